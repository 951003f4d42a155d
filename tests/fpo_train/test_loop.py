"""One iteration by hand: what the penalty chooses is what is learnt, labelled and measured."""

import dataclasses

import pytest
import torch

from fpo_train.config import PenaltyConfig, PolicyConfig, RewardModelConfig, RolloutConfig, RunConfig, UpdateConfig
from fpo_train.data.prompts import read_prompts
from fpo_train.loop import iterate, retrain
from fpo_train.reward_model.replay import Pair
from fpo_train.rollout import Readings, Rollout
from fpo_train.running.run import FIT_PLACE, Workshop

N = 4


@pytest.fixture
def config(tiny):
    return RunConfig(
        policy=PolicyConfig(model=str(tiny), lora_rank=4),
        rollout=RolloutConfig(prompts=3, candidates=N, max_new_tokens=6),
        reward_model=RewardModelConfig(fit_pairs=40),
        update=UpdateConfig(learning_rate=1e-2),
        penalty=PenaltyConfig(kind="practical", gamma_units="raw"),
    )


@pytest.fixture
def workshop(config):
    return Workshop(config, read_prompts("questions"))


def watched(monkeypatch, owner, name, calls):
    """Remember what a method is called with, and what it returns."""
    inner = getattr(owner, name)

    def call(*arguments):
        calls[name] = arguments
        calls[name + ".returned"] = inner(*arguments)
        return calls[name + ".returned"]

    monkeypatch.setattr(owner, name, call)


def test_the_iteration(config, workshop, monkeypatch):
    parts = workshop.parts(config)
    calls = {}

    def worst_first(*arguments):
        found = parts.penalty(*arguments)
        calls["judged"] = found._replace(penalty=2 * found.reward, effective=-found.reward)
        return calls["judged"]

    watched(monkeypatch, parts.update, "gradient", calls)
    watched(monkeypatch, parts.reward_model, "gradient", calls)
    learnt = {}
    watched(monkeypatch, parts.update, "gradient", learnt)
    before = len(parts.replay)
    row, samples = iterate(dataclasses.replace(parts, penalty=worst_first), 1)

    rollout, readings, judged, _ = learnt["gradient"]
    b = torch.arange(3)
    worst = judged.reward.argmin(1)
    assert judged is calls["judged"]
    assert torch.equal(judged.effective.argmax(1), worst)
    features = readings.of().closing.view(3, N + 1, -1)
    u = features[:, :N] - features[:, N:]
    assert torch.allclose(judged.product, (features[:, :N] * u).sum(-1), rtol=1e-4)
    assert torch.allclose(judged.mean_product, u @ features[:, :N].flatten(0, 1).mean(0), rtol=1e-4, atol=1e-4)

    pairs, _ = calls["gradient"]  # of the reward model, the last to be called
    assert [pair.chosen_text for pair in pairs] == [rollout.texts[5 * n + int(worst[n])] for n in range(3)]
    assert [pair.reference_text for pair in pairs] == [rollout.texts[5 * n + N] for n in range(3)]
    assert len(parts.replay) == before + 3
    for n, pair in enumerate(pairs):
        assert torch.equal(torch.stack(pair.features), features[n, [int(worst[n]), N]])

    utility = parts.oracle.utility(rollout, readings, torch.arange(15)).view(3, N + 1)
    gain = utility[b, worst] - utility[:, N]
    assert torch.allclose(torch.tensor([pair.preference for pair in pairs]), gain.sigmoid(), atol=1e-5)
    chosen, reference = judged.reward[b, worst], judged.reference_reward[:, 0]
    c = (chosen - reference).sigmoid() - gain.sigmoid()
    assert row["proxy_gap"] == pytest.approx(float((chosen - reference - gain).mean()), abs=1e-5)
    assert row["overconfidence"] == pytest.approx(float(c.mean()), abs=1e-5)
    assert row["steering"] == pytest.approx(float((c * judged.mean_product[b, worst]).mean()), rel=1e-3)
    assert row["oracle_utility"] == pytest.approx(float(utility[b, worst].mean()), abs=1e-5)
    assert row["chosen_reward"] == pytest.approx(float(chosen.mean()), abs=1e-5)
    assert row["reward"] == pytest.approx(float(judged.reward.mean()), abs=1e-5)
    assert row["oracle_calls"] == 3
    assert row["audit_utility"] == pytest.approx(float(utility[:, :N].mean()), abs=1e-5)  # the base has read them all
    assert row["audit_gain"] == pytest.approx(float((utility[:, :N] - utility[:, N:]).mean()), abs=1e-5)
    assert row["audit_calls"] == 3 * (N - 1)
    assert [s["reward"] for s in samples] == pytest.approx(chosen.tolist())
    assert [s["utility"] for s in samples] == pytest.approx(utility[b, worst].tolist(), abs=1e-5)
    assert [s["reference_utility"] for s in samples] == pytest.approx(utility[:, N].tolist(), abs=1e-5)


