"""Differences with their intervals, and what a run's numbers allow to say, in words.

A run's iterations draw questions and replies of their own. What differs between those of one part of the run is chance
and the policy's own drift, which widens the interval: given the policies that a run has had, the iterations' values are
independent. Intervals speak of this run, not of another seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .progress import number

Rows = list[dict[str, Any]]
Paired = dict[str, Any]  # what `paired` returns

LEAST = 4
"""Iterations with a number that a quarter of a run must have; fewer are too few to say."""

HEADLINES = {
    "audit_gain": "the oracle's utility of all candidates, less that of the base model's replies,",
    "audit_utility": "the oracle's utility of all candidates",
    "oracle_gain": "the oracle's utility of the learnt reply, less that of the base model's,",
    "oracle_utility": "the oracle's utility of the learnt reply",
}
"""What a penalty is judged by → its key's words: the first for which every run of a page has numbers."""
REWARD = "reward"


class Change(NamedTuple):
    """A quantity's means over the first and the last quarter of a run, and the 95 % interval of their difference."""

    first: float | None
    last: float | None
    low: float | None
    high: float | None
    """None where a quarter has fewer than `LEAST` numbers."""

    @property
    def size(self) -> float | None:
        """last − first."""
        return None if self.first is None or self.last is None else self.last - self.first

    @property
    def way(self) -> int | None:
        """1 where it rose and −1 where it fell, told apart from chance; 0 where neither; None: too few to say."""
        if self.low is None or self.high is None:
            return None
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def change(rows: Sequence[Mapping[str, Any]], key: str) -> Change:
    """How a quantity changed from the first quarter of a run's rows to the last; what is None is left out.

    x̄_last − x̄_first ± t·√(s²_first/n + s²_last/m), t the quantile 0.975 of Student's distribution with the degrees of
    freedom of Welch (1947), rounded down. Simulated, with normal noise of one size (20,000 runs without a drift and
    4000 with one, a straight line over the run, in standard deviations of the noise), the interval leaves out 0 in

    | iterations | no drift | drift of 2 | drift of 4 |
    |---|---|---|---|
    | 16 | 3.6 % | 38 % | 91 %  |
    | 20 | 4.2 % | 52 % | 98 %  |
    | 40 | 4.6 % | 90 % | 100 % |
    """
    quarter = max(1, len(rows) // 4)
    ends = [[float(row[key]) for row in some if row.get(key) is not None] for some in (rows[:quarter], rows[-quarter:])]
    first, last = (statistics.fmean(end) if end else None for end in ends)
    if first is None or last is None or min(map(len, ends)) < LEAST:
        return Change(first, last, None, None)
    errors = [statistics.variance(end) / len(end) for end in ends]
    both = sum(errors)
    own = sum(error**2 / (len(end) - 1) for error, end in zip(errors, ends, strict=True))
    reach = student_quantile(0.975, max(1, int(both**2 / own))) * math.sqrt(both) if own else 0.0
    return Change(first, last, last - first - reach, last - first + reach)


def headline(runs: Mapping[str, Rows]) -> str | None:
    """The key of `HEADLINES` that all runs of a page are judged by; None where they have none in common."""
    ends = [[rows[: max(1, len(rows) // 4)], rows[-max(1, len(rows) // 4) :]] for rows in runs.values() if rows]
    for key in HEADLINES if ends else ():
        if all(any(row.get(key) is not None for row in end) for both in ends for end in both):
            return key
    return None


TOO_FEW = "too few iterations to say"


def verdict(rows: Rows, key: str | None, unit: str) -> str:
    """What can be said of one run, in one or two sentences.

    Args:
        key: what it is judged by, see `headline`. unit: of that quantity.
    """
    if not rows:
        return "No iteration is done."
    if key is None:
        return "Nothing can be said: the oracle's answers are missing."
    found, reward = change(rows, key), change(rows, REWARD)
    what = HEADLINES[key]
    if found.way is None:
        wanted = f"{len(rows)} of them, and a quarter must have {LEAST}, so {4 * LEAST} are needed"
        return (
            f"Too few iterations to say: {wanted}. So far {what} went from {number(found.first)} "
            f"(first quarter) to {number(found.last)} {unit} (last quarter)."
        )
    size = f"{number(found.size)} [{number(found.low)}, {number(found.high)}] {unit}"
    said = {
        1: f"Better: {what} rose by {size}.",
        0: f"No change that is told apart from chance: {what} moved by {size}.",
        -1: f"Worse: {what} fell by {size}.",
    }[found.way]
    if reward.way is None:
        return said
    size = f"{number(reward.size)} [{number(reward.low)}, {number(reward.high)}] log-odds"
    moved = {1: "rose by", 0: "moved, by no more than chance explains, by", -1: "fell by"}[reward.way]
    end = (
        ": a reward that rises while the oracle's utility falls is collapse"
        if (found.way, reward.way) == (-1, 1)
        else ""
    )
    return f"{said} The reward model's score of all candidates {moved} {size}{end}."


def against(rows: Rows, other: Rows, key: str, unit: str) -> str:
    """How one run's last quarter compares with another's, on the same questions: an iteration less the same iteration.

    Both runs must be of one seed and one set of prompts.
    """
    theirs = {row["iteration"]: row[key] for row in other[-max(1, len(other) // 4) :] if row.get(key) is not None}
    last = [row for row in rows[-max(1, len(rows) // 4) :] if row.get(key) is not None]
    found = paired([row[key] - theirs[row["iteration"]] for row in last if row["iteration"] in theirs])
    if found["pairs"] < LEAST:
        return TOO_FEW
    size = f"{number(found['mean'])} [{number(found['low'])}, {number(found['high'])}] {unit}"
    if found["low"] > 0:
        return f"higher by {size}"
    return f"lower by {size}" if found["high"] < 0 else f"not told apart from chance, {size}"


def paired(differences: Sequence[float]) -> Paired:
    """Mean of paired differences, its 95 % interval and two-sided p by Student's t with n − 1 degrees of freedom.

    {pairs: n, mean, low, high, p}; of one pair there is no interval and no p, of none no mean: they are None.
    """
    n = len(differences)
    if n < 2:
        return {"pairs": n, "mean": differences[0] if n else None, "low": None, "high": None, "p": None}
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(n)
    reach = student_quantile(0.975, n - 1) * error
    p = 2 * student(-abs(mean) / error, n - 1) if error else float(mean == 0)
    return {"pairs": n, "mean": mean, "low": mean - reach, "high": mean + reach, "p": max(p, 0.0)}


def student(t: float, degrees: int) -> float:
    """P(T ≤ t) of Student's distribution with whole degrees of freedom ν.

    In closed form, with θ = atan(t/√ν): Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    term, total = (cosine if degrees % 2 else 1.0), 0.0
    for k in range(1 + degrees % 2, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = 2 / math.pi * (theta + sine * total) if degrees % 2 else sine * total
    return 0.5 + inside / 2


def student_quantile(p: float, degrees: int) -> float:
    """t with `student`(t, ν) = p, for p > ½, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, degrees) < p else (low, middle)
    return high
