"""What grad_sketch promises of inner products: right on average over seeds, with an error that falls as k^(−1/2)."""

import math
import statistics

import torch

import fpo_kernels as fk
from fpo_kernels.testing import random_streams

LENGTHS = (6, 1, 9, 4, 0, 12)
P, Q = 40, 24


def low_rank_streams(seed):
    """Streams whose tokens share few directions, as those of a model do: a and d of rank 5 and a little noise.

    Their mean is not zero, or maps without signs would go unseen.
    """
    a, d, offsets = random_streams(LENGTHS, P, Q, torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    few_a, few_d = (torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (P, Q))
    return a[:, :5] @ few_a + 0.1 * a + 1, d[:, :5] @ few_d + 0.1 * d + 1, offsets


def gram(streams):
    pairs = torch.cartesian_prod(*[torch.arange(len(LENGTHS))] * 2)
    return fk.grad_products(*streams, pairs, impl="reference").view(len(LENGTHS), -1)


def sketched(streams, dim, seed, name="layer"):
    """The Gram matrix of the sketches, in float64."""
    s = fk.grad_sketch(*streams, fk.TensorSketch(p=P, q=Q, dim=dim, seed=seed, name=name))
    return s @ s.T


def test_the_mean_over_64_seeds_is_the_gram_matrix():
    """No entry of the mean is more than 4.6 standard errors off.

    Of 15 different entries that are not zero, by Student's t with 63 degrees of freedom: a sound sketch passes with
    more than 99.9% probability; one whose products are 10% too large has them near 8 standard errors off.
    """
    streams = low_rank_streams(seed=0)
    grams = torch.stack([sketched(streams, 256, seed) for seed in range(64)])
    exact = gram(streams)
    empty = exact == 0
    assert int(empty.sum()) == 2 * len(LENGTHS) - 1
    assert not grams[:, empty].any()
    off = (grams.mean(0) - exact) / (grams.std(0) / 8)
    assert off[~empty].abs().max() < 4.6


def test_sketches_of_layers_add_up_without_bias():
    """Two layers that read one input and share its map: the mean over 64 seeds is the sum of their Gram matrices."""
    a, d, offsets = low_rank_streams(seed=1)
    other = d.flip(1).contiguous()  # like d, so that a cross term would show
    exact = gram((a, d, offsets)) + gram((a, other, offsets))
    grams = []
    for seed in range(64):
        maps = [fk.TensorSketch(p=P, q=Q, dim=256, seed=seed, name=name, family="both") for name in ("x", "y")]
        s = fk.grad_sketch(a, (d, other), offsets, maps)
        grams.append(s @ s.T)
    found = torch.stack(grams)
    some = exact != 0
    off = (found.mean(0) - exact) / (found.std(0) / 8)
    assert off[some].abs().max() < 4.6


def test_the_error_falls_with_the_square_root_of_k():
    """Log error against log k over k = 64 … 16384 has a slope of −1/2 within 0.08, twelve draws a point.

    That is three standard deviations of the slope, 0.026 over other draws of streams and seeds.
    """
    points = []
    streams = [low_rank_streams(seed) for seed in range(3)]
    exact = [gram(x) for x in streams]
    for dim in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384):
        errors = [
            float((sketched(x, dim, seed) - truth).norm() / truth.norm())
            for x, truth in zip(streams, exact, strict=True)
            for seed in range(4)
        ]
        points.append((math.log(dim), math.log(statistics.mean(errors))))
    slope = statistics.linear_regression(*zip(*points, strict=True)).slope
    assert abs(slope + 0.5) < 0.08


def test_the_error_is_within_the_bound_of_the_theory():
    """Over 64 seeds the mean square error of ⟨S_i, S_j⟩ is at most (11/k)·‖G_i‖²‖G_j‖², for every pair.

    Source: Avron, Nguyen and Woodruff 2014, for a tensor sketch of degree 2.
    """
    streams = low_rank_streams(seed=2)
    exact = gram(streams)
    square = torch.stack([(sketched(streams, 1024, seed) - exact).square() for seed in range(64)]).mean(0)
    sizes = exact.diagonal()
    assert (square <= 11 / 1024 * sizes[:, None] * sizes).all()
    assert square.sum() > 0.1 / 1024 * sizes.sum() ** 2, "too good to be a sketch of 1024 numbers"
