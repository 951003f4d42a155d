"""TRL's own trainers with the reward of FPO: trained, logged, interrupted, in two processes."""

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from fpo_train import FPOCallback, FPOReward, MonitorCallback, OnBase
from fpo_train.config import RewardModelConfig
from fpo_train.errors import RunError

if sys.version_info < (3, 11):  # TRL needs 3.11
    pytest.skip("TRL needs Python 3.11", allow_module_level=True)

from . import trl_runs as runs

ROOT = Path(__file__).parents[2]


def noted(reward):
    """All that a reward is asked and answers, and the state in which it was asked."""
    calls, call = [], FPOReward.__call__

    class Noting(FPOReward):
        def __call__(self, prompts, completions, **columns):
            logged = {}

            def extra(name, values):
                logged[name] = values
                columns["log_extra"](name, values)

            found = call(self, prompts, completions, **columns | {"log_extra": extra})
            scored = self.score(prompts, completions, reference=columns["reference"])
            calls.append((found, logged, scored))
            return found

    reward.__class__ = Noting
    return calls


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_trainer_learns_from_it_and_it_learns_from_the_trainer(tiny, tmp_path, kind):
    reward = runs.reward_of(tiny)
    calls, before = noted(reward), reward.model.weights()
    trainer = runs.train(kind, tiny, tmp_path, reward, chat=kind == "grpo")
    assert len(calls) == 6
    for found, logged, scored in calls:
        assert torch.allclose(torch.tensor(logged["fpo/penalty"]), scored.penalty, rtol=1e-5, atol=1e-6)
        assert torch.allclose(torch.tensor(found), scored.reward - scored.penalty, rtol=1e-5, atol=1e-6)
    assert all(not torch.equal(weight, before[name]) for name, weight in reward.model.weights().items())
    rows = [row for row in trainer.state.log_history if "fpo/penalty" in row]
    means = [float(scored.penalty.mean()) for _, _, scored in calls]
    assert [row["fpo/penalty"] for row in rows] == pytest.approx(means, rel=1e-5)
    assert "fpo/reward_model_loss" in rows[1]
    assert rows[5]["fpo/pairs"] == 12
    again = FPOReward(str(tmp_path / "reward_model"))
    assert torch.equal(again.model.head.weight, reward.model.head.weight)


@pytest.mark.parametrize(("kind", "penalty"), [("grpo", "residual"), ("rloo", "practical")])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(tiny, tmp_path, kind, penalty):
    whole = runs.reward_of(tiny, penalty=penalty, parameters="all")
    trained = runs.train(kind, tiny, tmp_path, whole)
    again = runs.reward_of(tiny, penalty=penalty, parameters="all")
    resumed = runs.train(kind, tiny, tmp_path, again, resume=tmp_path / "checkpoint-3")
    pairs = zip(trained.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(weight, again.model.weights()[name]) for name, weight in whole.model.weights().items())


