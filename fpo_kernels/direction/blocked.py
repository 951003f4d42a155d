"""impl="torch": rows of one stream times V, multiplied by the other stream and summed, a chunk at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fpo_kernels.direction.config import SCRATCH_BYTES


def grad_direction(
    a: Tensor,  # (S, p)
    d: Tensor,  # (S, q)
    offsets: Tensor,  # (B+1,)
    direction: Tensor,  # (q, p)
) -> Tensor:  # (B,)
    dtype = torch.float64 if torch.float64 in (a.dtype, direction.dtype) else torch.float32
    # d_tᵀ V a_t is (V a_t)·d_t or (Vᵀ d_t)·a_t: the wider stream is the one multiplied by V, so that the
    # product has the columns of the narrower.
    x, y, V = (a, d, direction) if a.shape[1] >= d.shape[1] else (d, a, direction.T)
    rows = torch.zeros(len(a), dtype=torch.float64, device=a.device)  # d_tᵀ V a_t of every token
    columns, step = _chunk(x, y, V, dtype)
    for left in range(0, len(V), columns):
        V_part = V[left : left + columns].to(dtype)
        for first in range(0, len(x), step):
            chunk = slice(first, first + step)
            product = x[chunk].to(dtype) @ V_part.T
            rows[chunk] += product.mul_(y[chunk, left : left + columns]).sum(1)
            del product  # or the next one would be made beside it
    # segment_reduce, not index_add_: on CUDA the latter adds by atomics, in no fixed order. `unsafe` skips a
    # check of the lengths that would sync.
    return torch.segment_reduce(rows, "sum", lengths=offsets.diff(), unsafe=True).to(dtype)


def _chunk(x: Tensor, y: Tensor, V: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """How many columns of the product, and how many rows, keep copies and product within `SCRATCH_BYTES`."""
    width = max(x.shape[1], 1)
    columns = max(len(V), 1)
    if V.dtype != dtype:  # half of the scratch for the copy of a part of V
        columns = min(columns, max(1, SCRATCH_BYTES // (2 * width * dtype.itemsize)))
    row = columns + (width if x.dtype != dtype else 0)
    left = SCRATCH_BYTES - (columns * width * dtype.itemsize if V.dtype != dtype else 0)
    return columns, max(1, left // (row * dtype.itemsize))
