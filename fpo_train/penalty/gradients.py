"""What the penalties ask of the reward model's per-example gradients g = ∇r, which are never formed.

Two ways: over a linear score head on features that are known, g = h (a bias adds 1 to every g and cancels in
u = g_z − g_ref, so it changes none of what is asked here); over any other weights, through `fpo_kernels.Influence`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

import fpo_kernels as fk
from fpo_train.config import PenaltyConfig
from fpo_train.config.seeds import mix
from fpo_train.errors import RunError
from fpo_train.processes import Ranks
from fpo_train.reward_model import Reading, RewardModel


class Gradients(Protocol):
    """Gradients of the rows of one reading, at the reward model's weights as they are while these are asked."""

    def steering(self, rows: Tensor, references: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """⟨g_z, g_z − g_ref⟩, r(z) and r(ref) of the rows z and their references, (n,) each."""

    def mean_products(self, rows: Tensor, references: Tensor, over: Tensor) -> Tensor:
        """⟨ḡ, g_z − g_ref⟩, (n,); ḡ the mean of g over the rows `over` of all processes."""

    def features(self, rows: Tensor) -> Tensor:
        """Vectors whose inner products are (head) or estimate (sketches) those of the gradients, (n, k)."""


class HeadGradients:
    """Closed forms for a head on features (R, H); sums are in float64, norms being large and differences small."""

    free = True
    """Whether `mean_products` costs nothing worth mentioning."""

    def __init__(self, reward_model: RewardModel, reading: Reading, processes: Ranks) -> None:
        if reading.features is None:
            raise ValueError("wanted a reading with features")
        self._reward_model, self._reading, self._processes = reward_model, reading, processes
        self._features = reading.features

    def steering(self, rows: Tensor, references: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Gradients`."""
        reward = self._reward_model.score(self._reading)
        z, u = self._features[rows].double(), self._difference(rows, references)
        return (z * u).sum(1).to(reward.dtype), reward[rows], reward[references]

    def mean_products(self, rows: Tensor, references: Tensor, over: Tensor) -> Tensor:
        """See `Gradients`."""
        mean = mean_of(self._features[over], self._processes)
        return (self._difference(rows, references) @ mean).to(self._features.dtype)

    def features(self, rows: Tensor) -> Tensor:
        """See `Gradients`: h itself."""
        return self._features[rows]

    def _difference(self, rows: Tensor, references: Tensor) -> Tensor:
        return self._features[rows].double() - self._features[references].double()


class Kept:
    """The engine over a reward model's weights, made when it is first asked for and kept from then on.

    An engine's first call looks the model over; weights that change in place, as those of training and of earlier
    states do, are read anew in each.
    """

    def __init__(self) -> None:
        self._engine: fk.Influence | None = None
        self._names: list[str] = []

    def over(self, module: torch.nn.Module, names: list[str], rows_at_once: int) -> fk.Influence:
        """The engine over those parameters, with at most `rows_at_once` sequences on a tape (0: all).

        Raises:
            RunError: weights whose gradients cannot be told apart by example.
        """
        if self._engine is None or self._engine.model is not module or self._names != names:
            with refusals():
                self._engine, self._names = fk.Influence(module, parameters=names), list(names)
        self._engine.micro_batch = rows_at_once or None
        return self._engine


class EngineGradients:
    """Any weights, by one backward a batch; see `fpo_kernels.Influence` for what can be told apart by example."""

    free = False

    def __init__(
        self,
        reward_model: RewardModel,
        reading: Reading,
        names: list[str],
        processes: Ranks,
        dim: int,
        seed: int,
        rows_at_once: int = 0,
        kept: Kept | None = None,
    ) -> None:
        if reading.batch is None:
            raise ValueError("wanted a reading with a batch")
        self._module, self._reading, self._names, self._processes = reward_model.module, reading, names, processes
        self._dim, self._seed, self._rows_at_once = dim, seed, rows_at_once
        self._influence = (kept or Kept()).over(reward_model.module, names, rows_at_once)

    def steering(self, rows: Tensor, references: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Gradients`: one pass, in which a reference is read once for all its candidates."""
        needed, place = references.unique(return_inverse=True)
        with refusals():
            found = self._influence.steering(self._batch(rows), self._batch(needed), reference_of=place)
        return found.product, found.reward, found.reference_reward

    def mean_products(self, rows: Tensor, references: Tensor, over: Tensor) -> Tensor:
        """See `Gradients`: ḡ is formed, by one ordinary backward; it takes the memory of one gradient."""
        mean = self._mean_gradient(over)
        needed, place = torch.cat([rows, references]).unique(return_inverse=True)
        with refusals():
            along = self._influence.direction(self._batch(needed), mean)[place]
        return along[: len(rows)] - along[len(rows) :]

    def features(self, rows: Tensor) -> Tensor:
        """See `Gradients`: sketches."""
        if not len(rows):
            return torch.zeros(0, self._dim, device=rows.device)
        with refusals():
            return self._influence.sketch(self._batch(rows), dim=self._dim, seed=self._seed)

    def fault(self, row: Tensor) -> str:
        """Where a number of a row (1,) that is not finite arises; "" where all are."""
        with refusals():
            faults = self._influence.faults(self._batch(row))
        return str(faults[0]._replace(example=None)) if faults else ""

    def _batch(self, rows: Tensor) -> dict[str, Tensor]:
        return self._reading.rows(rows).batch or {}

    def _mean_gradient(self, over: Tensor) -> dict[str, Tensor]:
        named = dict(self._module.named_parameters())
        chosen = [named[name] for name in self._names]
        wide = [
            torch.zeros(p.shape, device=p.device, dtype=torch.promote_types(p.dtype, torch.float32)) for p in chosen
        ]
        count = self._processes.total(torch.tensor([len(over)], device=over.device)).clamp_min(1)
        with torch.enable_grad(), asking(chosen):
            for rows in over.split(self._rows_at_once or max(1, len(over))):
                if len(rows):
                    reward = self._module(**self._batch(rows)).logits[:, 0].sum()
                    parts = torch.autograd.grad(reward, chosen, allow_unused=True)
                    for whole, part in zip(wide, parts, strict=True):
                        if part is not None:
                            whole += part
        return {name: self._processes.total(whole) / count for name, whole in zip(self._names, wide, strict=True)}


@contextmanager
def asking(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Gradients of these can be asked for; what required none does not afterwards."""
    flags = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


@contextmanager
def refusals(setting: str = "penalty.parameters") -> Iterator[None]:
    """What the kernels refuse, said as the setting that asks for it."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise RunError(f"{setting}: {error}") from error


def mean_of(rows: Tensor, processes: Ranks) -> Tensor:
    """Mean over the rows (n, k) of all processes, (k,) float64; zeros where there are none."""
    total = processes.total(rows.double().sum(0))
    return total / processes.total(torch.tensor([len(rows)], device=rows.device)).clamp_min(1)


def gradients(
    reward_model: RewardModel,
    reading: Reading,
    config: PenaltyConfig,
    processes: Ranks,
    seed: int,
    rows_at_once: int = 0,
    kept: Kept | None = None,
) -> HeadGradients | EngineGradients:
    """Gradients over `penalty.parameters`; in closed form where that is the score head, on features that are known.

    Elsewhere by the engine that is `kept`, or by one of their own.

    Raises:
        RunError: weights that the reward model does not have, or whose gradients cannot be told apart by example.
    """
    names = reward_model.names(config.parameters)
    if reading.features is not None and set(names) <= set(reward_model.names("head")):
        return HeadGradients(reward_model, reading, processes)
    dim, seed = config.sketch_dim, mix("sketch", seed)
    return EngineGradients(reward_model, reading, names, processes, dim, seed, rows_at_once, kept)
