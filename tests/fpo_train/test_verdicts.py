"""What a report says of a run: verdicts both ways, too few iterations, which replies, and what a warning could see."""

import html
import math
import re

import numpy as np
import pytest

from fpo_train.report import verdicts
from fpo_train.report.page import write_report
from fpo_train.report.watch import could_warn
from tests.fpo_train.test_report import row_of, write

NOISE = (0.03, -0.05, 0.02, 0.0, -0.02, 0.04, -0.01, 0.05)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    monkeypatch.setattr("fpo_train.report.panels.draw", lambda *arguments: [])


def rows_of(count, slope, key="audit_gain", reward=0.0, **more):
    """A run whose quantity moves by `slope` from end to end, with a little noise."""
    return [
        row_of(i, **{"reward": reward * i / count + NOISE[i % 8], key: slope * i / count + NOISE[(3 * i) % 8]} | more)
        for i in range(1, count + 1)
    ]


def said(out, runs, **config):
    """Verdicts of the page, a penalty's each, and the whole page."""
    kinds = tuple(runs)
    for kind, rows in runs.items():
        write(out / "parts" / kind, rows, [])
    write(out, [], [], kinds, **config)
    for kind in kinds:
        (out / kind / "metrics.jsonl").write_text((out / "parts" / kind / "metrics.jsonl").read_text())
    page = html.unescape(write_report(out).read_text(encoding="utf-8"))
    lines = re.findall(r"<li><b>(\w+)</b>\. (.*?)</li>", page)
    return dict(lines), page


def test_verdicts_both_ways(tmp_path):
    runs = {
        "none": rows_of(32, -2.0, reward=3.0),
        "practical": rows_of(32, 2.0, reward=-3.0),
        "relaxed": rows_of(32, 0.0),
    }
    found, page = said(tmp_path, runs)
    of_all = "the oracle's utility of all candidates, less that of the base model's replies,"
    assert re.match(rf"Worse: {of_all} fell by -1\.\d+ \[-1\.\d+, -1\.\d+\] nats/token\.", found["none"])
    assert "score of all candidates rose by +2." in found["none"]
    assert "rises while the oracle's utility falls is collapse" in found["none"]
    assert re.match(rf"Better: {of_all} rose by \+1\.\d+ \[\+1\.\d+, \+1\.\d+\] nats/token\.", found["practical"])
    assert "score of all candidates fell by -2." in found["practical"]
    assert "is collapse" not in found["practical"]
    assert f"No change that is told apart from chance: {of_all} moved by " in found["relaxed"]
    assert re.search(r"At the end, against none: higher by \+3\.\d+ \[\+3\.\d+, \+3\.\d+\]", found["practical"])
    assert "At the end" not in found["none"]
    assert "Judged are all candidates" in page
    assert "Welch's t" in page
    turned, _ = said(
        tmp_path / "turned", {"none": runs["practical"], "practical": runs["none"], "relaxed": runs["practical"]}
    )
    assert "against none: lower by -3." in turned["practical"]
    assert "against none: not told apart from chance, +0.000" in turned["relaxed"]


@pytest.mark.parametrize(("count", "few"), [(6, True), (15, True), (16, False)])
def test_too_few_iterations_to_say(tmp_path, count, few):
    found, _ = said(tmp_path, {"none": rows_of(count, -9.0), "practical": rows_of(count, 9.0)})
    assert found["none"].startswith(f"Too few iterations to say: {count} of them" if few else "Worse: ")
    assert ("16 are needed" in found["practical"]) == few
    assert ("At the end, against none" not in found["practical"]) == few


def test_iterations_without_a_number_are_not_counted():
    rows = rows_of(16, 5.0)
    assert verdicts.change(rows, "audit_gain").way == 1
    rows[1]["audit_gain"] = None
    assert verdicts.change(rows, "audit_gain").way is None


def test_what_runs_do_not_share_they_are_not_judged_by(tmp_path):
    """A penalty that buys all labels has `audit_gain`; one that does not is judged by what both have."""
    bought = [row | {"oracle_gain": row["audit_gain"]} for row in rows_of(16, 1.0)]
    alone = rows_of(16, 1.0, key="oracle_gain")
    found, page = said(tmp_path / "both", {"none": alone, "relaxed": bought}, oracle={"kind": "judge"})
    assert all("the oracle's utility of the learnt reply" in one for one in found.values())
    assert "They are each penalty's own choice, so penalties are not to be compared by them." in page
    assert "logging.audit asks the oracle" in page
    found, page = said(tmp_path / "one", {"relaxed": bought})
    assert "the oracle's utility of all candidates" in found["relaxed"]
    assert "logging.audit" not in page.split("<h2>At a glance")[0]


@pytest.mark.parametrize(("count", "window", "could"), [(6, 10, 0), (9, 10, 0), (10, 10, 1), (25, 10, 16), (6, 4, 3)])
def test_whether_a_warning_could_have_spoken(tmp_path, count, window, could):
    rows = rows_of(count, 0.0, key="oracle_utility")
    assert could_warn(rows, window) == could
    _, page = said(tmp_path, {"none": rows}, logging={"window": window})
    if could:
        assert f"none: a warning could have been given at {could} of {count} iterations." in page
    else:
        assert f"none: none could have been given in {count} iterations; a warning looks back over {window} " in page


def test_after_a_warning_there_is_none_for_a_window():
    rows = rows_of(25, 0.0, key="oracle_utility")
    rows[11]["warning"] = "possible collapse"
    assert could_warn(rows, 10) == 3 + 4  # iterations 10, 11 and 12, and from 22 on
    for row in rows:
        row["oracle_utility"] = None
    assert could_warn(rows, 10) == 0


def test_the_interval_is_welch_s():
    """Against numbers worked out by hand: variances 5/3 and 20/3 of four each, 4.41 degrees of freedom, taken as 4."""
    values = [1, 2, 3, 4, *[0] * 8, 10, 12, 14, 16]
    found = verdicts.change([{"x": value} for value in values], "x")
    assert (found.first, found.last, found.size, found.way) == (2.5, 13, 10.5, 1)
    reach = 2.776445 * math.sqrt((5 / 3 + 20 / 3) / 4)
    assert (found.low, found.high) == (pytest.approx(10.5 - reach, abs=1e-4), pytest.approx(10.5 + reach, abs=1e-4))
    flat = verdicts.change([{"x": 1.0}] * 16, "x")
    assert (flat.low, flat.high, flat.way) == (0, 0, 0)


def test_how_often_noise_alone_is_called_a_change():
    """At most one run in twenty, and not much less."""
    draws = np.random.default_rng(0).normal(size=(400, 40))
    ways = [verdicts.change([{"x": value} for value in run], "x").way for run in draws]
    assert 0.02 < np.mean(np.abs(ways)) < 0.075
