"""The benchmark runner: its gate, its result file and its exit codes, on cases that cost nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from benchmarks import cases, isolated, meters, results
from benchmarks.__main__ import main
from benchmarks.cases import ways
from benchmarks.comparing.command import DEFAULT
from benchmarks.registry import Case, Competitor, Contest, Headline, Told
from benchmarks.runner import check, spread

EXACT = torch.tensor([3.0, 4.0], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Setting:
    name: str = "small"
    size: int = 2


class Counted:
    """Returns a value, or raises it, and counts how often."""

    def __init__(self, value) -> None:
        self.value, self.calls = value, 0

    def __call__(self):
        self.calls += 1
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def case_of(runs: dict, cannot: dict | None = None, baseline: str = "right") -> Case:
    contest = Contest(
        competitors={name: Competitor(run=run, budget=1e-6) for name, run in runs.items()},
        expected=lambda: {"product": EXACT},
        cannot=cannot or {},
    )
    return Case(
        name="fake",
        description="a fake",
        competitors=(*runs, *(cannot or {})),
        baseline=baseline,
        settings=lambda quick, device: [Setting()],
        build=lambda setting, device: contest,
    )


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a case from the command line; gives the exit code and the result file."""

    def run(case: Case, *options: str):
        monkeypatch.setattr(cases, "cases", lambda: {case.name: case})
        code = main(["run", case.name, "--device", "cpu", "--out", str(tmp_path), "--repeats", "3", *options])
        (path,) = tmp_path.rglob("*.*")
        return code, json.loads(path.read_text()), path

    return run


def test_result_file_has_the_promised_keys(run):
    code, result, path = run(case_of({"right": Counted(EXACT.float()), "slow": Counted(EXACT)}, {"gpu": "no GPU"}))
    assert code == 0
    assert path.name == "fake.json"
    assert path.parent.name == result["device"] == f"cpu-{torch.get_num_threads()}threads"
    assert {"case", "description", "baseline", "device_name", "cpu", "threads", "commit", "dirty", "finished"} <= {
        *result
    }
    assert {"python", "torch", "triton", "transformers"} <= {*result["versions"]}
    assert result["settings"] == {"device": "cpu", "quick": False, "repeats": 3}
    right, slow, gpu = result["rows"]
    assert right["setting"] == {"name": "small", "size": 2}
    assert [row["status"] for row in (right, slow, gpu)] == ["timed", "timed", "cannot run"]
    assert right["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert slow["seconds"]["min"] <= slow["seconds"]["median"] <= slow["seconds"]["max"]
    assert gpu["reason"] == "no GPU"
    assert "seconds" not in gpu


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (EXACT * 1.001, "over its budget"),
        (torch.tensor([3.0, float("nan")]), "not finite"),
        (EXACT[None], "shape (1, 2)"),
        (ValueError("broken"), "ValueError: broken"),
    ],
)
def test_gate_stops_a_wrong_competitor(run, capsys, answer, reason):
    wrong = Counted(answer)
    code, result, _ = run(case_of({"right": Counted(EXACT), "wrong": wrong}))
    right, row = result["rows"]
    assert code == 1
    assert wrong.calls == 1, "timed although it failed the gate"
    assert row["status"] == "failed"
    assert reason in row["reason"]
    assert "seconds" not in row
    assert right["status"] == "timed"
    assert reason in capsys.readouterr().out


def test_a_failed_baseline_leaves_no_ratio(run):
    code, result, _ = run(case_of({"right": Counted(-EXACT), "other": Counted(EXACT)}))
    assert code == 1
    assert result["rows"][1]["ratio"] is None
    assert result["rows"][1]["seconds"]["median"] > 0


def test_budget_is_relative():
    barely = Competitor(run=lambda: EXACT * (1 + 0.9e-6), budget=1e-6)
    assert check(barely, {"product": EXACT})[1] == ""
    assert check(barely, {"product": EXACT * 1e-9})[1]


def test_competitors_take_turns(run):
    order: list[str] = []

    def slow(name: str):
        def call():
            order.append(name)
            time.sleep(0.021)  # one call fills a sample
            return EXACT

        return call

    code, _, _ = run(case_of({"right": slow("A"), "other": slow("B")}))
    assert code == 0
    assert "".join(order[-6:]) in ("ABBAAB", "BAABBA")


def test_quick_does_not_replace_full_results(run):
    _, result, path = run(case_of({"right": Counted(EXACT)}), "--quick")
    assert path.name == "fake-quick.json"
    assert result["settings"]["quick"]


@pytest.mark.parametrize("argv", [["run", "nonsense"], ["run"], [], ["run", "head", "--repeats", "0"]])
def test_wrong_usage_exits_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    if argv == ["run", "nonsense"]:
        known = ", ".join(cases.cases())
        assert f"unknown case 'nonsense': wanted all or some of {known}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_exits_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", "head", "--device", "cuda"])
    assert stopped.value.code == 2
    assert "no usable GPU" in capsys.readouterr().err


