"""The comparison with one ordinary backward: it refuses nothing that is right, and by name what is wrong."""

import random
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

import fpo_kernels as fk
from fpo_kernels import layers
from tests.fpo_kernels.test_zoo import EXPECTED_REFUSED, ZOO, engine_of
from tests.fpo_kernels.tiny import batch_of, error, gradients, tiny_llama
from tests.fpo_kernels.truth import Passes

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def refused_of_random_batches(count, seed):
    """Parameters refused over `count` random batches of every architecture and dtype in turn: (model, dtype, name)."""
    draw, found = random.Random(seed), set()
    turns = [(name, dtype) for name in ZOO for dtype in DTYPES]
    batches = {turn: len(range(n, count, len(turns))) for n, turn in enumerate(turns)}
    for (name, dtype), own in batches.items():
        engine = engine_of(name, dtype, check="every")
        for n in range(own):
            lengths = tuple(draw.randint(1, 20) for _ in range(draw.randint(1, 7)))
            engine.norms(ZOO[name].batch(lengths, seed=seed + n, side=draw.choice(["left", "right"])))
        found |= {(name, dtype, row.parameter) for row in engine.coverage() if row.rule == "per_example"}
    return found, sum(batches.values())


def surprises(found):
    return {
        (name, dtype, parameter)
        for name, dtype, parameter in found
        if not any(fnmatchcase(parameter, glob) for glob in EXPECTED_REFUSED.get(name, ()))
    }


def test_nothing_right_is_refused():
    found, count = refused_of_random_batches(2 * len(ZOO) * len(DTYPES), seed=random.randrange(10**6))
    assert count == 96
    assert not surprises(found)


@pytest.mark.slow
def test_nothing_right_is_refused_in_a_thousand_batches():
    found, count = refused_of_random_batches(1000, seed=random.randrange(10**6))
    assert count == 1000
    assert not surprises(found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        ("_outer", lambda stream: stream.__class__(stream.a, 2 * stream.d, stream.packing, stream.transposed)),
        ("_outer", lambda stream: stream.__class__(stream.a.roll(1, 0), stream.d, stream.packing, stream.transposed)),
        ("_scale", lambda stream: stream.__class__(stream.v.roll(1, 0))),  # another example's
        ("_lookup", lambda stream: stream.__class__(stream.ids, 0 * stream.d, stream.packing, stream.table)),
    ],
    ids=["a factor of two", "rows moved by one", "examples in another order", "nothing at all"],
)
def test_a_broken_rule_is_named(monkeypatch, dtype, rule, wrong):
    right = getattr(layers, rule)
    monkeypatch.setattr(layers, rule, lambda module, call: wrong(right(module, call)))
    part = {"_outer": "up_proj.weight", "_scale": "norm.weight", "_lookup": "embed_tokens.weight"}[rule]
    with pytest.raises(ValueError, match=rf"{part}.*one ordinary backward gives another gradient"):
        fk.Influence(tiny_llama(dtype=dtype)).norms(batch_of([5, 2, 9, 3]))
    fk.Influence(tiny_llama(dtype=dtype), check="never").norms(batch_of([5, 2, 9, 3]))


def test_when_it_is_made():
    counts = {}
    for check in ("never", "first", "every"):
        model = tiny_llama()
        engine, runs = fk.Influence(model, check=check), Passes(model)
        told = [len_of(engine, runs, lengths) for lengths in ([5, 2, 9, 3], [5, 2, 9, 3], [6, 1, 9, 4], [9, 5, 3, 2])]
        counts[check] = told
    assert counts["never"] == [2, 1, 1, 1]  # a look at a few, and the pass
    assert counts["first"] == [2, 1, 1, 2]  # an ordinary backward beside the first pass, and of falling lengths
    assert counts["every"] == [2, 2, 2, 2]


def len_of(engine, runs, lengths):
    before = runs.count
    engine.norms(batch_of(lengths))
    return runs.count - before


def test_what_it_leaves_behind():
    model, batch = tiny_llama(), batch_of([5, 2, 9, 3])
    model.score.weight.grad = kept = torch.ones_like(model.score.weight)
    stepped = []
    model.score.weight.register_post_accumulate_grad_hook(lambda p: stepped.append(p))
    state = torch.get_rng_state()
    got = fk.Influence(model, check="every").gram(batch)
    rows = gradients(model, batch, lambda name: True)
    assert error(got, rows @ rows.T) < 1e-7
    assert model.score.weight.grad is kept
    assert bool((kept == 1).all())
    assert not stepped
    assert model.model.norm.weight.grad is None
    assert torch.equal(state, torch.get_rng_state())


def test_arguments():
    with pytest.raises(ValueError, match="check='sometimes': wanted 'first', 'every' or 'never'"):
        fk.Influence(nn.Linear(2, 1), check="sometimes")
