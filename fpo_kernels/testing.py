"""Inputs for tests and benchmarks, and the error an implementation may make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from fpo_kernels import budgets
from fpo_kernels.budgets import budget, direction_budget, sketch_budget
from fpo_kernels.direction import grad_direction
from fpo_kernels.products import grad_products

__all__ = ["budget", "direction_budget", "sketch_budget"]  # what tests know by this module, besides its own

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
    many = budgets.truncations(got.device, streams[0].dtype, impl)
    truncated = many * _counted(budgets.products_truncated, left, listed, right, way)
    allowed = budget((same - exact).abs(), scale, terms(left, listed, right, way), got.dtype, truncated)
    over = (got.cpu() - exact).abs() - allowed
    assert not len(over) or over.max() <= 0, f"{impl}, {way}: {over.max()} over the budget at pair {over.argmax()}"
    return got


def terms(left: Streams, pairs: Tensor, right: Streams, way: str) -> Tensor:
    """(n,) `budgets.products_terms` of pairs (n, 2) of streams."""
    return _counted(budgets.products_terms, left, pairs, right, way)


def _counted(count: Callable[..., Tensor], left: Streams, pairs: Tensor, right: Streams, way: str) -> Tensor:
    p, q = left[0].shape[1], sum(d.shape[1] for d in outputs(left[1]))
    return count(p, q, left[2].diff()[pairs[:, 0]], right[2].diff()[pairs[:, 1]], way)


def reach(streams: Streams) -> Tensor:
    """(B,) `budgets.reach` of streams."""
    return budgets.reach(streams[0], outputs(streams[1]), streams[2])


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
    many = budgets.truncations(got.device, streams[0].dtype, impl)
    allowed = direction_budget((same - exact).abs(), (a, d, offsets), V, got.dtype, truncations=many)
    over = (got.cpu() - exact).abs() - allowed
    assert not len(over) or over.max() <= 0, f"{impl}: {over.max()} over the budget at example {over.argmax()}"
    return got
