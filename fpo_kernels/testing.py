"""Inputs for tests and benchmarks, and the error an implementation may make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fpo_kernels.direction import grad_direction
from fpo_kernels.products import grad_products
from fpo_kernels.sketch import TensorSketch

Outputs = Tensor | tuple[Tensor, ...]
Streams = tuple[Tensor, Outputs, Tensor]
Place = Literal["first", "middle", "last"]

PLACES: tuple[Place, ...] = ("first", "middle", "last")
# Rows that rooms take at a time: a block of the native room's bands; a GPU tile, a chunk of a sketch, and the least
# that forming gathers; a tile of the torch room. Lengths to draw from: none, one, and each of these met, missed by one
# and passed; with several pieces at the end.
PIECES = (16, 64, 128)
EDGES = (0, 1, 2, *(piece + more for piece in PIECES for more in (-1, 0, 1)), 2 * PIECES[-1] + 1)


def ragged(examples: int, longest: int = EDGES[-1], shortest: int = 0, place: Place = "last") -> list[int]:
    """Lengths of so many examples, spread evenly from the shortest, which stands at `place`, to the longest.

    The others rise and fall again; beside an empty example and two more, one is of a single token.
    """
    rising = [longest - (longest - shortest) * n // max(examples - 1, 1) for n in reversed(range(examples))]
    if shortest == 0 and examples > 3:
        rising[1] = 1
    least, *rest = rising
    others = [*rest[::2], *rest[1::2][::-1]]
    where = {"first": 0, "middle": len(others) // 2, "last": len(others)}[place]
    return [*others[:where], least, *others[where:]]


def random_streams(
    lengths: Sequence[int] | int,
    p: int,
    q: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """a (S, p), d (S, q) ~ N(0, 1) without zeros, and offsets (B+1,) int64 of examples with these lengths.

    A number of examples stands for `ragged` ones. Drawn in float64 on the CPU, so a seed gives the same numbers
    everywhere, rounded to `dtype`.
    """
    lengths = ragged(lengths) if isinstance(lengths, int) else lengths
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    rows = int(offsets[-1])
    a, d = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (p, q))
    # rounding must not make a zero either: a dropped term has to show
    a, d = (torch.where(x.abs() < 1e-3, 1e-3, x).to(dtype) for x in (a, d))
    return a.to(device), d.to(device), offsets.to(device)


def budget(reference_error: Tensor, scale: Tensor, terms: Tensor | float, dtype: torch.dtype) -> Tensor:
    """The error allowed: what the reference makes in this dtype, plus a rounding band.

    band = √terms · ε · scale. A sum of n terms in any order errs by a random walk of at most n roundings, each
    of at most ε/2 of a partial sum; √n · ε · scale is at least twice that walk's standard deviation.

    Args:
        reference_error: |reference in this dtype − reference in float64|, any shape.
        scale: the size the partial sums reach, e.g. ‖G_i‖·‖G_j‖; broadcasts. Zero allows no error.
        terms: how many terms are added one after another, counted over all nested sums.
        dtype: the accumulation dtype, not the inputs'.
    """
    steps = torch.as_tensor(terms, dtype=torch.float64, device=scale.device).sqrt()
    return reference_error.double() + steps * torch.finfo(dtype).eps * scale.double()


def check_products(
    impl: str, streams: Streams, pairs: Tensor, other: Streams | None = None, *, way: str = "auto"
) -> Tensor:
    """grad_products by `impl` and `way`, asserted to lie within the budget around the float64 reference on the CPU."""
    left, right = (_moved(stream, "cpu") for stream in (streams, other or streams))
    wide, wide2 = (_moved(stream, torch.float64) for stream in (left, right))
    listed = pairs.cpu()
    exact = grad_products(*wide, listed, other=wide2, impl="reference")
    same = grad_products(*left, listed, other=right, impl="reference")
    got = grad_products(*streams, pairs, other=other, impl=impl, way=way)
    assert (got.dtype, got.shape, got.device) == (same.dtype, same.shape, pairs.device)
    scale = reach(wide)[listed[:, 0]] * reach(wide2)[listed[:, 1]]
    allowed = budget((same - exact).abs(), scale, terms(left, listed, right, way), got.dtype)
    over = (got.cpu() - exact).abs() - allowed
    assert not len(over) or over.max() <= 0, f"{impl}, {way}: {over.max()} over the budget at pair {over.argmax()}"
    return got


def terms(left: Streams, pairs: Tensor, right: Streams, way: str) -> Tensor:
    """(n,) how many terms each pair's nested sums add one after another; the larger of both ways for "auto".

    From tokens: p and Σ_k q_k features, then T_i·T_j products. By forming: T_i and T_j tokens, then p·Σ_k q_k
    elements.
    """
    p, q = left[0].shape[1], sum(d.shape[1] for d in outputs(left[1]))
    rows_i, rows_j = left[2].diff()[pairs[:, 0]], right[2].diff()[pairs[:, 1]]
    tokens, form = p + q + rows_i * rows_j, rows_i + rows_j + p * q
    return {"tokens": tokens, "form": form}.get(way, torch.maximum(tokens, form))


def reach(streams: Streams) -> Tensor:
    """(B,) the larger of ‖G_i‖ and √Σ_t ‖a_t‖²‖d_t‖²: what sums over tokens reach even where G_i cancels."""
    a, d, offsets = streams
    every = torch.arange(len(offsets) - 1)
    squared = grad_products(a, d, offsets, torch.stack([every, every], 1), impl="reference")
    energy = a.square().sum(1) * sum(x.square().sum(1) for x in outputs(d))
    tokens = energy.split(offsets.diff().tolist())
    return torch.maximum(squared, torch.stack([t.sum() for t in tokens])).sqrt()


def outputs(d: Outputs) -> tuple[Tensor, ...]:
    """The d of each layer that reads the same a."""
    return (d,) if isinstance(d, Tensor) else d


def _moved(streams: Streams, to: torch.dtype | str) -> Streams:
    """a and d's in a dtype, or all on a device."""
    a, d, offsets = streams
    moved = d.to(to) if isinstance(d, Tensor) else tuple(x.to(to) for x in d)
    return a.to(to), moved, offsets if isinstance(to, torch.dtype) else offsets.to(to)


