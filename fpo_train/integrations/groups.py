"""What completions are worth, and which compete: those of one prompt, wherever they stand, over all processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpo_train.config import PenaltyConfig
from fpo_train.penalty.base import Judged, Penalty
from fpo_train.rollout import Said, Written

CANCELLED = 0.05
"""Advantages that change by no more than this when γ is doubled do not depend on it."""
FAINT = 0.02
"""A penalty whose share is γ times this or less has next to no effect, in units that should make it γ."""


@dataclass(frozen=True)
class Grouped(Written):
    """Completions, each with the name of the group that it competes in, and with its columns of the data set."""

    groups: Sequence[str] = ()
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def place(self, row: int) -> int:
        """The first completion that a row belongs to, as itself or as its reference: all of them have its columns."""
        return int(((self.rows == row) | (self.references == row)).nonzero()[0])


class InGroups(Penalty):
    """A penalty whose spreads are around the means of whole groups, though these be split over processes.

    Where no group has two members, spreads are around the mean of all.
    """

    def _squares(self, rollout: Said, reward: Tensor, raw: Tensor, judged: Tensor) -> tuple[float, float, float]:
        groups = rollout.groups if isinstance(rollout, Grouped) else ()
        own = list(zip(groups, *(one.flatten().tolist() for one in (reward, raw, judged)), strict=True))
        known = [one for one in self._processes.gather_objects(own) if one[3]]
        keys = [key for key, *_ in known]
        if len(set(keys)) == len(keys):  # one completion a prompt: they compete with one another
            keys = [""] * len(keys)
        squares = [sum(value**2 for value in centred(keys, column)) for column in list(zip(*known, strict=True))[1:3]]
        return (*squares, float(len(known))) if known else (0.0, 0.0, 0.0)  # type: ignore[return-value]


class Judgement(NamedTuple):
    """What n completions are worth, (n,) fp32 or float64 on the CPU each; NaN where one could not be scored."""

    reward: Tensor
    """r(z), the reward model's score."""
    reference_reward: Tensor
    """r(ref)."""
    penalty: Tensor
    """In the units of γ."""
    effective: Tensor
    """r(z) − γ · penalty(z): what a policy should maximise."""


class Scored(NamedTuple):
    """What became of one completion; the last three are NaN, or −∞, where it could not be scored."""

    group: str
    reward: float
    penalty: float
    effective: float


def centred(keys: Sequence[str], values: Sequence[float]) -> list[float]:
    """Each value less the mean of its group's."""
    sums: dict[str, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        sums.setdefault(key, []).append(value)
    means = {key: sum(some) / len(some) for key, some in sums.items()}
    return [value - means[key] for key, value in zip(keys, values, strict=True)]


def share(scored: Sequence[Scored], gamma: float) -> float | None:
    """γ times the penalty's spread within groups, over the reward's; None where the reward has none, or the penalty."""
    known = [one for one in scored if one.effective > float("-inf")]
    keys = [one.group for one in known]
    columns = [one.reward for one in known], [one.penalty for one in known]
    reward, penalty = (sum(value * value for value in centred(keys, column)) ** 0.5 for column in columns)
    return gamma * penalty / reward if reward and penalty else None


def lost(scored: Sequence[Scored], penalty: PenaltyConfig, normalised: bool) -> Iterator[str]:
    """Where γ does not mean what it says, in sentences. `normalised`: advantages are divided by their spread."""
    if penalty.kind == "none":
        return
    part = share(scored, penalty.gamma)
    if penalty.gamma_units == "reward_std" and part is not None and part <= FAINT * penalty.gamma:
        yield (
            "penalties of an earlier call were so large that they hold γ's running scale, which forgets a tenth a "
            f"call: the penalty's spread is {part:.1%} of the reward's in this one, though gamma is "
            f"{penalty.gamma:g} (reward_std)"
        )
    change = doubled(scored, penalty.gamma) if normalised else None
    if change is not None and change <= CANCELLED:
        yield (
            f"gamma {penalty.gamma:g} ({penalty.gamma_units}): the trainer divides advantages by their spread, and "
            f"the penalty's share of it is so large that twice the γ would change them by {change:.1%}: γ cancels. "
            "A smaller γ, or advantages that are not normalised (scale_rewards=False), would have an effect"
        )


def doubled(scored: Sequence[Scored], gamma: float) -> float | None:
    """How much normalised advantages change when γ is doubled: ‖A(2γ) − A(γ)‖ / ‖A(γ)‖, in [0, 2].

    A = (r̃ − mean) / spread within each group, r̃ = r − γ · penalty. None where that says nothing of γ: the penalty is
    the smaller part of r̃'s spread, or there is none.
    """
    known = [one for one in scored if one.effective > float("-inf")]
    keys = [one.group for one in known]
    reward, penalty = (centred(keys, column) for column in ([o.reward for o in known], [o.penalty for o in known]))
    if (share(known, gamma) or 0.0) <= 1:
        return None
    both = ([r - g * p for r, p in zip(reward, penalty, strict=True)] for g in (gamma, 2 * gamma))
    once, twice = (_normalised(keys, centre) for centre in both)
    size = sum(a * a for a in once) ** 0.5
    return sum((b - a) ** 2 for a, b in zip(once, twice, strict=True)) ** 0.5 / size if size else None


def best(scored: Sequence[Scored]) -> list[int]:
    """The place of each group's completion with the largest effective reward, the first of several; none of a group
    in which nothing could be scored."""
    found: dict[str, int] = {}
    for place, one in enumerate(scored):
        if one.effective > float("-inf") and one.effective > scored[found.setdefault(one.group, place)].effective:
            found[one.group] = place
    return list(found.values())


def _normalised(keys: Sequence[str], centre: Sequence[float]) -> list[float]:
    """Values around 0, over the root of their mean square in their group."""
    squares: dict[str, list[float]] = {}
    for key, value in zip(keys, centre, strict=True):
        squares.setdefault(key, []).append(value * value)
    spread = {key: (sum(some) / len(some)) ** 0.5 for key, some in squares.items()}
    return [value / spread[key] if spread[key] else 0.0 for key, value in zip(keys, centre, strict=True)]


def judgement(judged: Judged) -> Judgement:
    """(n, 1) on the model's device → (n,) on the CPU, NaN where nothing was judged."""
    lost = ~judged.effective.isfinite()
    columns = (judged.reward, judged.reference_reward, judged.penalty, judged.effective)
    return Judgement(*(one.masked_fill(lost, torch.nan)[:, 0].detach().cpu() for one in columns))


def numbers(values: Tensor) -> list[float | None]:
    """A tensor's numbers, None for NaN."""
    return [None if value != value else value for value in values.tolist()]
