"""Steering penalties: r̃(z) = r(z) − γ · penalty(z) (Gauthier, Bach, Jordan 2026).

| none      | 0                        |
| practical | ⟨∇r(z), u(z)⟩            |
| relaxed   | c(z) · ⟨∇r(z), u(z)⟩     |    u = ∇r(z) − ∇r(ref), c = σ(r(z) − r(ref)) − p*
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .config import PenaltyConfig


class Judged(NamedTuple):
    """Scored candidates, each (B, N): `penalty` in the units of γ, so that effective = reward − γ · penalty."""

    reward: Tensor
    penalty: Tensor
    effective: Tensor
    spread: float
    """Standard deviation of the penalty in the paper's own units, over that of the reward."""


def overconfidence(margin: Tensor, preference: Tensor) -> Tensor:
    """c = σ(r(z) − r(ref)) − p*, in [−1, 1]."""
    return torch.sigmoid(margin) - preference


class Penalty:
    """One kind of penalty and the running scale that `gamma_units="reward_std"` needs."""

    DECAY = 0.9  # weight of the past in the running variances, an iteration: a memory of about ten

    def __init__(self, config: PenaltyConfig) -> None:
        self.config = config
        self._reward_variance = self._penalty_variance = 0.0

    def __call__(
        self, reward: Tensor, reference_reward: Tensor, product: Tensor, preferences: Callable[[], Tensor]
    ) -> Judged:
        """Judge candidates.

        Args:
            reward, product: r(z) and ⟨∇r(z), u(z)⟩, (B, N). reference_reward: r(ref), (B, 1).
            preferences: buys p* of all candidates from the oracle, (B, N); only `relaxed` calls it.
        """
        raw = torch.zeros_like(product)
        if self.config.kind == "practical":
            raw = product
        elif self.config.kind == "relaxed":
            raw = overconfidence(reward - reference_reward, preferences()) * product
        spread = float(raw.std(correction=0) / reward.std(correction=0).clamp_min(1e-30))
        penalty = raw * self._scale(reward, raw)
        return Judged(reward, penalty, reward - self.config.gamma * penalty, spread)

    def _scale(self, reward: Tensor, raw: Tensor) -> float:
        """What turns the raw penalty into the units of γ; the iteration at hand counts at once."""
        if self.config.gamma_units == "raw":
            return 1.0
        keep = self.DECAY
        self._reward_variance = keep * self._reward_variance + (1 - keep) * float(reward.var(correction=0))
        self._penalty_variance = keep * self._penalty_variance + (1 - keep) * float(raw.var(correction=0))
        if self._penalty_variance == 0:
            return 0.0
        return (self._reward_variance / self._penalty_variance) ** 0.5

    def state(self) -> dict[str, float]:
        """The running variances, for a checkpoint."""
        return {"reward_variance": self._reward_variance, "penalty_variance": self._penalty_variance}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from `state()`."""
        self._reward_variance = state["reward_variance"]
        self._penalty_variance = state["penalty_variance"]
