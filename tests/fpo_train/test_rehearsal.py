"""A rehearsal: small by itself, with stand-ins, and nothing to go on with."""

import pytest
import yaml

from fpo_train.cli import main
from tests.fpo_train.runs import arguments


@pytest.mark.slow
def test_a_rehearsal_of_the_published_run(tmp_path, capsys):
    """SmolLM2 and MiniLM stand in; an iteration is one step of each optimizer."""
    out = tmp_path / "out"
    more = ["--rollout.prompts", "2", "--rollout.candidates", "2", "--rollout.max_new_tokens", "6"]
    words = ["run", "--config", "paper.yaml", "--dry_run", "true", "--out", str(out), *more]
    assert main(words) == 0
    told = capsys.readouterr().out
    config = yaml.safe_load(told.split("stands in:")[0])
    assert config["policy"]["model"] == "meta-llama/Llama-3.2-1B-Instruct"
    assert config["data"]["limit"] == 500
    assert "stands in: policy.model 'smollm2' for 'meta-llama/Llama-3.2-1B-Instruct'" in told
    assert "stands in: reward_model.model 'minilm' for 'OpenAssistant/reward-model-deberta-v3-base'" in told
    assert "rehearsed: 2 iterations, 2 policy steps, 2 reward model steps, one resume" in told
    assert not out.exists()


def test_a_rehearsal_where_the_learning_rates_fall(tiny, tmp_path, capfd):
    """Over a known number of iterations, which a resume may not change."""
    more = "--dry_run", "true", "--update.schedule", "cosine", "--compare", "none,practical"
    assert main(arguments(tiny, tmp_path / "out", *more)) == 0
    told = capfd.readouterr().out
    assert told.count("rehearsed: 2 iterations, 2 policy steps, 2 reward model steps, one resume") == 2


def test_a_rehearsal_is_small_by_itself_and_touches_every_phase(tiny, tmp_path, monkeypatch, capfd):
    from fpo_train.running import rehearsal

    asked = []
    monkeypatch.setattr(rehearsal, "run", lambda config, run=rehearsal.run: (asked.append(config), run(config)))
    more = ["--rollout.prompts", 16, "--rollout.candidates", 12, "--rollout.max_new_tokens", 200, "--iterations", 500]
    more += ["--rollout.min_new_tokens", 20, "--reward_model.every", 7, "--reward_model.fit_pairs", 300, "--dry_run"]
    assert main(arguments(tiny, tmp_path / "out", *more)) == 0
    said = capfd.readouterr().out
    for one in asked:
        rollout = one.rollout
        assert (rollout.prompts, rollout.candidates, rollout.max_new_tokens, rollout.min_new_tokens) == (2, 4, 8, 8)
        assert (one.iterations, one.reward_model.fit_pairs, one.reward_model.every) == (2, 4, 1)
        assert (one.policy.model, one.policy.lora_rank) == (str(tiny), 4)
    assert [one.resume for one in asked] == [False, True]
    assert "for the rehearsal: rollout.max_new_tokens 8 for 200" in said
    assert "rehearsed: 2 iterations, 2 policy steps, 2 reward model steps, one resume" in said
    assert "what the sizes asked for take of memory is not measured here; `fpo-train plan` says it" in said


def test_a_rehearsal_holds_the_budget_to_the_sizes_asked_for(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("fpo_train.running.rehearsal.stand_ins", lambda config: (config, []))  # the budget is kept
    monkeypatch.setattr("fpo_train.running.rehearsal.run", None)
    more = ["--rollout.prompts", 64, "--memory.generate_rows", 576, "--memory.budget", "20MiB", "--dry_run"]
    assert main(arguments(tiny, tmp_path / "out", *more)) == 1
    assert "memory.budget 20.0 MiB: generate takes" in capfd.readouterr().err


def test_what_a_rehearsal_has_at_hand(tmp_path, monkeypatch):
    from fpo_train.config import OracleConfig, PolicyConfig, RunConfig
    from fpo_train.running.rehearsal import stand_ins

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = RunConfig(policy=PolicyConfig(model="some/llm"), oracle=OracleConfig(kind="gold", model="some/gold"))
    small, changes = stand_ins(config)
    assert (small.policy.model, small.oracle.kind) == ("smollm2", "base")  # none that ships is a trained judge
    assert "oracle.kind 'base' for 'gold'" in changes
    for name in ("llm", "gold"):
        snapshot = tmp_path / f"models--some--{name}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").touch()
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert stand_ins(config) == (config, [])


def test_a_rehearsal_that_is_broken_off_is_nothing_to_go_on_with(tmp_path, monkeypatch, capfd):
    def broken(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("fpo_train.running.rehearsal.rehearse", broken)
    (tmp_path / "config.yaml").touch()  # of a run that has nothing to do with it
    assert main(["run", "--dry_run", "true", "--out", str(tmp_path)]) == 1
    assert "go on with" not in capfd.readouterr().err


def test_a_rehearsal_is_no_resume(tiny, tmp_path, capfd):
    assert main(arguments(tiny, tmp_path / "out", "--dry_run", "true", "--resume", "true")) == 1
    assert "dry_run: it rehearses a run from its beginning; wanted resume false" in capfd.readouterr().err
