"""The published procedure's restatement: its penalties are the definition's, its losses those of plain batches."""

import copy

import pytest
import torch

from benchmarks import iterations, procedure
from benchmarks.cases import cases, train_step
from benchmarks.fixed import exact, fixed_replies, joined
from fpo_train.config import PolicyConfig
from fpo_train.data.prompts import Prompt, read_prompts, render
from fpo_train.policy import load_policy
from tests.fpo_train.conftest import tiny  # noqa: F401

SETTINGS = procedure.Settings(candidates=3, tokens=5)


@pytest.fixture
def peer(tiny):  # noqa: F811
    from transformers import BertConfig, BertForSequenceClassification

    policy = load_policy(PolicyConfig(model=str(tiny)), seed=0, device=torch.device("cpu"))
    oracle = load_policy(PolicyConfig(model=str(tiny)), seed=0, device=torch.device("cpu")).model.unload()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(policy.tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=1,
        initializer_range=0.5,
    )
    classifier = BertForSequenceClassification(config).eval().requires_grad_(False)
    classifier.classifier.requires_grad_(True)
    models = procedure.Models(
        policy=policy.model,
        oracle=oracle,
        tokenizer=policy.tokenizer,
        reward_model=classifier,
        reward_tokenizer=policy.tokenizer,
    )
    return procedure.Procedure(models, SETTINGS)


@pytest.fixture
def fixed(peer):
    tokenizer = peer.models.tokenizer
    prompts = [Prompt(name=n, text=t, ids=tuple(render(tokenizer, t))) for n, t in read_prompts("questions")[:2]]
    return fixed_replies(prompts, tokenizer)


def test_penalties_and_losses_are_the_definition_s(peer, fixed):
    models = peer.models
    # Without an adapter of its own to tell apart, the policy is its base, as when a run begins.
    truth = exact(fixed, models.oracle, models.reward_model, models.reward_tokenizer, torch.ones(32), SETTINGS.gamma)
    answer = iterations.Published(peer, [], lambda one: joined(one.judged(fixed), truth, train_step.ANSWERS["relaxed"]))
    wanted = joined(truth, truth, train_step.ANSWERS["relaxed"])
    got = joined(answer.judged(fixed), truth, train_step.ANSWERS["relaxed"])
    assert (got - wanted).norm() <= train_step.CLOSE * wanted.norm()
    with torch.no_grad():
        models.reward_model.classifier.weight *= 1.01
    moved = iterations.Published(peer, [], lambda one: wanted)
    other = joined(moved.judged(fixed), truth, train_step.ANSWERS["relaxed"])
    assert (other - wanted).norm() > train_step.CLOSE * wanted.norm(), "the gate sees nothing"


def test_an_iteration_trains_both_and_tells_its_phases(peer, fixed):
    models = peer.models
    before = copy.deepcopy([dict(models.policy.named_parameters()), dict(models.reward_model.named_parameters())])
    turn = iterations.Published(peer, [prompt.text for prompt in fixed.prompts], lambda one: torch.ones(1))
    turn()
    assert set(turn.seconds[0]) == set(procedure.PHASES)
    assert all(seconds > 0 for seconds in turn.seconds[0].values())
    for model, old in zip((models.policy, models.reward_model), before, strict=True):
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert moved
        assert moved <= trained
    turn.restart()
    for model, old in zip((models.policy, models.reward_model), before, strict=True):
        assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())
        assert all(p.grad is None for p in model.parameters())


def test_the_case_is_known_and_charts_phases():
    case = cases()["train_step"]
    assert {h.over for h in case.headlines} | {h.under for h in case.headlines} <= set(case.competitors)
    figures = dict.fromkeys(procedure.PHASES, 0.5)
    rows = [
        {"setting": {"name": "s"}, "competitor": "c", "figures": figures, "seconds": {"median": 2.0}},
        {"setting": {"name": "s"}, "competitor": "failed"},
    ]
    assert case.summary(rows).splitlines()[2:] == ["| s | c | 0.50 | 0.50 | 0.50 | 0.50 | 2.00 |"]