def test_the_first_head_agrees_with_the_oracle(config, workshop):
    """On the forty pairs it was fitted to, its margins follow the oracle's."""
    parts = workshop.parts(config)
    prompts = parts.prompts.batch(0, 40, stream=1)
    rollout = Rollout.of(parts.policy, prompts, parts.sampler.base_replies(prompts, 2, FIT_PLACE, 0), candidates=1)
    readings = Readings(parts.policy, rollout)
    reward = parts.reward_model.score(parts.reward_model.read(rollout, readings))
    utility = parts.oracle.utility(rollout, readings, torch.arange(80))
    margins = torch.stack([reward[::2] - reward[1::2], utility[::2] - utility[1::2]])
    assert torch.corrcoef(margins)[0, 1] > 0.6
    assert len(parts.replay) == 0  # residuals on what it was fitted to would foretell nothing


def test_all_roles_share_one_copy_of_the_base(config, workshop):
    parts = workshop.parts(config)
    again = workshop.parts(dataclasses.replace(config, seed=1))
    assert parts.policy is again.policy is parts.oracle._model is parts.update._policy is parts.sampler._policy
    assert parts.reward_model.module.body is parts.policy.lm.base_model
    assert list(parts.reward_model.trainable) == ["score.weight"]


def test_an_adapter_on_the_output_embedding_does_not_speak_for_the_base(config):
    policy = dataclasses.replace(config.policy, lora_targets=("lm_head",))
    config = dataclasses.replace(config, policy=policy)
    parts = Workshop(config, read_prompts("questions")).parts(config)
    prompts = parts.prompts.batch(0, 2)
    rollout = Rollout.of(parts.policy, prompts, [[5, 6, 7], [8, 9], [9, 5], [6]], candidates=1)
    rows = torch.arange(4)
    before = parts.oracle.utility(rollout, Readings(parts.policy, rollout), rows)
    with torch.no_grad():
        for parameter in parts.policy.trainable.values():
            parameter.normal_()
    readings = Readings(parts.policy, rollout)
    assert torch.equal(parts.oracle.utility(rollout, readings, rows), before)
    judged = type("", (), {"effective": torch.zeros(2, 1)})
    assert parts.update.gradient(rollout, readings, judged).kl > 0.01


def test_the_gradient_is_clipped(config, workshop, monkeypatch):
    norms = {}
    for most in (1e-3, 0.0):
        parts = workshop.parts(dataclasses.replace(config, update=UpdateConfig(max_grad_norm=most)))
        rollout = Rollout.of(parts.policy, parts.prompts.batch(0, 2), [[5, 6, 7], [8, 9], [9, 5], [6]], candidates=1)
        judged = type("", (), {"effective": torch.zeros(2, 1)})
        parts.update.gradient(rollout, Readings(parts.policy, rollout), judged)
        parameters = list(parts.policy.trainable.values())
        monkeypatch.setattr(parts.update.optimizer, "zero_grad", lambda set_to_none: None)
        told = parts.update.step()
        norms[most] = float(torch.stack([p.grad.norm() for p in parameters]).norm())
        assert told > 0.01
    assert 0.9e-3 < norms[1e-3] <= 1.001e-3
    assert norms[0.0] == pytest.approx(told)


def test_the_reward_model_is_trained_at_its_own_cadence(config, workshop):
    """Every second iteration, two steps, each on all pairs since the last training and one drawn from before."""
    settings = dataclasses.replace(config.reward_model, every=2, steps=2, replay_pairs=1)
    parts = workshop.parts(dataclasses.replace(config, reward_model=settings))
    batches = []
    parts.reward_model.gradient = lambda pairs, rows: batches.append(pairs) or torch.tensor(float(len(batches)))
    parts.reward_model.step = lambda: None
    pair = {"prompt": parts.prompts.batch(0, 1)[0], "chosen": (5,), "reference": (6,), "reference_text": "b"}
    losses = []
    for iteration in range(1, 5):
        new = [Pair(**pair, chosen_text=text, preference=0.5, iteration=iteration, features=None) for text in "ab"]
        parts.replay.add(new)
        losses.append(retrain(parts, iteration))
    assert losses == [None, 1.5, None, 3.5]
    trained = [[one.iteration for one in batch] for batch in batches]
    assert trained[:2] == [[1, 1, 2, 2]] * 2  # nothing older to draw from
    assert [some[:4] for some in trained[2:]] == [[3, 3, 4, 4]] * 2
    assert all(len(some) == 5 and some[4] <= 2 for some in trained[2:])
