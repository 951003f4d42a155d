"""Every penalty over every scope against its definition, by one plain autograd call a row."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fpo_train.config import PenaltyConfig, PolicyConfig, RewardModelConfig, RunConfig
from fpo_train.errors import RunError
from fpo_train.penalty.base import Penalty
from fpo_train.penalty.gradients import EngineGradients, HeadGradients, gradients
from fpo_train.policy import load_policy
from fpo_train.processes import Processes
from fpo_train.reward_model import State, load_reward_model
from fpo_train.reward_model.replay import Pair, Replay
from fpo_train.rollout import Readings, Rollout

B, N = 2, 3
KINDS = ("none", "practical", "relaxed", "tracin", "exact", "residual")
SCOPES = [
    ("head", "head"), ("head", "all"), ("head", "*layers.0.self_attn*,score.weight"),
    ("lora", "head"), ("lora", "lora"), ("lora", "all"), ("lora", "trainable"),
    ("classifier", "head"), ("classifier", "lora"), ("classifier", "all"), ("classifier", "*layer.1.output*"),
]  # fmt: skip


@pytest.fixture
def exact_norms(monkeypatch):
    """Llama's norms compute in fp32 whatever the model's dtype; here in float64, so that truth has all its digits."""

    def forward(self, states):
        variance = states.pow(2).mean(-1, keepdim=True)
        return self.weight * (states * torch.rsqrt(variance + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture(scope="module")
def tiny_bert(tiny, tmp_path_factory):
    """Folder of a two-layer BERT classifier with the tiny model's tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "bert"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.3, pad_token_id=0, **shape)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def setting(tiny, tiny_bert, of_model, dtype, **penalty):
    """A policy's rollout, its reading by a reward model with an eventful past, and everything a penalty is given."""
    targets = ("query", "value") if of_model == "classifier" else ("q_proj", "v_proj", "up_proj")
    own = {"model": str(tiny_bert), "train": "lora"} if of_model == "classifier" else {}
    rm = RewardModelConfig(kind=of_model, lora_rank=3, lora_targets=targets, **own)
    config = RunConfig(
        policy=PolicyConfig(model=str(tiny), lora_rank=4), reward_model=rm, penalty=PenaltyConfig(**penalty)
    )
    policy = load_policy(config.policy, 0, torch.device("cpu"))
    torch.manual_seed(3)
    for parameter in policy.trainable.values():
        parameter.data.normal_(std=0.1)
    policy.model.to(dtype)
    processes = Processes()
    model = load_reward_model(config, policy, processes, policy.device)
    model.module.to(dtype)
    states = []
    for rate in (0.5, 0.25, 2.0):
        for parameter in model.trainable.values():
            parameter.data.normal_(std=0.4)
        states.append(State(rate, model.weights()))
    model.history.extend(states)
    assert len(model.history) == config.penalty.checkpoints
    prompts = [SimpleNamespace(name=str(n), talk=text, text=text, ids=tuple(policy.tokenizer(text)["input_ids"]))
               for n, text in enumerate(("Why is the sky blue?", "Say it."))]  # fmt: skip
    replies = [torch.randint(5, 90, (int(torch.randint(1, 9, ())),)).tolist() for _ in range(B * (N + 1))]
    rollout = Rollout.of(policy, prompts, replies, N)
    reading = model.read(rollout, Readings(policy, rollout))
    pairs = []
    for n in range(7):
        chosen, reference = (torch.randint(5, 90, (int(torch.randint(1, 9, ())),)).tolist() for _ in range(2))
        pair = Pair(
            prompt=prompts[n % 2], chosen=tuple(chosen), reference=tuple(reference), preference=float(torch.rand(())),
            chosen_text=policy.decode(chosen), reference_text=policy.decode(reference), iteration=n, features=None,
        )  # fmt: skip
        pairs.append(pair)
    replay = Replay(20)
    replay.add(pairs)
    preference = torch.rand(B, N, dtype=dtype)
    labels = SimpleNamespace(preferences=lambda wanted: preference.masked_fill(~wanted, torch.nan))
    return SimpleNamespace(**locals())


