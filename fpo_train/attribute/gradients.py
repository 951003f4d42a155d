"""What the reward model says of texts: rewards, what its head reads, gradients; of the pairs it is kept on disk.

Kept under a folder of their own for each model, way of reading and choice of weights, and found again by the texts of a
pair: what is asked twice is computed once, and so is what a command had computed when it was stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

import fpo_kernels as fk
from fpo_train.errors import RunError
from fpo_train.penalty.gradients import refusals
from fpo_train.policy.generation import check_finite
from fpo_train.report.progress import Steps
from fpo_train.reward_model import Reading
from fpo_train.reward_model.classifier import ClassifierRewardModel

from .inputs import Text, TrainingPair
from .model import identity

PAIRS_AT_ONCE = 64  # between two appends to the disk
BLOCK_ROWS = 4096  # read from the disk at a time
SIDES = "+-"  # chosen and rejected, behind the name of a pair
UNSKETCHED = 0  # in place of the version of the bucket maps: vectors that were not sketched


class Reader:
    """The reward model as it is, asked about texts.

    Attributes:
        names: the weights that gradients are over. dim: numbers a sketch; 0: the gradients of a linear head, which are
            what it reads, a bias left out.
    """

    def __init__(self, model: ClassifierRewardModel, names: list[str], dim: int, seed: int, rows_at_once: int) -> None:
        """Raises: RunError: weights whose gradients cannot be told apart by example."""
        self.model, self.names, self.dim, self.seed = model, names, dim, seed
        self._rows_at_once = rows_at_once
        with refusals("parameters"):
            self._engine = fk.Influence(model.module, parameters=names) if dim else None

    def hidden(self, texts: Sequence[Text]) -> Tensor:
        """What the head reads, (R, H), fp32 or float64."""
        return torch.cat([self.model.head_inputs(reading) for reading in self._readings(texts)])

    def gradients(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """What the head reads, (R, H), and ∇r or its sketch, (R, k)."""
        found = [self._both(reading) for reading in self._readings(texts)]
        return torch.cat([hidden for hidden, _ in found]), torch.cat([gradient for _, gradient in found])

    def rewards(self, hidden: Tensor) -> Tensor:
        """r of what the head reads, (R,).

        Raises:
            NotFinite: one that is not a finite number.
        """
        return self.model.score(Reading(None, hidden.to(self.model.device)))

    def _both(self, reading: Reading) -> tuple[Tensor, Tensor]:
        hidden = self.model.head_inputs(reading)
        if self._engine is None:
            return hidden, hidden
        with refusals("parameters"):
            return hidden, self._engine.sketch(reading.batch or {}, dim=self.dim, seed=self.seed)

    def _readings(self, texts: Sequence[Text]) -> Iterator[Reading]:
        for start in range(0, len(texts), self._rows_at_once):
            yield self.model.read_texts(texts[start : start + self._rows_at_once])


class Shelf:
    """Rows on disk, found by name, in a store of the folder that is this space's own."""

    def __init__(self, root: Path, space: fk.SketchSpace) -> None:
        """Raises: RunError: what is there is damaged."""
        with _stores():
            self._store = fk.SketchStore(root / hashlib.sha256(repr(space).encode()).hexdigest()[:16], space)
        self._rows = {name: row for row, name in enumerate(self._store.ids)}

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def add(self, rows: Tensor, names: Sequence[str]) -> None:
        """Keep rows (n, k) under names.

        Raises:
            RunError: another command writes there, a number that is not finite, or the disk is full.
        """
        with _stores():
            self._store.append(rows, names)
        self._rows |= {name: len(self._rows) + n for n, name in enumerate(names)}

    def blocks(self, names: Sequence[str], rows: int = BLOCK_ROWS) -> Iterator[Tensor]:
        """Their rows, in that order, (≤ rows, k) fp32 at a time."""
        for start in range(0, len(names), rows):
            yield self._store[[self._rows[name] for name in names[start : start + rows]]]

    def all(self, names: Sequence[str]) -> Tensor:
        """Their rows, in that order, (n, k) fp32."""
        return torch.cat(list(self.blocks(names)))

    def close(self) -> None:
        """Let another command write."""
        self._store.close()


