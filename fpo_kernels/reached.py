"""Rows of a gradient that it reached, where they are few: a reward is read off one token, which spares a last block.

Of a model that reads one token a text, the last block's gradients are zero at all others, but for keys and values.
Whatever is made of such rows alone is the same: Gᵢ = Σ_t d_t a_tᵀ, and what a linear layer passes on, d W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_NUMBERS = 2**17  # of a gradient, below which looking takes as long as it saves
SAMPLE = 64  # rows that are looked at first
FEW = 0.7  # of the rows, at most, are worth being taken out


def reached_rows(d: Tensor) -> Tensor | None:
    """Which rows of d (S, q) are not all zero, rising, (m,) int64; None where they are not few, or on a device.

    Rows with NaN are not zero.
    """
    if d.is_cuda or d.numel() < LEAST_NUMBERS:
        return None
    step = max(1, len(d) // SAMPLE)
    if _not_zero(d[step // 2 :: step]).float().mean() > FEW:
        return None
    rows = _not_zero(d).nonzero()[:, 0]
    return rows if len(rows) <= FEW * len(d) else None


def _not_zero(d: Tensor) -> Tensor:
    return torch.linalg.vector_norm(d, float("inf"), dim=1) != 0


class _Linear(torch.autograd.Function):
    """F.linear by a weight that does not learn; the way back takes the rows that the gradient reached."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        # an alias that autograd does not count as a view: models may go on in place
        return F.linear(x, weight, bias).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        rows = reached_rows(flat)
        if rows is None:
            return grad @ weight, None, None
        passed = grad.new_zeros(len(flat), weight.shape[1]).index_copy(0, rows, flat[rows] @ weight)
        return passed.view(*grad.shape[:-1], -1), None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, the same numbers; only for an x that requires grad and a weight that does not."""
    made: Tensor = _Linear.apply(x, weight, bias)
    return made
