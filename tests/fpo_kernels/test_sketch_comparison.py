"""The projections that the tensor sketch is compared with: against explicit matrices, and unbiased over seeds."""

import itertools
import math

import numpy as np
import pytest
import torch

from fpo_kernels.sketch import comparison
from fpo_kernels.sketch.comparison import SJLT, DenseProjection, LoGra
from fpo_kernels.sketch.maps import numbers
from fpo_kernels.testing import random_streams

KINDS = (LoGra, SJLT, DenseProjection)
LENGTHS = (3, 0, 7, 1)

each = pytest.mark.parametrize("kind", KINDS)


def formed(a, d, offsets):
    """vec(G_i) of every example, (B, q·p)."""
    cuts = offsets.tolist()
    return torch.stack([(d[s:e].T @ a[s:e]).flatten() for s, e in itertools.pairwise(cuts)])


def matrix(projection):
    """(dim, q·p) of what the docstrings promise, from the generator alone."""
    p, q, k = projection.p, projection.q, projection.dim
    if isinstance(projection, LoGra):
        to_a, to_d = (x.double() for x in projection.matrices(torch.device("cpu")))
        return torch.kron(to_d, to_a)
    key = f"{type(projection).__name__}-1|{projection.seed}|{projection.name}|{p}|{q}|{k}|"
    R = torch.zeros(k, q * p, dtype=torch.float64)
    if isinstance(projection, SJLT):
        for j, z in enumerate(map(int, numbers(f"{key}bucket", q * p))):
            R[(z >> 32) * k >> 32, j] = -1.0 if z & 1 else 1.0
        return R
    z = [int(x) for x in numbers(f"{key}sign", -(-q * p // 64) * k)]
    for j in range(q * p):
        for r in range(k):
            R[r, j] = -1.0 if z[j // 64 * k + r] >> j % 64 & 1 else 1.0
    return R / math.sqrt(k)


@each
@pytest.mark.parametrize(("p", "q", "dim"), [(13, 7, 64), (1, 5, 16), (37, 3, 9), (5, 40, 256)])
def test_it_is_the_matrix_that_is_promised(kind, p, q, dim):
    streams = random_streams(LENGTHS, p, q, torch.float64, seed=p)
    projection = kind(p=p, q=q, dim=dim, seed=3, name="layer")
    exact = formed(*streams) @ matrix(projection).T
    got = projection.project(*streams)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12 * float(exact.abs().max()))
    assert not got[1].any(), "an empty example must give zeros"
    a, d, offsets = streams
    same = formed(a.float(), d.float(), offsets).double()
    narrow = projection.project(a.float(), d.float(), offsets)
    assert narrow.dtype == torch.float32
    # Rounding: each number is a sum of at most (tokens + q·p) terms whose squares add up to at most ‖a‖²‖d‖².
    reach = float(same.norm(dim=1).max()) * matrix(projection).norm(dim=1).max()
    assert (narrow - exact).abs().max() <= math.sqrt(p * q + 7) * torch.finfo(torch.float32).eps * 2 * reach


@each
def test_blocks_and_company_do_not_change_it(kind, monkeypatch):
    p, q = 67, 9
    a, d, offsets = random_streams(LENGTHS, p, q, torch.float64, seed=1)
    projection = kind(p=p, q=q, dim=64)
    together = projection.project(a, d, offsets)
    monkeypatch.setattr(comparison, "SCRATCH", 1)  # the least: 64 coordinates a tile, which cuts rows in two
    torch.testing.assert_close(projection.project(a, d, offsets), together, rtol=1e-12, atol=1e-10)
    monkeypatch.setattr(comparison, "SCRATCH", 64 * 150)  # two rows a tile, no multiple of 64 coordinates
    torch.testing.assert_close(projection.project(a, d, offsets), together, rtol=1e-12, atol=1e-10)
    for n in range(len(LENGTHS)):
        start, end = int(offsets[n]), int(offsets[n + 1])
        alone = projection.project(a[start:end], d[start:end], torch.tensor([0, end - start], dtype=torch.int32))
        torch.testing.assert_close(alone[0], together[n], rtol=1e-12, atol=1e-10)


@each
def test_it_adds_up(kind):
    """The sketch of two examples' tokens taken as one is the sum of theirs, and scaling d scales it."""
    a, d, offsets = random_streams((4, 5), 11, 6, torch.float64)
    projection = kind(p=11, q=6, dim=64)
    two = projection.project(a, d, offsets)
    one = projection.project(a, -3 * d, offsets[[0, 2]])
    torch.testing.assert_close(one[0], -3 * two.sum(0), rtol=1e-12, atol=1e-11)


@each
def test_it_is_unbiased_and_as_exact_as_theory_says(kind):
    """Over 400 seeds: no entry of the mean Gram matrix is 5 standard errors off, its error in all is as it should.

    136 entries at 5 standard errors: a sound projection fails with probability 1e-4, did the seeds change. The mean
    square error is at most (2/k)·tr² for projections of the formed gradient, ((1 + 2/√k)² − 1)·tr² for LoGra.
    """
    streams = random_streams((2, 5, 1, 3), 9, 8, torch.float64, seed=7)
    exact = formed(*streams) @ formed(*streams).T
    grams = torch.stack(
        [x @ x.T for x in (kind(p=9, q=8, dim=64, seed=s, name="n").project(*streams) for s in range(400))]
    )
    error = grams.std(0) / math.sqrt(len(grams))
    assert ((grams.mean(0) - exact).abs() <= 5 * error).all()
    share = (1 + 2 / 8) ** 2 - 1 if kind is LoGra else 2 / 64
    mean_square = (grams - exact).square().sum((1, 2)).mean()
    assert 0.1 * share * exact.trace() ** 2 < mean_square < share * exact.trace() ** 2


@each
def test_seeds_names_and_sizes_make_other_maps(kind):
    streams = random_streams((4,), 10, 10, torch.float64)
    base = kind(p=10, q=10, dim=64).project(*streams)
    assert torch.equal(kind(p=10, q=10, dim=64).project(*streams), base)
    for other in ({"seed": 1}, {"name": "x"}):
        assert (kind(p=10, q=10, dim=64, **other).project(*streams) - base).norm() > 0.5 * base.norm()


def test_every_bit_is_a_fair_sign_of_its_own():
    """Signs by the bit they come from: each within 5 standard deviations of even, and no two alike."""
    signs = DenseProjection(p=64, q=64, dim=64).signs(0, 4096).double().reshape(64, 64, 64)  # (k, words, bits)
    count = 64 * 64
    by_bit = signs.permute(2, 0, 1).reshape(64, count)
    assert (by_bit.sum(1).abs() <= 5 * math.sqrt(count)).all()
    together = by_bit @ by_bit.T / math.sqrt(count)
    assert (together - torch.eye(64) * math.sqrt(count)).abs().max() <= 5


def test_buckets_are_even():
    """χ² of 64 buckets over 64,000 coordinates, 63 degrees of freedom: under 63 + 5·√126 with 1 − 1e-5 or more."""
    bucket, sign = SJLT(p=640, q=100, dim=64).buckets(0, 64_000)
    loads = np.bincount(bucket, minlength=64)
    assert ((loads - 1000.0) ** 2 / 1000).sum() < 63 + 5 * math.sqrt(126)
    assert abs(int(sign.sum())) <= 5 * math.sqrt(64_000)


def test_normal_numbers_are_normal():
    """Kolmogorov and Smirnov's distance of 40,000 numbers: above 2.2/√n in 1 of 10,000 draws."""
    x = LoGra(p=400, q=1, dim=10_000).matrices(torch.device("cpu"))[0].double().flatten() * 10
    ranks = torch.special.ndtr(x.sort().values)
    steps = torch.arange(1, len(x) + 1) / len(x)
    assert (ranks - steps).abs().max() < 2.2 / math.sqrt(len(x))


@each
def test_nothing_in_nothing_out(kind):
    projection = kind(p=3, q=2, dim=16)
    none = projection.project(torch.zeros(0, 3), torch.zeros(0, 2), torch.zeros(1, dtype=torch.int64))
    assert none.shape == (0, 16)
    empty = projection.project(torch.zeros(0, 3), torch.zeros(0, 2), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(empty, torch.zeros(2, 16))


@each
def test_16_bit_streams_are_computed_in_fp32(kind):
    a, d, offsets = random_streams((3, 4), 12, 5, torch.bfloat16)
    projection = kind(p=12, q=5, dim=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = projection.project(a, d.requires_grad_(), offsets)
    assert not got.requires_grad
    assert torch.equal(got, projection.project(a.float(), d.float(), offsets))


@each
def test_what_does_not_fit_is_refused(kind):
    with pytest.raises(ValueError, match="p, q and dim must be at least 1, got 0, 2 and 16"):
        kind(p=0, q=2, dim=16)
    projection = kind(p=3, q=2, dim=16)
    a, d, offsets = random_streams((3,), 3, 2)
    with pytest.raises(ValueError, match=r"\(S, 3\) and \(S, 2\), got \(3, 2\) and \(3, 3\)"):
        projection.project(d, a, offsets)
    with pytest.raises(ValueError, match="offsets must end at the number of rows, 3"):
        projection.project(a, d, torch.tensor([0, 2]))
    with pytest.raises(TypeError, match="dtype of a"):
        projection.project(a, d.double(), offsets)


def test_logra_wants_a_square():
    with pytest.raises(ValueError, match="dim must be a square number, got 8192"):
        LoGra(p=3, q=2, dim=8192)
