"""Sketches of gradients that are no product of two streams: an embedding's rows, a bias, a norm's weight.

In bucket space a gradient G is b = Σ_ij s_i s_j G_ij e_{h_i ⊕ h_j}, and S = k^(−1/2) W b is what `grad_sketch` makes
of the same G under the same maps, because (W e_x) ∘ (W e_y) = W e_{x ⊕ y}. A vector needs one map: b = C v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fpo_kernels.sketch.blocked import fold, transform
from fpo_kernels.sketch.config import SCRATCH_BYTES
from fpo_kernels.sketch.maps import BucketMap


def row_buckets(ids: Tensor, x: Tensor, offsets: Tensor, of_rows: BucketMap, of_columns: BucketMap) -> Tensor:
    """b of every G_i = Σ_{t∈i} e_{id_t} x_tᵀ: (B, k), fp32 or float64. Scratch: `SCRATCH_BYTES`.

    Args:
        ids: (S,) integers. x: (S, h). offsets: (B+1,), as `grad_sketch` takes them.
        of_rows, of_columns: the maps of G's rows and columns, on the device of x.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    k, examples = of_columns.table.shape[1], len(offsets) - 1
    owner = torch.repeat_interleave(offsets.diff(), output_size=len(x))
    every = torch.arange(k, device=x.device)
    out = torch.zeros(examples, k, dtype=dtype, device=x.device)
    # gathered features and their entries; folded, moved, and where from (int64)
    step = max(1, SCRATCH_BYTES // (8 * of_columns.table.numel() + 4 * 8 * k))
    for first in range(0, len(x), step):
        block = slice(first, first + step)
        bucket, sign = of_rows.bucket[ids[block]], of_rows.sign[ids[block]].to(dtype)
        folded = fold(x[block], of_columns.table, dtype) * sign[:, None]
        moved = folded.gather(1, every ^ bucket[:, None])
        lengths = torch.bincount(owner[block], minlength=examples)
        out += torch.segment_reduce(moved, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
    return out


def vector_buckets(v: Tensor, of_elements: BucketMap) -> Tensor:
    """b of every vector: (B, n) → (B, k), fp32 or float64."""
    return fold(v, of_elements.table, torch.float64 if v.dtype == torch.float64 else torch.float32)


def spectrum(buckets: Tensor) -> Tensor:
    """S = k^(−1/2) W b, (B, k) → (B, k)."""
    return transform(buckets) * buckets.shape[1] ** -0.5
