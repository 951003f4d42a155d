"""Updates against plain sums over one unpadded reply at a time."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from fpo_train.config import PolicyConfig, RolloutConfig, RunConfig, UpdateConfig
from fpo_train.errors import RunError
from fpo_train.policy import load_policy
from fpo_train.processes import Processes
from fpo_train.rollout import Readings, Rollout, sampler
from fpo_train.update import leave_one_out, load_update

N = 4
NONE = -float("inf")


@pytest.fixture
def rollout(policy, prompts):
    return sampler(policy, RolloutConfig(prompts=3, candidates=N, max_new_tokens=8), 5)(prompts.batch(1, 3), 1, 0)


def judged(effective):
    return SimpleNamespace(effective=torch.tensor(effective))


EFFECTIVE = judged([[0.1, 0.2, 0.9, 0.3], [1.0, NONE, 0.5, -2.0], [0.0, NONE, NONE, 0.4]])  # best: 2, 0, 3
BEST = [2, 5, 13]


def config(kind="best_of_n", rollout=None, **settings):
    settings = {"learning_rate": 0.0, "max_grad_norm": 0.0, "logits_at_once": 5, **settings}
    return RunConfig(update=UpdateConfig(kind=kind, **settings), rollout=rollout or RolloutConfig(candidates=N))


def whole(policy, rollout, n):
    """Ids of a row, log p of every next token by the policy and by the base, and where the reply begins."""
    prompt, reply = rollout.prompts[n // (N + 1)], rollout.replies[n]
    ids = torch.tensor([[*prompt.ids, *reply]])
    own = policy.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    with torch.no_grad(), policy.base():
        base = policy.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return ids[0], own, base, len(prompt.ids)


def token_terms(policy, rollout, n, loss_on="reply"):
    """−log π of each learnt token, and KL of each reply token."""
    ids, own, base, start = whole(policy, rollout, n)
    nll = -own.gather(1, ids[1:, None])[:, 0]
    kl = (own.exp() * (own - base)).sum(1)[start - 1 :]
    return nll[start - 1 :] if loss_on == "reply" else nll, kl


def compare(policy, update, rollout, effective, loss, rows_at_once=0, tolerance=1e-4):
    parameters = list(policy.trainable.values())
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    learnt = update.gradient(rollout, Readings(policy, rollout), effective, rows_at_once)
    got = torch.cat([p.grad.flatten() for p in parameters])
    assert (got - truth).norm() <= tolerance * truth.norm()
    return learnt


@pytest.mark.parametrize("rows_at_once", [0, 1, 2])
@pytest.mark.parametrize("loss_on", ["reply", "prompt_and_reply"])
@pytest.mark.parametrize("mean", ["token", "prompt"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
def test_best_of_n(policy, rollout, rows_at_once, loss_on, mean, kl_weight):
    terms = [token_terms(policy, rollout, n, loss_on) for n in BEST]
    kl = torch.cat([kl for _, kl in terms]).mean()
    if mean == "token":
        loss = torch.cat([nll for nll, _ in terms]).mean()
    else:
        loss = torch.stack([nll.mean() for nll, _ in terms]).mean()
    frozen = {n: p.clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    update = load_update(policy, config(loss_on=loss_on, mean=mean, kl_weight=kl_weight), Processes())
    learnt = compare(policy, update, rollout, EFFECTIVE, loss + kl_weight * kl, rows_at_once)
    assert learnt.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    assert learnt.kl == pytest.approx(float(kl.detach()), rel=1e-3)
    assert all(torch.equal(frozen[n], p) for n, p in policy.model.named_parameters() if n in frozen)
    assert not any(module.training for module in policy.model.modules())


@pytest.mark.parametrize("rows_at_once", [0, 1])
@pytest.mark.parametrize("masked", [True, False])
def test_padding_in_the_loss_as_published(policy, rollout, masked, rows_at_once):
    rows = torch.tensor(BEST)
    sequences = rollout.sequences.rows(rows)
    ids = sequences.ids.masked_fill(~sequences.mask, policy.eos)
    mask = sequences.mask.long() if masked else torch.ones_like(ids)
    logits = policy.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    settings = config(loss_on="padded", rollout=RolloutConfig(candidates=N, attention_mask=masked))
    learnt = compare(policy, load_update(policy, settings, Processes()), rollout, EFFECTIVE, nll, rows_at_once)
    assert learnt.loss == pytest.approx(float(nll.detach()), rel=1e-4)
    assert not sequences.mask.all()


@pytest.mark.parametrize("rows_at_once", [0, 1, 3])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_rloo(policy, rollout, rows_at_once, kl_weight):
    effective = EFFECTIVE.effective.clone()
    effective[2, 3] = NONE  # one candidate alone has nobody to be compared with
    loss, count, divergence, tokens = 0.0, 0, 0.0, 0
    for b in range(2):
        own = [n for n in range(N) if effective[b, n] > NONE]
        parts = [whole(policy, rollout, b * (N + 1) + n) for n in own]
        log_p = [o[s - 1 :].gather(1, ids[s:, None]).sum() for ids, o, _, s in parts]
        base = [o[s - 1 :].gather(1, ids[s:, None]).sum() for ids, _, o, s in parts]
        kl = [(o.exp() * (o - q)).sum(1)[s - 1 :] for _, o, q, s in parts]
        divergence += float(torch.cat(kl).detach().sum())
        tokens += len(torch.cat(kl))
        reward = [
            float(effective[b, n] - kl_weight * (p - q).detach()) for n, p, q in zip(own, log_p, base, strict=True)
        ]
        for place, p in enumerate(log_p):
            others = [r for other, r in enumerate(reward) if other != place]
            loss = loss - (reward[place] - sum(others) / len(others)) * p
            count += 1
    update = load_update(policy, config("rloo", kl_weight=kl_weight), Processes())
    learnt = compare(policy, update, rollout, SimpleNamespace(effective=effective), loss / count, rows_at_once, 1e-3)
    assert count == 7
    assert learnt.loss == pytest.approx(float(loss.detach()) / count, rel=1e-3, abs=1e-4)
    assert learnt.kl == pytest.approx(divergence / tokens, rel=1e-3)


def test_rloo_makes_better_replies_likelier(policy, rollout):
    update = load_update(policy, config("rloo", learning_rate=1e-2), Processes())
    before = [token_terms(policy, rollout, n)[0].sum().item() for n in range(4)]
    effective = judged([[0.0, 0.0, 3.0, 0.0], [NONE] * 4, [NONE] * 4])
    for _ in range(4):
        update.gradient(rollout, Readings(policy, rollout), effective)
        update.step()
    after = [token_terms(policy, rollout, n)[0].sum().item() for n in range(4)]
    assert after[2] < before[2]
    assert sum(after[n] - before[n] for n in (0, 1, 3)) > 0


def test_baselines_leave_the_reply_itself_out():
    reward = torch.tensor([[1.0, 2.0, 6.0], [3.0, 5.0, NONE]])
    expected = torch.tensor([[-3.0, -1.5, 4.5], [-2.0, 2.0, 0.0]])
    assert torch.equal(leave_one_out(reward, reward.isfinite()), expected)


@pytest.mark.parametrize("kind", ["best_of_n", "rloo"])
def test_nothing_to_learn_moves_nothing(policy, rollout, kind):
    update = load_update(policy, config(kind, learning_rate=1.0), Processes())
    before = [p.clone() for p in policy.trainable.values()]
    nothing = judged([[NONE] * 4] * 3)
    assert update.gradient(rollout, Readings(policy, rollout), nothing) == (0.0, 0.0)
    assert update.step() == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable.values(), strict=True))


def test_the_gradient_is_clipped_and_its_norm_told(policy, rollout):
    norms = {}
    for most in (0.0, 1e-3):
        update = load_update(policy, config(max_grad_norm=most), Processes())
        update.gradient(rollout, Readings(policy, rollout), EFFECTIVE)
        whole = torch.stack([p.grad.norm() for p in policy.trainable.values()]).norm()

        def note(optimizer, args, kwargs, most=most):
            norms[most] = float(torch.stack([p.grad.norm() for p in policy.trainable.values()]).norm())

        update.optimizer.register_step_pre_hook(note)
        assert update.step() == pytest.approx(float(whole), rel=1e-5)
    assert norms[0.0] == pytest.approx(float(whole), rel=1e-5)
    assert norms[1e-3] <= 1.001e-3 < norms[0.0]


def test_learning_again_after_out_of_memory_gives_the_same_gradient(policy, rollout):
    update, readings = load_update(policy, config(), Processes()), Readings(policy, rollout)
    update.gradient(rollout, readings, EFFECTIVE)
    once = [p.grad.clone() for p in policy.trainable.values()]
    update.gradient(rollout, readings, EFFECTIVE)
    assert all(torch.equal(a, p.grad) for a, p in zip(once, policy.trainable.values(), strict=True))


def test_state_goes_on(policy, rollout):
    settings = config(learning_rate=1e-2, schedule="cosine")
    update, readings = load_update(policy, settings, Processes()), Readings(policy, rollout)

    def learn(update):
        update.gradient(rollout, readings, EFFECTIVE)
        update.step()
        return [p.clone() for p in policy.trainable.values()]

    learn(update)
    kept, weights = copy.deepcopy(update.state_dict()), [p.detach().clone() for p in policy.trainable.values()]
    first = learn(update)
    for parameter, weight in zip(policy.trainable.values(), weights, strict=True):
        parameter.data.copy_(weight)
    again = load_update(policy, settings, Processes())
    again.load_state_dict(kept)
    assert all(torch.equal(a, b) for a, b in zip(first, learn(again), strict=True))


def test_dropout_is_on_while_the_policy_learns(tiny, prompts):
    policy = load_policy(PolicyConfig(model=str(tiny), lora_dropout=0.5), 0, torch.device("cpu"))
    for parameter in policy.trainable.values():
        parameter.data.normal_(std=0.1)
    rollout = sampler(policy, RolloutConfig(candidates=N, max_new_tokens=6), 5)(prompts.batch(1, 3), 1, 0)
    update, readings = load_update(policy, config(), Processes()), Readings(policy, rollout)
    losses = {update.gradient(rollout, readings, EFFECTIVE).loss for _ in range(3)}
    assert len(losses) == 3


def test_settings_that_do_not_go_together(policy):
    with pytest.raises(RunError, match="rloo learns reply tokens"):
        load_update(policy, config("rloo", loss_on="padded"), Processes())
    with pytest.raises(RunError, match="2 candidates or more"):
        load_update(policy, config("rloo", rollout=RolloutConfig(candidates=1)), Processes())


def test_an_adapter_on_the_output_embedding_does_not_speak_for_the_base(tiny, prompts):
    policy = load_policy(PolicyConfig(model=str(tiny), lora_targets=("lm_head",)), 0, torch.device("cpu"))
    rollout = sampler(policy, RolloutConfig(candidates=N, max_new_tokens=6), 5)(prompts.batch(1, 3), 1, 0)
    update = load_update(policy, dataclasses.replace(config()), Processes())
    assert update.gradient(rollout, Readings(policy, rollout), EFFECTIVE).kl == pytest.approx(0, abs=1e-6)
    for parameter in policy.trainable.values():
        parameter.data.normal_()
    assert update.gradient(rollout, Readings(policy, rollout), EFFECTIVE).kl > 0.01


@pytest.mark.parametrize("kind", ["best_of_n", "rloo"])
def test_gradient_checkpointing_changes_nothing(tiny, prompts, kind):
    """Also where nobody has read the base before the policy learns."""
    found = []
    for checkpointing in (False, True):
        policy = load_policy(
            PolicyConfig(model=str(tiny), gradient_checkpointing=checkpointing), 0, torch.device("cpu")
        )
        torch.manual_seed(1)
        for parameter in policy.trainable.values():
            parameter.data.normal_(std=0.1)
        rollout = sampler(policy, RolloutConfig(candidates=N, max_new_tokens=6), 5)(prompts.batch(1, 3), 1, 0)
        update = load_update(policy, config(kind, kl_weight=0.3), Processes())
        learnt = update.gradient(rollout, Readings(policy, rollout), EFFECTIVE)
        found.append((*learnt, float(torch.stack([p.grad.norm() for p in policy.trainable.values()]).norm())))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_gradient_that_is_not_finite_moves_nothing(policy, rollout):
    update = load_update(policy, config("rloo", learning_rate=1.0), Processes())
    before = [p.detach().clone() for p in policy.trainable.values()]
    update.gradient(rollout, Readings(policy, rollout), EFFECTIVE)
    next(iter(policy.trainable.values())).grad[0, 0] = torch.nan
    with pytest.raises(RunError, match="gradient has the norm nan"):
        update.step()
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable.values(), strict=True))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("best_of_n", {}), ("best_of_n", {"mean": "prompt"}), ("best_of_n", {"loss_on": "padded"}), ("rloo", {})],
)
def test_two_processes_learn_what_one_learns(policy, rollout, kind, settings):
    """Prompts 0 and 1 on one, 2 on the other: with the denominators of both, the parts add up to the whole."""
    settings = config(kind, kl_weight=0.3, **settings)

    def part(first, last, counts, widths):
        replies = rollout.replies[first * (N + 1) : last * (N + 1)]
        own = Rollout.of(policy, rollout.prompts[first:last], replies, N)
        asked = []

        def total(tensor):
            asked.append(tensor)
            return counts if len(asked) == 1 and counts is not None else tensor

        def gather(tensor):
            widths.append(tensor)
            return torch.cat(widths)

        processes = SimpleNamespace(total=total, gather=gather, sum_gradients=list)
        effective = SimpleNamespace(effective=EFFECTIVE.effective[first:last])
        learnt = load_update(policy, settings, processes).gradient(own, Readings(policy, own), effective)
        return asked[0], learnt, [p.grad.clone() for p in policy.trainable.values()]

    whole = load_update(policy, settings, Processes())
    learnt = whole.gradient(rollout, Readings(policy, rollout), EFFECTIVE)
    truth = [p.grad.clone() for p in policy.trainable.values()]
    widths = []
    for first, last in ((0, 2), (2, 3)):  # how wide the rows of both are, then how many tokens that makes
        part(first, last, None, widths)
    counts = part(0, 2, None, list(widths))[0] + part(2, 3, None, list(widths))[0]
    parts = [part(first, last, counts, list(widths)) for first, last in ((0, 2), (2, 3))]
    for number in range(2):
        assert sum(one[1][number] for one in parts) == pytest.approx(learnt[number], rel=1e-4, abs=1e-5)
    for left, right, both in zip(parts[0][2], parts[1][2], truth, strict=True):
        assert (left + right - both).norm() <= 1e-4 * both.norm()


def test_the_divergence_in_the_reward_is_without_dropout(tiny, prompts):
    policy = load_policy(PolicyConfig(model=str(tiny), lora_dropout=0.5), 0, torch.device("cpu"))
    for parameter in policy.trainable.values():
        parameter.data.normal_(std=0.1)
    rollout = sampler(policy, RolloutConfig(candidates=N, max_new_tokens=6), 5)(prompts.batch(1, 3), 1, 0)
    update, base = load_update(policy, config("rloo"), Processes()), Readings(policy, rollout).of()
    policy.model.train()
    found = [update._divergence(rollout.sequences, base, 0) for _ in range(2)]
    assert torch.equal(*found)
    assert policy.model.training
