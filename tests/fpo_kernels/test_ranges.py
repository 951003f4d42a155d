"""Streams from 1e-20 to 1e20 in fp32: a right number, or a sentence that says that there is none in fp32."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fpo_kernels as fk
from fpo_kernels import ranges

LENGTHS = (3, 0, 5, 1)
OFFSETS = torch.tensor([0, 3, 3, 8, 9])
PAIRS = torch.cartesian_prod(torch.arange(4), torch.arange(4))
MOST, LEAST = torch.finfo(torch.float32).max, 1e-37


def streams(seed, p=6, q=5):
    rng = np.random.default_rng(seed)
    a, d, v = (torch.from_numpy(rng.normal(size=shape)) for shape in ((9, p), (9, q), (q, p)))
    return a, d, v


def agree(ask, truth):
    """What is asked in fp32 is the truth, where fp32 has it."""
    if bool((truth.abs() > MOST).any()):
        with pytest.raises(ValueError, match=r"beyond float32; scale a or d, or pass them in float64"):
            ask()
        return
    found = ask().double()
    told = truth.abs() > LEAST
    assert found.isfinite().all()
    assert ((found - truth)[told].abs() <= 2e-5 * truth.abs().max().clamp_min(LEAST)).all()
    assert (found[~told].abs() < 2 * LEAST).all()


def truth_of(a, d):
    return torch.stack([d[b:e].T @ a[b:e] for b, e in itertools.pairwise(OFFSETS)])


@given(st.integers(0, 2**31), st.integers(-20, 20), st.integers(-20, 20), st.integers(-20, 20))
@settings(deadline=None, max_examples=150)
def test_every_operation_at_every_scale(seed, of_a, of_d, of_v):
    a, d, v = streams(seed)
    a, d, v = (x.mul(10.0**power).float() for x, power in ((a, of_a), (d, of_d), (v, of_v)))
    G = truth_of(a.double(), d.double())
    for impl, way in (
        ("auto", "auto"),
        ("torch", "tokens"),
        ("torch", "form"),
        ("native", "tokens"),
        ("reference", "form"),
    ):
        agree(
            lambda impl=impl, way=way: fk.grad_products(a, d, OFFSETS, PAIRS, impl=impl, way=way),
            torch.einsum("iqp,jqp->ij", G, G).flatten(),
        )
    agree(lambda: fk.grad_direction(a, d, OFFSETS, v), torch.einsum("iqp,qp->i", G, v.double()))
    sketch = fk.TensorSketch(p=6, q=5, dim=64, seed=seed % 1000, name="x")
    agree(
        lambda: fk.grad_sketch(a, d, OFFSETS, sketch),
        fk.grad_sketch(a.double(), d.double(), OFFSETS, sketch, impl="reference"),
    )


@given(st.integers(0, 2**31), st.lists(st.integers(-12, 12), min_size=4, max_size=4))
@settings(deadline=None, max_examples=50)
def test_examples_of_unlike_scales(seed, powers):
    """Each pair is as right as if it were alone, though another's numbers are 10²⁴ times as large."""
    a, d, _ = streams(seed)
    scale = torch.repeat_interleave(10.0 ** torch.tensor(powers, dtype=torch.float64), torch.tensor(LENGTHS))
    a, d = a.float(), (d * scale[:, None]).float()
    G = truth_of(a.double(), d.double())
    found, truth = fk.grad_products(a, d, OFFSETS, PAIRS).double(), torch.einsum("iqp,jqp->ij", G, G).flatten()
    norms = G.flatten(1).norm(dim=1)
    assert ((found - truth).abs() <= 1e-5 * (norms[:, None] * norms).flatten() + LEAST).all()


def test_two_streams_and_sums_that_cancel():
    a, d, _ = streams(3)
    other = (a.mul(1e-20).float(), d.mul(1e20).float(), OFFSETS)
    G = truth_of(a.float().double(), d.float().double())
    H = truth_of(*(x.double() for x in other[:2]))
    agree(
        lambda: fk.grad_products(a.float(), d.float(), OFFSETS, PAIRS, other=other),
        torch.einsum("iqp,jqp->ij", G, H).flatten(),
    )
    # orthogonal: nothing is taken again for a zero that is one
    a, d = torch.eye(2).repeat(1, 1), torch.ones(2, 1)
    assert fk.grad_products(a, d, torch.tensor([0, 1, 2]), torch.tensor([[0, 1]])).item() == 0


def test_what_is_not_finite_stays_so():
    a, d, _ = streams(4)
    a[0, 0] = torch.nan
    found = fk.grad_products(a.float(), d.float(), OFFSETS, PAIRS).view(4, 4)
    assert found[0, 0].isnan()
    assert found[0, 2].isnan()
    assert found[2, 2].isfinite()


def test_usual_numbers_are_not_taken_again(monkeypatch):
    monkeypatch.setattr(ranges, "scales", lambda *given: pytest.fail("looked at"))
    a, d, v = (x.float() for x in streams(5))
    offsets = torch.tensor([0, 3, 8, 9])
    fk.grad_products(a, d, offsets, torch.tensor([[0, 0], [1, 2]]))
    fk.grad_direction(a, d, offsets, v)
    fk.grad_sketch(a, d, offsets, fk.TensorSketch(p=6, q=5, dim=64, seed=1, name="x"))
