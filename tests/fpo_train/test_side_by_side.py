"""Runs of a comparison at the same time: what each would give alone, and how they end together."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from fpo_train.cli import main
from fpo_train.config import MemoryConfig, OracleConfig, PolicyConfig, RunConfig
from fpo_train.errors import RunError
from fpo_train.running import side_by_side
from fpo_train.running.side_by_side import at_once
from tests.fpo_train.runs import arguments, children, is_running, rows

KINDS = ("none", "practical")
TOGETHER = ("--compare", ",".join(KINDS), "--memory.runs_at_once", 2)


def started(tiny, out, *more):
    """The command in a process of its own, once both runs have done an iteration, and their processes."""
    command = [sys.executable, "-m", "fpo_train.cli", *arguments(tiny, out, *TOGETHER, "--iterations", 10_000, *more)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not all((out / kind / "metrics.jsonl").exists() for kind in KINDS):
        time.sleep(0.05)
    time.sleep(0.3)
    return process, children(process.pid)


def test_each_gives_what_it_gives_by_turns(tiny, tmp_path, capsys):
    together, by_turns = tmp_path / "together", tmp_path / "by_turns"
    controlled = "--logging.controlled", "true"
    assert main(arguments(tiny, together, *TOGETHER, *controlled)) == 0
    assert main(arguments(tiny, by_turns, *TOGETHER[:2], "--memory.runs_at_once", 1, *controlled)) == 0
    files = [{str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} for out in (together, by_turns)]
    assert files[0] == files[1]
    for kind in KINDS:
        assert rows(together / kind) == rows(by_turns / kind)
        for part in ("policy/adapter_model.safetensors", "reward_model/head.safetensors", "samples.jsonl"):
            assert (together / kind / part).read_bytes() == (by_turns / kind / part).read_bytes()
    facts = [json.loads((out / "environment.json").read_text()) for out in (together, by_turns)]
    assert facts[0].keys() == facts[1].keys()
    assert facts[0]["models"] == facts[1]["models"]
    # what one way has begun the other goes on with
    more = "--iterations", 4, "--resume", "true"
    assert main(arguments(tiny, together, *TOGETHER[:2], *more, *controlled)) == 0
    assert main(arguments(tiny, by_turns, *TOGETHER, *more, *controlled)) == 0
    assert [rows(together / kind) for kind in KINDS] == [rows(by_turns / kind) for kind in KINDS]
    assert len(rows(together / "none")) == 4


def test_a_stop_reaches_all_and_all_go_on(tiny, tmp_path):
    out = tmp_path / "run"
    process, _ = started(tiny, out, "--logging.checkpoint_every", 5000)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 3, said
    last = [rows(out / kind)[-1]["iteration"] for kind in KINDS]
    assert [[p.name for p in (out / kind / "checkpoints").iterdir()] for kind in KINDS] == [[str(n)] for n in last]
    assert f"stopped after iteration {min(last)}; go on with --resume true" in said
    more = "--iterations", max(last) + 1, "--resume", "true"
    assert main(arguments(tiny, out, *TOGETHER, *more)) == 0
    assert [len(rows(out / kind)) for kind in KINDS] == [max(last) + 1] * 2


def test_none_outlives_the_process_that_began_it(tiny, tmp_path):
    process, pids = started(tiny, tmp_path / "run")
    assert len(pids) >= 2
    process.kill()
    process.communicate()
    end = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def test_a_refusal_leaves_nothing_behind(tiny, tmp_path, capfd):
    out = tmp_path / "run"
    assert main(arguments(tiny, out, *TOGETHER, "--penalty.parameters", "no.such.weight")) == 1
    assert "'no.such.weight' names no weight of the reward model" in capfd.readouterr().err.splitlines()[-1]
    assert not out.exists()


def fail_late(config):
    if config.penalty.kind == "none":
        raise ZeroDivisionError
    time.sleep(60)


def test_one_that_fails_ends_the_others(tmp_path, capfd):
    configs = [RunConfig(out=str(tmp_path / kind), compare="") for kind in KINDS]
    configs = [
        dataclasses.replace(one, penalty=dataclasses.replace(one.penalty, kind=kind))
        for one, kind in zip(configs, KINDS, strict=True)
    ]
    before = time.monotonic()
    with pytest.raises(RunError, match="none: its process ended with exit code 1"):
        side_by_side.run_side_by_side(fail_late, configs, 2, side_by_side.Request())
    assert time.monotonic() - before < 50
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("runs", "threads", "n"), [(2, 1, 1), (2, 2, 2), (3, 3, 3), (4, 2, 2), (2, 8, 2), (1, 8, 1), (5, 4, 2)]
)
def test_as_many_as_is_quickest(tiny, monkeypatch, runs, threads, n):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    config = RunConfig(policy=PolicyConfig(model=str(tiny)), iterations=1000)  # the first fit does not count
    assert at_once(config, runs) == n
    peak = side_by_side._peak(config)
    assert at_once(config, runs, available=int(1.9 * peak / 0.8)) == 1
    assert at_once(config, runs, available=int(2.1 * peak / 0.8)) == min(n, 2)


def test_a_first_fit_that_outweighs_the_iterations_is_not_repeated(tiny, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    config = RunConfig(policy=PolicyConfig(model=str(tiny)), iterations=2)
    assert at_once(config, 2) == 1
    assert at_once(dataclasses.replace(config, iterations=200), 2) == 2


def test_one_alone_where_something_is_one_run_s(tiny, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = RunConfig(policy=PolicyConfig(model=str(tiny)))
    two = dataclasses.replace(config, memory=MemoryConfig(runs_at_once=2))
    assert (at_once(config, 2), at_once(two, 2), at_once(two, 1)) == (2, 2, 1)
    assert at_once(dataclasses.replace(config, memory=MemoryConfig(budget="4GiB")), 2) == 1
    judged = OracleConfig(kind="judge", url="http://localhost:1", model="a")
    assert at_once(dataclasses.replace(config, oracle=judged), 2) == 1
    assert at_once(dataclasses.replace(two, oracle=judged), 2) == 2
    for setting in (lambda: monkeypatch.setenv("WORLD_SIZE", "2"), lambda: None):
        setting()
        assert at_once(config, 2) == 1
        with pytest.raises(RunError, match=r"memory\.runs_at_once 2: .* wanted 1"):
            at_once(two, 2)
        monkeypatch.delenv("WORLD_SIZE")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setenv("WORLD_SIZE", "1")


def test_a_machine_that_does_not_say_what_it_has_runs_one(monkeypatch, tiny):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(side_by_side, "_available", lambda: 0)
    assert at_once(RunConfig(policy=PolicyConfig(model=str(tiny))), 2) == 1
