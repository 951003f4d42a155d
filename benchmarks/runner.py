"""Runs a case: the correctness gate first, then interleaved timing of those who passed it."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.meters import Bystanders, peak_bytes, seconds_per_call
from benchmarks.registry import Case, Competitor, Contest

SAMPLE_SECONDS = 0.02  # a sample repeats its call until it lasts about this long, at most MOST_CALLS times
MOST_CALLS = 200

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line sets.

    Attributes:
        device: where competitors run. quick: the small settings. repeats: timed rounds a contest.
    """

    device: torch.device
    quick: bool = False
    repeats: int = 10


def run_case(case: Case, options: Options) -> list[Row]:
    """One row a setting and competitor, JSON-ready: {setting, competitor, status, reason, …}.

    Status is "timed", "failed" (wrong answer or an exception; never timed) or "cannot run". Timed rows have
    seconds and ratio (to the baseline, pair by pair within a round) as {median, min, max}, peak_bytes beyond
    what was held before, and others_cpu_share, the part of all cores' time that other processes took meanwhile.
    """
    rows: list[Row] = []
    for setting in case.settings(options.quick, options.device):
        contest = case.build(setting, options.device)
        named = {*contest.competitors, *contest.cannot}
        if named != set(case.competitors):
            raise ValueError(f"{case.name}: competitors {sorted(named)}, wanted {sorted(case.competitors)}")
        outcome = run_contest(contest, case.baseline, options)
        rows += [{"setting": asdict(setting), "competitor": name, **outcome[name]} for name in case.competitors]
    return rows


def run_contest(contest: Contest, baseline: str, options: Options) -> dict[str, Row]:
    """What became of every competitor."""
    expected = contest.expected()
    rows: dict[str, Row] = {name: {"status": "cannot run", "reason": why} for name, why in contest.cannot.items()}
    passed: dict[str, Competitor] = {}
    for name, competitor in contest.competitors.items():
        error, reason = check(competitor, expected)
        rows[name] = {"status": "failed", "reason": reason, "error": error, "budget": competitor.budget}
        if not reason:
            passed[name] = competitor
    for name, competitor in passed.items():
        rows[name] |= {"status": "timed", "peak_bytes": peak_bytes(competitor.run, options.device)}
    for name, timing in _take_turns(passed, baseline, options).items():
        rows[name] |= timing
    return rows


def check(competitor: Competitor, expected: Mapping[str, Tensor]) -> tuple[float | None, str]:
    """The relative error in norm, and why the competitor is refused ("" if it is not)."""
    exact = expected[competitor.answers].detach().double().cpu()
    try:
        got = competitor.run().detach().double().cpu()
    except Exception as problem:  # a competitor that crashes must not take the others down; the reason is reported
        return None, f"{type(problem).__name__}: {problem}"
    if got.shape != exact.shape:
        return None, f"shape {tuple(got.shape)}, wanted {tuple(exact.shape)}"
    error = float((got - exact).norm() / (exact.norm() or 1.0))
    if not math.isfinite(error):
        return None, "not finite"
    return (
        error,
        "" if error <= competitor.budget else f"relative error {error:.1e} over its budget {competitor.budget:.1e}",
    )


def _take_turns(competitors: Mapping[str, Competitor], baseline: str, options: Options) -> dict[str, Row]:
    """A B C A B C …, so that a slow moment of the machine hits all alike."""
    calls = {}
    for name, competitor in competitors.items():
        once = seconds_per_call(competitor.run, 1, options.device)
        calls[name] = max(1, min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / max(once, 1e-9))))
    bystanders = Bystanders()
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(options.repeats):
        gc.collect()
        for name, competitor in competitors.items():
            times[name].append(seconds_per_call(competitor.run, calls[name], options.device))
    base, others = times.get(baseline), bystanders.share()
    return {
        name: {
            "seconds": spread(own),
            "ratio": spread([x / y for x, y in zip(own, base, strict=True)]) if base else None,
            "calls_per_sample": calls[name],
            "others_cpu_share": others,
        }
        for name, own in times.items()
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
