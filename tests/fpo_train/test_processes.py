"""Two processes on one machine give the updates of one with the same global batch, within rounding."""

import subprocess
import sys

import pytest
from safetensors.torch import load_file

from fpo_train.cli import main
from tests.fpo_train.runs import arguments, rows

TRAINED = ("policy/adapter_model.safetensors", "reward_model/head.safetensors")


@pytest.mark.parametrize("update", ["best_of_n", "rloo"])
def test_two_processes_equal_one(tiny, tmp_path, update):
    more = ["--rollout.prompts", "4", "--update.kind", update, "--update.kl_weight", "0.05", "--penalty.kind", "tracin"]
    more += ["--reward_model.fit_pairs", "5"]  # does not divide by two
    assert main(arguments(tiny, tmp_path / "one", *more)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    words = arguments(tiny, tmp_path / "two", *more)
    done = subprocess.run([*launch, "fpo_train.cli", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == (pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value), key
    for part in TRAINED:
        a, b = load_file(tmp_path / "one" / part), load_file(tmp_path / "two" / part)
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            assert (tensor - b[name]).norm() <= 1e-3 * tensor.norm(), name
    text = [(tmp_path / run / "samples.jsonl").read_text().count("\n") for run in ("one", "two")]
    assert text == [12, 12]
