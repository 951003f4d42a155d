"""Launch numbers and scratch bounds of `grad_direction`, each with its reason."""

from __future__ import annotations

from typing import NamedTuple

import torch

# impl="torch": the most that a chunk's product and its widened copies take together, whatever the shapes; the
# packing inside BLAS and 8 bytes a row come on top. The value of `products`, for its reason.
SCRATCH_BYTES = 64 * 2**20


class Launch(NamedTuple):
    """A tile of the product and how it is computed."""

    rows: int  # tokens
    columns: int  # features of the narrower stream
    features: int  # of the wider stream, at a time
    warps: int
    stages: int


# impl="triton": chosen by register and shared-memory arithmetic, not yet measured on a GPU; tests/compile_only
# reads the binaries of every one of these for spills.
# 16-bit: a (128, 128) fp32 tile over 256 threads takes 64 registers a thread, copies in flight 96 KiB.
LARGE = Launch(rows=128, columns=128, features=64, warps=8, stages=3)
# Where the large tiles would leave processors idle, or, loading element by element, would spill registers.
SMALL = Launch(rows=64, columns=64, features=64, warps=4, stages=3)
# LoRA factors: 16 columns are the least that a matrix instruction takes.
NARROW = Launch(rows=64, columns=16, features=128, warps=4, stages=3)
# bf16 times fp32 in parts: three products of each tile.
SPLIT = Launch(rows=64, columns=64, features=32, warps=4, stages=3)
NARROW_SPLIT = Launch(rows=64, columns=16, features=64, warps=4, stages=3)
# fp32 is multiplied without matrix instructions, operands in registers: smaller tiles spill nowhere.
SMALL_FP32 = Launch(rows=64, columns=64, features=32, warps=8, stages=3)
NARROW_FP32 = Launch(rows=64, columns=16, features=32, warps=4, stages=3)
# One program for each of an H100's 132 processors.
TARGET_PROGRAMS = 132


def launch(rows: int, columns: int, dtype: torch.dtype, split: bool, aligned: bool) -> Launch:
    """The tile for a (rows, columns) product of x in `dtype`.

    Args:
        split: V is multiplied in bf16 parts.
        aligned: every stride but 1 is a multiple of 16 elements, so that loads are vectors.
    """
    if dtype == torch.float32:
        narrow, small = NARROW_FP32, SMALL_FP32
    elif split:
        narrow, small = NARROW_SPLIT, SPLIT
    else:
        narrow, small = NARROW, SMALL
    if columns <= narrow.columns:
        return narrow
    programs = -(-rows // LARGE.rows) * -(-columns // LARGE.columns)
    return LARGE if small is SMALL and aligned and programs >= TARGET_PROGRAMS else small