def check_direction(impl: str, streams: tuple[Tensor, Tensor, Tensor], direction: Tensor) -> Tensor:
    """grad_direction by `impl`, asserted to lie within the budget around the float64 reference on the CPU."""
    a, d, offsets, V = (x.cpu() for x in (*streams, direction))
    exact = grad_direction(a.double(), d.double(), offsets, V.double(), impl="reference")
    same = grad_direction(a, d, offsets, V, impl="reference")
    got = grad_direction(*streams, direction, impl=impl)
    assert (got.dtype, got.shape, got.device) == (same.dtype, same.shape, streams[0].device)
    allowed = direction_budget((same - exact).abs(), (a, d, offsets), V, got.dtype)
    over = (got.cpu() - exact).abs() - allowed
    assert not len(over) or over.max() <= 0, f"{impl}: {over.max()} over the budget at example {over.argmax()}"
    return got


def direction_budget(
    reference_error: Tensor,
    streams: tuple[Tensor, Tensor, Tensor],
    direction: Tensor,
    dtype: torch.dtype,
    formed: bool = False,
) -> Tensor:
    """(B,) the error allowed to ⟨G_i, V⟩ computed in `dtype`, whichever sum is taken first.

    Sums over features, then tokens; `formed` is for those who sum over tokens, then over all of G. The scale is
    four standard deviations of what partial sums of random signs reach at each level: over single terms
    d_q V_qp a_p, over d_q (V a)_q and a_p (Vᵀ d)_p, and over tokens, whichever is largest.
    """
    a, d, V = (x.double() for x in (streams[0], streams[1], direction))
    left, right = a @ V.T, d @ V  # (S, q), (S, p)
    terms = ((a.square() @ V.square().T) * d.square()).sum(1)
    levels = torch.stack(
        [terms, (left * d).square().sum(1), (right * a).square().sum(1), (left * d).sum(1).square()], 1
    )  # (S, levels)
    counts = streams[2].diff()
    reach = torch.segment_reduce(levels, "sum", lengths=counts).amax(1).sqrt() * 4
    features = V.numel() if formed else sum(V.shape)
    return budget(reference_error, reach, features + counts, dtype)


def sketch_budget(
    streams: tuple[Tensor, Tensor, Tensor], sketch: TensorSketch, dtype: torch.dtype, more: int = 0
) -> Tensor:
    """(B,) the error in norm allowed to S_i computed in `dtype`.

    Maps and transforms keep norms but for rounding: what errs is sums of p/k and q/k features, 2·log₂ k butterflies
    and T_i tokens, of partial sums no longer than Σ_t ‖C_a a_t‖‖C_d d_t‖, here bounded by √loads ‖a_t‖‖d_t‖.
    `more` are further terms that a sum has.
    """
    a, d, offsets = (x.cpu() for x in streams)
    loads = -(-sketch.p // sketch.dim) * -(-sketch.q // sketch.dim)
    size = (a.double().square().sum(1) * d.double().square().sum(1) * loads).sqrt()
    counts = offsets.diff()
    scale = torch.segment_reduce(size, "sum", lengths=counts, initial=0) if len(size) else counts.double() * 0
    steps = loads + 2 * sketch.dim.bit_length() + counts + more
    return budget(torch.zeros_like(scale), scale, steps, dtype)
