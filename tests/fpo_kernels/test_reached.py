"""Rows that no gradient reached are spared, forward and back, and no answer moves: a reward is read off one token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForSequenceClassification

import fpo_kernels as fk
from fpo_kernels import capture, gather, reached
from tests.fpo_kernels.tiny import LINEAR, batch_of, error, gradients, is_linear, tiny_llama


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """However small, and met where it arrives, as in models of a real size."""
    monkeypatch.setattr(reached, "LEAST_NUMBERS", 1)
    monkeypatch.setitem(capture.NOTED_BYTES, "cpu", 0)


@pytest.fixture
def taken(monkeypatch):
    """(rows, of how many) of every stream that was made smaller."""
    met = []

    def noting(d):
        rows = reached.reached_rows(d)
        if rows is not None:
            met.append((len(rows), len(d)))
        return rows

    monkeypatch.setattr(gather, "reached_rows", noting)
    return met


@pytest.mark.parametrize("lengths", [[9, 9, 9], [11, 1, 4, 6], [8], [1, 1]])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_every_answer_equals_the_autograd_loop(lengths, side, dtype, most, taken):
    model = tiny_llama(5, dtype)
    batch, other = batch_of(lengths, 6, side), batch_of([7, 2], 7, side)
    g, h = (gradients(model, one, is_linear) for one in (batch, other))
    engine = fk.Influence(model, LINEAR)
    vectors = {n: torch.randn_like(p) for n, p in model.named_parameters() if is_linear(n)}
    v = torch.cat([x.double().flatten() for x in vectors.values()])
    for _ in range(2):  # the second time calls are only noted
        assert error(engine.gram(batch), g @ g.T) < most
        assert error(engine.gram(batch, other), g @ h.T) < most
        assert error(engine.norms(batch), g.square().sum(1)) < most
        own = torch.arange(len(lengths)) % 2
        assert error(engine.steering(batch, other, own).product, (g * (g - h[own])).sum(1)) < most
        assert error(engine.direction(batch, vectors), g @ v) < most
    assert error(fk.Influence(model, LINEAR, micro_batch=2).gram(batch), g @ g.T) < most
    assert taken or max(lengths) == 1


def test_sketches_are_the_same(monkeypatch):
    model, batch = tiny_llama(8), batch_of([9, 3, 6], 9)
    few = fk.Influence(model, LINEAR).sketch(batch, 64)
    monkeypatch.setattr(reached, "LEAST_NUMBERS", 2**40)
    assert error(few, fk.Influence(model, LINEAR).sketch(batch, 64)) < 1e-12


def test_the_last_block_costs_one_row_a_text(taken):
    """Its query, output, gate, up and down matrices and the head; of keys and values every row has a gradient."""
    model, batch = tiny_llama(10), batch_of([12, 12, 12], 11)
    engine = fk.Influence(model, LINEAR)
    engine.norms(batch)
    engine.norms(batch)
    taken.clear()
    engine.norms(batch)
    assert taken == [(3, 36)] * 6


def test_the_way_back_multiplies_the_rows_that_were_reached(monkeypatch):
    """Of the last of two blocks q, o, gate, up and down, and the head: FLOPs counted."""
    model, batch = tiny_llama(12), batch_of([16, 16], 13)
    engine, flops = fk.Influence(model, LINEAR), []
    late = [n for n in dict(model.named_parameters()) if is_linear(n) and ".0." not in n]
    sizes = [model.get_parameter(n).numel() for n in late if "k_proj" not in n and "v_proj" not in n]
    spared = 2 * 2 * 15 * sum(sizes)
    for least in (2**40, 1):
        monkeypatch.setattr(reached, "LEAST_NUMBERS", least)
        monkeypatch.setattr(gather, "reached_rows", lambda d: None)  # the products are another matter
        for _ in range(3):
            with FlopCounterMode(display=False) as counter:
                engine.norms(batch)
        flops.append(counter.get_total_flops())
    assert flops[0] - flops[1] == spared


def test_without_any_setting_at_a_real_size(monkeypatch):
    """As users have it, of a block whose gradients are 2¹⁷ numbers each."""
    monkeypatch.undo()
    torch.manual_seed(14)
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=61, num_labels=1, pad_token_id=0, **sizes)
    model, batch = LlamaForSequenceClassification(config).eval(), batch_of([64, 64, 64, 64], 15)
    g, engine, made = gradients(model, batch, is_linear), fk.Influence(model, LINEAR), []
    monkeypatch.setattr(gather, "reached_rows", lambda d: made.append((len(d), reached.reached_rows(d))) or made[-1][1])
    for _ in range(3):
        assert error(engine.gram(batch), g @ g.T) < 1e-5
    assert len([rows for count, rows in made[-8:] if count == 256 and rows is not None and len(rows) == 4]) == 5


@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 5), st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_reached_rows(seed, count, width, share):
    rng = np.random.default_rng(seed)
    d = torch.from_numpy(rng.normal(size=(count, width)) * (rng.random((count, 1)) < share))
    if count > 1:
        d[rng.integers(count)] = torch.nan
    rows, truth = reached.reached_rows(d), (d != 0).any(1).nonzero()[:, 0]
    if rows is None:  # it may take a few for many, by the rows that it looks at first
        assert len(truth) > 0.5 * count or count > reached.SAMPLE or len(truth) > reached.FEW * count
    else:
        assert torch.equal(rows, truth)
        assert len(rows) <= reached.FEW * count


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 3), (2, 2, 3, 3)])
def test_linear_is_torch_s(bias, shape):
    weight, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64) if bias else None
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    own, torch_s = reached.linear(x, weight, b), F.linear(x, weight, b)
    assert torch.equal(own, torch_s)
    d = torch.randn_like(own)
    d.view(-1, 4)[1:] = 0
    for one in (d, torch.randn_like(d)):
        got, wanted = (torch.autograd.grad(y, x, one, retain_graph=True)[0] for y in (own, torch_s))
        assert error(got, wanted) < 1e-14
    assert torch.autograd.gradgradcheck(lambda z: reached.linear(z, weight, b), (x,))
