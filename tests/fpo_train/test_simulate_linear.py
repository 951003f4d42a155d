"""The linear environment against the reference tables, and what `run` leaves on disk."""

import csv
import json
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from fpo_train.report import figures
from fpo_train.report.tables import format_table
from fpo_train.simulate import linear

# linear environment, seed 0: signal, noise, final U, best U
REFERENCE = {
    "none": (4.0634, 1.6480, 3.9322, 5.9665),
    "relaxed": (3.2749, 0.1718, 9.8060, 9.8401),
    "practical": (3.4191, 1.3928, 5.5331, 5.9436),
}
# the table of `residual`: final utility at seeds 0, 1, 2
BY_SEED = {"none": (3.93, 4.01, 3.69), "practical": (5.53, 5.66, 4.99), "relaxed": (9.81, 9.81, 9.81)}
KEYS = ["signal", "noise", "utility", "best_utility"]
PUBLISHED = ("none", "relaxed", "practical")
SHORT = linear.LinearSettings(iterations=20)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("linear") / "new" / "folder"
    return out, linear.run(PUBLISHED, [0, 1, 2], out)


@pytest.mark.parametrize("penalty", REFERENCE)
def test_reproduces_the_reference_table(results, penalty):
    final = results[1]["linear"][penalty]["0"]
    # the reference is printed to 4 decimals: half a unit of the last one, and rounding
    assert [final[key] for key in KEYS] == pytest.approx(REFERENCE[penalty], abs=6e-5)


@pytest.mark.parametrize("penalty", BY_SEED)
def test_reproduces_final_utility_of_other_seeds(results, penalty):
    measured = [results[1]["linear"][penalty][seed]["utility"] for seed in "012"]
    assert measured == pytest.approx(BY_SEED[penalty], abs=5.01e-3)


def test_simulate_agrees_with_a_plain_loop():
    """the reference recursion written out coordinate by coordinate, for a few steps of each penalty."""
    target = np.array([2.0] * 3 + [0.0] * 47)

    def score(y):
        return 10 * np.exp(-0.3 * np.sum((y - target) ** 2))

    for penalty in PUBLISHED:
        w = np.array([1.0] * 3 + [0.0] * 47) + np.random.RandomState(5).normal(0, 0.1, 50)
        y = np.zeros(50)
        expected = [[0.0, 0.0, score(y), 0.0]]

        def objective(y, w=w, penalty=penalty):
            bracket = {"none": 0.0, "relaxed": w @ y - score(y), "practical": 1.0}[penalty]
            return w @ y - 0.1 * bracket * (y @ y) - 0.1 * (y @ y)

        for _ in range(SHORT.iterations):
            gradient = np.zeros(50)
            for axis in range(50):
                shifted = y.copy()
                shifted[axis] += 0.05
                gradient[axis] = (objective(shifted, w) - objective(y, w)) / 0.05
            y = y + 0.02 * gradient
            w = w * (1 - 1e-4) + 0.005 * 2 * (score(y) - w @ y) * y
            expected.append([np.linalg.norm(y[:3]), np.linalg.norm(y[3:]), score(y), w @ y])
        run = linear.simulate(penalty, 5, SHORT)
        got = np.stack([run.signal, run.noise, run.utility, run.proxy_reward], axis=1)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_summary_file_holds_what_run_returns(results):
    out, summary = results
    assert json.loads((out / "summary.json").read_text()) == summary
    assert set(summary) == {"linear"}
    assert list(summary["linear"]) == list(PUBLISHED)
    for by_seed in summary["linear"].values():
        assert list(by_seed) == ["0", "1", "2"]
        assert all(list(final) == [*KEYS, "oracle_calls"] for final in by_seed.values())


