"""Overconfidence foretold from labels already bought: Gaussian-process regression over gradient features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Forecast(NamedTuple):
    """ĉ of new candidates, (n,) float64, and the hyperparameters that were chosen."""

    overconfidence: Tensor
    length: float
    """ℓ in units of the median distance between the pairs' features."""
    noise: float
    """λ relative to the signal's variance."""


def expected_overconfidence(
    new: Tensor, known: Tensor, residuals: Tensor, lengths: Sequence[float], noises: Sequence[float]
) -> Forecast:
    """ĉ(z) = k(z, B)(K_BB + λI)⁻¹e, with k(x, y) = exp(−‖x − y‖²/2ℓ²) and a mean of zero.

    ℓ and λ are those of the grid with the largest marginal likelihood; the signal's variance is eᵀ(K + λI)⁻¹e/m in
    closed form for each of them. All in float64. ĉ goes to 0 far from what is known; it is not cut to [−1, 1].

    Args:
        new: features u of the candidates, (n, k). known: of the labelled pairs, (m, k), m ≥ 1.
        residuals: e_j = σ(r(z_j) − r(ref_j)) − p*_j of those pairs, (m,).
        lengths: ℓ to choose from, in units of the median distance between the pairs (1 where there is none, or all
            pairs are alike). noises: λ to choose from.

    Source: Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, sections 2.2 and 5.4.
    """
    x, e, m = known.double(), residuals.double(), len(known)
    square = _square_distances(x, x)
    apart = square[torch.ones(m, m, dtype=torch.bool, device=x.device).triu(1)].sqrt()
    unit = float(apart.median()) if len(apart) and apart.median() > 0 else 1.0
    best, chosen = -math.inf, (lengths[0], noises[0])
    weights = torch.zeros_like(e)
    eye = torch.eye(m, dtype=x.dtype, device=x.device)
    if not e.any():
        return Forecast(x.new_zeros(len(new)), *chosen)
    for length in lengths:
        kernel = torch.exp(-square / (2 * (length * unit) ** 2))
        for noise in noises:
            factor = torch.linalg.cholesky(kernel + noise * eye)
            solved = torch.cholesky_solve(e[:, None], factor)[:, 0]
            likelihood = -m / 2 * math.log(float(e @ solved) / m) - float(factor.diagonal().log().sum())
            if likelihood > best:
                best, chosen, weights = likelihood, (length, noise), solved
    across = torch.exp(-_square_distances(new.double(), x) / (2 * (chosen[0] * unit) ** 2))
    return Forecast(across @ weights, *chosen)


def _square_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖², (n, m), of float64 rows; differences first, since rows may be long and close together."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
