"""The paper's neural environment: every penalty and seed one after the other, or all of them together.

A run's cost is the same at each of its iterations, so a part of them tells the ratio of whole runs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.registry import Case, Competitor, Contest, Headline
from fpo_train.simulate import neural

APART, TOGETHER = "one after the other", "together"
CLOSE = 1e-2  # relative, of the actions reached: rounding grows from step to step


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Runs of `penalties` at `seeds`, of so many iterations."""

    name: str
    penalties: tuple[str, ...]
    seeds: int
    iterations: int


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """The paper's penalties at five seeds; all of ours at ten."""
    if quick:
        return [Setting(name="2 penalties, 2 seeds", penalties=("none", "relaxed"), seeds=2, iterations=10)]
    published = ("none", "relaxed", "practical")
    return [
        Setting(name="none, relaxed, practical, 5 seeds", penalties=published, seeds=5, iterations=100),
        Setting(name="all six penalties, 10 seeds", penalties=neural.PENALTIES, seeds=10, iterations=20),
    ]


def build(setting: Setting, device: torch.device) -> Contest:
    """On the CPU, one thread, as `fpo-train simulate neural` runs."""
    if device.type != "cpu":
        return Contest(competitors={}, expected=dict, cannot=dict.fromkeys(CASE.competitors, "runs on the CPU"))
    rows = [(penalty, seed) for penalty in setting.penalties for seed in range(setting.seeds)]
    few = neural.NeuralSettings(iterations=setting.iterations)

    def apart() -> Tensor:
        return reached([neural.simulate([row], few)[0] for row in rows])

    def together() -> Tensor:
        return reached(neural.simulate(rows, few))

    return Contest(
        competitors={
            APART: Competitor(run=apart, budget=CLOSE, rounds=3),
            TOGETHER: Competitor(run=together, budget=CLOSE, rounds=3),
        },
        expected=functools.cache(lambda: {"product": apart()}),
    )


def reached(runs: Sequence[neural.Trajectory]) -> Tensor:
    """The last actions, (R, d)."""
    return torch.stack([torch.from_numpy(run.path[-1]) for run in runs])


CASE = Case(
    name="neural",
    description="runs of the paper's neural environment one after the other and together",
    competitors=(APART, TOGETHER),
    baseline=APART,
    settings=settings,
    build=build,
    headlines=(Headline(text="together / one after the other", over=TOGETHER, under=APART),),
)
