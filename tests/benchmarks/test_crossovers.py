"""Where forming is sooner: foretold by the cost model, and read off what was timed."""

import math

import pytest

from benchmarks.cases.products import list_pairs
from benchmarks.report.crossovers import ROOMS, crossing, crossovers, predicted
from fpo_kernels.cost import Work, choose_way


def row(tokens, competitor, least, *, full=True, status="timed"):
    setting = {"pairs": "gram", "examples": 4, "p": 48, "q": 32, "tokens": tokens, "full": full}
    return {"setting": setting, "competitor": competitor, "status": status, "seconds": {"min": least}}


def test_a_crossing_lies_on_the_line_between_two_lengths():
    assert crossing({16: 8.0, 64: 2.0, 256: 0.5}) == pytest.approx(128.0)
    assert crossing({100: 1.0, 200: 0.5}) == pytest.approx(100.0)
    assert crossing({16: 0.9, 64: 1.25, 256: 0.8}) == pytest.approx(math.sqrt(64 * 256))  # for good
    assert crossing({16: 3.0, 64: 2.0}) is None
    assert crossing({16: 0.3, 64: 0.2}) is None


@pytest.mark.parametrize("device", ROOMS)
@pytest.mark.parametrize(("pairs", "examples"), [("steering", 9), ("gram", 16)])
def test_what_is_foretold_is_the_least_length_that_forms(device, pairs, examples):
    least = predicted(pairs, examples, 576, 1536, device)
    ways = []
    for tokens in (least - 1, least):
        work = Work.of([tokens] * examples, list_pairs(examples, pairs).numpy())
        ways.append(choose_way(work, 576, (1536,), device, *ROOMS[device]))
    assert ways == ["tokens", "form"]


def test_rows_of_equal_lengths_that_were_timed_count():
    rows = [row(16, "tokens", 1.0), row(16, "form", 4.0), row(64, "tokens", 4.0), row(64, "form", 1.0)]
    rows += [row(32, "form", 9.0, full=False), row(128, "form", 9.0, status="failed"), row(256, "form", 1.0)]
    (found,) = crossovers(rows, "cpu")
    assert found.timed == pytest.approx(32.0)
    assert (found.first, found.last) == (16, 64)
    assert found.predicted == predicted("gram", 4, 48, 32, "cpu")
    assert crossovers(rows[:2], "cpu") == []
