"""The study on a tiny model: runs a process each, kept and gone on with, and what is said of them."""

import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from fpo_train.cli import main
from fpo_train.report.verdicts import paired, student, student_quantile
from fpo_train.study.study import _page, nearer, summarise, write_study
from tests.fpo_train.runs import arguments, children, contents, is_running


def words(tiny, out, *more):
    return ["study", *arguments(tiny, out, "--compare", "none,residual", "--seeds", "0,3", *more)[1:]]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "s"
    assert main(words(tiny, out, "--jobs", "2")) == 0
    return out


def test_what_a_study_leaves(folder):
    summary = json.loads((folder / "study.json").read_text())
    assert list(summary) == ["none", "residual"]
    for kind in summary:
        assert set(summary[kind]["final"]) == {"0", "3"}
        assert summary[kind]["oracle_calls"] == {"0": 6, "3": 6}  # an audit is no label that was bought
        for seed in "03":
            rows = [json.loads(line) for line in (folder / kind / f"seed-{seed}" / "metrics.jsonl").open()]
            assert [row["audit_calls"] for row in rows] == [4, 4, 4]
            assert summary[kind]["final"][seed]["gold"] == pytest.approx(rows[-1]["audit_utility"])
    with (folder / "curves.csv").open(newline="") as file:
        curves = list(csv.DictReader(file))
    assert len(curves) == 2 * 2 * 3
    assert {row["seed"] for row in curves} == {"0", "3"}
    first = {row["penalty"]: row["audit_utility"] for row in curves if (row["seed"], row["iteration"]) == ("3", "1")}
    assert first["none"] == first["residual"]  # the same start and the same first replies
    page = (folder / "study.md").read_text()
    assert "| none |" in page
    assert "- `residual`: [seed 0](residual/seed-0/report.html), [seed 3](residual/seed-3/report.html)" in page
    assert all((folder / path).is_file() for path in re.findall(r"\]\((.*?)\)", page))
    assert "- `residual` against `none`: " in page
    for kind in ("png", "pdf"):
        assert (folder / "figures" / f"study.{kind}").stat().st_size > 1000


def test_finished_runs_are_kept_and_broken_ones_go_on(folder, tiny, tmp_path, capfd):
    out = tmp_path / "s"
    shutil.copytree(folder, out)
    untouched = {p: p.stat().st_mtime_ns for p in (out / "none").rglob("metrics.jsonl")}
    broken = out / "residual" / "seed-3"
    whole = (broken / "metrics.jsonl").read_text()
    shutil.rmtree(broken / "checkpoints" / "3")
    (broken / "report.html").unlink()
    page = (out / "study.md").read_text()
    asked = yaml.safe_load((out / "study.yaml").read_text())
    del asked["run"]["logging"]["watched"]  # as a study of an earlier version
    (out / "study.yaml").write_text(yaml.safe_dump(asked))
    assert main(words(tiny, out)) == 0
    said = [line[10:] for line in capfd.readouterr().err.splitlines()]
    assert said == ["study: 12 of 12 iterations (residual, seed 3: done; 4 of 4 runs)"]  # the others are not begun
    assert untouched == {p: p.stat().st_mtime_ns for p in untouched}
    keys = ("audit_utility", "reward", "kl")
    before, after = (
        [json.loads(line) for line in text.splitlines()] for text in (whole, (broken / "metrics.jsonl").read_text())
    )
    assert [[row[key] for key in keys] for row in after] == [[row[key] for key in keys] for row in before]
    assert (out / "study.md").read_text() == page


