"""One iteration by hand: what the penalty chooses is what is learnt, labelled and measured."""

import dataclasses

import pytest
import torch

from fpo_train.config import PenaltyConfig, PolicyConfig, RewardModelConfig, RolloutConfig, RunConfig, UpdateConfig
from fpo_train.data import read_prompts
from fpo_train.loop import iterate, seed_stream
from fpo_train.penalty import Judged
from fpo_train.run import FIT_STREAM, Workshop


@pytest.fixture
def config(tiny):
    return RunConfig(
        policy=PolicyConfig(model=str(tiny), lora_rank=4),
        rollout=RolloutConfig(prompts=3, candidates=4, max_new_tokens=6),
        reward_model=RewardModelConfig(fit_pairs=40),
        update=UpdateConfig(learning_rate=1e-2),
        penalty=PenaltyConfig(kind="practical", gamma_units="raw"),
    )


@pytest.fixture
def workshop(config):
    return Workshop(config, read_prompts("questions"))


def test_the_iteration(config, workshop):
    parts = workshop.parts(config)
    calls = {}

    def judge(reward, reference_reward, product, preferences):
        effective = -reward  # the worst by reward is the best by effective reward
        calls.update(reward=reward.clone(), reference=reference_reward.clone(), product=product.clone())
        return Judged(reward, 2 * reward, effective, 1.0)

    def step(encoded, rows):
        calls.update(encoded=encoded, rows=rows)
        return inner_step(encoded, rows)

    def learn(chosen, references, preference):
        calls.update(chosen=chosen, references=references, preference=preference)
        return inner_learn(chosen, references, preference)

    inner_step, inner_learn = parts.update.step, parts.reward_model.learn
    parts.update.step, parts.reward_model.learn = step, learn
    row, samples = iterate(dataclasses.replace(parts, penalty=judge), 1)

    features = calls["encoded"].closing.view(3, 5, -1)
    worst = calls["reward"].argmin(1)
    b = torch.arange(3)
    assert calls["rows"].tolist() == (5 * b + worst).tolist()
    assert torch.equal(calls["chosen"], features[b, worst])
    assert torch.equal(calls["references"], features[:, 4])
    assert torch.allclose(calls["product"], (features[:, :4] * (features[:, :4] - features[:, 4:])).sum(-1), rtol=1e-4)

    utility = parts.oracle.utility(calls["encoded"], torch.arange(15)).view(3, 5)
    gain = utility[b, worst] - utility[:, 4]
    assert torch.allclose(calls["preference"], torch.sigmoid(gain), atol=1e-5)
    margin = calls["reward"][b, worst] - calls["reference"][:, 0]
    assert row["proxy_gap"] == pytest.approx(float((margin - gain).mean()), abs=1e-5)
    assert row["overconfidence"] == pytest.approx(float((margin.sigmoid() - gain.sigmoid()).mean()), abs=1e-5)
    assert row["oracle_utility"] == pytest.approx(float(utility[b, worst].mean()), abs=1e-5)
    assert row["chosen_reward"] == pytest.approx(float(calls["reward"][b, worst].mean()), abs=1e-5)
    assert row["reward"] == pytest.approx(float(calls["reward"].mean()), abs=1e-5)
    assert row["oracle_calls"] == 3
    assert [s["reward"] for s in samples] == pytest.approx(calls["reward"][b, worst].tolist())


def test_the_first_head_agrees_with_the_oracle(config, workshop):
    """On the forty pairs it was fitted to, its margins follow the oracle's."""
    parts = workshop.parts(config)
    seed_stream(config.seed, FIT_STREAM)
    with parts.policy.base():
        replies = parts.policy.generate(parts.prompts.batch(0, 40, stream=1), 2, config.rollout)
    owners = [prompt for prompt in parts.prompts.batch(0, 40, stream=1) for _ in range(2)]
    encoded = parts.policy.encode(parts.policy.sequences(owners, replies))
    reward = parts.reward_model.score(encoded.closing)
    utility = parts.oracle.utility(encoded, torch.arange(80))
    margins = torch.stack([reward[::2] - reward[1::2], utility[::2] - utility[1::2]])
    assert torch.corrcoef(margins)[0, 1] > 0.8


def test_all_roles_share_one_copy_of_the_base(config, workshop):
    parts = workshop.parts(config)
    again = workshop.parts(dataclasses.replace(config, seed=1))
    assert parts.policy is again.policy is parts.oracle._policy is parts.update._policy
    assert parts.reward_model.head.weight.numel() == parts.policy.lm.config.hidden_size


def test_an_adapter_on_the_output_embedding_does_not_speak_for_the_base(config, tiny):
    policy = dataclasses.replace(config.policy, lora_targets=("lm_head",))
    workshop = Workshop(dataclasses.replace(config, policy=policy), read_prompts("questions"))
    parts = workshop.parts(config)
    prompts = parts.prompts.batch(0, 2)
    encoded = parts.policy.encode(parts.policy.sequences(prompts, [[5, 6, 7], [8, 9]]))
    before = parts.oracle.utility(encoded, torch.arange(2))
    with torch.no_grad():
        for parameter in parts.policy.trainable.values():
            parameter.normal_()
    assert torch.equal(parts.oracle.utility(encoded, torch.arange(2)), before)
    assert parts.update.step(encoded, torch.arange(2)).kl > 0.01


def test_the_gradient_is_clipped(config, workshop):
    parts = workshop.parts(dataclasses.replace(config, update=UpdateConfig(max_grad_norm=1e-3)))
    encoded = parts.policy.encode(parts.policy.sequences(parts.prompts.batch(0, 2), [[5, 6, 7], [8, 9]]))
    parts.update.step(encoded, torch.arange(2))
    norm = torch.stack([p.grad.norm() for p in parts.policy.trainable.values()]).norm()
    assert 0 < norm <= 1.001e-3