def formed(model, batch, names):
    """Rewards (R,) and gradients (R, P) over the named weights, one autograd call a row."""
    named = dict(model.module.named_parameters())
    chosen = [named[name] for name in names]
    flags = [p.requires_grad for p in chosen]
    for p in chosen:
        p.requires_grad_(True)
    rewards = model.module(**batch).logits[:, 0]
    rows = []
    for reward in rewards:
        parts = torch.autograd.grad(reward, chosen, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, parts, strict=True)]
        rows.append(torch.cat([g.flatten() for g in parts]))
    for p, flag in zip(chosen, flags, strict=True):
        p.requires_grad_(flag)
    return rewards.detach(), torch.stack(rows)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def defined(s, kind, parameters):
    """The penalty (B, N) at the weights as they are, from formed gradients in the model's dtype."""
    names = s.model.names(parameters)
    reward, g = formed(s.model, s.reading.batch, names)
    rows, references = s.rollout.pairs()
    u = g[rows] - g[references]
    margin = reward[rows] - reward[references]
    c = sigmoid(margin) - s.preference.flatten()
    product = (g[rows] * u).sum(1)
    if kind == "none":
        return torch.zeros(B, N, dtype=g.dtype)
    if kind == "practical":
        return product.view(B, N)
    if kind == "relaxed":
        return (c * product).view(B, N)
    if kind == "tracin":
        return (c * (u @ g[rows].mean(0))).view(B, N)
    pairs = s.model.read_pairs(s.pairs)
    pair_reward, pair_g = formed(s.model, pairs.batch, names)
    pair_margin = pair_reward[::2] - pair_reward[1::2]
    label = torch.tensor([pair.preference for pair in s.pairs], dtype=g.dtype)
    if set(names) <= set(s.model.names("head")) and s.reading.features is not None:
        own, other, known = g[rows], g[references], pair_g
    else:  # sketches, whose inner products another test holds to those of the gradients
        of = gradients(s.model, s.reading, s.config.penalty, s.processes, 5)
        own, other = of.features(rows), of.features(references)
        known = gradients(s.model, pairs, s.config.penalty, s.processes, 5).features(torch.arange(2 * len(s.pairs)))
    new, x = (own - other).double(), (known[::2] - known[1::2]).double()
    if kind == "exact":
        weight = sigmoid(pair_margin) * sigmoid(-pair_margin)
        hessian = (x * weight[:, None].double()).T @ x
        hessian += s.config.penalty.damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
        return (c * (new @ torch.linalg.solve(hessian, own.double().mean(0)))).view(B, N)
    e = (sigmoid(pair_margin) - label).double()
    return (gaussian_process(new, x, e, s.config.penalty) * product).view(B, N)


