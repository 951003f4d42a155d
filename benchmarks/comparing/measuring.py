"""One setting, measured in both trees: the gate, then rounds until the verdict, and once more if that is bad news."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.comparing.sides import Side, SideError
from benchmarks.comparing.trees import Tree
from benchmarks.comparing.verdict import LOOKS, Verdict, judge, together
from benchmarks.registry import TOLERANCE, Case, Competitor
from benchmarks.runner import check

# A block is a millisecond or a call; the quickest of the blocks of two samples counts. Under a load of 6 on two cores
# that brought the spread of a pair from 12% to 1 or 2%: among so many, one was left alone.
BLOCK_SECONDS = 0.001
BLOCKS = 20
SAMPLE_SECONDS = 0.05  # of long calls there are fewer blocks, so that both sides are measured under the same weather
# Two of some eighty processes with the same code were 4 and 6% off the others for their whole lives, whatever they
# forked. So slower and faster have to come out again in two more processes, and a third pair breaks a tie.
PAIRS = 3
BAD = ("slower", "wrong", "failed")

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line sets.

    Attributes:
        device: where. quick: which settings. competitor: the one to time, in place of the case's `ours`.
        margin: a ratio up to 1 + margin is no change. seconds, rounds: the most that a pair of processes is given.
    """

    device: torch.device
    quick: bool = True
    competitor: str = ""
    margin: float = 0.05
    seconds: float = 240.0
    rounds: int = LOOKS[-1]