class Known:
    """What the reward model, as it is now, says of training pairs: computed where it is not on disk yet.

    Attributes:
        found: pairs of which everything was on disk.
    """

    def __init__(
        self, root: Path, reader: Reader, pairs: Sequence[TrainingPair], what: str, gradients: bool = True
    ) -> None:
        """`what`: named while it is computed. `gradients`: False: what the head reads alone is wanted.

        Raises: RunError: as `Shelf`; weights whose gradients cannot be told apart by example, or that give none.
        """
        self._names = [pair.digest for pair in pairs]
        self.sides = [f"{name}{side}" for name in self._names for side in SIDES]
        model = reader.model
        head = next(name for name, p in model.module.named_parameters() if p is model.head.weight)
        beneath = identity(model, beneath=True)
        space = fk.SketchSpace(dim=model.head.in_features, seed=0, layers=(head,), model=beneath, maps=UNSKETCHED)
        self._hidden, self._sketches = Shelf(root, space), None
        if reader.dim and gradients:
            space = fk.SketchSpace(dim=reader.dim, seed=reader.seed, layers=tuple(reader.names), model=identity(model))
            self._sketches = Shelf(root, space)
        missing = {pair.digest: pair for pair in pairs if not self._has(pair.digest)}
        self.found = sum(pair.digest not in missing for pair in pairs)
        todo = list(missing.values())
        with Steps(what, len(todo), "pairs") as steps:
            for start in range(0, len(todo), PAIRS_AT_ONCE):
                self._compute(reader, todo[start : start + PAIRS_AT_ONCE])
                steps(len(todo[start : start + PAIRS_AT_ONCE]))
        self._hidden.close()
        if self._sketches is not None:
            self._sketches.close()

    def _compute(self, reader: Reader, pairs: Sequence[TrainingPair]) -> None:
        texts = [text for pair in pairs for text in pair.texts]
        sides = [f"{pair.digest}{side}" for pair in pairs for side in SIDES]
        if self._sketches is None:
            hidden = gradients = reader.hidden(texts)
        else:
            hidden, gradients = reader.gradients(texts)
        told = f"reward_model: of {pairs[0].where} to {pairs[-1].where}"
        check_finite(hidden, f"{told}, what its score head reads is not finite numbers")
        check_finite(gradients, f"{told}, gradients are not finite numbers")
        self._hidden.add(hidden, sides)
        if self._sketches is not None:
            self._sketches.add(gradients[::2] - gradients[1::2], [pair.digest for pair in pairs])

    def _has(self, name: str) -> bool:
        return f"{name}+" in self._hidden and (self._sketches is None or name in self._sketches)

    def hidden(self) -> Tensor:
        """What the head reads of chosen and rejected, (n, 2, H)."""
        return self._hidden.all(self.sides).unflatten(0, (-1, 2))

    def differences(self) -> Iterator[Tensor]:
        """u = ∇r(chosen) − ∇r(rejected), or its sketch, (n, k) in blocks."""
        if self._sketches is not None:
            yield from self._sketches.blocks(self._names)
            return
        for rows in self._hidden.blocks(self.sides, 2 * BLOCK_ROWS):
            yield rows[::2].double() - rows[1::2].double()


def kept(
    shelf: Shelf, names: Sequence[str], texts: Sequence[str], compute: Callable[[Sequence[str]], Tensor]
) -> Tensor:
    """Rows (n, k) of texts, one a name; what is not on the shelf is computed, some at a time, and put there."""
    missing = dict(item for item in zip(names, texts, strict=True) if item[0] not in shelf)
    todo = list(missing)
    with Steps("embeddings", len(todo), "texts") as steps:
        for start in range(0, len(todo), PAIRS_AT_ONCE):
            some = todo[start : start + PAIRS_AT_ONCE]
            shelf.add(compute([missing[name] for name in some]), some)
            steps(len(some))
    shelf.close()
    return shelf.all(names)


@contextmanager
def _stores() -> Iterator[None]:
    """What a store complains of, as the setting that says where it is."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise RunError(f"out: {error}") from error
