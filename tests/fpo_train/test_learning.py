"""Reward head, penalties and the policy's update against autograd and hand-written sums."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fpo_train.config import PenaltyConfig, RewardModelConfig, RolloutConfig, UpdateConfig
from fpo_train.penalty import Penalty
from fpo_train.reward_model import HeadRewardModel
from fpo_train.rollout import sample
from fpo_train.update import BestOfN

CPU = torch.device("cpu")


@pytest.fixture
def rollout(policy, prompts):
    torch.manual_seed(5)
    return sample(policy, prompts.batch(1, 3), RolloutConfig(prompts=3, candidates=4, max_new_tokens=8))


def head(width, seed=0):
    model = HeadRewardModel(width, RewardModelConfig(learning_rate=1e-2), CPU)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.head.weight)
    return model


def test_steering_equals_autograd_over_the_head(policy, rollout):
    """The demo's penalty: ⟨∇r(z), ∇r(z) − ∇r(ref)⟩ by one autograd call a row, through the real features."""
    features = policy.encode(rollout.sequences).closing.view(3, 5, -1)
    model = head(features.shape[-1])
    product = model.steering(features[:, :-1], features[:, -1:])
    for b in range(3):
        grads = []
        for row in features[b].double():
            weight = model.head.weight.detach().double().requires_grad_()
            grads.append(torch.autograd.grad((weight @ row).sum(), weight)[0].flatten())
        for n in range(4):
            truth = grads[n] @ (grads[n] - grads[4])
            assert abs(product[b, n] - truth) <= 1e-5 * abs(truth)
    assert torch.allclose(model.score(features), features @ model.head.weight[0].detach(), atol=1e-5)


def judged(kind, gamma=2.0, units="raw", seed=0, calls=None, penalty=None):
    torch.manual_seed(seed)
    reward, reference, product = torch.randn(3, 4), torch.randn(3, 1), 100 * torch.rand(3, 4)
    preference = torch.rand(3, 4)

    def buy():
        if calls is not None:
            calls.append(1)
        return preference

    penalty = penalty or Penalty(PenaltyConfig(kind=kind, gamma=gamma, gamma_units=units))
    return penalty(reward, reference, product, buy), reward, reference, product, preference


def test_penalties_are_the_paper_s():
    for kind in ("none", "practical", "relaxed"):
        calls = []
        out, reward, reference, product, preference = judged(kind, calls=calls)
        overconfidence = torch.sigmoid(reward - reference) - preference
        expected = {"none": 0 * product, "practical": product, "relaxed": overconfidence * product}[kind]
        assert torch.allclose(out.penalty, expected)
        assert torch.allclose(out.effective, reward - 2.0 * expected)
        assert out.spread == pytest.approx(float(expected.std(correction=0) / reward.std(correction=0)), rel=1e-5)
        assert len(calls) == (kind == "relaxed")  # only relaxed asks the oracle about every candidate


def test_gamma_in_units_of_the_reward_s_spread():
    penalty = Penalty(PenaltyConfig(kind="practical", gamma=3.0, gamma_units="reward_std"))
    out, reward, *_ = judged("practical", penalty=penalty)
    assert out.penalty.std(correction=0) == pytest.approx(float(reward.std(correction=0)), rel=1e-5)
    assert torch.allclose(out.effective, reward - 3.0 * out.penalty)

    pairs = [judged("practical", penalty=penalty, seed=s)[0] for s in range(1, 6)]
    again = Penalty(penalty.config)
    judged("practical", penalty=again)
    again.restore(again.state())
    for seed, expected in zip(range(1, 6), pairs, strict=True):
        assert torch.equal(judged("practical", penalty=again, seed=seed)[0].penalty, expected.penalty)
    assert not judged("none", units="reward_std")[0].penalty.any()


def test_the_fit_is_the_ridge_logistic_optimum():
    torch.manual_seed(6)
    x, p = torch.randn(20, 32), torch.rand(20)
    model = head(32)
    model.fit(x, p, ridge=0.2)
    w = model.head.weight[0].detach().double().requires_grad_()
    damping = 0.2 * x.double().square().sum() / 32
    loss = binary_cross_entropy_with_logits(x.double() @ w, p.double(), reduction="sum") + damping / 2 * w @ w
    (gradient,) = torch.autograd.grad(loss, w)
    assert gradient.norm() < 1e-5 * damping * w.norm()


def test_learning_pairs_lowers_their_loss_and_reports_it():
    torch.manual_seed(7)
    chosen, reference, p = torch.randn(6, 32), torch.randn(6, 32), torch.rand(6)
    model = head(32)
    first = binary_cross_entropy_with_logits(model.score(chosen) - model.score(reference), p)
    losses = [model.learn(chosen, reference, p) for _ in range(40)]
    assert losses[0] == pytest.approx(first.item(), rel=1e-5)
    assert losses[-1] < losses[0]


def test_the_head_is_saved_under_the_name_transformers_uses(tmp_path):
    model = head(32)
    model.save(tmp_path / "reward_model", "smollm2")
    saved = load_file(tmp_path / "reward_model" / "head.safetensors")
    assert torch.equal(saved["score.weight"], model.head.weight)


def test_best_of_n_learns_the_reply_tokens_alone(policy, rollout):
    encoded = policy.encode(rollout.sequences)
    rows = rollout.chosen(torch.tensor([2, 0, 3]))
    assert rows.tolist() == [2, 5, 13]
    frozen = {n: p.clone() for n, p in policy.model.named_parameters() if not p.requires_grad}

    terms, divergence, count = 0.0, 0.0, 0
    for n in rows.tolist():
        prompt, reply = rollout.prompts[n // 5], rollout.replies[n]
        ids = torch.tensor([[*prompt.ids, *reply]])
        logits = policy.model(input_ids=ids).logits[0, len(prompt.ids) - 1 : -1]
        with torch.no_grad(), policy.base():
            base = policy.model(input_ids=ids).logits[0, len(prompt.ids) - 1 : -1].log_softmax(-1)
        terms = terms + cross_entropy(logits, torch.tensor(reply), reduction="sum")
        own = logits.detach().log_softmax(-1)
        divergence += float((own.exp() * (own - base)).sum())
        count += len(reply)
    parameters = list(policy.trainable.values())
    gradient = torch.autograd.grad(terms / count, parameters)

    update = BestOfN(policy, UpdateConfig(learning_rate=0.0, max_grad_norm=1e9))
    learnt = update.step(encoded, rows)
    assert learnt.loss == pytest.approx(float(terms.detach()) / count, rel=1e-4)
    assert learnt.kl == pytest.approx(divergence / count, rel=1e-3)
    for parameter, truth in zip(parameters, gradient, strict=True):
        assert torch.allclose(parameter.grad, truth, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(frozen[n], p) for n, p in policy.model.named_parameters() if n in frozen)
    assert not policy.model.training

    update = BestOfN(policy, UpdateConfig(learning_rate=1e-2))
    losses = [update.step(encoded, rows).loss for _ in range(5)]
    assert losses[-1] < losses[0]