def test_it_sits_on_the_policy_that_is_trained(tiny, tmp_path):
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny), LoraConfig(target_modules=["q_proj", "v_proj"]))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    reward = FPOReward(OnBase(model, "lora"), tokenizer, parameters="lora", oracle=runs.vowels, reference="group")
    with torch.no_grad():
        reward.model.head.weight.normal_(std=0.3)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    runs.train("grpo", tiny, tmp_path, reward, model=model, steps=3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert any(".default." in name for name in moved)
    assert any(".reward." in name for name in moved)
    assert all(".default." in name or ".reward." in name for name in moved)


def test_online_dpo_has_no_log_helpers(tiny, tmp_path):
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    reward = runs.reward_of(tiny)
    config = OnlineDPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, max_new_tokens=6, report_to="none",
        use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    before = reward.model.weights()
    OnlineDPOTrainer(
        model=LlamaForCausalLM.from_pretrained(tiny),
        reward_funcs=reward,
        args=config,
        train_dataset=runs.data(),
        processing_class=AutoTokenizer.from_pretrained(tiny),
        callbacks=[FPOCallback(reward)],
    ).train()
    assert reward.pairs == 4
    assert all(not torch.equal(weight, before[name]) for name, weight in reward.model.weights().items())


def test_what_is_said_while_a_trainer_evaluates_is_not_learnt(tiny, tmp_path):
    reward = runs.reward_of(tiny)
    runs.train(
        "grpo", tiny, tmp_path, reward, steps=2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8
    )
    assert reward.pairs == 4


def test_a_gamma_that_group_normalisation_cancels_is_told(tiny, tmp_path):
    loud = runs.reward_of(tiny, gamma=1e4, gamma_units="raw")
    with pytest.warns(UserWarning, match="γ cancels"):
        runs.train("grpo", tiny, tmp_path / "a", loud, steps=1)
    calm = runs.reward_of(tiny, gamma=1e4, gamma_units="raw")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fpo")
        runs.train("grpo", tiny, tmp_path / "b", calm, steps=1, scale_rewards="none")


def two(tiny, out, world, chunk):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "LOCAL_WORLD_SIZE": str(world),
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    command = [sys.executable, runs.__file__, str(tiny), str(out), str(chunk)]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | (shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(world)]


def test_two_processes_give_the_rewards_of_one(tiny, tmp_path):
    """Six completions of two groups of four in each: groups are split between them."""
    (tmp_path / "two").mkdir()
    found = two(tiny, tmp_path / "two", 2, 6)
    weights = [one["state"]["reward_model"]["weights"] for one in found]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert found[0]["state"]["penalty"] == found[1]["state"]["penalty"]
    alone = runs.reward_of(tiny, penalty="tracin")
    steps = len(found[0]["seen"]) // 6
    assert steps == 3
    for step in range(steps):  # all that both have seen in a step, asked at once
        rows = [row for one in found for row in one["seen"][6 * step : 6 * step + 6]]
        prompts = [[{"role": "user", "content": prompt}] for prompt, _, _ in rows]
        completions = [[{"role": "assistant", "content": text}] for _, text, _ in rows]
        references = [f"It is {prompt.split()[-1]}." for prompt, _, _ in rows]
        said = alone(prompts, completions, reference=references)
        assert said == pytest.approx([reward for _, _, reward in rows], rel=1e-4, abs=1e-5)
        alone.update()
    assert torch.allclose(alone.model.weights()["score.weight"], weights[0]["score.weight"], rtol=1e-4, atol=1e-6)


def test_without_an_oracle_the_scale_travels_all_the_same(tiny, tmp_path):
    whole, again = (runs.reward_of(tiny, oracle=None) for _ in range(2))
    trained = runs.train("grpo", tiny, tmp_path, whole)
    resumed = runs.train("grpo", tiny, tmp_path, again, resume=tmp_path / "checkpoint-3")
    assert whole.state_dict()["penalty"] == again.state_dict()["penalty"]
    assert all(torch.equal(a, b) for a, b in zip(trained.model.parameters(), resumed.model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["head", "lora"])
def test_a_policy_with_the_reward_models_adapter_on_it_is_resumed_to_the_bit(tiny, tmp_path, kind):
    def made(folder=""):
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
        model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny), config)
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        settings = RewardModelConfig(learning_rate=1e-2)
        base = OnBase(model, kind, folder)
        reward = FPOReward(base, tokenizer, parameters=kind, oracle=runs.vowels, settings=settings)
        reward.fit(["Say "], ["aeiou"], ["xyz"])
        return model, reward

    model, whole = made()
    runs.train("grpo", tiny, tmp_path, whole, model=model)
    again, reward = made()
    runs.train("grpo", tiny, tmp_path, reward, model=again, resume=tmp_path / "checkpoint-3")
    other = dict(again.named_parameters())
    assert not [name for name, p in model.named_parameters() if not torch.equal(p, other[name])]
    assert any(p.any() for name, p in again.named_parameters() if ".lora_B.default." in name)
    assert torch.equal(whole.model.head.weight, reward.model.head.weight)
    kept, later = made(str(tmp_path / "reward_model"))
    assert not torch.equal(later.model.head.weight, whole.model.head.weight)  # fitted anew
    config = OnBase(kept, kind, str(tmp_path / "reward_model"))
    if kind == "head":
        same = FPOReward(config, AutoTokenizer.from_pretrained(tiny), oracle=runs.vowels)
        assert torch.equal(same.model.head.weight, whole.model.head.weight)
    with pytest.raises(RunError, match="holds no"):
        FPOReward(OnBase(kept, kind, str(tmp_path)), AutoTokenizer.from_pretrained(tiny))


def test_two_rewards_of_one_trainer_keep_apart(tiny, tmp_path):
    def made():
        return [runs.reward_of(tiny, name="one"), runs.reward_of(tiny, name="two", penalty="none")]

    rewards = made()
    trainer = runs.train("grpo", tiny, tmp_path, rewards, callback=[FPOCallback(one) for one in rewards])
    assert {"rewards/one/mean", "rewards/two/mean", "one/penalty", "two/penalty"} <= trainer.state.log_history[0].keys()
    again = made()
    callbacks, resume = [FPOCallback(one) for one in again], tmp_path / "checkpoint-3"
    runs.train("grpo", tiny, tmp_path, again, callback=callbacks, resume=resume)
    for one, other in zip(rewards, again, strict=True):
        assert torch.equal(one.model.head.weight, other.model.head.weight)
    assert not torch.equal(rewards[0].model.head.weight, rewards[1].model.head.weight)
    assert (tmp_path / "two_reward_model").is_dir()


def test_another_runs_checkpoint_is_refused(tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        runs.train("grpo", tiny, tmp_path / name, runs.reward_of(tiny), steps=3, seed=seed)
    resume = tmp_path / "a" / "checkpoint-3"
    with pytest.raises(RunError, match="is of another run than the checkpoint that the trainer resumes from"):
        runs.train("grpo", tiny, tmp_path / "b", runs.reward_of(tiny), steps=4, resume=resume)
    reward = runs.reward_of(tiny)
    callback = FPOCallback(reward, resume=resume)
    runs.train("grpo", tiny, tmp_path / "b", reward, callback=callback, steps=4, resume=resume)


def test_a_callback_wants_the_reward_that_the_trainer_calls():
    with pytest.raises(RunError, match="reward: wanted an FPOReward, the one that the trainer calls, got <function"):
        FPOCallback(lambda prompts, completions: [0.0])
    with pytest.raises(RunError, match="monitor: wanted an FPOMonitor"):
        MonitorCallback(lambda prompts, completions: [0.0])


def test_a_checkpoint_without_a_state_is_refused(tiny, tmp_path):
    reward = runs.reward_of(tiny)
    runs.train("grpo", tiny, tmp_path, reward, steps=3)
    (tmp_path / "checkpoint-3" / "fpo.pt").unlink()
    with pytest.raises(RunError, match="its checkpoint holds no state of the reward"):
        runs.train("grpo", tiny, tmp_path, reward, steps=4, resume=tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "fpo.pt").write_bytes(b"PK")
    with pytest.raises(RunError, match="is damaged"):
        runs.train("grpo", tiny, tmp_path, reward, steps=4, resume=tmp_path / "checkpoint-3")
