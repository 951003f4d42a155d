"""The warning of collapse against numpy's regression, and how often it fires."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_train.report import records
from fpo_train.report.watch import ORACLE, PROXY, collapse, slope


def run_of(proxy, oracle):
    return [
        {"iteration": i, PROXY: None if p is None else float(p), ORACLE: None if o is None else float(o)}
        for i, (p, o) in enumerate(zip(proxy, oracle, strict=True), 1)
    ]


def warned(rows, window=10):
    """Iterations with a warning, as a run gives them: a row at a time."""
    for end in range(1, len(rows) + 1):
        rows[end - 1]["warning"] = collapse(rows[:end], window)
    return [row["iteration"] for row in rows if row["warning"]]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-50, 50), st.floats(-1e3, 1e3)), min_size=4, max_size=30, unique_by=lambda p: p[0])
)
def test_the_slope_is_that_of_least_squares(points):
    x, y = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    found, error = slope(list(x), list(y))
    design = np.stack([np.ones_like(x), x], 1)
    solution, *_ = np.linalg.lstsq(design, y, rcond=None)
    residual = y - design @ solution
    covariance = residual @ residual / (len(x) - 2) * np.linalg.inv(design.T @ design)
    assert found == pytest.approx(solution[1], rel=1e-7, abs=1e-7)
    assert error == pytest.approx(covariance[1, 1] ** 0.5, rel=1e-5, abs=1e-7)


def test_only_a_rising_proxy_with_a_falling_oracle_is_warned_about():
    noise = np.random.default_rng(0).normal(size=(2, 60)) * 0.1
    up, down = np.arange(60) * 0.1 + noise[0], -np.arange(60) * 0.1 + noise[1]
    assert warned(run_of(up, down)) == [10, 20, 30, 40, 50, 60]  # at most once a window
    assert warned(run_of(up, up)) == warned(run_of(down, down)) == warned(run_of(down, up)) == []
    assert warned(run_of(up, 0 * up)) == warned(run_of(0 * up, down)) == []
    assert warned(run_of(up[:9], down[:9])) == []  # less than a window
    text = collapse(run_of(np.arange(10.0), -2 * np.arange(10.0)), 10)
    assert "iterations 1 to 10 the reward rose by 9 while the oracle's utility of the learnt replies fell by 18" in text


def test_rows_without_a_number_are_left_out():
    up, down = list(np.arange(12.0)), list(-np.arange(12.0))
    holes = [None if i % 2 else value for i, value in enumerate(down)]
    assert warned(run_of(up, holes)) == []  # five of ten are not more than half
    assert warned(run_of(up, [None, None, *down[2:]])) == [10]
    assert warned(run_of([None] * 12, down)) == []
    assert warned(run_of(up, down[:4] + [None] * 8), 8) == []
    older = [{"iteration": i, PROXY: float(i)} for i in range(1, 12)]  # rows from before the oracle was in them
    assert collapse(older, 10) is None


@pytest.mark.parametrize("stop", [7, 12, 23])
def test_a_resumed_run_is_warned_alike(stop, tmp_path):
    generator = np.random.default_rng(1)
    up = np.arange(40) * 0.3 + generator.normal(size=40)
    rows = run_of(up, -up + generator.normal(size=40))
    whole = [dict(row) for row in rows]
    assert warned(whole)
    path = tmp_path / "metrics.jsonl"
    first = [dict(row) for row in rows[:stop]]
    warned(first)
    records.append(path, first)
    for row in rows[stop:]:
        row["warning"] = collapse([*records.read(path), row], 10)
        records.append(path, [row])
    assert records.read(path) == json.loads(json.dumps(whole))


def rate(runs, drift, seed):
    """Share of runs of 200 iterations that are warned about, and the median first warning."""
    generator = np.random.default_rng(seed)
    first = []
    for _ in range(runs):
        p, o = generator.normal(size=(2, 200)) + np.outer([1, -1], np.arange(200) * drift / 10)
        rows = run_of(p, o)
        first.append(next((end for end in range(10, 201) if collapse(rows[:end], 10)), None))
    found = [iteration for iteration in first if iteration]
    return len(found) / runs, np.median(found) if found else None


def test_noise_is_seldom_warned_about_and_drift_soon():
    """The rates of the docstring, on fewer runs."""
    share, _ = rate(300, drift=0, seed=2)
    assert share <= 0.04  # 1.4 % of many
    share, after = rate(60, drift=3, seed=3)
    assert share == 1
    assert after <= 20
