"""Profiles: what they set, what has the last word, and the published run's numbers in its configuration."""

import pytest
import yaml

from fpo_train.cli import main
from fpo_train.config.profiles import PROFILES


def printed(capsys, *words):
    with pytest.raises(SystemExit) as leaving:
        raise SystemExit(main(["run", *words, "--print_config"]))
    assert leaving.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def flat(tree, prefix=""):
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_a_profile_sets_defaults_and_no_more(capsys, tmp_path):
    sound, paper = flat(printed(capsys)), flat(printed(capsys, "--profile", "paper"))
    assert paper["profile"] == "paper"
    assert sound["profile"] == "sound"
    changed = {key: value for key, value in paper.items() if value != sound[key]} | {"profile": "paper"}
    assert set(changed) <= {*PROFILES["paper"], "profile"}
    assert {key: paper[key] for key in PROFILES["paper"]} == PROFILES["paper"]
    assert len(changed) > 15
    file = tmp_path / "mine.yaml"
    file.write_text("profile: paper\nupdate:\n  mean: token\n")
    mixed = flat(printed(capsys, "--config", str(file), "--update.loss_on", "reply"))
    assert (mixed["update.mean"], mixed["update.loss_on"]) == ("token", "reply")  # file and command line win
    assert mixed["reward_model.input"] == "reply"
    assert flat(printed(capsys, "--config", str(file), "--profile", "sound"))["reward_model.input"] == "chat"


PUBLISHED = {
    "iterations": 125, "seed": 42, "profile": "paper",
    "policy.model": "meta-llama/Llama-3.2-1B-Instruct", "policy.quantization": "nf4", "policy.dtype": "bfloat16",
    "policy.lora_rank": 16, "policy.lora_alpha": 32, "policy.lora_dropout": 0.05,
    "policy.lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "policy.gradient_checkpointing": False,
    "update.kind": "best_of_n", "update.learning_rate": 2e-5, "update.optimizer": "paged_adamw_8bit",
    "update.weight_decay": 0.01, "update.loss_on": "padded", "update.kl_weight": 0.0, "update.mean": "prompt",
    "update.max_grad_norm": 0.0, "update.schedule": "constant", "update.warmup": 0,
    "reward_model.kind": "classifier", "reward_model.model": "OpenAssistant/reward-model-deberta-v3-base",
    "reward_model.train": "head", "reward_model.learning_rate": 5e-5, "reward_model.optimizer": "paged_adamw_8bit",
    "reward_model.weight_decay": 0.01, "reward_model.max_tokens": 128, "reward_model.input": "reply",
    "reward_model.dropout_when_scoring": True, "reward_model.dtype": "float16", "reward_model.nan_scores": "drop",
    "reward_model.fit_pairs": 0, "reward_model.replay_pairs": 0, "reward_model.every": 1, "reward_model.steps": 1,
    "reward_model.schedule": "constant", "reward_model.warmup": 0,
    "oracle.kind": "base", "oracle.quantization": "int8", "oracle.offset": 5.0, "oracle.utility_range": [-15.0, 5.0],
    "oracle.mean_over": "padded", "oracle.temperature": 1.0,
    "data.prompts": "HuggingFaceH4/ultrafeedback_binarized", "data.split": "train_prefs", "data.limit": 500,
    "data.max_tokens": 128, "data.double_bos": True, "data.truncate": "right",
    "rollout.prompts": 4, "rollout.candidates": 8, "rollout.max_new_tokens": 32, "rollout.min_new_tokens": 5,
    "rollout.top_p": 0.9, "rollout.top_k": 50, "rollout.temperature": 0.8, "rollout.skip_blank": True,
    "rollout.lora_dropout": True, "rollout.attention_mask": False,
    "penalty.kind": "relaxed", "penalty.gamma": 10.0, "penalty.gamma_units": "raw", "penalty.parameters": "head",
    "penalty.checkpoints": 1, "logging.save": "policy",
}  # fmt: skip


def test_the_published_run_s_numbers(capsys):
    found = flat(printed(capsys, "--config", "paper.yaml"))
    assert {key: found[key] for key in PUBLISHED} == PUBLISHED
    assert found["iterations"] * found["rollout.prompts"] == found["data.limit"]


def test_an_unknown_profile(capfd):
    assert main(["run", "--profile", "brave"]) == 2
    assert "profile" in capfd.readouterr().err
