"""impl="torch": rows of one stream times V, multiplied by the other stream and summed, a chunk at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fpo_kernels.direction.config import PARTS, SCRATCH_BYTES

NARROW = (torch.bfloat16, torch.float16)


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
    parts = _parts(x, V)
    columns, step = _chunk(x, y, V, dtype, parts)
    rows = None  # d_tᵀ V a_t of every token
    for left in range(0, len(V), columns):
        V_part = V[left : left + columns]
        split = _split(V_part, parts) if parts else V_part.to(dtype)
        some = []
        for first in range(0, len(x), step):
            chunk = slice(first, first + step)
            product = _wide_product(x[chunk], split) if parts else x[chunk].to(dtype) @ split.T
            if parts > 1:  # y meets every part's product
                product = product.view(len(product), parts, -1)
                product = product.mul_(y[chunk, left : left + columns].unsqueeze(1)).flatten(1)
            else:
                product.mul_(y[chunk, left : left + columns])
            # in one reduction on a GPU; a CPU would copy the product first
            some.append(product.sum(1, dtype=torch.float64) if x.is_cuda else product.sum(1).double())
            del product  # or the next one would be made beside it
        added = some[0] if len(some) == 1 else torch.cat(some) if some else x.new_zeros(0, dtype=torch.float64)
        rows = added if rows is None else rows + added
    if rows is None:
        rows = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    # segment_reduce, not index_add_: on CUDA the latter adds by atomics, in no fixed order. `unsafe` skips a
    # check of the lengths that would sync.
    return torch.segment_reduce(rows, "sum", lengths=offsets.diff(), unsafe=True).to(dtype)


def _parts(x: Tensor, V: Tensor) -> int:
    """In how many parts V is multiplied on matrix units with fp32 sums; 0: both are widened and multiplied in full.

    One where both have the same 16 bits. bf16 reaches as far as any other format, so that V can be taken apart in it;
    fp16 does not.
    """
    if not _has_wide_product(x) or x.dtype not in NARROW or V.dtype == torch.float64:
        return 0
    if V.dtype == x.dtype:
        return 1
    return PARTS if x.dtype == torch.bfloat16 else 0


def _has_wide_product(x: Tensor) -> bool:
    """Whether torch multiplies 16-bit matrices into fp32 on this device."""
    return x.is_cuda


def _wide_product(x: Tensor, V: Tensor) -> Tensor:
    """x Vᵀ of 16-bit matrices, (S, n) fp32: no sum and no result is rounded to 16 bits."""
    return torch.mm(x, V.T, out_dtype=torch.float32)


def _split(V: Tensor, parts: int) -> Tensor:
    """(parts · n, w): V in so many bf16 parts that add up to it, one below the other."""
    if parts == 1:
        return V
    left, found = V.float(), []
    for _ in range(parts):
        found.append(left.to(torch.bfloat16))
        left = left - found[-1]
    return torch.cat(found)


def _chunk(x: Tensor, y: Tensor, V: Tensor, dtype: torch.dtype, parts: int) -> tuple[int, int]:
    """How many columns of the product, and how many rows, keep copies and product within `SCRATCH_BYTES`."""
    width = max(x.shape[1], 1)
    columns = max(len(V), 1)
    # bytes of a copy of V an element: its parts, what is left and its fp32 beside them; or V in the wider dtype
    copied = (2 * 2 * parts + 8 if parts > 1 else 0) if parts else (dtype.itemsize if V.dtype != dtype else 0)
    if copied:  # half of the scratch for the copy of a part of V
        columns = min(columns, max(1, SCRATCH_BYTES // (2 * width * copied)))
    row = columns * max(parts, 1) + (width if not parts and x.dtype != dtype else 0)
    left = SCRATCH_BYTES - columns * width * copied
    return columns, max(1, left // (row * dtype.itemsize))
