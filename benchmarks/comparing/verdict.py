"""When a ratio of times is known well enough to say slower, faster, or no change.

A round gives one log ratio head/base. Noise of a shared machine has heavy tails and comes in bursts, so nothing is
assumed of it but that a round errs to either side with the same chance, whatever the rounds before it did: the
interval is the exact one of the sign test, between two order statistics, and what is estimated is the median.

Rounds are added until the interval decides. Whoever looks again and again finds something in any noise, so there is a
fixed list of looks, each with its share of the error, and the shares add up to ERROR (Bonferroni).
"""

from __future__ import annotations

import bisect
import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ERROR = 0.001  # of a thousand settings, one has its true ratio outside of any interval that was looked at
LOOKS = (12, 18, 27, 40, 60, 90, 135, 200, 300)  # after so many rounds; what 300 leave open, 450 seldom decide
# Half of the error for the first look: with fewer than 12 rounds no interval is that sure.
SHARES = (ERROR / 2, *(ERROR / 2 / (len(LOOKS) - 1),) * (len(LOOKS) - 1))

Word = Literal["slower", "faster", "no change", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """What the rounds say.

    Attributes:
        word: "slower" and "faster" by more than the margin, "no change" by less, each beyond doubt but for ERROR.
        ratio: the median of head/base. low, high: its interval; None where the rounds are too few for one.
        rounds: how many there were.
    """

    word: Word
    ratio: float
    low: float | None
    high: float | None
    rounds: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"undecided: {self.rounds} rounds, {LOOKS[0]} are the fewest that decide"
        more, least, most = (100 * (x - 1) for x in (self.ratio, self.low, self.high))
        if self.word == "slower":
            return f"slower by {more:.0f} % [{least:.0f}, {most:.0f}]"
        if self.word == "faster":
            return f"faster by {-more:.0f} % [{-most:.0f}, {-least:.0f}]"
        if self.word == "no change":
            return f"no change: within ±{max(-least, most):.1f} %"
        return f"undecided: {more:+.0f} % [{least:+.0f}, {most:+.0f}]"


def judge(logs: Sequence[float], margin: float, over: bool = False) -> Verdict | None:
    """The verdict on the log ratios so far, to be asked for after every round.

    Args:
        logs: ln(head/base), one a round. margin: a ratio up to 1 + margin, down to 1 / (1 + margin), is no change.
        over: no more rounds will come.

    Returns:
        None where more rounds are wanted. `over` looks once more, with the share of the look that will not come.
    """
    count, limit = len(logs), math.log1p(margin)
    over = over or count >= LOOKS[-1]
    if not over and count not in LOOKS:
        return None
    look = min(bisect.bisect_left(LOOKS, count), len(LOOKS) - 1)
    found = interval(logs, SHARES[look])
    if found is None:
        return Verdict("undecided", math.exp(statistics.median(logs)) if logs else math.nan, None, None, count)
    low, high = found
    word: Word = "undecided"
    if low > limit:
        word = "slower"
    elif high < -limit:
        word = "faster"
    elif -limit < low and high < limit:
        word = "no change"
    elif not over:
        return None
    return Verdict(word, math.exp(statistics.median(logs)), math.exp(low), math.exp(high), count)


def together(word: Word, verdicts: Sequence[Verdict]) -> Verdict:
    """Several in one: the mean of their logarithms, and an interval that holds all of theirs."""
    lows = [verdict.low for verdict in verdicts if verdict.low is not None]
    highs = [verdict.high for verdict in verdicts if verdict.high is not None]
    return Verdict(
        word,
        math.exp(statistics.fmean(math.log(verdict.ratio) for verdict in verdicts)),
        min(lows, default=None),
        max(highs, default=None),
        sum(verdict.rounds for verdict in verdicts),
    )


def interval(values: Sequence[float], error: float) -> tuple[float, float] | None:
    """Between which the median of what the values are drawn from lies; None where they are too few to say.

    Args:
        values: independent draws; nothing else is asked of them. error: the chance of being wrong, at most.
    """
    skipped = _skipped(len(values), error)
    if skipped < 0:
        return None
    ordered = sorted(values)
    return ordered[skipped], ordered[-1 - skipped]


@functools.cache
def _skipped(count: int, error: float) -> int:
    """How many of the least, and of the greatest, lie outside: the most k with 2 P(Binomial(count, ½) ≤ k) ≤ error."""
    k, below = -1, 0
    while k + 1 < count // 2 and 2 * (below + math.comb(count, k + 1)) <= error * 2**count:
        k += 1
        below += math.comb(count, k)
    return k
