"""Each example runs as it stands, on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fpo_train.conftest import tiny  # noqa: F401

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(folder, name, *arguments):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_trl = pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")


def test_a_loop_of_ones_own(tiny, tmp_path):  # noqa: F811
    assert len((EXAMPLES / "hand_loop.py").read_text(encoding="utf-8").splitlines()) <= 30
    said = run(tmp_path, "hand_loop.py", str(tiny))
    assert said.count("reward model's loss") == 6
    assert (tmp_path / "fpo.pt").is_file()


@needs_trl
def test_grpo(tiny, tmp_path):  # noqa: F811
    said = run(tmp_path, "trl_grpo.py", "--model", str(tiny), "--steps", "4", "--tokens", "8")
    assert said.count("fpo/penalty") >= 4
    assert "fpo/reward_model_loss" in said
    assert (tmp_path / "runs" / "grpo" / "reward_model" / "head.safetensors").is_file()


@needs_trl
def test_rloo(tiny, tmp_path):  # noqa: F811
    said = run(
        tmp_path, "trl_rloo.py", "--model", str(tiny), "--reward_model", str(tiny), "--steps", "2", "--tokens", "8"
    )
    assert said.count("fpo/penalty") >= 2
    assert (tmp_path / "runs" / "rloo" / "reward_model" / "model.safetensors").is_file()


def test_attribution(tiny, tmp_path):  # noqa: F811
    said = run(tmp_path, "attribution.py", "--reward_model", str(tiny))
    assert "Do your own taxes, you fool." in said
    assert "pairs: 6, 0 of them known" in said
    rows = (tmp_path / "runs" / "attribution" / "why" / "attributions.jsonl").read_text(encoding="utf-8").splitlines()
    assert 3 <= len(rows) <= 6  # three a side, of six pairs


def test_a_server_and_its_client(tiny, tmp_path):  # noqa: F811
    said = run(tmp_path, "server_and_client.py", "--reward_model", str(tiny))
    assert "after a training: {'loss': " in said
    assert "'pairs': 1, 'updates': 1}" in said
    assert said.splitlines()[-1] == "the server ended with 0"


def test_every_example_is_run_here():
    here = Path(__file__).read_text(encoding="utf-8")
    assert not [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in here]
