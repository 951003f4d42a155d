"""Sampling: N candidates of the policy and one reference reply of the base, for all prompts of an iteration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .config import RolloutConfig
from .data import Prompt
from .policy import Policy, Sequences


@dataclass(frozen=True)
class Rollout:
    """B prompts with N candidates and a reference each; row b·(N+1)+n is candidate n, n = N the reference."""

    prompts: list[Prompt]
    replies: list[list[int]]  # B·(N+1) token lists
    sequences: Sequences
    candidates: int

    def chosen(self, best: Tensor) -> Tensor:
        """Row numbers (B,) of the candidates best (B,)."""
        return best + self.stride(best)

    def references(self, like: Tensor) -> Tensor:
        """Row numbers (B,) of the references."""
        return self.stride(like) + self.candidates

    def stride(self, like: Tensor) -> Tensor:
        """First row of each prompt, (B,)."""
        return like.new_tensor(range(len(self.prompts))) * (self.candidates + 1)


def sample(policy: Policy, prompts: list[Prompt], settings: RolloutConfig) -> Rollout:
    """One batched generation with the adapter on, one with it off (the oracle model refers, as in the paper)."""
    replies = policy.generate(prompts, settings.candidates, settings)
    with policy.base():
        references = policy.generate(prompts, 1, settings)
    n = settings.candidates
    grouped: list[list[int]] = []
    for row, reference in enumerate(references):
        grouped += [*replies[row * n : (row + 1) * n], reference]
    owners = [prompt for prompt in prompts for _ in range(n + 1)]
    return Rollout(prompts, grouped, policy.sequences(owners, grouped), n)
