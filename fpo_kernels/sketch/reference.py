"""impl="reference": S_i = k^(−1/2) Σ_t (W C_a a_t) ∘ (W C_d d_t) with W, C_a and C_d as explicit matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(k, k): W[b, c] = (−1)^popcount(b & c), by W_2m = [[W_m, W_m], [W_m, −W_m]]."""
    W = torch.ones(1, 1, dtype=dtype, device=device)
    while len(W) < k:
        W = torch.cat([torch.cat([W, W], 1), torch.cat([W, -W], 1)])
    return W


def explicit(table: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """(k, n): the bucket map that a gather table stands for."""
    C = torch.zeros(table.shape[1], n, dtype=dtype, device=table.device)
    row, bucket = (table >= 0).nonzero().unbind(1)
    entry = table[row, bucket].long()
    C[bucket, entry >> 1] = (1 - 2 * (entry & 1)).to(dtype)
    return C


def grad_sketch(
    a: Tensor,  # (S, p)
    table_a: Tensor,  # (⌈p/k⌉, k)
    ds: tuple[Tensor, ...],  # (S, q_l), of layers that read the same a
    tables_d: tuple[Tensor, ...],
    offsets: Tensor,  # (B+1,)
) -> Tensor:  # (B, k)
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    k = table_a.shape[1]
    W = hadamard(k, dtype, a.device)
    C_a = explicit(table_a, a.shape[1], dtype)
    folded = a.new_zeros(len(a), k, dtype=dtype)
    for d, table in zip(ds, tables_d, strict=True):
        folded += d.to(dtype) @ explicit(table, d.shape[1], dtype).T
    spectra = (a.to(dtype) @ C_a.T @ W) * (folded @ W)
    examples = [rows.sum(0) for rows in spectra.split(offsets.diff().tolist())]
    return torch.stack(examples) * k**-0.5 if examples else spectra.new_zeros(0, k)
