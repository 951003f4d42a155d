"""What was asked and what was replied, as texts: all that a reward model, an oracle and a penalty must know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fpo_train.data.turns import Talk
from fpo_train.policy import Encoded

from .base import Readings, Rollout


class Said(Protocol):
    """Candidates and their references: what an iteration has sampled, or what a caller brings."""

    @property
    def texts(self) -> list[str]:
        """The reply of every row."""

    @property
    def usable(self) -> Tensor:
        """The candidates that may be chosen, (B, N) bool."""

    def talk(self, row: int) -> Talk:
        """What a row replies to."""

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Rows of all candidates and of their references, (B·N,) int64 each; a prompt's candidates share one."""


@dataclass(frozen=True)
class Written:
    """n candidates with a reference each, (n, 1) in all that is asked of them; a text that comes again is one row."""

    talks: list[Talk]  # of each row
    texts: list[str]  # of each row
    rows: Tensor  # (n,) int64
    references: Tensor  # (n,) int64
    usable: Tensor  # (n, 1) bool

    @classmethod
    def of(
        cls,
        talks: Sequence[Talk],
        replies: Sequence[str],
        references: Sequence[str],
        device: torch.device,
        usable: Sequence[bool] | None = None,
        marks: Sequence[str] | None = None,
    ) -> Written:
        """From n prompts, replies and references; texts of another mark are rows of their own."""
        own = [""] * len(talks) if marks is None else marks
        numbers: dict[tuple[Talk, str, str], int] = {}
        rows, others = (
            torch.tensor(
                [numbers.setdefault(one, len(numbers)) for one in zip(talks, texts, own, strict=True)],
                dtype=torch.int64,
                device=device,
            )
            for texts in (replies, references)
        )
        may = torch.ones(len(rows), 1, dtype=torch.bool) if usable is None else torch.tensor(usable)[:, None]
        talks_of, texts_of = [talk for talk, *_ in numbers], [text for _, text, _ in numbers]
        return cls(talks_of, texts_of, rows, others, may.to(device))

    def talk(self, row: int) -> Talk:
        """See `Said`."""
        return self.talks[row]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """See `Said`."""
        return self.rows, self.references


def rows_of(said: Said) -> list[tuple[Talk, str]]:
    """What each row replies to, and its reply."""
    return [(said.talk(row), text) for row, text in enumerate(said.texts)]


def sampled(said: Said) -> Rollout:
    """What was sampled here, with its tokens.

    Raises:
        TypeError: texts alone.
    """
    if not isinstance(said, Rollout):
        raise TypeError(f"wanted a rollout with its tokens, got {type(said).__name__}")
    return said


class NotRead(Readings):
    """Readings of nobody: for those who read texts alone."""

    def __init__(self, rows_at_once: int = 0) -> None:
        self.rows_at_once = rows_at_once

    def of(self, rows: Tensor | None = None) -> Encoded:
        """Raises: RuntimeError: always."""
        raise RuntimeError("no base has read these texts")
