"""The host case: what it prints comes from its samples, and a pass that notes too little is no result."""

import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import host


def row(competitor, taps, samples):
    return {"competitor": competitor, "setting": {"taps": taps}, "status": "timed", "samples": samples}


def test_a_tap_and_what_a_pass_costs_beside_them():
    rows = []
    for taps in (57, 225):
        plain = [1.0, 5.0, 2.0]
        rows.append(row(host.BASELINE, taps, plain))
        rows.append(row(host.HOOKS, taps, [x + taps * 20e-6 for x in plain]))
        rows.append(row(host.TAPS, taps, [x + taps * 30e-6 + 500e-6 for x in plain]))
    assert host.added(rows)[host.TAPS] == pytest.approx({57: 57 * 30e-6 + 500e-6, 225: 225 * 30e-6 + 500e-6})
    told = host.summary(rows)
    assert f"225 taps: {host.HOOKS} 20.0 µs, {host.TAPS} 32.2 µs; tap / hook 1.61" in told
    assert f"{host.TAPS}: 30.0 µs a tap, 500 µs a pass beside them" in told


def test_runs(tmp_path, capsys):
    assert main(["run", "host", "--quick", "--device", "cpu", "--repeats", "2", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/host-quick.json")
    result = json.loads(path.read_text())
    assert [row["status"] for row in result["rows"]] == ["timed"] * 6
    assert result["summary"]
    assert "µs a tap" in capsys.readouterr().out


def test_what_is_not_noted_shows(monkeypatch):
    setting = host.settings(True, torch.device("cpu"))[0]
    monkeypatch.setattr(host, "block_weights", lambda model: ["score.weight"])
    contest = host.build(setting, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="1 weights were noted, wanted 8"):
        contest.competitors[host.TAPS].run()
