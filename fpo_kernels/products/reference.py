"""The definition, written out: form every G_i = Σ_t d_t a_tᵀ, then take ⟨G_i, G_j⟩."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def _per_example_gradients(a: Tensor, d: Tensor, offsets: Tensor) -> list[Tensor]:
    rows = offsets.tolist()
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return [
        d[start:stop].to(dtype).T @ a[start:stop].to(dtype)  # (q, p)
        for start, stop in pairwise(rows)
    ]


def grad_products(
    a: Tensor,  # (S, p)
    ds: tuple[Tensor, ...],  # (S, q_k)
    offsets: Tensor,  # (B+1,)
    pairs: Tensor,  # (n, 2)
    other: tuple[Tensor, tuple[Tensor, ...], Tensor] | None,
    longest: int,
) -> Tensor:  # (n,)
    a2, ds2, offsets2 = other or (a, ds, offsets)
    out = a.new_zeros(len(pairs), dtype=torch.float64 if a.dtype == torch.float64 else torch.float32)
    for d, d2 in zip(ds, ds2, strict=True):
        left = _per_example_gradients(a, d, offsets)
        right = left if other is None else _per_example_gradients(a2, d2, offsets2)
        for n, (i, j) in enumerate(pairs.tolist()):
            out[n] += (left[i] * right[j]).sum()
    return out
