"""Reward models of every kind: what they read, how they score, learn, go back and are kept."""

import copy
import io
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from fpo_train.config import PenaltyConfig, RewardModelConfig, RolloutConfig, RunConfig
from fpo_train.errors import RunError
from fpo_train.processes import Processes
from fpo_train.reward_model import load_reward_model
from fpo_train.reward_model.base import fit_logistic
from fpo_train.reward_model.inputs import TextInputs
from fpo_train.reward_model.replay import Pair
from fpo_train.rollout import Readings, sampler

KINDS = [
    {"kind": "head"},
    {"kind": "head", "input": "reply"},
    {"kind": "lora", "lora_rank": 3},
    {"kind": "lora", "lora_rank": 3, "input": "pair"},
    {"kind": "classifier", "model": "bert", "input": "pair"},
    {"kind": "classifier", "model": "bert", "train": "lora", "lora_targets": ("query",)},
    {"kind": "classifier", "model": "llama", "train": "all"},
    {"kind": "classifier", "model": "llama", "input": "reply"},
]


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Folders of tiny classifiers with the tiny model's tokenizer, whose padding is its end of turn."""
    folders, tokenizer = {}, AutoTokenizer.from_pretrained(tiny)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    shape |= {"vocab_size": len(tokenizer), "num_labels": 1, "initializer_range": 0.3}
    torch.manual_seed(1)
    for name, kind, config in (
        ("bert", BertForSequenceClassification, BertConfig(**shape, max_position_embeddings=64)),
        ("llama", LlamaForSequenceClassification, LlamaConfig(**shape, pad_token_id=tokenizer.pad_token_id)),
    ):
        folders[name] = tmp_path_factory.mktemp("models") / name
        kind(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture
def rollout(policy, prompts):
    return sampler(policy, RolloutConfig(prompts=2, candidates=3, max_new_tokens=6), 5)(prompts.batch(1, 2), 1, 0)


def load(policy, models, processes=None, penalty=None, **settings):
    settings = {"learning_rate": 0.05, **settings}
    if settings.get("model") in models:
        settings["model"] = str(models[settings["model"]])
    penalty = PenaltyConfig(checkpoints=3) if penalty is None else penalty
    config = RunConfig(reward_model=RewardModelConfig(**settings), penalty=penalty)
    model = load_reward_model(config, policy, processes or Processes(), policy.device)
    torch.manual_seed(7)
    for parameter in model.trainable.values():
        parameter.data.normal_(std=0.3)
    return model


def pairs_of(rollout, reading, preferences=(0.9, 0.2)):
    pairs = []
    for b, p in enumerate(preferences):
        chosen, reference = 4 * b + 1, 4 * b + 3
        features = None if reading.features is None else (reading.features[chosen], reading.features[reference])
        pair = Pair(
            prompt=rollout.prompts[b], chosen=tuple(rollout.replies[chosen]), preference=p, iteration=b,
            reference=tuple(rollout.replies[reference]), chosen_text=rollout.texts[chosen],
            reference_text=rollout.texts[reference], features=features,
        )  # fmt: skip
        pairs.append(pair)
    return pairs


def alone(model, reading):
    """Scores of unpadded rows, one forward each, with a graph."""
    found = []
    for row in range(len(reading)):
        width = int(reading.batch["attention_mask"][row].sum())
        batch = {key: value[row : row + 1, :width] for key, value in reading.batch.items()}
        found.append(model.module(**batch).logits[0, 0])
    return torch.stack(found)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_scores_do_not_depend_on_padding_or_company(policy, models, rollout, settings):
    model = load(policy, models, **settings)
    reading = model.read(rollout, Readings(policy, rollout))
    assert not reading.batch["attention_mask"].all()
    truth = alone(model, reading).detach()
    assert truth.std() > 1e-3
    for rows_at_once in (0, 1, 3):
        score = model.score(reading, rows_at_once)
        assert score.dtype == torch.float32
        assert torch.allclose(score, truth, rtol=1e-4, atol=1e-5)
    assert (reading.features is not None) == (
        settings["kind"] == "head" or (settings["kind"] == "classifier" and "train" not in settings)
    )
    assert not any(module.training for module in model.module.modules())


def test_what_is_read(policy, models, rollout):
    tokenizer, reply = policy.tokenizer, rollout.texts[1]
    prompt = rollout.prompts[0].text

    def row(**settings):
        batch = load(policy, models, **settings).read(rollout, Readings(policy, rollout)).batch
        return batch["input_ids"][1][batch["attention_mask"][1].bool()].tolist()

    assert row(kind="head") == rollout.sequences.ids[1][rollout.sequences.mask[1]].tolist()
    assert row(kind="head", input="reply") == [*tokenizer(reply)["input_ids"], policy.eos]
    assert row(kind="classifier", model="bert", input="reply") == tokenizer(reply)["input_ids"]
    assert row(kind="classifier", model="bert", input="pair") == tokenizer(prompt, reply)["input_ids"]
    chat = row(kind="classifier", model="llama", input="chat")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    assert chat == tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert chat == row(kind="classifier", model="llama")
    assert row(kind="classifier", model="bert", input="chat", max_tokens=7) == chat[:7]
    with pytest.raises(RunError, match="read whole"):
        load(policy, models, kind="head", max_tokens=7)


def test_a_decoder_is_read_at_its_last_token_though_that_is_what_pads(policy, models, rollout):
    model = load(policy, models, kind="classifier", model="llama", train="all", input="chat")
    ids = torch.tensor([[5, 6, policy.eos], [7, policy.eos, policy.eos]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert model.tokenizer.pad_token_id == policy.eos
    both = model.module(input_ids=ids, attention_mask=mask).logits[:, 0]
    one = model.module(input_ids=ids[1:, :2], attention_mask=mask[1:, :2]).logits[0, 0]
    assert torch.allclose(both[1], one, atol=1e-5)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_learning(policy, models, rollout, settings):
    # small steps: an adapter's first ones, at a rate of 0.002, overshoot on some processors' replies
    model = load(policy, models, learning_rate=2e-4, **settings)
    reading = model.read(rollout, Readings(policy, rollout))
    pairs = pairs_of(rollout, reading)
    flags = {name: p.requires_grad for name, p in policy.model.named_parameters()}
    policy_weights = {name: p.clone() for name, p in policy.trainable.items()}
    truth = alone(model, reading)
    margin = truth[[1, 5]] - truth[[3, 7]]
    loss = binary_cross_entropy_with_logits(margin, torch.tensor([0.9, 0.2]))
    if reading.features is not None:
        rewards = model.head(reading.features)[:, 0]
        loss = binary_cross_entropy_with_logits(rewards[[1, 5]] - rewards[[3, 7]], torch.tensor([0.9, 0.2]))
    expected = torch.autograd.grad(loss, list(model.trainable.values()), allow_unused=True)
    expected = torch.cat([torch.zeros(0) if g is None else g.flatten() for g in expected])
    for rows_at_once in (0, 2):
        assert float(model.gradient(pairs, rows_at_once)) == pytest.approx(float(loss.detach()), rel=1e-4)
        got = [p.grad.flatten() for p in model.trainable.values() if p.grad is not None]
        assert (torch.cat(got) - expected).norm() <= 1e-4 * expected.norm()
    losses = [float(loss.detach())]
    for _ in range(6):
        model.step()
        losses.append(float(model.gradient(pairs)))
    assert losses[-1] < losses[0]
    assert flags == {name: p.requires_grad for name, p in policy.model.named_parameters()}
    assert all(torch.equal(policy_weights[name], p) for name, p in policy.trainable.items())
    assert model.drift() > 0


def test_two_processes_learn_what_one_learns(policy, models, rollout):
    """Each of two takes half of the pairs; the parts add up to the whole."""
    whole = load(policy, models, kind="head")
    pairs = pairs_of(rollout, whole.read(rollout, Readings(policy, rollout)))
    loss = whole.gradient(pairs)
    parts = []
    for rank in range(2):
        processes = SimpleNamespace(rank=rank, world=2, sum_gradients=list, total=lambda tensor: tensor)
        model = load(policy, models, processes, kind="head")
        part = model.gradient(pairs)
        parts.append((part, model.head.weight.grad))
    assert torch.allclose(parts[0][0] + parts[1][0], loss)
    assert torch.allclose(parts[0][1] + parts[1][1], whole.head.weight.grad, rtol=1e-5)


@pytest.mark.parametrize("settings", KINDS[:1] + KINDS[2:3] + KINDS[5:7], ids=str)
def test_states(policy, models, rollout, settings):
    model = load(policy, models, schedule="linear", **settings)
    reading = model.read(rollout, Readings(policy, rollout))
    pairs = pairs_of(rollout, reading)
    scores = []
    for _ in range(4):
        model.gradient(pairs)
        model.step()
        scores.append(model.score(model.read(rollout, Readings(policy, rollout))))
    assert len(model.history) == 3
    rates = [state.learning_rate for state in model.history]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.05
    now = model.weights()
    for state, score in zip(model.history, scores[1:], strict=True):
        with model.at(state):
            assert torch.equal(model.score(model.read(rollout, Readings(policy, rollout))), score)
    with pytest.raises(ZeroDivisionError), model.at(model.history[0]):
        raise ZeroDivisionError
    assert all(torch.equal(now[name], weight) for name, weight in model.weights().items())

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    drift = model.drift()
    model.gradient(pairs)
    model.step()
    expected, later = model.weights(), copy.deepcopy([state.learning_rate for state in model.history])
    model.load_state_dict(torch.load(file, weights_only=True))
    assert model.drift() == drift
    model.gradient(pairs)
    model.step()
    assert all(torch.equal(expected[name], weight) for name, weight in model.weights().items())
    assert [state.learning_rate for state in model.history] == later


def test_the_fit_is_the_ridge_logistic_optimum():
    torch.manual_seed(6)
    x, p = torch.randn(20, 32), torch.rand(20)
    w = fit_logistic(x, p, ridge=0.2).requires_grad_()
    damping = 0.2 * x.double().square().sum() / 32
    margin = x.double() @ w
    loss = -(p.double() * logsigmoid(margin) + (1 - p.double()) * logsigmoid(-margin)).sum() + damping / 2 * w @ w
    (gradient,) = torch.autograd.grad(loss, w)
    assert gradient.norm() < 1e-8 * damping * w.detach().norm()


@pytest.mark.parametrize("settings", [KINDS[0], KINDS[2], KINDS[4]], ids=str)
def test_fitting_sets_the_head_and_begins_from_there(policy, models, rollout, settings):
    model = load(policy, models, **settings)
    reading = model.read(rollout, Readings(policy, rollout))
    pairs = pairs_of(rollout, reading)
    features = model.head_inputs(reading)
    model.fit(pairs)
    expected = fit_logistic(features[[1, 5]] - features[[3, 7]], torch.tensor([0.9, 0.2]), 0.1)
    assert torch.allclose(model.head.weight[0].double(), expected, rtol=1e-3, atol=1e-6)
    assert model.drift() == 0
    assert len(model.history) == 1


def test_scores_that_are_not_numbers(policy, models, rollout):
    for choice in ("fail", "drop"):
        model = load(policy, models, kind="head", nan_scores=choice)
        reading = model.read(rollout, Readings(policy, rollout))
        reading.features[2] = torch.nan
        if choice == "fail":
            with pytest.raises(RunError, match="1 of 8 scores are not numbers"):
                model.score(reading)
        else:
            assert model.score(reading).isnan().tolist() == [n == 2 for n in range(8)]


def test_dropout_is_an_option(policy, models, rollout):
    model = load(policy, models, kind="classifier", model="bert")
    reading = model.read(rollout, Readings(policy, rollout))
    assert torch.equal(model.score(reading), model.score(reading))
    assert not torch.equal(model.score(reading, dropout=True), model.score(reading, dropout=True))
    assert not any(module.training for module in model.module.modules())


def test_what_is_kept(policy, models, rollout, tmp_path):
    head = load(policy, models, kind="head")
    head.save(tmp_path / "head")
    assert torch.equal(load_file(tmp_path / "head" / "head.safetensors")["score.weight"], head.head.weight)
    lora = load(policy, models, kind="lora", lora_rank=3)
    lora.save(tmp_path / "lora")
    assert (tmp_path / "lora" / "reward" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "lora" / "config.json").read_text())["adapter"] == "reward"
    part = load(policy, models, **KINDS[5])
    part.save(tmp_path / "part")
    assert set(load_file(tmp_path / "part" / "trained.safetensors")) == set(part.trainable)
    whole = load(policy, models, kind="classifier", model="llama", train="all")
    whole.save(tmp_path / "whole")
    again = LlamaForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert torch.equal(again.score.weight, whole.head.weight)


def test_one_copy_of_the_base_and_a_fresh_adapter_for_each_start(policy, models):
    first = load(policy, models, kind="lora", lora_rank=3)
    assert first.module.body is policy.lm.base_model
    assert not any(".default." in name for name in first.trainable)
    again = load_reward_model(
        RunConfig(reward_model=RewardModelConfig(kind="lora", lora_rank=3)), policy, Processes(), policy.device
    )
    same = load_reward_model(
        RunConfig(reward_model=RewardModelConfig(kind="lora", lora_rank=3)), policy, Processes(), policy.device
    )
    assert all(torch.equal(w, same.weights()[n]) for n, w in again.weights().items())
    assert all(not w.any() for n, w in same.weights().items() if "lora_B" in n)


def test_what_cannot_be(policy, models):
    with pytest.raises(RunError, match="cannot train float16"):
        load(policy, models, kind="classifier", model="bert", dtype="float16")
    for kind in ({"kind": "lora"}, {"kind": "classifier", "model": "bert", "train": "lora"}):
        with pytest.raises(RunError, match=r"reward_model\.lora_targets\W+'nothing'"):
            load(policy, models, **kind, lora_targets=("nothing",))


@pytest.mark.slow
def test_minilm(policy, models, rollout):
    model = load(policy, models, kind="classifier", model="minilm", input="pair")
    reading = model.read(rollout, Readings(policy, rollout))
    assert reading.features.shape == (8, 384)
    assert torch.allclose(model.score(reading), alone(model, reading).detach(), rtol=1e-3, atol=1e-4)


def test_the_fit_does_not_overshoot():
    """Little ridge, features of very different size from 1: whole Newton steps run away here."""
    torch.manual_seed(5)
    n, h = int(torch.randint(2, 60, ())), int(torch.randint(1, 80, ()))
    x = torch.randn(n, h) * 10 ** float(torch.empty(()).uniform_(-2, 3))
    p, ridge = torch.rand(n), 1e-6
    w = fit_logistic(x, p, ridge)
    wide, damping = x.double(), ridge * x.double().square().sum() / h
    gradient = wide.T @ (torch.sigmoid(wide @ w) - p) + damping * w
    assert gradient.norm() < 1e-8 * (wide.T @ (0.5 - p.double())).norm()


def test_a_head_in_half_precision_scores_in_fp32(policy, models, rollout):
    model = load(policy, models, kind="classifier", model="bert", dtype="bfloat16")
    reading = model.read(rollout, Readings(policy, rollout))
    model.head.bias.data.fill_(100.0)
    expected = reading.features @ model.head.weight[0].float() + 100.0
    assert torch.allclose(model.score(reading), expected, rtol=1e-6)
    pairs = pairs_of(rollout, reading)
    assert torch.allclose(model.margins(pairs), expected[[1, 5]] - expected[[3, 7]], atol=1e-4)
    assert model.score(reading).unique().numel() > 2  # rounded to bfloat16 nearly all would be 100
    model.gradient(pairs)
    assert model.head.weight.grad.dtype == torch.bfloat16


def test_of_what_is_too_long_the_prompt_is_cut_and_not_the_reply(policy):
    prompt, replies = "word " * 60 + "end", ("yes, so it is", "no, not at all")
    for kind, eos in (("chat", None), ("pair", policy.eos), ("pair", None)):
        whole = TextInputs(policy.tokenizer, kind, 10_000, eos)
        inputs = TextInputs(policy.tokenizer, kind, 40, eos)
        for reply in replies:
            (row,) = inputs.batch([(prompt, reply)], policy.device)["input_ids"].tolist()
            assert 30 < len(row) <= 40
            assert reply in policy.tokenizer.decode(row)
            (short,) = whole.batch([("word", reply)], policy.device)["input_ids"].tolist()
            assert inputs.batch([("word", reply)], policy.device)["input_ids"].tolist() == [short]


def test_the_schedule_falls_over_all_trainings(policy):
    settings = RewardModelConfig(schedule="linear", learning_rate=1.0, steps=3, every=2)
    model = load_reward_model(RunConfig(reward_model=settings, iterations=5), policy, Processes(), policy.device)
    for _ in range(6):
        model.step()
    assert model.scheduler.get_last_lr() == [0.0]
    assert model.history[-1].learning_rate == pytest.approx(1 / 6)