def test_a_study_grows_by_seeds(folder, tiny, tmp_path, capfd):
    out = tmp_path / "s"
    shutil.copytree(folder, out)
    before = {name: bytes_ for name, bytes_ in contents(out).items() if len(name.parts) > 1 and "seed" in name.parts[1]}
    more = "--seeds", "7,0,3"
    assert main(words(tiny, out, *more)) == 1
    assert "holds the seeds 0,3; --resume adds those that are missing" in capfd.readouterr().err
    assert main(words(tiny, out, "--seeds", "0,7", "--resume")) == 1
    assert "holds the seeds 0,3; ask for all of them, 3 too" in capfd.readouterr().err
    assert main(words(tiny, out, *more, "--penalty.gamma", "3", "--resume")) == 1
    assert "penalty.gamma was 1.0 and is 3.0 now" in capfd.readouterr().err
    assert contents(out) == contents(folder)

    assert main(words(tiny, out, *more, "--resume", "--jobs", "2")) == 0
    assert "seed 7: done" in capfd.readouterr().err
    after = contents(out)
    assert {name: after[name] for name in before} == before
    asked = yaml.safe_load((out / "study.yaml").read_text())
    assert asked["seeds"] == [0, 3, 7]
    assert asked["run"] == yaml.safe_load((folder / "study.yaml").read_text())["run"]
    summary = json.loads((out / "study.json").read_text())
    assert set(summary["residual"]["final"]) == {"0", "3", "7"}
    assert summary["residual"]["against"]["none"]["gold"]["pairs"] == 3
    assert "over 3 seeds" in (out / "study.md").read_text()
    with (out / "curves.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 3 * 3
    assert main(words(tiny, out, *more)) == 0  # all there: nothing to add
    assert contents(out) == after


def test_a_study_of_an_earlier_version_grows(folder, tiny, tmp_path):
    out = tmp_path / "s"
    shutil.copytree(folder, out)
    asked = yaml.safe_load((out / "study.yaml").read_text())
    del asked["run"]["reward_model"]["fit"]
    (out / "study.yaml").write_text(yaml.safe_dump(asked))
    assert main(words(tiny, out)) == 0
    del asked["run"]["penalty"]["gamma"]
    (out / "study.yaml").write_text(yaml.safe_dump(asked))
    assert main(words(tiny, out)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_is_ended_ends_its_runs(tiny, tmp_path, number):
    out = tmp_path / "s"
    long = "--iterations", "10000", "--logging.checkpoint_every", "5000"
    command = [sys.executable, "-m", "fpo_train.cli", *words(tiny, out, "--compare", "none", *long)]
    rows = out / "none" / "seed-0" / "metrics.jsonl"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not rows.exists():
        time.sleep(0.05)
    pids = children(process.pid)
    assert len(pids) == 1
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    end = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_running, pids))
    if number == signal.SIGTERM:
        assert process.returncode == 3
        assert told.strip().splitlines()[-1] == "fpo-train study: stopped; the same command goes on"
        last = json.loads(rows.read_text().splitlines()[-1])["iteration"]
        assert (rows.parent / "checkpoints" / str(last) / "state.pt").is_file()
    assert not (out / "none" / "seed-3").exists()  # none is begun once an end was asked for
    assert not (out / "study.json").exists()


def test_other_settings_and_other_folders_are_refused(folder, tiny, tmp_path, capfd):
    assert main([*words(tiny, folder), "--penalty.gamma", "3"]) == 1
    assert "holds a study of other settings (penalty.gamma was 1.0 and is 3.0 now)" in capfd.readouterr().err
    assert main(words(tiny, folder, "--compare", "none")) == 1
    assert "(penalties was ['none', 'residual'] and is ['none'] now)" in capfd.readouterr().err
    assert main(words(tiny, tmp_path / "a", "--resume")) == 1
    assert "there is no study to resume in" in capfd.readouterr().err
    (tmp_path / "mine.txt").write_text("x")
    assert main(words(tiny, tmp_path)) == 1
    assert "is not an empty folder" in capfd.readouterr().err
    assert main(words(tiny, tmp_path / "a", "--seeds", "x")) == 2
    assert main(words(tiny, tmp_path / "a", "--jobs", "0")) == 2
    assert main([*words(tiny, tmp_path / "a"), "--dry_run", "true"]) == 1
    assert "rehearse with `fpo-train run`" in capfd.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_run_that_fails_is_named(tiny, tmp_path, capfd):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert main(words(tiny, tmp_path / "s", "--data.prompts", str(empty))) == 1
    message = capfd.readouterr().err
    assert "4 of 4 runs failed" in message
    assert f"{empty} holds no prompts" in message


def test_a_study_of_prompts_that_are_nowhere_begins_no_run(tiny, tmp_path, capfd):
    assert main(words(tiny, tmp_path / "s", "--data.prompts", "nowhere.jsonl")) == 1
    assert "no file nowhere.jsonl" in capfd.readouterr().err
    assert not (tmp_path / "s").exists()