def test_list_names_every_case(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("products", "ways", "influence", "head", "triton", "autograd call each"))


def test_what_compare_times_is_among_the_competitors():
    known = cases.cases()
    for case in known.values():
        assert set(case.ours) <= set(case.competitors)
    assert all(known[name].ours for name in DEFAULT)


def test_real_products_pass_the_gate(tmp_path):
    assert main(["run", "products", "--quick", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("products-quick.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["status"] for row in rows if row["competitor"] in ("form G, multiply", "torch")} == {"timed"}
    assert all(row["reason"] for row in rows if row["status"] == "cannot run")


def test_both_ways_pass_the_gate(tmp_path, capsys):
    assert main(["run", "ways", "--quick", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path)]) == 0
    assert "regret of auto: median " in capsys.readouterr().out
    (path,) = tmp_path.rglob("ways-quick.json")
    rows = json.loads(path.read_text())["rows"]
    assert {(row["competitor"], row["status"]) for row in rows} == {
        (way, "timed") for way in ("auto", "tokens", "form")
    }


def test_rounds_can_be_capped(run):
    runs = {name: Counted(EXACT) for name in ("right", "twice", "never")}
    contest = Contest(
        competitors={
            name: Competitor(run=run, budget=1e-6, rounds=rounds)
            for (name, run), rounds in zip(runs.items(), (None, 2, 0), strict=True)
        },
        expected=lambda: {"product": EXACT},
    )
    case = dataclasses.replace(case_of(runs), build=lambda setting, device: contest)
    _, result, _ = run(case)
    right, twice, never = result["rows"]
    assert [len(row["samples"]) for row in (right, twice, never)] == [3, 2, 1]
    assert never["ratio"]["median"] == never["seconds"]["median"] / right["seconds"]["median"]


def test_what_is_many_times_slower_is_not_asked_again(run):
    runs = {name: Counted(EXACT) for name in ("right", "near", "far")}
    seconds = {"right": 1.0, "near": 2.9, "far": 3.1}

    def told(name: str) -> Told:
        return Told(runs[name](), seconds[name], None)

    contest = Contest(
        competitors={name: Competitor(run=functools.partial(told, name), budget=1e-6) for name in runs},
        expected=lambda: {"product": EXACT},
        once_above=3.0,
    )
    case = dataclasses.replace(case_of(runs), build=lambda setting, device: contest)
    _, result, _ = run(case)
    assert [(len(row["samples"]), row["in_rounds"]) for row in result["rows"]] == [(3, True), (3, True), (1, False)]
    assert runs["far"].calls == 1
    assert result["rows"][2]["ratio"]["median"] == 3.1


def row_of(competitor: str, samples: list[float], setting: str = "small", **figures) -> dict:
    return {
        "setting": {"name": setting},
        "competitor": competitor,
        "status": "timed",
        "samples": samples,
        "in_rounds": True,
        "seconds": spread(samples),
        **figures,
    }


def headlines_of(rows: list[dict], figure="seconds") -> list[dict]:
    headline = Headline(text="ours / base", over="ours", under="base", figure=figure)
    return results.headlines(dataclasses.replace(case_of({}), headlines=(headline,)), rows)


def test_headlines_are_ratios_round_by_round():
    (line,) = headlines_of([row_of("base", [1.0, 2.0, 4.0]), row_of("ours", [1.5, 2.0, 3.0])])
    assert line == {"setting": "small", "text": "ours / base", "median": 1.0, "min": 0.75, "max": 1.5}
    assert results.lines([line]) == "small\n  ours / base  1.00 (0.75 to 1.50)"


def test_headlines_tell_settings_apart():
    rows = [row_of("base", [1.0]), row_of("ours", [3.0]), row_of("base", [1.0], "big"), row_of("ours", [2.0], "big")]
    assert results.lines(headlines_of(rows)) == "small\n  ours / base  3.00\nbig\n  ours / base  2.00"


def test_a_headline_about_memory_says_which():
    own = [row_of("base", [1.0], rss_bytes=200, peak_bytes=10), row_of("ours", [1.0], rss_bytes=220, peak_bytes=20)]
    (line,) = headlines_of(own, "memory")
    assert (line["text"], line["median"]) == ("ours / base, own processes", 1.1)
    (line,) = headlines_of([{**row, "rss_bytes": None} for row in own], "memory")
    assert (line["text"], line["median"]) == ("ours / base, beyond the start of the call", 2.0)
    assert headlines_of([{**row, "rss_bytes": None, "peak_bytes": None} for row in own], "memory") == []


def test_a_headline_without_figures_is_left_out():
    assert headlines_of([row_of("base", [1.0]), {**row_of("ours", [1.0]), "status": "failed"}]) == []


def test_memory_of_own_processes_is_kept_and_shown(monkeypatch, run, capsys):
    figures = {
        "right": (200 * 2**20, ""),
        "greedy": (300 * 2**20, ""),
        "lost": (None, "own process: exit code 1: gone"),
    }

    def measure(case, setting, competitor, quick):
        size, reason = figures[competitor]
        return {"rss_bytes": size, "rss_built_bytes": size, "rss_reason": reason}

    monkeypatch.setattr(isolated, "measure", measure)
    runs = {name: Counted(EXACT) for name in (*figures, "unasked")}
    case = dataclasses.replace(
        case_of(runs),
        isolated=lambda setting: tuple(figures),
        headlines=(Headline(text="greed", over="greedy", under="right", figure="memory"),),
    )
    code, result, _ = run(case)
    right, greedy, lost, unasked = result["rows"]
    assert code == 0
    assert (right["rss_ratio"], greedy["rss_ratio"]) == (1.0, 1.5)
    assert "rss_ratio" not in lost
    assert "rss_bytes" not in unasked
    assert result["headlines"][0]["median"] == 1.5
    shown = capsys.readouterr().out
    assert "own process: exit code 1: gone" in shown
    assert "\n  greed, own processes  1.50\n" in shown


@pytest.mark.slow
def test_real_steering_is_measured_in_its_own_process(tmp_path, capsys):
    assert main(["run", "influence", "--quick", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("influence-quick.json")
    rows = {row["competitor"]: row for row in json.loads(path.read_text())["rows"]}
    ours = rows["fk.Influence.steering"]
    if Path("/proc/self/status").exists():
        assert ours["rss_bytes"] > ours["rss_built_bytes"] > 0, "the figure is that of building the model"
        assert ours["rss_ratio"] == ours["rss_bytes"] / rows["forward + backward"]["rss_bytes"]
        assert "own processes" in capsys.readouterr().out


def test_regret_is_the_chosen_way_s_time_over_the_best_one_s():
    def row(setting, chosen, competitor, least, status="timed"):
        return {
            "setting": {"name": setting, "pairs": "gram", "p": 5, "q": 6, "tokens": 16, "chosen": chosen},
            "competitor": competitor,
            "status": status,
            "seconds": {"min": least},
        }

    rows = [row("x", "tokens", "auto", 3.1), row("x", "tokens", "tokens", 3.0), row("x", "tokens", "form", 2.0)]
    rows += [row("y", "tokens", "auto", 1.2), row("y", "tokens", "tokens", 1.1), row("y", "tokens", "form", 9.0)]
    rows += [row("z", "tokens", "auto", 1.0), row("z", "tokens", "tokens", 1.0)]
    rows += [row("z", "tokens", "form", 0.1, "failed")]
    assert ways.regrets(rows) == {"x": 1.5, "y": 1.0}
    assert ways.summary(rows).startswith("regret of auto: median 1.25, worst 1.50 (x)\n")
    assert ways.chart(rows[:3]) == ["| tokens an example | 16 |", "|---|---|", "| gram, 5 to 6 | 0.67 |"]


def test_some_settings_are_run_again_and_the_file_keeps_the_others(run, capsys):
    case = replace(
        case_of({"right": Counted(EXACT), "other": Counted(EXACT)}),
        settings=lambda quick, device: [Setting(), Setting(name="large", size=9)],
    )
    code, whole, path = run(case)
    assert code == 0
    older = {**whole, "commit": "older", "rows": [{**row, "commit": "older", "error": 9.0} for row in whole["rows"]]}
    path.write_text(json.dumps(older))
    code, again, _ = run(case, "--setting", "larg")
    assert code == 0
    assert [(row["setting"]["name"], row["competitor"]) for row in again["rows"]] == [
        (setting, name) for setting in ("small", "large") for name in ("right", "other")
    ]
    assert [row["commit"] for row in again["rows"]] == ["older", "older", again["commit"], again["commit"]]
    assert [row["error"] == 9.0 for row in again["rows"]] == [True, True, False, False]
    with pytest.raises(SystemExit):
        run(case, "--setting", "none such")
    assert "no setting of that name" in capsys.readouterr().err
    path.write_text(json.dumps({**older, "cpu": "another"}))
    with pytest.raises(ValueError, match="its cpu is another"):
        run(case, "--setting", "large")


def test_children_are_no_bystanders():
    """Neither one that runs nor one that has ended."""
    code = "import time\nwhile time.thread_time() < 1: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline()
        assert meters._own_seconds() > time.process_time() + 0.9
    assert meters._own_seconds() > time.process_time() + 0.9
