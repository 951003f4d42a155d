"""The definition, written out: form every G_i = Σ_t d_t a_tᵀ, then take ⟨G_i, V⟩."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def grad_direction(
    a: Tensor,  # (S, p)
    d: Tensor,  # (S, q)
    offsets: Tensor,  # (B+1,)
    direction: Tensor,  # (q, p)
) -> Tensor:  # (B,)
    dtype = torch.float64 if torch.float64 in (a.dtype, direction.dtype) else torch.float32
    V = direction.to(dtype)
    out = a.new_zeros(len(offsets) - 1, dtype=dtype)
    for i, (start, stop) in enumerate(pairwise(offsets.tolist())):
        G = d[start:stop].to(dtype).T @ a[start:stop].to(dtype)  # (q, p)
        out[i] = (G * V).sum()
    return out