def gaussian_process(new, x, e, config):
    """ĉ by the textbook, an inverse and a determinant at a time."""
    x, new, e = x.numpy(), new.numpy(), e.numpy()
    m = len(x)
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
    unit = np.sort(distance[np.triu_indices(m, 1)])[(m * (m - 1) // 2 - 1) // 2]
    best = None
    for length in config.lengths:
        for noise in config.noises:
            k = np.exp(-(distance**2) / (2 * (length * unit) ** 2)) + noise * np.eye(m)
            variance = e @ np.linalg.inv(k) @ e / m
            likelihood = -0.5 * (m * np.log(variance) + np.linalg.slogdet(k)[1])
            if best is None or likelihood > best[0]:
                best = likelihood, length * unit, k
    across = np.exp(-(np.linalg.norm(new[:, None] - x[None], axis=-1) ** 2) / (2 * best[1] ** 2))
    return torch.from_numpy(across @ np.linalg.inv(best[2]) @ e)


def asked(s, rows_at_once=0, **changes):
    penalty = Penalty(s.config.penalty, s.processes, 5)
    return penalty(s.model, s.reading, s.labels, s.replay, s.rollout, rows_at_once)


def close(got, truth, tolerance):
    assert got.shape == truth.shape
    assert (got.double() - truth.double()).norm() <= tolerance * truth.double().norm()


@pytest.mark.parametrize(("kind_of_model", "scope"), SCOPES)
@pytest.mark.parametrize("checkpoints", [1, 3])
def test_in_float64(tiny, tiny_bert, exact_norms, kind_of_model, scope, checkpoints):
    for kind in KINDS:
        more = {"kind": kind, "parameters": scope, "gamma_units": "raw", "gamma": 2.0, "checkpoints": checkpoints}
        s = setting(tiny, tiny_bert, kind_of_model, torch.float64, sketch_dim=64, **more)
        flags = {name: p.requires_grad for name, p in s.policy.model.named_parameters()}
        judged = asked(s)
        close(judged.reward, formed(s.model, s.reading.batch, s.model.names("head"))[0].view(B, N + 1)[:, :N], 1e-10)
        if checkpoints == 1:
            truth = defined(s, kind, scope)
        else:
            truth = torch.zeros(B, N, dtype=torch.float64)
            for state in list(s.model.history):
                with s.model.at(state):
                    if s.reading.features is not None and kind_of_model == "classifier":
                        raise AssertionError("only a frozen body has features")
                    truth += state.learning_rate * defined(s, kind, scope)
        close(judged.penalty, truth, 1e-8)
        close(judged.effective, judged.reward - 2 * truth, 1e-8)
        assert flags == {name: p.requires_grad for name, p in s.policy.model.named_parameters()}
        for name, weight in s.model.weights().items():
            assert torch.equal(weight, s.states[-1].weights[name])


@pytest.mark.parametrize(("kind_of_model", "scope"), SCOPES)
def test_in_float32_whatever_is_on_a_tape(tiny, tiny_bert, kind_of_model, scope):
    for kind in KINDS[1:]:
        more = {"kind": kind, "parameters": scope, "gamma_units": "raw"}
        s = setting(tiny, tiny_bert, kind_of_model, torch.float32, sketch_dim=64, **more)
        truth = defined(s, kind, scope)
        for rows_at_once in (0, 3):
            close(asked(s, rows_at_once).penalty, truth, 1e-4)


@pytest.mark.parametrize(("kind_of_model", "scope"), [("head", "all"), ("lora", "lora"), ("classifier", "lora")])
def test_sketches_keep_the_gradients_inner_products(tiny, tiny_bert, kind_of_model, scope):
    s = setting(tiny, tiny_bert, kind_of_model, torch.float64, kind="exact", parameters=scope, sketch_dim=4096)
    of = gradients(s.model, s.reading, s.config.penalty, s.processes, 5)
    assert isinstance(of, EngineGradients)
    _, g = formed(s.model, s.reading.batch, s.model.names(scope))
    sketch = of.features(torch.arange(B * (N + 1)))
    assert sketch.shape == (B * (N + 1), 4096)
    assert (sketch @ sketch.T - g @ g.T).norm() <= 5 / 4096**0.5 * (g @ g.T).norm()


def test_closed_forms_are_taken_where_the_body_is_frozen(tiny, tiny_bert):
    s = setting(tiny, tiny_bert, "head", torch.float64, kind="tracin", parameters="head")
    of = gradients(s.model, s.reading, s.config.penalty, s.processes, 5)
    assert isinstance(of, HeadGradients)
    rows, references = s.rollout.pairs()
    other = EngineGradients(s.model, s.reading, s.model.names("head"), s.processes, 64, 5)
    for a, b in zip(of.steering(rows, references), other.steering(rows, references), strict=True):
        close(a, b, 1e-10)
    close(of.mean_products(rows, references, rows[:4]), other.mean_products(rows, references, rows[:4]), 1e-10)


@pytest.mark.parametrize(("kind_of_model", "scope"), [("head", "head"), ("lora", "lora")])
def test_pairs_that_say_nothing(tiny, tiny_bert, kind_of_model, scope):
    """Of replies alike H is 0: there is no direction to steer in. Without damping few pairs are refused by name."""
    s = setting(tiny, tiny_bert, kind_of_model, torch.float32, kind="exact", parameters=scope, sketch_dim=64)
    alike = Replay(20)
    alike.add(dataclasses.replace(p, reference=p.chosen, reference_text=p.chosen_text) for p in s.pairs)
    s.replay, usual = alike, s.replay
    judged = asked(s)
    assert not judged.penalty.any()
    assert torch.equal(judged.effective, judged.reward)
    s.replay = usual
    penalty = Penalty(PenaltyConfig(kind="exact", parameters=scope, damping=0.0, sketch_dim=64), s.processes, 5)
    with pytest.raises(RunError, match=r"penalty\.damping: "):
        penalty(s.model, s.reading, s.labels, s.replay, s.rollout)


def test_the_mean_gradient_is_over_all_processes(tiny, tiny_bert):
    """Two processes with their own candidates; and none to be judged on either gives zeros."""
    s = setting(tiny, tiny_bert, "lora", torch.float64, kind="tracin", parameters="lora")
    names, (rows, references) = s.model.names("lora"), s.rollout.pairs()
    alone = EngineGradients(s.model, s.reading, names, s.processes, 64, 5)
    sums = []
    for over in (rows[:2], rows[2:]):
        processes = SimpleNamespace(total=lambda tensor: sums.append(tensor.clone()) or tensor)
        EngineGradients(s.model, s.reading, names, processes, 64, 5)._mean_gradient(over)
    half = len(sums) // 2
    totals = iter([a + b for a, b in zip(sums[:half], sums[half:], strict=True)])
    processes = SimpleNamespace(total=lambda tensor: next(totals))
    found = EngineGradients(s.model, s.reading, names, processes, 64, 5).mean_products(rows, references, rows[:2])
    close(found, alone.mean_products(rows, references, rows), 1e-10)
    assert not alone.mean_products(rows, references, rows[:0]).any()
