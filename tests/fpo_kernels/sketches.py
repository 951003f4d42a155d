"""What a tensor sketch is by definition, in float64, and how far from it a room may be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpo_kernels.sketch.checked import cut_off
from fpo_kernels.sketch.spec import TensorSketch
from fpo_kernels.testing import budget, outputs

CPU = torch.device("cpu")


def siblings(p: int, widths: Sequence[int], dim: int, seed: int = 0) -> tuple[TensorSketch, ...]:
    """Layers that read one input of p features."""
    return tuple(TensorSketch(p, q, dim, seed, f"layer {n}", "one input") for n, q in enumerate(widths))


def tables(sketches: Sequence[TensorSketch], device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """table_a, and one for each d."""
    maps = [sketch.maps(device) for sketch in sketches]
    return maps[0][0].table, tuple(of_d.table for _, of_d in maps)


def walsh(x: Tensor) -> Tensor:
    """W x for each row of x (S, k), k a power of two."""
    rows, k = x.shape
    for bit in range(k.bit_length() - 1):
        x = x.reshape(rows, k >> bit + 1, 2, 2**bit)
        x = torch.stack([x[:, :, 0] + x[:, :, 1], x[:, :, 0] - x[:, :, 1]], 2)
    return x.reshape(rows, k)


def spectra(a: Tensor, ds: Sequence[Tensor], sketches: Sequence[TensorSketch]) -> tuple[Tensor, Tensor]:
    """W C_a a_t and W Σ_l C_l d^l_t of each token, both (S, k) float64."""
    folded = torch.zeros(2, len(a), sketches[0].dim, dtype=torch.float64)
    for n, (d, sketch) in enumerate(zip(ds, sketches, strict=True)):
        of_a, of_d = sketch.maps(CPU)
        if n == 0:
            folded[0].index_add_(1, of_a.bucket, a.double() * of_a.sign)
        folded[1].index_add_(1, of_d.bucket, d.double() * of_d.sign)
    return walsh(folded[0]), walsh(folded[1])


def definition(
    a: Tensor, d: Tensor | tuple[Tensor, ...], offsets: Tensor, sketches: Sequence[TensorSketch], lost: float = 0
) -> tuple[Tensor, Tensor]:
    """S (B, k) in float64, and the error that float32 sums may make.

    A spectrum's number errs by a walk over p (or Σ q) terms whose partial sums reach ‖a_t‖, times the other spectrum,
    of size ‖d_t‖; four standard deviations of both, over all k and all tokens. What matrix units cut off a spectrum,
    `lost` in ε of those partial sums, is towards zero, and adds up with the tokens' products.
    """
    ds = [x.cpu() for x in outputs(d)]
    left, right = spectra(a.cpu(), ds, sketches)
    lengths = offsets.cpu().diff().tolist()
    scale = sketches[0].dim ** -0.5
    exact = torch.stack([tokens.sum(0) * scale for tokens in (left * right).split(lengths)])
    energy = a.cpu().double().square().sum(1) * sum(x.double().square().sum(1) for x in ds)
    reach = torch.stack([tokens.sum() for tokens in energy.split(lengths)])[:, None].sqrt() * scale * 4
    features = a.shape[1] + sum(x.shape[1] for x in ds)
    terms = features + offsets.cpu().diff()[:, None]
    size = torch.maximum(reach, exact.abs())
    return exact, budget(size * (lost * torch.finfo(torch.float32).eps), size, terms, torch.float32)


def check_room(got: Tensor, streams: tuple, sketches: Sequence[TensorSketch], impl: str = "") -> None:
    """Asserts that a room's fp32 answer lies within the budget around the definition; empty examples are exact."""
    exact, allowed = definition(*streams, sketches, cut_off(impl, got.device, sketches[0].dim))
    assert (got.dtype, got.shape) == (torch.float32, exact.shape)
    over = (got.cpu() - exact).abs() - allowed
    assert not over.numel() or over.max() <= 0, (
        f"{over.max()} over the budget at {divmod(int(over.argmax()), len(exact.T))}"
    )
