"""How a call's examples are cut into pieces, each on a tape of its own.

Where nobody says how many, on a CPU: a tape of some two thousand tokens is as quick as a longer one, whose activations
lie beyond the caches, and takes a fraction of its memory (benchmarks/NOTES.md). So nothing is cut below that, and
nothing where more than a few references would run again for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .batches import Batch, as_long_as_the_batch, chunks, rows_of, tokens_of

T = TypeVar("T")

TOKENS = 2048  # of a piece
RUN_AGAIN = 0.13  # of a call's sequences, at most, are references that a second piece needs too
FORMED_AGAIN = 0.25  # of two batches' gradients, at most, are formed again for a second piece


@dataclass(frozen=True)
class Pieces:
    """A call's rule.

    Attributes:
        most: sequences on a tape, as the caller has set it; None where nobody has.
        device: the model's.
        alike: whether examples are the same in a smaller batch; None where that was not looked at yet.
    """

    most: int | None
    device: torch.device
    alike: Callable[[], bool | None]

    def of(self, batch: Batch) -> list[slice]:
        """Slices of one batch."""
        n = rows_of(batch)
        wanted = _wanted(n * _width(batch))
        return _even(n, wanted) if wanted > 1 and self._is_free(batch) else chunks(n, self.most)

    def to_hold(self, batch: Batch) -> list[slice]:
        """Slices of a batch whose streams are all held until the last has come; none where its tape is as small.

        What is held, inputs and gradients of its modules, is about half of what a tape has.
        """
        slices = self.of(batch) if self.most is None else []
        return slices if len(slices) > 2 else []

    def of_candidates(self, candidates: Batch, references: Batch, partner: Tensor) -> list[slice]:
        """Slices of candidates that go on one tape with their references, where any do; `partner` (N,) says which."""
        n, m = len(partner), len(partner.unique())
        if self.most is not None:
            return chunks(n, max(1, self.most - 1 if m == 1 else self.most // 2))
        wanted = _wanted(n * _width(candidates) + (m * _width(references) if m > 1 else 0))
        if wanted > 1 and not self._is_free(candidates, references):
            wanted = 1
        for count in range(wanted, 1, -1):
            slices = _even(n, count)
            if n + sum(len(partner[rows].unique()) for rows in slices) <= (1 + RUN_AGAIN) * (n + m):
                return slices
        return [slice(0, n)]

    def beside_held(self, held: Batch, met: Batch) -> list[slice]:
        """Slices of the batch that another is held for; none where both go on one tape."""
        h, n = rows_of(held), rows_of(met)
        tokens = n * _width(met)
        if tokens + h * _width(held) <= 2 * TOKENS or not self._is_free(held, met):
            return []
        return _even(n, min(_wanted(tokens), 1 + int(FORMED_AGAIN * (h + n) / h)))

    def each(self, one: Callable[[slice], T], slices: list[slice]) -> list[T]:
        """`one` of each; of all at once where the first shows that a piece is not what it is in the whole."""
        if self.most is not None or len(slices) == 1:
            return [one(rows) for rows in slices]
        unknown, every = self.alike() is None, slice(0, slices[-1].stop)
        try:
            first = one(slices[0])
        except (RuntimeError, ValueError, IndexError, TypeError):
            if not unknown:
                raise
            return [one(every)]  # an output map may take no fewer; what is wrong in the whole too is said there
        return [first, *map(one, slices[1:])] if self.alike() else [one(every)]

    def _is_free(self, *batches: Batch) -> bool:
        """Whether the rule is ours to make, and it is known what a piece of each batch is."""
        if self.most is not None or self.device.type != "cpu" or self.alike() is False:
            return False
        return all(_width(one) and not as_long_as_the_batch(one) for one in batches)


def _even(n: int, count: int) -> list[slice]:
    """At most so many slices that cover range(n), as even as they can be."""
    return chunks(n, -(-n // min(count, n)))


def _wanted(tokens: int) -> int:
    return max(1, -(-tokens // TOKENS))


def _width(batch: Batch) -> int:
    return tokens_of(batch) or 0