def test_student():
    for degrees, quantile in ((1, 12.706), (2, 4.303), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042)):
        assert student_quantile(0.975, degrees) == pytest.approx(quantile, abs=6e-4)
        assert student(-quantile, degrees) == pytest.approx(0.025, abs=1e-4)
    found = paired([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3
    assert found["low"] == pytest.approx(3 - 2.776 * math.sqrt(0.5), abs=1e-3)
    assert found["p"] == pytest.approx(0.0132, abs=1e-4)
    assert paired([1.0]) == {"pairs": 1, "mean": 1.0, "low": None, "high": None, "p": None}
    assert paired([])["mean"] is None
    assert 0 <= paired([1.0, 1.0, 1.0, 1.0, 1.0001])["p"] < 1e-9
    assert paired([0.0, 0.0])["p"] == 1


def rows(gold):
    return [
        {"iteration": n, "audit_utility": gold + n / 10, "reward": 1.0, "proxy_gap": -gold, "oracle_calls": 2}
        for n in range(1, 9)
    ]


def test_what_is_told_apart():
    table = {
        "none": {seed: rows(0.1 * seed) for seed in range(5)},
        "practical": {seed: rows(0.1 * seed + 1 + 0.01 * (seed % 2)) for seed in range(5)},
        "relaxed": {seed: rows(0.1 * seed + (seed - 2)) for seed in range(5)},
    }
    summary = summarise(table)
    assert summary["none"]["final"][2]["gold"] == pytest.approx(0.2 + 0.75)  # the last two of eight
    assert summary["practical"]["against"]["none"]["gold"]["low"] > 0.98
    assert summary["practical"]["against"]["none"]["gap"]["high"] < -0.98
    relaxed = summary["relaxed"]["against"]["none"]["gold"]
    assert relaxed["low"] < 0 < relaxed["high"]
    assert summary["none"]["against"]["relaxed"]["gold"]["low"] == pytest.approx(-relaxed["high"])


def test_which_penalty_ends_nearer_to_which():
    ends = {"relaxed": [0, 1, 2, 3], "practical": [-2, 3, 0, 1], "residual": [0.5, 0.4, 2.5, 2.6]}
    summary = summarise({kind: dict(enumerate(map(rows, gold))) for kind, gold in ends.items()})
    assert nearer(summary, "residual", "practical", "relaxed")["mean"] == pytest.approx(2 - 0.5, abs=1e-6)
    assert nearer(summary, "practical", "residual", "relaxed")["mean"] == pytest.approx(0.5 - 2, abs=1e-6)


def test_a_run_without_a_last_value_is_left_out_of_the_differences():
    table = {
        "none": {0: rows(0.0), 1: rows(1.0), 2: [row | {"audit_utility": None} for row in rows(2.0)]},
        "practical": {0: rows(1.0), 1: rows(2.5), 2: rows(9.0)},
    }
    summary = summarise(table)
    assert summary["none"]["final"][2]["gold"] is None
    against = summary["practical"]["against"]["none"]["gold"]
    assert (against["pairs"], against["mean"]) == (2, pytest.approx(1.25))
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(
    "kinds", [("none",), ("practical",), ("none", "practical"), ("practical", "relaxed", "residual")]
)
def test_the_page_of_one_seed_and_of_few_penalties(kinds):
    summary = summarise({kind: {7: rows(number)} for number, kind in enumerate(kinds)})
    json.dumps(summary, allow_nan=False)
    page = _page(summary)
    assert "inf" not in page.replace("influence", "")
    assert ("- `practical` against `none`: +1.000; 1 pair of runs" in page) == (kinds == ("none", "practical"))
    assert ("than `practical` does? +0.000; 1 pair of runs" in page) == ("residual" in kinds)


def test_the_page_says_what_the_numbers_say(folder, tmp_path):
    out = tmp_path / "s"
    kinds = {"none": 0.0, "practical": 1.0, "relaxed": 3.0, "residual": 2.5}
    for kind, gold in kinds.items():
        for seed in (0, 3):
            shutil.copytree(folder / "none" / f"seed-{seed}", out / kind / f"seed-{seed}")
            lines = "".join(json.dumps(row | {"kl": 0.0}) + "\n" for row in rows(gold + 0.01 * seed))
            (out / kind / f"seed-{seed}" / "metrics.jsonl").write_text(lines)
    (out / "study.yaml").write_text(f"seeds: [0, 3]\npenalties: [{', '.join(kinds)}]\n")
    page = write_study(out).read_text()
    assert "| none | +0.765 | +1.000 | -0.015 | 16 | – | – |" in page
    assert "- `practical` against `none`: Higher by +1.000 [+1.000, +1.000]" in page
    assert "| residual | +1.500 [+1.500, +1.500] | -0.500 [-0.500, -0.500] |  |" in page
    assert "than `practical` does? Nearer by +1.500 [+1.500, +1.500]" in page
