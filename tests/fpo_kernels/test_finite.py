"""Numbers that are none stay with the example that has them, and where they arise is told by name."""

import pytest
import torch
from torch import nn

import fpo_kernels as fk
from fpo_kernels import capture, pieces, reached
from tests.fpo_kernels.tiny import LINEAR, batch_of, error, gradients, is_linear, tiny_llama

BAD = 60  # a token


@pytest.fixture(params=["as it is", "by pieces, met where they arrive"])
def way(request, monkeypatch):
    if request.param != "as it is":
        monkeypatch.setattr(pieces, "TOKENS", 16)
        monkeypatch.setattr(reached, "LEAST_NUMBERS", 1)
        monkeypatch.setitem(capture.NOTED_BYTES, "cpu", 0)


def poisoned(value, lengths=(5, 8, 3, 8), rows=(1, 3)):
    """A model, and a batch of which some examples have a token whose embedding is not finite."""
    model, batch = tiny_llama(2), batch_of(list(lengths), 3)
    batch["input_ids"][batch["input_ids"] == BAD] = 1
    for row in rows:
        batch["input_ids"][row, 1] = BAD
    with torch.no_grad():
        model.model.embed_tokens.weight[BAD] = value
    return model, batch


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_other_examples_have_their_numbers(way, value):
    model, batch = poisoned(value)
    sound = [0, 2]
    few = {key: x[sound] for key, x in batch.items()}
    g = gradients(model, few, is_linear)
    engine, other = fk.Influence(model, LINEAR), batch_of([4], 5)
    h = gradients(model, other, is_linear)
    vectors = {n: torch.randn_like(p) for n, p in model.named_parameters() if is_linear(n)}
    v = torch.cat([x.flatten() for x in vectors.values()])
    for _ in range(2):
        for answer, truth in (
            (engine.norms(batch), g.square().sum(1)),
            (engine.direction(batch, vectors), g @ v),
            (engine.gram(batch, other)[:, 0], g @ h[0]),
            (engine.steering(batch, other).product, (g * (g - h)).sum(1)),
        ):
            assert error(answer[sound], truth) < 1e-11
            assert not answer[[1, 3]].isfinite().any()
        gram, sketch = engine.gram(batch), engine.sketch(batch, 64)
        assert error(gram[sound][:, sound], g @ g.T) < 1e-11
        assert not gram[[1, 3]].isfinite().any()
        assert error(sketch[sound], engine.sketch(few, 64)) < 1e-11
        assert not sketch[[1, 3]].isfinite().all(1).any()


def test_the_module_that_made_it_is_named(way):
    model, batch = poisoned(torch.nan)
    engine = fk.Influence(model, LINEAR)
    assert engine.faults(batch) == [fk.Fault(row, "model.embed_tokens", "makes") for row in (1, 3)]
    assert str(engine.faults(batch)[0]) == "example 1: model.embed_tokens makes a number that is not finite"
    assert engine.faults({key: x[[0, 2]] for key, x in batch.items()}) == []


def test_a_weight_that_is_not_finite_is_everybody_s():
    model, batch = tiny_llama(4), batch_of([3, 5], 5)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    assert {(one.where, one.what) for one in fk.Influence(model, LINEAR).faults(batch)} == {
        ("model.layers.1.mlp.up_proj", "makes")
    }


class Between(nn.Module):
    """A number is lost between two modules, or on the way back alone."""

    def __init__(self, lose):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.lose = nn.Linear(3, 4, bias=False).double(), nn.Linear(4, 1).double(), lose

    def forward(self, x):
        return self.last(self.lose(self.first(x))).mean((1, 2))


def test_what_is_lost_between_modules():
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    x[1, 0] = 0
    model = Between(lambda y: y / y.abs().sum(-1, keepdim=True))
    engine = fk.Influence(model, output=lambda returned: returned)
    assert engine.faults({"x": x}) == [fk.Fault(1, "last", "reads")]


def test_what_is_lost_on_the_way_back():
    """√ at 0: finite, with an infinite slope."""
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    x[2, 0] = 0
    model = Between(lambda y: y.abs().sqrt())
    engine = fk.Influence(model, output=lambda returned: returned)
    (fault,) = engine.faults({"x": x})
    assert (fault.example, fault.what) == (2, "gradient")
    assert str(fault) == "example 2: the gradient that arrives at first.weight is not finite"
    answer = engine.norms({"x": x})
    assert answer[:2].isfinite().all()
    assert not answer[2].isfinite()
