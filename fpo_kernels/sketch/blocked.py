"""impl="torch": plain PyTorch on any device, a block of tokens at a time; the transform is two matrix products."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fpo_kernels.sketch.config import SCRATCH_BYTES


@functools.cache
def _hadamard(k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(k, k)"""
    bits = torch.arange(k)
    both = bits[:, None] & bits
    odd = torch.zeros_like(both)
    while both.any():
        odd, both = odd ^ (both & 1), both >> 1
    return (1 - 2 * odd).to(dtype).to(device)


def transform(x: Tensor) -> Tensor:
    """W x of every row of (S, k): with k = m·n, W = W_m ⊗ W_n, so that X → W_m X W_n on (m, n)."""
    k = x.shape[1]
    m = 1 << (k.bit_length() - 1) // 2
    left, right = (_hadamard(size, x.dtype, x.device) for size in (m, k // m))
    return (left @ (x.view(-1, m, k // m) @ right)).reshape(-1, k)


def fold(x: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """C x of every row of (S, n) → (S, k), in `dtype`."""
    if not x.is_cuda:
        row, bucket = (table >= 0).nonzero().unbind(1)
        entry = table[row, bucket]
        signed = x.index_select(1, entry >> 1).to(dtype).mul_(1 - 2 * (entry & 1))
        return torch.zeros(len(x), table.shape[1], dtype=dtype, device=x.device).index_add_(1, bucket, signed)
    # there index_add's order of additions is anyone's guess
    entry = table.flatten()
    gathered = x.index_select(1, entry.clamp(min=0) >> 1).to(dtype)  # (S, rows·k)
    sign = torch.where(entry < 0, 0, 1 - 2 * (entry & 1)).to(dtype)
    return (gathered * sign).view(-1, *table.shape).sum(1)


def grad_sketch(
    a: Tensor,  # (S, p)
    table_a: Tensor,  # (⌈p/k⌉, k)
    ds: tuple[Tensor, ...],  # (S, q_l), of layers that read the same a
    tables_d: tuple[Tensor, ...],
    offsets: Tensor,  # (B+1,)
) -> Tensor:  # (B, k)
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    k, rows = table_a.shape[1], len(a)
    examples = len(offsets) - 1
    widest = max(table.numel() for table in (table_a, *tables_d))
    step = max(1, SCRATCH_BYTES // ((2 * widest + 4 * k) * dtype.itemsize))
    owner = torch.repeat_interleave(offsets.diff(), output_size=rows)
    out = torch.zeros(examples, k, dtype=dtype, device=a.device)
    for first in range(0, rows, step):
        block = slice(first, first + step)
        folded = fold(ds[0][block], tables_d[0], dtype)
        for d, table in zip(ds[1:], tables_d[1:], strict=True):
            folded += fold(d[block], table, dtype)
        spectra = transform(fold(a[block], table_a, dtype)).mul_(transform(folded))
        lengths = torch.bincount(owner[block], minlength=examples)
        out += torch.segment_reduce(spectra, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
    return out.mul_(k**-0.5)
