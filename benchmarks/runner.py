"""Runs a case: the correctness gate first, then interleaved timing of those who passed it."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import floors, isolated
from benchmarks.floors import Rates
from benchmarks.meters import Bystanders, peak_bytes, release, seconds_per_call
from benchmarks.registry import Case, Competitor, Contest, Told

SAMPLE_SECONDS = 0.02  # a sample repeats its call until it lasts about this long, at most MOST_CALLS times
MOST_CALLS = 200
WARM_SECONDS = (
    2.0  # calls that take longer are not repeated to be measured warm: what a first call adds is lost in them
)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line sets.

    Attributes:
        device: where competitors run. quick: the small settings. repeats: timed rounds a contest.
        clock: as a case has it. only: settings whose name has that in it.
    """

    device: torch.device
    quick: bool = False
    repeats: int = 10
    clock: Callable[[], float] = time.perf_counter
    only: str = ""


def chosen(case: Case, options: Options) -> list[Any]:
    """The case's settings that are asked for."""
    return [one for one in case.settings(options.quick, options.device) if options.only in one.name]


def run_case(case: Case, options: Options, rates: Rates | None = None) -> list[Row]:
    """One row a setting and competitor, JSON-ready: {setting, competitor, status, reason, …}.

    Status is "timed", "failed" (wrong answer or an exception; never timed) or "cannot run". Timed rows have
    samples (seconds a call, one a round), seconds and ratio (to the baseline, pair by pair within a round) as
    {median, min, max}; in_rounds is false where the call that the gate judged is the only sample. They have
    peak_bytes beyond what was held before, the median of the calls after the first if there are such, and
    others_cpu_share, the part of all cores' time that other processes took meanwhile, and the competitor's figures
    if it has any. Those in the case's `isolated` have rss_bytes and its kin (`isolated`) and rss_ratio to the
    baseline's. Where the contest says what its answer takes at the least, that is `floor`, and its time at the
    device's rates (in `rates` afterwards) floor_seconds;
    of_floor is that over the median.
    """
    rows: list[Row] = []
    rates = rates or Rates(options.device)
    for setting in chosen(case, options):
        print(f"{setting.name} …", file=sys.stderr, flush=True)  # minutes may pass before the table
        contest = case.build(setting, options.device)
        named = {*contest.competitors, *contest.cannot}
        if named != set(case.competitors):
            raise ValueError(f"{case.name}: competitors {sorted(named)}, wanted {sorted(case.competitors)}")
        gc.freeze()  # each look through all that was imported takes longer than many a call
        outcome = run_contest(contest, case.baseline, options, rates)
        del contest
        gc.unfreeze()
        release()  # children need the room
        if options.device.type == "cpu":
            _isolate(case, setting, outcome, options.quick)
        rows += [{"setting": asdict(setting), "competitor": name, **outcome[name]} for name in case.competitors]
    for row in rows:
        rates.judge(row)
    return rows


def _isolate(case: Case, setting: Any, outcome: dict[str, Row], quick: bool) -> None:
    for name in case.isolated(setting):
        if outcome[name]["status"] == "timed":
            outcome[name] |= isolated.measure(case, setting.name, name, quick)
    base = outcome[case.baseline].get("rss_bytes")
    for row in outcome.values():
        if base and row.get("rss_bytes"):
            row["rss_ratio"] = row["rss_bytes"] / base


def run_contest(contest: Contest, baseline: str, options: Options, rates: Rates) -> dict[str, Row]:
    """What became of every competitor; the device's rates are measured before the rounds and after them."""
    expected = contest.expected()
    rows: dict[str, Row] = {name: {"status": "cannot run", "reason": why} for name, why in contest.cannot.items()}
    passed: dict[str, _Metered] = {}
    for name, competitor in contest.competitors.items():
        metered = _Metered(competitor, options.device)
        error, reason = check(replace(competitor, run=metered), expected)
        rows[name] = {"status": "failed", "reason": reason, "error": error, "budget": competitor.budget}
        if not reason:
            passed[name] = metered
    most = contest.once_above * passed[baseline].seconds if baseline in passed else math.inf
    for name, metered in passed.items():
        if metered.seconds > most:
            metered.rounds = 0
        elif metered.seconds < WARM_SECONDS:
            metered()
        rows[name]["status"] = "timed"
    dtypes = {floor.dtype for floor in contest.floors.values()} if passed else set()
    rates.measure(dtypes)
    timings = _take_turns(passed, baseline, options)
    rates.measure(dtypes)
    for name, timing in timings.items():
        rows[name] |= timing
        rows[name]["peak_bytes"] = passed[name].usual_peak
        floor = contest.floors.get(contest.competitors[name].answers)
        if floor:
            rows[name]["floor"] = floors.kept(floor)
        figures = contest.competitors[name].figures
        if figures:
            rows[name]["figures"] = dict(figures())
    return rows


