"""Every way through a whole model is right, on a tiny one, and leaves the model as it found it."""

import dataclasses

import pytest
import torch

from benchmarks import peers
from benchmarks.cases import influence
from benchmarks.models import SHAPES, block_weights, reward_model, token_batch
from benchmarks.runner import check

CPU = torch.device("cpu")
TINY = influence.Setting(name="tiny", shape="tiny", layers=2, candidates=3, tokens=16, dtype="float32")


@pytest.fixture(scope="module")
def contest():
    contest = influence.build(TINY, CPU)
    return contest, contest.expected()


@pytest.mark.parametrize("name", influence.CASE.competitors)
def test_competitors_pass_the_gate(contest, name):
    contest, expected = contest
    _, reason = check(contest.competitors[name], expected)
    assert reason == ""
    doubled = dataclasses.replace(contest.competitors[name], run=lambda: 2 * contest.competitors[name].run())
    assert "over its budget" in check(doubled, expected)[1]


def test_peers_leave_no_trace():
    model = reward_model("tiny", 2, torch.float32, CPU)
    names, batch = block_weights(model), token_batch(4, 16, CPU)
    peers.ghost_norms(model, names, batch)
    peers.autograd_loop(model, names, batch)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_the_trusted_answers_are_the_exact_ones():
    model = reward_model("tiny", 2, torch.float32, CPU)
    names, batch = block_weights(model), token_batch(4, 16, CPU)
    right, trusted = peers.exact(model, names, batch), peers.trusted(model, names, batch)
    assert trusted["product"].dtype == torch.float64
    for key, value in right.items():
        torch.testing.assert_close(trusted[key].double(), value, rtol=1e-4, atol=1e-6 * float(value.abs().max()))


def test_only_what_is_too_wide_is_not_gated_in_float64(monkeypatch):
    monkeypatch.setattr(peers, "trusted", lambda *a: pytest.fail("not exact"))
    influence.build(TINY, CPU).expected()
    monkeypatch.undo()
    monkeypatch.setattr(influence, "EXACT_WEIGHTS", 1)
    monkeypatch.setattr(peers, "exact", lambda *a: pytest.fail("exact"))
    influence.build(TINY, CPU).expected()


def test_what_does_not_fit_says_so(monkeypatch):
    monkeypatch.setattr(influence, "available_bytes", lambda device: 10**6)
    model = reward_model("tiny", 2, torch.float32, CPU)
    weights = sum(model.get_parameter(name).nbytes for name in block_weights(model))
    contest = influence.build(TINY, CPU)
    assert weights < 10**6 < 2 * 4 * weights
    assert set(contest.cannot) == {influence.VMAP}
    assert "GiB are free" in contest.cannot[influence.VMAP]


def test_models_are_made_in_their_dtype():
    assert {p.dtype for p in reward_model("tiny", 1, torch.bfloat16, CPU).parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    first, second = (reward_model("tiny", 1, torch.float32, CPU) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))


def test_every_setting_names_a_known_shape():
    found = influence.settings(False, CPU)
    assert {setting.shape for setting in found} <= set(SHAPES)
    assert len({setting.name for setting in found}) == len(found)
    assert all(set(setting.isolated) <= set(influence.CASE.competitors) for setting in found)
