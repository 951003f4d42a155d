"""Killed at random moments and resumed each time, a run ends with the very bits of one that nobody disturbed."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fpo_train.runs import arguments, rows


def run(folder, kills, seed, most, words):
    """How often it was killed, and in how many states."""
    script = Path(__file__).with_name("kill_and_resume.py")
    command = [sys.executable, str(script), str(folder), str(kills), str(seed), str(most), "--", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return tuple(map(int, re.search(r"killed (\d+) times in (\d+) states", done.stdout).groups()))


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_leave_no_trace(tiny, tmp_path, kills):
    more = [
        "--iterations",
        40,
        "--penalty.kind",
        "residual",
        "--reward_model.replay_pairs",
        2,
        "--policy.lora_dropout",
    ]
    words = arguments(tiny, "ignored", *more, 0.1, "--update.schedule", "cosine", "--update.warmup", 3)
    words = words[: words.index("--out")] + words[words.index("--out") + 2 :]
    assert run(tmp_path / "whole", 0, 0, 0, words) == (0, 0)
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    killed, states = run(tmp_path / "killed", kills, seed, 3, words)
    assert killed == kills
    assert states > kills // 3  # in different places
    whole, survivor = tmp_path / "whole", tmp_path / "killed"
    assert rows(survivor) == rows(whole)
    for part in ("policy/adapter_model.safetensors", "reward_model/head.safetensors", "samples.jsonl"):
        assert (survivor / part).read_bytes() == (whole / part).read_bytes(), part
    assert len((whole / "metrics.jsonl").read_text().splitlines()) == 40
    assert json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])["iteration"] == 40
