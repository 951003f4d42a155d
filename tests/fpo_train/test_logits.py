"""Chunked logits against plain ones in float64; and that no tensor is larger than a chunk."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fpo_train.policy.logits import kl_to, token_log_probs
from fpo_train.policy.optimizers import make_optimizer, make_schedule

V, H = 101, 7


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    states, base = torch.randn(2, 13, H, dtype=torch.float64)
    weight, base_weight = torch.randn(2, V, H, dtype=torch.float64)
    return states.requires_grad_(), base, weight.requires_grad_(), base_weight, torch.randint(V, (13,))


@pytest.mark.parametrize("at_once", [1, 4, 13, 100])
def test_values_and_gradients(inputs, at_once):
    states, base, weight, base_weight, tokens = inputs
    upstream = torch.randn(13, dtype=torch.float64)
    own, other = (states @ weight.T).log_softmax(1), (base @ base_weight.T).log_softmax(1)
    plain = own.gather(1, tokens[:, None])[:, 0], (own.exp() * (own - other)).sum(1)
    ours = (
        token_log_probs(states, tokens, lambda h: h @ weight.T, at_once),
        kl_to(states, base, lambda h: h @ weight.T, lambda h: h @ base_weight.T, at_once),
    )
    for mine, truth in zip(ours, plain, strict=True):
        assert torch.allclose(mine, truth, rtol=1e-12)
        got = torch.autograd.grad((mine * upstream).sum(), (states, weight))
        expected = torch.autograd.grad((truth * upstream).sum(), (states, weight), retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("at_once", [1, 4, 13, 100])
def test_under_a_frozen_projection_gradients_are_known_at_once(inputs, at_once):
    states, base, weight, base_weight, tokens = inputs
    upstream, weight, made = torch.randn(13, dtype=torch.float64), weight.detach(), []

    def project(h):
        made.append(len(h))
        return h @ weight.T

    own, other = (states @ weight.T).log_softmax(1), (base @ base_weight.T).log_softmax(1)
    plain = own.gather(1, tokens[:, None])[:, 0], (own.exp() * (own - other)).sum(1)
    ours = (
        token_log_probs(states, tokens, project, at_once, frozen=True),
        kl_to(states, base, project, lambda h: h @ base_weight.T, at_once, frozen=True),
    )
    for mine, truth in zip(ours, plain, strict=True):
        assert torch.allclose(mine, truth, rtol=1e-12)
        (got,) = torch.autograd.grad((mine * upstream).sum(), states)
        (expected,) = torch.autograd.grad((truth * upstream).sum(), states, retain_graph=True)
        assert (got - expected).norm() <= 1e-12 * expected.norm()
    assert sum(made) == 2 * len(states)  # no logits were made twice
    nothing = token_log_probs(states[:0], tokens[:0], project, at_once, frozen=True)
    assert nothing.shape == (0,)


class Largest(TorchDispatchMode):
    """The most elements of any tensor made."""

    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.seen = max(self.seen, one.numel())
        return out


@pytest.mark.parametrize("frozen", [True, False])
def test_logits_of_all_tokens_never_exist(frozen):
    torch.manual_seed(1)
    states, tokens, weight = torch.randn(64, H, requires_grad=True), torch.randint(5000, (64,)), torch.randn(5000, H)
    with Largest() as largest:
        token_log_probs(states, tokens, lambda h: h @ weight.T, 8, frozen=frozen).sum().backward()
        sides = (lambda h: h @ weight.T, lambda h: h @ weight.T)
        kl_to(states, states.detach(), *sides, 8, frozen=frozen).sum().backward()
    assert 8 * 5000 <= largest.seen <= max(8 * 5000, weight.numel())


def test_schedules():
    def rates(kind, warmup, total, steps):
        optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], "adamw", 2.0, 0.0)
        schedule, found = make_schedule(optimizer, kind, warmup, total), []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    assert rates("constant", 0, 4, 4) == [2.0] * 4
    assert rates("constant", 2, 4, 4) == [1.0, 2.0, 2.0, 2.0]
    assert rates("linear", 0, 4, 6) == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]
    assert rates("linear", 2, 4, 5) == [1.0, 2.0, 2.0, 1.0, 0.0]
    assert rates("cosine", 0, 2, 3) == pytest.approx([2.0, 1.0, 0.0])


def test_the_8_bit_optimizer_needs_its_package(monkeypatch):
    import sys
    import types

    from fpo_train.errors import RunError

    parameters = [torch.nn.Parameter(torch.zeros(1))]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(RunError, match="paged_adamw_8bit: needs the package bitsandbytes"):
        make_optimizer(parameters, "paged_adamw_8bit", 1e-3, 0.01)
    module = types.ModuleType("bitsandbytes.optim")
    module.PagedAdamW8bit = lambda own, lr, weight_decay: (own, lr, weight_decay)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    assert make_optimizer(parameters, "paged_adamw_8bit", 1e-3, 0.01) == (parameters, 1e-3, 0.01)
