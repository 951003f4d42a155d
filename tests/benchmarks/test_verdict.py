"""Slower, faster or no change, on made-up rounds of a machine with heavy tails and bursts."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.comparing.measuring import settled
from benchmarks.comparing.verdict import ERROR, LOOKS, SHARES, Verdict, interval, judge, together

MARGIN = 0.05
RUNS = 200
numbers = st.floats(-3, 3, allow_nan=False)


def machine(ratio: float, seed: int):
    """Log ratios of rounds A B B A, of which the least times count, on a busy machine.

    Bursts begin and end at any sample and make several in a row 1.2 to 4 times as long; each sample has noise with two
    finite moments beside; and in every round things lie elsewhere in memory, which is worth 3% to each side.
    """
    chance = random.Random(seed)
    burst = 1.0
    turn = 0
    while True:
        places = [chance.gauss(0, 0.03) for _ in range(2)]
        best = [math.inf, math.inf]
        for side in (0, 1, 1, 0) if turn % 2 == 0 else (1, 0, 0, 1):
            if chance.random() < 0.15:
                burst = 1.0 if burst > 1 else chance.uniform(1.2, 4.0)
            noise = 0.02 * (chance.paretovariate(2.2) - 1)
            best[side] = min(best[side], (ratio if side else 1.0) * math.exp(places[side] + noise) * burst)
        yield math.log(best[1] / best[0])
        turn += 1


def told(ratio: float, seed: int, margin: float = MARGIN) -> Verdict:
    logs: list[float] = []
    for log in machine(ratio, seed):
        logs.append(log)
        verdict = judge(logs, margin)
        if verdict is not None:
            return verdict
    raise AssertionError("the machine stopped")


@pytest.mark.parametrize(("ratio", "word"), [(1.2, "slower"), (1 / 1.2, "faster")])
def test_a_fifth_is_found_in_the_noise(ratio, word):
    found = [told(ratio, seed) for seed in range(RUNS)]
    assert [verdict.word for verdict in found] == [word] * RUNS
    assert sum(verdict.low < ratio < verdict.high for verdict in found) >= RUNS - 2  # one in a thousand may be out


def test_noise_is_not_called_a_change():
    found = [told(1.0, seed) for seed in range(RUNS)]
    assert {verdict.word for verdict in found} <= {"no change", "undecided"}
    assert sum(verdict.word == "no change" for verdict in found) >= RUNS - 2


def test_looking_again_and_again_errs_no_more_often_than_promised():
    """Without a margin, any verdict on identical code is an error: one in a thousand."""
    wrong = sum(told(1.0, seed, margin=0.0).word != "undecided" for seed in range(1000))
    assert wrong <= 4  # five of a thousand have a chance of 0.4% at the promised rate


def test_the_shares_add_up_and_the_first_look_can_decide():
    assert sum(SHARES) == pytest.approx(ERROR)
    assert len(SHARES) == len(LOOKS)
    assert interval([0.0] * LOOKS[0], SHARES[0]) == (0.0, 0.0)
    assert interval([0.0] * (LOOKS[0] - 1), SHARES[0]) is None


@given(st.lists(numbers, min_size=1, max_size=80), st.floats(1e-6, 0.5))
def test_the_interval_is_the_sign_tests(values, error):
    """As far as the error allows, and no further, in exact arithmetic."""

    def beyond(skipped: int) -> Fraction:
        return Fraction(2 * sum(math.comb(len(values), k) for k in range(skipped + 1)), 2 ** len(values))

    found = interval(values, error)
    if found is None:
        assert beyond(0) > error
        return
    ordered = sorted(values)
    fitting = [k for k in range((len(values) + 1) // 2) if beyond(k) <= error]
    assert found == (ordered[fitting[-1]], ordered[-1 - fitting[-1]])


@given(st.lists(numbers, min_size=LOOKS[0], max_size=LOOKS[0]), numbers)
def test_the_interval_moves_with_what_it_is_of(values, by):
    low, high = interval(values, SHARES[0])
    moved = interval([value + by for value in values], SHARES[0])
    assert moved == pytest.approx((low + by, high + by))


@given(st.lists(numbers, min_size=1, max_size=LOOKS[-1] + 5))
def test_a_verdict_comes_at_looks_and_at_the_end_only(logs):
    now = judge(logs, MARGIN)
    if now is not None:
        assert len(logs) in LOOKS or len(logs) > LOOKS[-1]
        assert now.word != "undecided" or len(logs) >= LOOKS[-1]
    assert judge(logs, MARGIN, over=True).rounds == len(logs)


def test_verdicts_in_words():
    assert str(Verdict("slower", 1.194, 1.137, 1.252, 18)) == "slower by 19 % [14, 25]"
    assert str(Verdict("faster", 0.8, 0.75, 0.9, 18)) == "faster by 20 % [10, 25]"
    assert str(Verdict("no change", 1.001, 0.968, 1.021, 18)) == "no change: within ±3.2 %"
    assert str(Verdict("undecided", 1.06, 0.99, 1.12, 300)) == "undecided: +6 % [-1, +12]"
    assert str(judge([0.1] * 3, MARGIN, over=True)) == "undecided: 3 rounds, 12 are the fewest that decide"


def verdicts(*words: str) -> list[Verdict]:
    return [Verdict(word, 1.1, 1.05, 1.2, 12) for word in words]


@pytest.mark.parametrize(
    ("words", "settles"),
    [
        ((), None),
        (("no change",), "no change"),
        (("undecided",), "undecided"),
        (("slower",), None),
        (("slower", "slower"), "slower"),
        (("slower", "no change"), None),
        (("slower", "no change", "no change"), "no change"),
        (("slower", "undecided", "slower"), "slower"),
        (("faster", "no change", "slower"), "undecided"),
    ],
)
def test_slower_and_faster_have_to_come_twice(words, settles):
    found = settled(verdicts(*words))
    assert (found.word if found else None) == settles


def test_two_verdicts_in_one_hold_both():
    found = together("slower", [Verdict("slower", 1.1, 1.06, 1.2, 12), Verdict("slower", 1.21, 1.1, 1.4, 18)])
    assert (found.low, found.high, found.rounds) == (1.06, 1.4, 30)
    assert found.ratio == pytest.approx(math.sqrt(1.1 * 1.21))