def test_curves_file_has_every_iteration(results):
    out, summary = results
    with (out / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["environment", "penalty", "seed", "iteration", "signal", "noise", "utility", "proxy_reward"]
    assert list(rows[0]) == columns
    assert len(rows) == 3 * 3 * 301  # the start is iteration 0
    for penalty, by_seed in summary["linear"].items():
        for seed, final in by_seed.items():
            curve = [row for row in rows if row["penalty"] == penalty and row["seed"] == seed]
            assert [int(row["iteration"]) for row in curve] == list(range(301))
            assert {key: float(curve[-1][key]) for key in KEYS[:3]} == {key: final[key] for key in KEYS[:3]}
            assert max(float(row["utility"]) for row in curve) == final["best_utility"]


@pytest.mark.parametrize("name", ["phase", "utility", "pca"])
def test_figures_show_every_penalty_in_its_colour(results, name):
    path = results[0] / "figures" / f"{name}.png"
    image = matplotlib.image.imread(path)[..., :3]
    assert min(image.shape[:2]) >= 400
    for penalty in PUBLISHED:
        hexadecimal = figures.penalty_style(penalty)["color"].lstrip("#")
        color = np.array([int(hexadecimal[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        assert (np.abs(image - color).max(-1) < 0.01).sum() > 200, penalty
    assert figures.inline_png(path).startswith("data:image/png;base64,iVBORw0KGgo")


def test_same_call_gives_the_same_bytes(tmp_path):
    for name in "ab":
        linear.run(["none"], [3], tmp_path / name, SHORT)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert [str(file) for file in files] == [
        "curves.csv",
        *sorted(
            [f"figures/{name}.{kind}" for name in ("pca", "phase", "utility") for kind in ("pdf", "png")]
            + [f"figures/{name}.svg" for name in ("noise", "phase", "utility")]
        ),
        "summary.json",
    ]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_folder_that_holds_something_is_refused_and_kept(tmp_path):
    (tmp_path / "summary.json").write_text("mine")
    with pytest.raises(FileExistsError, match="out must be a new or empty folder"):
        linear.run(["none"], [0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert (tmp_path / "summary.json").read_text() == "mine"
    with pytest.raises(FileExistsError, match="out must be a new or empty folder"):
        linear.run(["none"], [0], tmp_path / "summary.json")
    assert (tmp_path / "summary.json").read_text() == "mine"


def test_empty_folder_is_used(tmp_path):
    linear.run(["none"], [0], tmp_path, SHORT)
    assert (tmp_path / "summary.json").is_file()


def test_unknown_penalty_names_the_supported_ones_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"none, practical, relaxed.*got 'brave'"):
        linear.simulate("brave")
    for penalties, seeds in ((["none", "brave"], [0]), ([], [0]), (["none"], []), (["none"], [-1])):
        with pytest.raises(ValueError):
            linear.run(penalties, seeds, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [{"signal_axes": 0}, {"signal_axes": 51}, {"iterations": 0}, {"difference_step": 0.0}])
def test_settings_refuse_what_cannot_run(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        linear.LinearSettings(**bad)


def test_settings_change_the_run():
    run = linear.simulate("none", settings=linear.LinearSettings(dimension=7, signal_axes=2, iterations=4))
    assert run.signal.shape == run.noise.shape == run.utility.shape == run.proxy_reward.shape == (5,)
    assert run.utility[0] == pytest.approx(10 * np.exp(-0.3 * 8))


def test_table_is_aligned_with_four_decimals(results):
    lines = format_table(results[1]).splitlines()
    assert len(lines) == 1 + 3 * 4
    assert len({len(line) for line in lines if "median" not in line}) == 1
    assert lines[4].split() == ["linear", "none", "median", "4.0634", "1.6480", "3.9322", "5.9665"]
    assert lines[0].split() == [
        "environment",
        "penalty",
        "seed",
        "signal",
        "noise",
        "utility",
        "best",
        "utility",
        "oracle",
        "calls",
    ]
    assert lines[1].split() == ["linear", "none", "0", "4.0634", "1.6480", "3.9322", "5.9665", "300"]


def test_every_penalty_has_a_style_of_its_own():
    names = ("none", "practical", "relaxed", "tracin", "exact", "residual")
    styles = [figures.penalty_style(name) for name in names]
    assert len({style["color"] for style in styles}) == len({str(style["linestyle"]) for style in styles}) == 6
    with pytest.raises(ValueError, match=r"practical.*got 'other'"):
        figures.penalty_style("other")


def test_figures_leave_matplotlib_as_it_was(tmp_path):
    """In a fresh process: neither import nor a run loads pyplot, picks a backend or changes rcParams."""
    code = (
        "import sys, matplotlib\n"
        "raw = lambda: list(dict.items(matplotlib.rcParams))  # reading by RcParams resolves the backend\n"
        "before = raw()\n"
        "from fpo_train.simulate import linear\n"
        "linear.run(['none'], [0], sys.argv[1], linear.LinearSettings(iterations=2))\n"
        "assert raw() == before and 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_residual_needs_no_label_beyond_the_baseline_s():
    """Five first reward models, by the default rule."""
    for seed in range(5):
        none, residual = linear.simulate("none", seed), linear.simulate("residual", seed)
        assert residual.oracle_calls == none.oracle_calls == 300
        assert residual.utility[-1] >= 9.5


@pytest.mark.parametrize(("penalty", "least"), [("tracin", 9.8), ("exact", 9.8)])
def test_the_other_penalties_that_ask_the_oracle(penalty, least):
    run = linear.simulate(penalty)
    assert run.utility[-1] >= least
    assert run.oracle_calls > 15_000


def test_exact_steering_is_the_derivative_through_retraining():
    """How the refitted reward of an action changes as a labelled one moves, by central differences of the refit."""
    rng = np.random.default_rng(4)
    actions, own = rng.normal(size=(7, 50)), rng.normal(size=50)
    utilities, at, step = linear.utility(actions), 3, 1e-5
    target = np.array([2.0] * 3 + [0.0] * 47)
    slope = -2 * 0.3 * utilities[at] * (actions[at] - target)  # ∇U

    def reward(moved):
        labelled = actions.copy()
        labelled[at] = moved
        return own @ linear.refit(labelled, linear.utility(labelled))

    axes = step * np.eye(50)
    numeric = np.array([(reward(actions[at] + axis) - reward(actions[at] - axis)) / (2 * step) for axis in axes])
    analytic = linear.steering(own, at, actions, utilities, slope)
    assert np.linalg.norm(analytic - 7 * numeric) <= 1e-7 * np.linalg.norm(analytic)


def test_exact_is_minus_the_steering_it_stands_for():
    """The gradient of the penalty at the action just labelled, with the refit as reward model."""
    rng = np.random.default_rng(5)
    actions = rng.normal(size=(6, 50))
    utilities = linear.utility(actions)
    played = linear.Played(actions=list(actions), utilities=list(utilities))
    w, y = linear.refit(actions, utilities), actions[-1]
    probes = 1e-6 * np.vstack([np.zeros(50), np.eye(50), -np.eye(50)])
    penalty = linear.penalties("exact", y + probes, w, played, linear.DEFAULTS)
    numeric = (penalty[1:51] - penalty[51:]) / 2e-6
    slope = -2 * 0.3 * utilities[-1] * (y - np.array([2.0] * 3 + [0.0] * 47))
    analytic = linear.steering(y, 5, actions, utilities, slope)
    assert np.linalg.norm(numeric + analytic) <= 1e-6 * np.linalg.norm(analytic)