class _Metered:
    """A competitor whose latest call's time and memory are kept."""

    def __init__(self, competitor: Competitor, device: torch.device) -> None:
        self.run, self.rounds, self.device = competitor.run, competitor.rounds, device
        self.seconds = math.inf
        self.peaks: list[int | None] = []
        self.elsewhere = False

    def __call__(self) -> Tensor:
        answers: list[Tensor | Told] = []

        def timed() -> None:
            self.seconds = seconds_per_call(lambda: answers.append(self.run()), 1, self.device)

        peak = peak_bytes(timed, self.device)
        answer = answers[0]
        if isinstance(answer, Told):
            self.elsewhere = True
            self.seconds, peak, answer = answer.seconds, answer.peak_bytes, answer.answer
        self.peaks.append(peak)
        return answer

    @property
    def usual_peak(self) -> int | None:
        """The median of all calls that were measured but the first: one call's pages lie where they happen to fit."""
        told = [peak for peak in self.peaks[1:] or self.peaks if peak is not None]
        return round(statistics.median(told)) if told else None

    def sample(self, calls: int, clock: Callable[[], float]) -> float:
        """Seconds a call, of so many in a row; of one in another process."""
        if self.elsewhere:
            self()
            return self.seconds
        return seconds_per_call(self.run, calls, self.device, clock)


def check(competitor: Competitor, expected: Mapping[str, Tensor]) -> tuple[float | None, str]:
    """The relative error in norm, and why the competitor is refused ("" if it is not)."""
    exact = expected[competitor.answers].detach().double().cpu()
    try:
        got = competitor.run()
        got = (got.answer if isinstance(got, Told) else got).detach().double().cpu()
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


def _take_turns(competitors: Mapping[str, _Metered], baseline: str, options: Options) -> dict[str, Row]:
    """A B C C B A …, so that a slow moment of the machine hits all alike; those with fewer rounds drop out early."""
    calls, times = {}, {}
    for name, competitor in competitors.items():
        once = competitor.seconds
        # the metered call had to fetch its memory from the system; what another process tells is of one call
        if once < WARM_SECONDS and competitor.rounds != 0 and not competitor.elsewhere:
            once = competitor.sample(1, options.clock)
        calls[name] = max(1, min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / max(once, 1e-9))))
        times[name] = [once] if competitor.rounds == 0 else []
    bystanders = Bystanders()
    for turn in range(options.repeats):
        gc.collect()
        turns = list(competitors.items())
        for name, competitor in turns if turn % 2 == 0 else reversed(turns):
            if competitor.rounds is None or turn < competitor.rounds:
                times[name].append(competitor.sample(calls[name], options.clock))
    rows: dict[str, Row] = {
        name: {
            "samples": own,
            "in_rounds": competitors[name].rounds != 0,
            "seconds": spread(own),
            "ratio": None,
            "calls_per_sample": calls[name],
            "others_cpu_share": bystanders.share(),
        }
        for name, own in times.items()
    }
    if baseline in rows:
        for row in rows.values():
            row["ratio"] = spread(seconds_ratio(row, rows[baseline]))
    return rows


def seconds_ratio(over: Row, under: Row) -> list[float]:
    """Of two timed rows, round by round as far as both go; one timed outside the rounds meets the other's median."""
    if over["in_rounds"] and under["in_rounds"]:
        return [x / y for x, y in zip(over["samples"], under["samples"], strict=False)]
    return [over["seconds"]["median"] / under["seconds"]["median"]]


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
