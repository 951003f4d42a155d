"""The same competitors under pytest-benchmark, quick sizes, gated like everywhere.

pytest benchmarks --benchmark-enable --benchmark-only --benchmark-autosave
pytest benchmarks --benchmark-enable --benchmark-only --benchmark-compare
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import cases
from benchmarks.meters import synchronize
from benchmarks.registry import Contest
from benchmarks.runner import check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=1)
def contest_of(case: str, setting: Any) -> tuple[Contest, Mapping[str, Tensor]]:
    """One contest at a time is kept: the competitors of a setting follow one another."""
    contest = cases()[case].build(setting, DEVICE)
    return contest, contest.expected()


def parameters() -> list[Any]:
    """Every quick setting's every competitor."""
    return [
        pytest.param(case.name, setting, competitor, id=f"{case.name}/{setting.name}/{competitor}")
        for case in cases().values()
        for setting in case.settings(True, DEVICE)
        for competitor in case.competitors
    ]


@pytest.mark.parametrize(("case", "setting", "name"), parameters())
def test_competitor(case: str, setting: Any, name: str, benchmark: Any) -> None:
    contest, expected = contest_of(case, setting)
    if name in contest.cannot:
        pytest.skip(contest.cannot[name])
    competitor = contest.competitors[name]
    _, reason = check(competitor, expected)
    assert not reason

    def run() -> None:
        competitor.run()
        synchronize(DEVICE)

    benchmark.group = f"{case}: {setting.name}"
    benchmark(run)
