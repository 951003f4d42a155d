"""The main job on the real model: SmolLM2 from its wheel, one iteration through the installed command."""

import json
import subprocess
import sys

import pytest
import torch

from fpo_train.config import PenaltyConfig, PolicyConfig, RunConfig
from fpo_train.data.prompts import Prompt, render
from fpo_train.penalty.base import Penalty
from fpo_train.policy import load_policy
from fpo_train.processes import Processes
from fpo_train.reward_model import load_reward_model
from fpo_train.reward_model.replay import Replay
from fpo_train.rollout import Readings, Rollout

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    return load_policy(PolicyConfig(), seed=0, device=torch.device("cpu"))


def test_special_tokens_and_chat_template(smollm2):
    tokenizer = smollm2.tokenizer
    assert tokenizer.eos_token == "<|im_end|>"
    assert smollm2.eos == 2
    ids = render(tokenizer, "What is the capital of France?")
    text = tokenizer.decode(ids)
    assert text.count("<|im_start|>") == 3  # system, user, assistant: once each, and no BOS in front of them
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>assistant\n")


def test_it_knows_the_capital_of_france(smollm2):
    ids = torch.tensor([render(smollm2.tokenizer, "What is the capital of France?")])
    with torch.no_grad(), smollm2.base():
        out = smollm2.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=smollm2.eos,
            pad_token_id=smollm2.eos,
        )
    assert "Paris" in smollm2.decode(out[0, ids.shape[1] :].tolist())


def test_the_demo_s_penalty_equals_autograd_over_the_head(smollm2):
    texts = ["Paris.", "The capital of France is Paris.", "I do not know", "Lyon, a city in France"]
    question = "What is the capital of France?"
    prompt = Prompt(name="q", text=question, ids=tuple(render(smollm2.tokenizer, question)))
    replies = [smollm2.tokenizer(text)["input_ids"] for text in texts]
    rollout = Rollout.of(smollm2, [prompt], replies, candidates=3)
    readings, processes = Readings(smollm2, rollout), Processes()
    model = load_reward_model(RunConfig(), smollm2, processes, smollm2.device)
    penalty = Penalty(PenaltyConfig(kind="practical", gamma_units="raw"), processes, 0)
    judged = penalty(model, model.read(rollout, readings), None, Replay(1), rollout)
    weight = torch.randn(model.head.in_features, dtype=torch.float64, requires_grad=True)
    sequences = rollout.sequences
    with torch.no_grad(), smollm2.base():
        hidden = smollm2.lm.base_model(input_ids=sequences.ids, attention_mask=sequences.mask.long()).last_hidden_state
    closing = hidden[torch.arange(4), sequences.mask.sum(1) - 1].double()
    g = [torch.autograd.grad(weight @ h, weight)[0] for h in closing]
    truth = torch.stack([g[n] @ (g[n] - g[3]) for n in range(3)])
    product = judged.penalty[0].double()
    assert (product - truth).norm() <= 1e-5 * truth.norm()
    assert ((product - truth).abs() <= 1e-5 * truth.abs()).all()


def test_one_iteration_in_a_fresh_process_under_3_gb(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fpo_train.cli", "run", "--config", "demo.yaml", "--iterations", "1"]
    more = ["--reward_model.fit_pairs", "12", "--penalty.kind", "relaxed", "--out", str(out)]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert row["peak_memory_bytes"] < 3e9
    assert row["oracle_calls"] == 16
    assert -6 < row["oracle_utility"] < 0
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len({sample["reply"] for sample in samples}) == 4
    assert all(len(sample["reply"]) > 5 and "<|" not in sample["reply"] for sample in samples)
    assert (out / "report.html").stat().st_size > 50_000