class Pair:
    """Both sides, asked together or in turn."""

    def __init__(self, base: Side, head: Side) -> None:
        self.base, self.head = base, head

    def ask(self, do: str, turn: int = 0, **what: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both at the same time; the answers of base and head. Who is asked first goes by the turn.

        Raises:
            SideError: one of them fails; the other has been heard out.
        """
        order = (self.base, self.head) if turn // 2 % 2 == 0 else (self.head, self.base)
        for side in order:
            side.say(do, **what)
        found, failed = {}, []
        for side in order:
            try:
                found[side] = side.hear()
            except SideError as problem:
                failed.append(problem)
        if failed:
            raise failed[0]
        return found[self.base], found[self.head]

    @contextlib.contextmanager
    def round(self, turn: int, case: str, setting: str, quick: bool) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """What both sides have built for a round; let go of in the end."""
        try:
            for side in (self.base, self.head):
                side.begin()
            yield self.ask("build", turn, case=case, setting=setting, quick=quick)
        finally:
            with contextlib.suppress(SideError):
                self.ask("end")

    def times(self, turn: int, **how: Any) -> tuple[float, float]:
        """Seconds a call of base and head, after a sample each that does not count: A B B A, or B A A B."""
        a, b = (self.base, self.head) if turn % 2 == 0 else (self.head, self.base)
        best = {a: math.inf, b: math.inf}
        for side in (a, b):
            side.ask("sample", **{**how, "blocks": max(1, how["blocks"] // 2)})
        for side in (a, b, b, a):
            best[side] = min(best[side], side.ask("sample", **how)["seconds"])
        return best[self.base], best[self.head]


class Pairs:
    """As many pairs of processes as are wanted, started when first wanted and kept; a context manager that ends them.

    Args:
        base, head, device, burnt: as of `Side`; what is burnt is the head's. scratch: a folder for what they write.
    """

    def __init__(self, base: Tree, head: Tree, device: torch.device, scratch: Path, burnt: float = 0.0) -> None:
        self._base, self._head, self._device, self._burnt = base, head, device, burnt
        self._scratch = scratch
        self._pairs: list[Pair] = []
        self._running = contextlib.ExitStack()

    def __getitem__(self, number: int) -> Pair:
        while len(self._pairs) <= number:
            folder = self._scratch / f"pair-{len(self._pairs)}"
            a = self._running.enter_context(Side(self._base, self._device, folder / "base"))
            b = self._running.enter_context(Side(self._head, self._device, folder / "head", self._burnt))
            self._pairs.append(Pair(a, b))
        return self._pairs[number]

    def __enter__(self) -> Pairs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()


def measure(pairs: Pairs, case: Case, setting: str, options: Options) -> Row:
    """Whether the head's answer is the base's, and if so how their times compare.

    Returns:
        JSON-ready: case, setting, verdict (a word of `Verdict`, or "wrong", "failed", "not compared"), text (the
        verdict in words), and as far as it came to that competitor, error (relative, of the head's answer to the
        base's), ratio, low, high, rounds, calls and blocks of a sample, samples ([base, head] seconds a call, by
        round, by pair of processes), base_seconds and head_seconds (medians), and seconds (that it all took).
    """
    row: Row = {"case": case.name, "setting": setting}
    begun = time.monotonic()
    samples: list[list[tuple[float, float]]] = []
    verdicts: list[Verdict] = []
    try:
        while (verdict := settled(verdicts)) is None:
            samples.append([])
            found = _rounds(row, pairs[len(verdicts)], case, setting, options, samples[-1])
            if found is None:
                return row
            verdicts.append(found)
    except SideError as problem:
        return row | {"verdict": "failed", "text": f"failed: {problem}"}
    bases, heads = zip(*itertools.chain(*samples), strict=True)
    return row | {
        "verdict": verdict.word,
        "text": str(verdict),
        "ratio": verdict.ratio,
        "low": verdict.low,
        "high": verdict.high,
        "rounds": verdict.rounds,
        "base_seconds": statistics.median(bases),
        "head_seconds": statistics.median(heads),
        "samples": samples,
        "seconds": time.monotonic() - begun,
    }


def settled(verdicts: Sequence[Verdict]) -> Verdict | None:
    """What the verdicts of so many pairs of processes come to; None where another pair has to be asked.

    No change, and what the first leaves undecided, is believed at once, slower and faster when they have come twice.
    """
    if not verdicts:
        return None
    if verdicts[0].word in ("no change", "undecided"):
        return verdicts[0]
    for verdict in verdicts:
        alike = [other for other in verdicts if other.word == verdict.word]
        if len(alike) > 1:
            return together(verdict.word, alike)
    return together("undecided", verdicts) if len(verdicts) == PAIRS else None


def _rounds(
    row: Row, pair: Pair, case: Case, setting: str, options: Options, samples: list[tuple[float, float]]
) -> Verdict | None:
    """Rounds of one pair of processes until its verdict; None where the row says why there is none."""
    begun = time.monotonic()
    verdict: Verdict | None = None
    while verdict is None:
        turn = len(samples)
        with pair.round(turn, case.name, setting, options.quick) as built:
            if "competitor" not in row and not _agreed(row, pair, case, built, options):
                return None
            samples.append(pair.times(turn, competitor=row["competitor"], calls=row["calls"], blocks=row["blocks"]))
        over = len(samples) >= options.rounds or time.monotonic() - begun >= options.seconds
        verdict = judge([math.log(head / base) for base, head in samples], options.margin, over)
    return verdict


def _agreed(row: Row, pair: Pair, case: Case, built: tuple[dict[str, Any], dict[str, Any]], options: Options) -> bool:
    """Choose what is timed, and compare the answers; False with the reason in the row where nothing shall be timed."""
    base, head = built
    ours = (options.competitor,) if options.competitor else case.ours
    both = [name for name in ours if name in base["competitors"] and name in head["competitors"]]
    same = {key for key in base["setting"] if key in head["setting"]}
    differs = [key for key in sorted(same) if base["setting"][key] != head["setting"][key]]
    if differs:
        row |= _not_compared(f"the setting's {', '.join(differs)} is not the same in both")
        return False
    if not both:
        row |= _not_compared(f"none of {', '.join(ours)} runs in both: {_reasons(ours, base, head)}")
        return False
    row["competitor"] = both[0]
    missed = [
        name for name in ours[: ours.index(both[0])] if name in base["competitors"] or name in head["competitors"]
    ]
    if missed:
        row["note"] = _reasons(missed, base, head)
    once = pair.base.ask("answer", competitor=both[0], path=str(pair.base.answers))["seconds"]
    pair.head.ask("answer", competitor=both[0], path=str(pair.head.answers))
    right, got = (torch.load(side.answers, weights_only=True) for side in (pair.base, pair.head))
    dtype = getattr(torch, str(base["setting"].get("dtype", "")), torch.float32)
    allowed = Competitor(run=lambda: got, budget=TOLERANCE.get(dtype, TOLERANCE[torch.float32]))
    row["error"], why = check(allowed, {"product": right})
    row["calls"] = max(1, round(BLOCK_SECONDS / once))
    row["blocks"] = max(1, min(BLOCKS, int(SAMPLE_SECONDS / (once * row["calls"]))))
    if why:
        row |= {"verdict": "wrong", "text": f"wrong: the head's answer is not the base's: {why}"}
    return not why


def _not_compared(why: str) -> Row:
    return {"verdict": "not compared", "text": f"not compared: {why}"}


def _reasons(names: Sequence[str], base: dict[str, Any], head: dict[str, Any]) -> str:
    """Why competitors do not run, by side."""
    found = [
        f"{name} in {side}: {built['cannot'].get(name, 'there is none')}"
        for name in names
        for side, built in (("base", base), ("head", head))
        if name not in built["competitors"]
    ]
    return "; ".join(found)
