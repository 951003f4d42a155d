"""The comparison with one ordinary backward: it refuses nothing that is right, and by name what is wrong."""

import random
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

import fpo_kernels as fk
from fpo_kernels import layers
from fpo_kernels.batches import telling
from fpo_kernels.compare import Comparison
from fpo_kernels.gradients import Vectors
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
        ("_scale", lambda stream: Vectors(stream.v.roll(1, 0))),  # another example's
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


class Company(nn.Module):
    """A layer and a score; `meet` says what becomes of the scores (B,) of a batch."""

    def __init__(self, meet):
        super().__init__()
        torch.manual_seed(3)
        self.layer, self.score, self.meet = nn.Linear(4, 6), nn.Linear(6, 1), meet
        self.double()

    def forward(self, x):
        return self.meet(self.score(torch.tanh(self.layer(x)))[..., 0].sum(1))


X = torch.randn(9, 5, 4, generator=torch.Generator().manual_seed(1)).double()


def company(meet, **options):
    model = Company(meet)
    return model, fk.Influence(model, output=lambda returned: returned, **options)


@pytest.mark.parametrize(
    "meet",
    [
        lambda r: r + 1e-3 * r.mean() if len(r) > 4 else r,
        lambda r: r + 1e-3 * r.roll(1) if len(r) > 4 else r,
        lambda r: r + 1e-3 * r.detach() * r.flip(0) if len(r) > 4 else r,
    ],
)
def test_examples_that_meet_in_larger_company_alone(meet):
    """Three of them, or one, do not; so no look at a few would see it."""
    _, engine = company(meet)
    with pytest.raises(ValueError, match=r"one ordinary backward gives another gradient|depend on one another"):
        engine.norms({"x": X})


@pytest.mark.parametrize(
    "meet",
    [lambda r: r - r.detach().mean(), lambda r: r * (1 + r.detach().norm()), lambda r: r * torch.arange(1.0, 10.0)],
    ids=["a mean without a gradient", "a factor without a gradient", "no fewer examples than all"],
)
def test_what_differs_in_other_company_and_is_right(meet):
    model, engine = company(meet)
    runs = Passes(model)
    got = engine.gram({"x": X})
    rows = []
    for i in range(9):
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(model(X)[i], list(model.parameters()))]))
    rows = torch.stack(rows)
    assert error(got, rows @ rows.T) < 1e-12
    runs.count = 0
    engine.gram({"x": X})
    assert runs.count == 1


def test_layers_that_no_gradient_reaches_are_looked_at():
    model, engine = company(lambda r: r)
    nn.init.zeros_(model.score.weight)
    runs = Passes(model)
    for count in (3, 1):  # the pass, an ordinary backward, and a look
        engine.norms({"x": X})
        assert runs.count == count
        runs.count = 0


def test_fp32_weights_that_are_multiplied_in_16_bits():
    model = tiny_llama(dtype=torch.float32)
    forward = model.forward

    def rounded(**batch):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(**batch)

    model.forward = rounded
    engine, runs = fk.Influence(model), Passes(model.score)
    # where it is seen: a look, and over the whole batch; of falling lengths, over three of them
    for lengths, count in (([5, 2, 9, 3], 5), ([6, 1, 9, 4], 1), ([9, 5, 3, 2], 3)):
        engine.norms(batch_of(lengths))
        assert runs.count == count
        runs.count = 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_examples_that_tell_would_be_moved_by_sorting(side):
    draw = random.Random(7)
    for _ in range(300):
        lengths = [draw.randint(1, 6) for _ in range(draw.randint(1, 20))]
        told = telling(batch_of(lengths, side=side), 1).tolist()
        assert told == sorted(set(told))
        assert 1 <= len(told) <= max(2, len(lengths) // 8)
        for sign in (1, -1):
            order = sorted(range(len(lengths)), key=lambda i: sign * lengths[i])
            moved = [i for i in range(len(lengths)) if order[i] != i]
            assert not moved or set(told) & set(moved)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16), (1, 24)])
def test_few_errors_escape_directions_of_rank_one(shape):
    """Not more of those of rank one, the hardest, than about δ: as under a dense direction of random signs."""
    q, p = shape
    names = {"w": nn.Parameter(torch.zeros(shape))}
    comparison = Comparison(names, torch.arange(1), 1, fine=True)
    hook = comparison._along("w", found := {})
    generator, delta, count = torch.Generator().manual_seed(5), 0.02, 4000
    missed = 0
    for _ in range(count):
        E = torch.outer(torch.randn(q, generator=generator), torch.randn(p, generator=generator))
        hook(E)
        missed += float(found["w"].abs().max()) < delta * float(E.norm())
    assert missed / count < 1.5 * delta


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
