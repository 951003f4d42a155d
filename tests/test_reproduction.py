"""docs/reproduction.md and docs/collapse.md say what the result files say, and name options that exist."""

import json
import re
import statistics
from pathlib import Path

import pytest
import yaml

from fpo_train.config import PENALTY_KINDS, RunConfig
from fpo_train.config.profiles import PROFILES
from fpo_train.report.verdicts import paired

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
SHOWN = ("none", "practical", "relaxed", "tracin", "exact", "residual")

# the published procedure, run: final utilities of seeds 0, 1, 2
NEURAL = {"none": (2.308, 3.522, 2.790), "relaxed": (9.741, 9.722, 9.947), "practical": (8.448, 8.594, 7.372)}
LINEAR = {"none": 3.9322, "relaxed": 9.8060, "practical": 5.5331}


def final(folder):
    """environment's penalty → seed → final numbers."""
    (found,) = json.loads((RESULTS / folder / "summary.json").read_text()).values()
    return found


def test_the_linear_environment_is_reproduced():
    found = final("linear")
    for kind, reference in LINEAR.items():
        assert found[kind]["0"]["utility"] == pytest.approx(reference, abs=5e-4)
        assert f"{reference:.4f}" in PAGE
    assert f"{found['none']['0']['best_utility']:.4f} |" in PAGE
    cells = [line.split("|")[3] for line in PAGE.splitlines() if line.startswith("| ") and line.count("|") == 6]
    for kind in LINEAR:
        assert any(f" {found[kind]['0']['utility']:.4f}" in cell for cell in cells), kind
    for seed in range(5):
        assert table_row(found, seed) in PAGE
        assert found["residual"][str(seed)]["utility"] >= 9.5
        assert found["residual"][str(seed)]["oracle_calls"] == found["none"][str(seed)]["oracle_calls"]


def table_row(found, seed):
    ends = [found[kind][str(seed)]["utility"] for kind in SHOWN if kind in found]
    return f"| {seed} | " + " | ".join(f"{end:.3f}" for end in ends) + " |"


def test_the_neural_environment_is_reproduced():
    found = final("neural")
    for kind, references in NEURAL.items():
        ours = [found[kind][str(seed)]["utility"] for seed in range(3)]
        assert ours == pytest.approx(references, abs=0.05 if kind == "none" else 0.1)
        assert ", ".join(f"{end:.3f}" for end in references) in PAGE
        assert ", ".join(f"{end:.3f}" for end in ours) in PAGE


def test_ten_seeds_of_the_neural_environment():
    found = final("neural")
    for seed in range(10):
        assert table_row(found, seed) in PAGE
        assert found["residual"][str(seed)]["utility"] >= 9.8
        assert found["residual"][str(seed)]["oracle_calls"] == found["none"][str(seed)]["oracle_calls"]
    calls = [f"{found[kind]['0']['oracle_calls']:,}" for kind in SHOWN if kind in found]
    assert f"| oracle calls a run | {' | '.join(calls)} |" in PAGE
    for name, of in (("median", statistics.median), ("least", min)):
        ends = [of(run["utility"] for run in found[kind].values()) for kind in SHOWN if kind in found]
        assert f"| {name} | " + " | ".join(f"{end:.3f}" for end in ends) + " |" in PAGE
    failed = {seed: run["utility"] for seed, run in found["relaxed"].items() if run["utility"] < 9}
    assert f"≥ 9 on {10 - len(failed)} of ten seeds" in PAGE
    for seed, end in failed.items():
        assert f"seed {seed} ({end:.2f})" in PAGE


def test_together_as_one_after_the_other():
    apart, together = final("neural"), final("neural_together")
    for kind in ("none", "practical", "relaxed"):
        cells = [", ".join(f"{found[kind][str(s)]['utility']:.3f}" for s in range(5)) for found in (apart, together)]
        assert f"| {kind} | {cells[0]} | {cells[1]} |" in PAGE
    exact = [together["exact"][str(s)]["utility"] for s in range(5)]
    assert f"| exact | – | {', '.join(f'{end:.3f}' for end in exact)} |" in PAGE
    cost = {}
    for one in json.loads((RESULTS / "cpu-2threads" / "neural.json").read_text())["headlines"]:
        cost[one["setting"]] = one["median"]
    assert f"take {cost['none, relaxed, practical, 5 seeds']:.2f} of the time" in PAGE
    assert f"all six at ten seeds {cost['all six penalties, 10 seeds']:.2f}" in PAGE


def test_what_the_page_names_is_what_the_profile_sets():
    table = PAGE.split("## What the published script does differently")[1]
    named = re.findall(r"`([a-z_]+\.[a-z_]+)(?:: ([^`]+))?`", table)
    for name, value in named:
        assert name in PROFILES["paper"], name
        if value:
            assert yaml.safe_load(value) == PROFILES["paper"][name], name
    plain = {name for name, _ in named if PROFILES["paper"][name] == default(name)}
    assert plain == {"policy.gradient_checkpointing", "update.kl_weight"}  # as the page says
    assert len(named) >= 15


def default(name):
    group, field = name.split(".")
    return getattr(getattr(RunConfig(), group), field)


def test_the_collapse_study():
    page = (ROOT / "docs" / "collapse.md").read_text(encoding="utf-8")
    study = json.loads((RESULTS / "collapse" / "study.json").read_text())
    said = (RESULTS / "collapse" / "study.md").read_text(encoding="utf-8")
    assert said.split("\n", 2)[2].replace("## What", "### What") in page
    found = {kind: {seed: run["gold"] for seed, run in one["final"].items()} for kind, one in study.items()}
    for other in ("practical", "exact", "residual"):
        against = study["relaxed"]["against"][other]["gold"]
        assert against["low"] > 0
        assert f"`{other}` by {against['mean']:+.3f} [{against['low']:+.3f}, {against['high']:+.3f}]" in page
    assert f"(p = {study['relaxed']['against']['none']['gold']['p']:.3f})" in page
    assert all(max(found, key=lambda kind, seed=seed: found[kind][seed]) == "relaxed" for seed in found["none"])
    asked = yaml.safe_load((RESULTS / "collapse" / "study.yaml").read_text(encoding="utf-8"))
    assert asked["penalties"] == list(PENALTY_KINDS)
    assert f"--seeds {','.join(map(str, asked['seeds']))}" in page
    shipped = yaml.safe_load((ROOT / "fpo_train" / "configs" / "study.yaml").read_text(encoding="utf-8"))
    for group, settings in shipped.items():
        if group != "out":
            run = asked["run"][group]
            assert settings.items() <= run.items() if isinstance(settings, dict) else settings == run


def test_the_study_once_more():
    page = " ".join((ROOT / "docs" / "collapse.md").read_text(encoding="utf-8").split())
    first, again = (json.loads((RESULTS / name / "study.json").read_text()) for name in ("collapse", "collapse_again"))
    gains = [
        [found["relaxed"]["final"][seed]["gold"] - run["gold"] for seed, run in found["none"]["final"].items()]
        for found in (first, again)
    ]
    assert f"`relaxed` is higher on {sum(gain > 0 for gain in gains[1])} of 5" in page
    against = paired(gains[1])
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"alone give {against['mean']:+.2f} [{against['low']:+.2f}, {against['high']:+.2f}]" in readme
    for found, where in ((against, "of 5: "), (paired(gains[0] + gains[1]), "All ten seeds together: ")):
        interval = f"[{found['low']:+.3f}, {found['high']:+.3f}], p = {found['p']:.3g}"
        assert f"{where}{found['mean']:+.3f} {interval}" in page
