"""The influence of training pairs on rewards, from gradients or their sketches; on tensors alone.

A pair j of (chosen, rejected) with margin Δ_j = r(chosen) − r(rejected) and label p_j, the probability that chosen is
the better one, has the loss ℓ_j = BCE(σ(Δ_j), p_j) and so the gradient ∇ℓ_j = c_j·u_j with c_j = σ(Δ_j) − p_j, which is
−σ(−Δ_j) where p_j is 1, and u_j = ∇r(chosen) − ∇r(rejected). What a gradient step on it, or counting it more and
retraining, does to the reward of a reply z is, to first order and per unit of the step or the count,

    influence(j, z) = −⟨∇r(z), F⁻¹ ∇ℓ_j⟩

with F = I for a step of gradient descent (TracIn, summed over states of the model, each times its learning rate), or
the damped curvature of all pairs (influence functions). Above 0: the pair taught the reward model to like z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import fpo_kernels as fk


@dataclass(frozen=True, kw_only=True)
class State:
    """What one state of the reward model says of m replies and n pairs, k numbers a gradient.

    Attributes:
        replies: (m, k) ∇r(z). margins: (n,) Δ. weight: its learning rate, or 1.
        pairs: call it for u = ∇r(chosen) − ∇r(rejected), (n, k) in blocks of rows, in the pairs' order; several times.
    """

    replies: Tensor
    margins: Tensor
    pairs: Callable[[], Iterator[Tensor]]
    weight: float = 1.0


class Influences(NamedTuple):
    """(m, n) float64 each: the influence in the units of r, and the cosine, between −1 and 1 (0 where one is 0)."""

    influence: Tensor
    cosine: Tensor


def influences(states: Iterable[State], labels: Tensor, damping: float | None = None) -> Influences:
    """Σ_s η_s · −⟨∇r(z), F_s⁻¹∇ℓ_j⟩ of every reply z and pair j, and its cosine in the same inner product.

    The cosine divides by the norms of ∇r(z) and ∇ℓ_j in the metric of F⁻¹, so that pairs of large gradients, which are
    influential for every reply, do not come first: up to a factor of the reply's own, ℓ-RelatIF.

    Args:
        labels: (n,) p, in [0, 1]. damping: λ of F, relative to the mean diagonal of Σ σ'(Δ) u uᵀ; None: F = I.

    Raises:
        ValueError: no state; as `fk.Curvature`.

    Source: Pruthi et al. 2020 (TracIn); Koh and Liang 2017 and Grosse et al. 2023 (influence functions, their damping);
    Barshan et al. 2020 (RelatIF); Min et al. 2025, arXiv 2501.05790 (on pairs of preferences).
    """
    total = own = losses = None
    for state in states:
        one, reply, loss = _of_state(state, labels.double(), damping)
        if total is None or own is None or losses is None:
            total, own, losses = one, reply, loss
        else:
            total, own, losses = total + one, own + reply, losses + loss
    if total is None or own is None or losses is None:
        raise ValueError("states: wanted at least one, got none")
    norms = own.clamp_min(0).sqrt()[:, None] * losses.clamp_min(0).sqrt()
    return Influences(total, torch.where(norms > 0, total / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0))


def loss_gradients(margins: Tensor, labels: Tensor) -> Tensor:
    """c = σ(Δ) − p, (n,) float64, what u is multiplied by in ∇ℓ; accurate where σ(Δ) rounds to a label of 0 or 1."""
    margins, labels = margins.double(), labels.double()
    return (1 - labels) * torch.sigmoid(margins) - labels * torch.sigmoid(-margins)


def _of_state(state: State, labels: Tensor, damping: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Influences (m, n) of one state, ‖∇r(z)‖² (m,) and ‖∇ℓ‖² (n,) in its metric, all times its weight."""
    replies = state.replies.double()
    inverse = _inverse(state, replies, damping)
    solved = inverse(replies)
    along, norms = [], []
    for u in state.pairs():
        wide = u.to(replies)
        along.append(solved @ wide.T)
        norms.append((wide * inverse(wide)).sum(1))
    c = loss_gradients(state.margins.to(replies.device), labels.to(replies.device))
    weight = state.weight
    return -weight * torch.cat(along, 1) * c, weight * (replies * solved).sum(1), weight * torch.cat(norms) * c.square()


def _inverse(state: State, like: Tensor, damping: float | None) -> Callable[[Tensor], Tensor]:
    """F⁻¹ of rows (·, k); the identity without a damping."""
    if damping is None:
        return lambda rows: rows
    curvature = fk.Curvature(like.shape[1], damping, device=like.device)
    weights, first = fk.logistic_weights(state.margins.to(like)), 0
    for u in state.pairs():
        curvature.update(u.to(like), weights[first : first + len(u)])
        first += len(u)
    return curvature.solve
