"""The GPU campaign's parts on a CPU, and what campaign.sh makes of parts that fail."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_campaign import __main__ as campaign
from benchmarks.gpu_campaign import engine, suite
from benchmarks.gpu_campaign.__main__ import main
from benchmarks.gpu_campaign.record import Record
from benchmarks.gpu_campaign.table import tables

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "campaign.sh"
CPU = torch.device("cpu")


def run(part, folder):
    code = main([part, "--device", "cpu", "--quick", "--out", str(folder)])
    return code, json.loads((folder / f"{part}.json").read_text())


@pytest.mark.slow
def test_parts_and_their_table(tmp_path, capsys):
    for part in ("engine", "kernels", "launches", "packages", "train"):
        code, result = run(part, tmp_path)
        assert code == 0, result["failures"]
        assert result["rows"]
        assert result["versions"]["torch"]
    rows = json.loads((tmp_path / "engine.json").read_text())["rows"]
    errors = {row["run"]: row["error"] for row in rows if "error" in row}
    assert errors[engine.STEERING] < 1e-5
    ended = ["engine=0", "kernels=0", "launches=0", "packages=0", "train=0", "build=124"]
    assert main(["table", *ended, "--device", "cpu", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "build: out of time" in text
    assert "steering ÷ backward" in text
    assert "sketch 4096" in text
    assert "packed, recorded" in text
    assert "| torch hooks, formed | " in text
    assert (tmp_path / "table.md").read_text().strip() in text


def test_a_wrong_answer_fails_the_part_and_is_told(tmp_path, monkeypatch):
    right = engine.peers.hooked_token_products
    monkeypatch.setattr(engine.peers, "hooked_token_products", lambda *given: right(*given) * 1.1)
    monkeypatch.setattr(engine, "lora", lambda *given: None)
    few = [engine.Size(candidates=3, tokens=5, every=False, rounds=1)]
    monkeypatch.setattr(engine, "plan", lambda *given: ("tiny", 1, few))
    code, result = run("engine", tmp_path)
    assert code == 1
    assert "over its budget" in result["failures"][0]
    assert "over its budget" in tables(tmp_path, {"engine": 1})


def test_what_crashes_keeps_its_rows(tmp_path, monkeypatch):
    def crash(record):
        record.add("found", setting="some", run="one", ms=1.0)
        raise RuntimeError("no more")

    monkeypatch.setattr("benchmarks.gpu_campaign.kernels.run", crash)
    code, result = run("kernels", tmp_path)
    assert (code, len(result["rows"]), result["failures"]) == (1, 1, ["RuntimeError: no more"])


def test_a_competitor_that_cannot_run_leaves_the_others():
    def broken():
        raise RuntimeError("not here\nat all")

    found = engine.in_turn({"good": lambda: torch.ones(1), "bad": broken}, CPU, rounds=2)
    assert found["bad"] == {"cannot": "RuntimeError: not here"}
    assert found["good"]["ms"] >= 0


def test_the_suite_is_watched(tmp_path, monkeypatch):
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    (folder / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0, 'why'\n"
        "def test_not(): pytest.skip('the native library is not built')\n"
    )
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    record = Record(folder=tmp_path / "out", part="tests", device=CPU, quick=True)
    suite.run(record)
    (row,) = record.rows
    assert row["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert "why" in row["failures"][0]["end"]
    assert record.failures


@pytest.mark.parametrize(("asked", "ran"), [([], list(campaign.PARTS)), (["kernels", "build"], ["kernels", "build"])])
def test_a_failing_part_does_not_stop_the_next(tmp_path, asked, ran):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$3" "$@" >>"$OUT/calls"\nif [ "$3" = kernels ]; then exit 3; fi\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "OUT": str(out)}
    command = [str(SCRIPT), "--device", "cpu", "--quick", *asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    calls = (out / "calls").read_text().splitlines()
    assert done.returncode == 1, done.stderr
    assert [call.split()[0] for call in calls] == [*ran, "table"]
    assert "kernels=3" in calls[-1]
    assert "build=0" in calls[-1]
    assert subprocess.run([str(SCRIPT), "nonsense"], env=environment, capture_output=True).returncode == 2


def test_limits_add_up():
    """Seven minutes, and two with --quick."""
    text = SCRIPT.read_text()
    seconds = {}
    for line in text.splitlines():
        for piece in line.split(";;"):
            words = piece.split()
            if len(words) == 3 and words[1] == "echo" and words[0].endswith(")"):
                seconds[words[0].rstrip(")")] = int(words[2])
    for quick in ("", "--quick"):
        for named in campaign.NAMED:
            seconds.pop(f"{named}{quick}")  # run where they are named alone
    assert set(seconds) == {f"{part}{quick}" for part in campaign.PARTS for quick in ("", "--quick")}
    assert sum(s for part, s in seconds.items() if not part.endswith("quick")) <= 420
    assert sum(s for part, s in seconds.items() if part.endswith("quick")) <= 120
