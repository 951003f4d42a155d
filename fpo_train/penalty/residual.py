"""Overconfidence foretold from labels already bought: Gaussian-process regression over gradient features."""

from __future__ import annotations

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


class Fitted(NamedTuple):
    """A process for each of … batches, fitted to its m points."""

    weights: Tensor
    """(K + λI)⁻¹e, (…, m); 0 where all residuals are."""
    length: Tensor
    """ℓ, (…)."""
    noise: Tensor
    """λ, (…)."""


def expected_overconfidence(
    new: Tensor, known: Tensor, residuals: Tensor, lengths: Sequence[float], noises: Sequence[float]
) -> Forecast:
    """ĉ(z) = k(z, B)(K_BB + λI)⁻¹e, with k(x, y) = exp(−‖x − y‖²/2ℓ²) and a mean of zero.

    ℓ and λ are chosen by `fit`. All in float64. ĉ goes to 0 far from what is known; it is not cut to [−1, 1].

    Args:
        new: features u of the candidates, (n, k). known: of the labelled pairs, (m, k), m ≥ 1.
        residuals: e_j = σ(r(z_j) − r(ref_j)) − p*_j of those pairs, (m,).
        lengths: ℓ to choose from, in units of the median distance between the pairs (1 where there is none, or all
            pairs are alike). noises: λ to choose from.
    """
    x, m = known.double(), len(known)
    square = _square_distances(x, x)
    apart = square[torch.ones(m, m, dtype=torch.bool, device=x.device).triu(1)].sqrt()
    unit = float(apart.median()) if len(apart) and apart.median() > 0 else 1.0
    fitted = fit(square / unit**2, residuals.double(), lengths, noises)
    across = torch.exp(-_square_distances(new.double(), x) / (2 * (fitted.length * unit) ** 2))
    return Forecast(across @ fitted.weights, float(fitted.length), float(fitted.noise))


def fit(square: Tensor, residuals: Tensor, lengths: Sequence[float], noises: Sequence[float]) -> Fitted:
    """Processes with k = exp(−d²/2ℓ²) and a mean of zero; of the grid, ℓ and λ with the largest marginal likelihood.

    The signal's variance is eᵀ(K + λI)⁻¹e/m, in closed form for each ℓ and λ.

    Args:
        square: d², squared distances between the m points of each batch, (…, m, m) float64.
        residuals: e, (…, m) float64. lengths: ℓ to choose from, in the distances' units. noises: λ to choose from.

    Source: Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, sections 2.2 and 5.4.
    """
    m = square.shape[-1]
    ell = square.new_tensor([length for length in lengths for _ in noises])
    lam = square.new_tensor([noise for _ in lengths for noise in noises])
    kernel = torch.exp(-square[..., None, :, :] / (2 * ell[:, None, None] ** 2))  # (…, g, m, m)
    eye = torch.eye(m, dtype=square.dtype, device=square.device)
    factor = torch.linalg.cholesky(kernel + lam[:, None, None] * eye)
    right = residuals[..., None, :, None].expand(*factor.shape[:-1], 1)
    solved = torch.cholesky_solve(right, factor)[..., 0]  # (…, g, m)
    fit_term = (residuals[..., None, :] * solved).sum(-1).clamp_min(torch.finfo(square.dtype).tiny)
    likelihood = -m / 2 * (fit_term / m).log() - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    best = likelihood.argmax(-1)  # (…)
    weights = solved.gather(-2, best[..., None, None].expand(*best.shape, 1, m))[..., 0, :]
    return Fitted(weights, ell[best], lam[best])


def _square_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖², (n, m), of float64 rows; differences first, since rows may be long and close together."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
