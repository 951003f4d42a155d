"""Checkpoints: every bit of state, whole or not at all, whatever ends the save."""

import dataclasses
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fpo_train.config import (
    DataConfig,
    LoggingConfig,
    PenaltyConfig,
    PolicyConfig,
    RewardModelConfig,
    RolloutConfig,
    RunConfig,
    UpdateConfig,
)
from fpo_train.data.prompts import read_prompts
from fpo_train.errors import RunError
from fpo_train.loop import iterate
from fpo_train.report import records
from fpo_train.running import checkpoint
from fpo_train.running.run import Workshop


def same(a, b):
    """Whether two trees are alike bit for bit, types and keys too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def workshop(tiny):
    config = RunConfig(
        iterations=4,
        policy=PolicyConfig(model=str(tiny), lora_rank=4, lora_dropout=0.1),
        reward_model=RewardModelConfig(kind="lora", lora_rank=2, fit_pairs=4, replay_pairs=2, schedule="linear"),
        rollout=RolloutConfig(prompts=2, candidates=2, max_new_tokens=6),
        penalty=PenaltyConfig(kind="residual", parameters="lora", checkpoints=2, sketch_dim=64),
        update=UpdateConfig(schedule="cosine", warmup=2),
        data=DataConfig(limit=20),
        logging=LoggingConfig(checkpoint_keep=1),
    )
    return Workshop(config, read_prompts("questions", limit=20)), config


def test_every_bit_comes_back_and_the_next_iteration_is_the_same(workshop, tmp_path):
    shop, config = workshop
    parts = shop.parts(config)
    for iteration in (1, 2):
        iterate(parts, iteration)
    parts.memory.rows["update"] = 1  # as if memory had run out
    checkpoint.save(tmp_path, 2, parts, keep=1)
    saved = torch.load(tmp_path / "2" / "state.pt", weights_only=True)
    empty = [key for key, part in saved.items() if not part]
    assert not empty
    assert saved["penalty"]["penalty_variance"] > 0
    assert saved["oracle"]["counts"]["scored"] > 0
    assert len(saved["reward_model"]["history"]) == 2
    after, _ = iterate(parts, 3)
    later = checkpoint.state_of(parts)
    assert not any(same(saved[key], part) for key, part in later.items() if key not in ("memory",))

    again = shop.parts(config, resumed=True)
    checkpoint.load(tmp_path, 2, again)
    assert same(checkpoint.state_of(again), saved)
    row, _ = iterate(again, 3)
    left_out = "seconds", "peak_memory_bytes", "memory_measured"
    assert {k: v for k, v in row.items() if k not in left_out} == {k: v for k, v in after.items() if k not in left_out}

    counted = dict(again.oracle.counts)
    checkpoint.load(tmp_path, 2, dataclasses.replace(again, processes=SimpleNamespace(main=False)))
    assert again.oracle.counts == counted  # the counts of all processes go to one of them


class Killed(Exception):  # noqa: N818 - a kill is no error
    """The end of the process."""


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(checkpoint, "state_of", lambda parts: {"number": parts, "oracle": {"counts": {"asked": parts}}})
    monkeypatch.setattr(checkpoint, "restore", lambda parts, state: parts.append(state["number"]))


def restored(folder):
    found = []
    checkpoint.load(folder, records.latest(folder), found)
    return found[0]


STEPS = [(os, "fsync"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree"), (torch, "save"), (Path, "mkdir")]


@pytest.mark.parametrize("step", range(10))
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_whatever_step_of_a_save_is_the_last_a_whole_checkpoint_is_left(step, before, small, tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, 1, keep=1)
    done = 0

    def counted(real):
        def call(*arguments, **options):
            nonlocal done
            done += 1
            if before and done == step + 1:
                raise Killed
            result = real(*arguments, **options)
            if done == step + 1:
                raise Killed
            return result

        return call

    with monkeypatch.context() as patch:
        for owner, name in STEPS:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            checkpoint.save(tmp_path, 2, 2, keep=1)
        except Killed:
            pass
        else:
            assert step >= 7  # more than there are
    assert restored(tmp_path) == records.latest(tmp_path)
    checkpoint.save(tmp_path, 3, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]  # what the kill left is gone
    assert restored(tmp_path) == 3
    assert records.counts(tmp_path) == {"asked": 3}


def test_the_state_is_on_the_disk_before_it_has_its_name_and_older_ones_go_last(small, tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, 1, keep=1)
    order = []
    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, name=name, real=real, **o: (order.append(name), real(*a, **o))[1])
    checkpoint.save(tmp_path, 2, 2, keep=1)
    assert order == ["fsync", "replace", "fsync", "fsync", "unlink"]


def test_the_last_few_are_kept(small, tmp_path):
    for iteration in (9, 10, 11):
        checkpoint.save(tmp_path, iteration, iteration, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11"]
    assert records.latest(tmp_path) == 11


def test_a_state_cut_short_or_lacking_something_is_named(workshop, small, tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 4, 4, keep=1)
    path = tmp_path / "4" / "state.pt"
    whole = path.read_bytes()
    advice = "delete its folder to go on from the checkpoint before, or, where there is none, from the beginning$"
    for cut in (0, 1, len(whole) // 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(RunError, match=rf"^resume: {path} is damaged; {advice}"):
            restored(tmp_path)
    (tmp_path / "4" / "oracle.json").write_text('{"asked')
    with pytest.raises(RunError, match=r"oracle\.json is damaged; delete it"):
        records.counts(tmp_path)
    monkeypatch.undo()
    shop, config = workshop
    parts = shop.parts(config, resumed=True)
    for change, text in (
        (lambda state: state["adapter"].popitem(), "lacks 'base_model"),
        (lambda state: state.pop("replay"), "lacks 'replay'"),
        (lambda state: state["reward_model"]["weights"].clear(), "lacks '"),
        (
            lambda state: state["adapter"].update({next(iter(state["adapter"])): torch.ones(1)}),
            "does not fit this run: ",
        ),
    ):
        checkpoint.save(tmp_path, 5, parts, keep=1)
        state = torch.load(tmp_path / "5" / "state.pt", weights_only=True)
        change(state)
        torch.save(state, tmp_path / "5" / "state.pt")
        with pytest.raises(RunError, match=f"{text}.*; {advice}"):
            checkpoint.load(tmp_path, 5, parts)


class Command:
    def __reduce__(self):
        return os.mkdir, ("run-by-a-checkpoint",)


def test_a_checkpoint_runs_no_code_of_its_own(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path, 1, 1, keep=1)
    torch.save({"number": Command()}, tmp_path / "1" / "state.pt")
    with pytest.raises(RunError, match=r"state\.pt is damaged"):
        restored(tmp_path)
    assert not (tmp_path / "run-by-a-checkpoint").exists()
