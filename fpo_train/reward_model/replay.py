"""The labelled pairs that the reward model has seen, newest last, and no more of them than fit."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fpo_train.data.prompts import Prompt

FIT_PLACE = 0  # place of the reward model's first fit in the run's random streams; iterations count from 1


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A reply and its prompt's reference with the oracle's soft label."""

    prompt: Prompt
    chosen: tuple[int, ...]
    """Tokens of the reply; none where only its text is known."""
    reference: tuple[int, ...]
    """Tokens of the reference, likewise."""
    chosen_text: str
    reference_text: str
    preference: float
    """p* of the reply against the reference."""
    iteration: int
    """When it was labelled; 0: before the first iteration."""
    features: tuple[Tensor, Tensor] | None
    """What the score head reads of both, (H,) fp32 on the CPU, where all beneath the head is frozen."""

    @property
    def differs(self) -> bool:
        """Whether the reply is another than its reference."""
        return (self.chosen, self.chosen_text) != (self.reference, self.reference_text)

    def __post_init__(self) -> None:
        if not 0 <= self.preference <= 1:
            raise ValueError(f"preference: wanted a probability, got {self.preference}")


class Replay:
    """At most `size` pairs; more push the oldest out."""

    def __init__(self, size: int) -> None:
        self._pairs: deque[Pair] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._pairs)

    def add(self, pairs: Iterable[Pair]) -> None:
        """Append pairs, in their order."""
        self._pairs.extend(pairs)

    def newest(self, count: int) -> list[Pair]:
        """The `count` newest pairs, or all there are, in the order they came."""
        return list(self._pairs)[-count:] if count else []

    def since(self, iteration: int) -> list[Pair]:
        """The pairs labelled after an iteration."""
        return [pair for pair in self._pairs if pair.iteration > iteration]

    def draw(self, count: int, generator: torch.Generator, until: int) -> list[Pair]:
        """`count` different pairs labelled until an iteration, or as many as there are, at random."""
        older = [pair for pair in self._pairs if pair.iteration <= until]
        return [older[n] for n in torch.randperm(len(older), generator=generator)[:count].tolist()]

    def state_dict(self) -> list[dict[str, Any]]:
        """The pairs as plain lists, dictionaries and tensors."""
        names = [field.name for field in fields(Pair)]
        return [{**{name: getattr(p, name) for name in names}, "prompt": asdict(p.prompt)} for p in self._pairs]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Go on from `state_dict()`."""
        self._pairs.clear()
        self._pairs.extend(Pair(**{**one, "prompt": Prompt(**one["prompt"])}) for one in state)
