"""The benchmark runner: its gate, its result file and its exit codes, on cases that cost nothing."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import pytest
import torch

from benchmarks import registry
from benchmarks.__main__ import main
from benchmarks.cases import ways
from benchmarks.registry import Case, Competitor, Contest
from benchmarks.runner import check

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
        monkeypatch.setattr(registry, "cases", lambda: {case.name: case})
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
    assert "".join(order[-6:]) == "ABABAB"


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
        assert (
            "unknown case 'nonsense': wanted all or some of products, ways, influence, head" in capsys.readouterr().err
        )


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
