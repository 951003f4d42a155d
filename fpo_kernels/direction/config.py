"""Scratch bounds of `grad_direction`, each with its reason."""

from __future__ import annotations

# impl="torch": the most that a chunk's product and its widened copies take together, whatever the shapes; the
# packing inside BLAS and 8 bytes a row come on top. The value of `products`, for its reason.
SCRATCH_BYTES = 64 * 2**20

# bf16 parts of a V of more bits: 8 bits each, so that three add up to a float32 exactly. Two would err by 2^-18 of V,
# which is more than fp32 may where streams are narrow.
PARTS = 3
