"""The budget for matrix units that truncate, against an emulation of how they add."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fpo_kernels.budgets import budget, products_terms, products_truncated, reach, sketch_budget
from fpo_kernels.products import grad_products
from fpo_kernels.sketch import TensorSketch
from fpo_kernels.sketch.checked import cut_off
from fpo_kernels.sketch.reference import hadamard
from fpo_kernels.testing import random_streams

# Products added at once and bits kept below fp32's last, per generation (Fasi et al. 2021; Khattak and Mikaitis 2025).
UNITS = {"A100": (8, 1), "H100": (16, 2)}


def cut(x: Tensor, grid: Tensor) -> Tensor:
    return torch.trunc(x / grid) * grid


def exponent(x: Tensor) -> Tensor:
    return torch.frexp(x.abs())[1].double() - 1


def unit_product(x: Tensor, y: Tensor, block: int, extra: int, total: Tensor | None = None) -> Tensor:
    """total + x yᵀ as a matrix unit adds: exact products and the sum so far, cut to a grid below the largest, cut to
    fp32."""
    x, y = x.double(), y.double()
    total = torch.zeros(len(x), len(y), dtype=torch.float64) if total is None else total
    for first in range(0, x.shape[1], block):
        columns = slice(first, first + block)
        addends = torch.cat([total[..., None], x[:, None, columns] * y[None, :, columns]], -1)
        grid = torch.exp2(exponent(addends.abs().amax(-1)) - 23 - extra)
        total = cut(addends, grid[..., None]).sum(-1)
        total = cut(total, torch.exp2(exponent(total) - 23))
    return total


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("p", "q"), [(576, 192), (577, 1535), (4, 1000)])
def test_fp16_tokens_need_the_band_and_stay_within_it(p: int, q: int, unit: str) -> None:
    """Sums of squares lose the most: every cut is towards zero. These are the widths that an H200 missed by rounding's
    budget alone, at (577, 1535) by 36.5 where the numbers themselves are of the order of 1e8."""
    lengths = [1, 2, 17]
    a, d, offsets = random_streams(lengths, p, q, torch.float16)
    tiles = unit_product(a, a, *UNITS[unit]) * unit_product(d, d, *UNITS[unit])
    pairs = torch.arange(3)[:, None].repeat(1, 2)
    got = torch.stack([tiles[i:j, i:j].sum() for i, j in zip([0, 1, 3], [1, 3, 20], strict=True)])
    wide = a.double(), d.double(), offsets
    exact = grad_products(*wide, pairs, impl="reference")
    same = grad_products(a, d, offsets, pairs, impl="reference")
    rows = (torch.tensor(lengths),) * 2
    size, steps = reach(wide[0], [wide[1]], offsets) ** 2, products_terms(p, q, *rows, "tokens")
    truncated = products_truncated(p, q, *rows, "tokens")
    error, known = (got - exact).abs(), (same - exact).abs()
    ratio = error / budget(known, size, steps, torch.float32, truncated)
    assert (ratio <= 1).all()
    assert ratio.max() > 0.03  # no more than 30 times what happens
    if p == 577:
        assert (error > budget(known, size, steps, torch.float32)).any()


@pytest.mark.parametrize("unit", UNITS)
def test_sketches_in_three_parts_need_their_cuts_and_stay_within(unit: str) -> None:
    """One token at k = 4096 in fp32, as the Triton room multiplies it: an H200 missed rounding's budget by 1.4."""
    W = hadamard(64, torch.float32, torch.device("cpu"))

    def times(x: Tensor, transposed: bool) -> Tensor:
        total = torch.zeros(64, 64, dtype=torch.float64)
        rest = (x.T if transposed else x).float()
        for _ in range(3):
            part = rest.bfloat16().float()
            rest = rest - part
            total = unit_product(part, W, *UNITS[unit], total=total)
        return total.T if transposed else total

    a, d = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    got = torch.ones(64, 64, dtype=torch.float64)
    exact = torch.ones(64, 64, dtype=torch.float64)
    for x in (a, d):
        got = got * times(times(x.view(64, 64), True), False)
        exact = exact * (W.double() @ x.view(64, 64).double() @ W.double())
    streams = a[None], d[None], torch.tensor([0, 1])
    plain, band = (
        sketch_budget(streams, TensorSketch(4096, 4096, 4096), torch.float32, 1, lost)
        for lost in (0, cut_off("triton", torch.device("cuda"), 4096))
    )
    error = (got - exact).norm() / 64
    assert plain < error < band < 8 * error
