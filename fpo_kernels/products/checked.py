"""What of a room of `grad_products` is checked at its first use and by `fpo-train doctor --kernels`, and how."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpo_kernels import budgets, library, verified
from fpo_kernels.products import config_triton as config
from fpo_kernels.products.reference import grad_products as reference
from fpo_kernels.streams import Extents

Streams = tuple[Tensor, tuple[Tensor, ...], Tensor]

# Widths of a and two d's: one more than a piece of features ends; in rows of 16 bytes, and not; a LoRA factor.
ALIGNED, ODD = (272, (144, 48)), (261, (131, 7))
NARROW, NARROW_ODD = (144, (16,)), (131, (7,))


def ensure(room: Any, impl: str, way: str, a: Tensor, ds: tuple[Tensor, ...], longest: int) -> None:
    """Refuses a launch configuration of a compiled room that has not agreed with the reference on this device."""
    if impl not in ("triton", "native") or not verified.needed(a.device):
        return
    shapes = tuple((x.shape[1], x.stride(0), x.stride(1), x.data_ptr() % 16) for x in (a, *ds))
    # While a graph is captured nothing is known of the lengths but the rows: that tile is checked beforehand too.
    for rows in (longest, len(a)) if (impl, way) == ("triton", "tokens") else (longest,):
        key, widths, tokens = _launch(impl, way, a.dtype, shapes, rows, a.device)
        run = functools.partial(check, room, impl, way, a.dtype, a.device, *widths, tokens)
        verified.ensure(key, a.device, run)


@functools.lru_cache(maxsize=1024)
def _launch(
    impl: str,
    way: str,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, ...], ...],
    longest: int,
    device: torch.device,
) -> tuple[verified.Key, tuple[int, tuple[int, ...]], int]:
    """What tells a launch from others, and the widths and longest example that make a small one like it."""
    name = ("grad_products", impl, way, dtype)
    p, qs = shapes[0][0], [shape[0] for shape in shapes[1:]]
    if way == "form":
        even = all(width % 16 == 0 for width in (p, *qs))
        tiles = sorted({config.formed(min(p, q)) for q in qs})
        small = {config.NARROW: NARROW if even else NARROW_ODD, config.SQUARE: ALIGNED if even else ODD}
        widths = small[config.SQUARE][0], tuple(q for tile in tiles for q in small[tile][1])
        return (*name, *tiles, "even" if even else "odd"), widths, 70
    if impl == "native":
        return name, ODD, 70
    whole = all(_whole(shape, dtype.itemsize) for shape in shapes)
    tile = config.tokens(dtype, longest, whole, config.chip(device))
    tokens = next((edge for edge in (64, 128) if longest <= edge), 200)
    return (*name, tile, "aligned" if whole else "odd"), ALIGNED if whole else ODD, tokens


def _whole(shape: tuple[int, ...], size: int) -> bool:
    """Whether rows begin and end at multiples of 16 bytes, once copied where the kernel cannot read them in place."""
    width, row, step, start = shape
    if (step != 1 and width != 1) or row > config.MOST_STRIDE:
        row, start = width, 0
    return (start | row * size | width * size) % 16 == 0


def check(
    room: Any, impl: str, way: str, dtype: torch.dtype, device: torch.device, p: int, qs: tuple[int, ...], longest: int
) -> verified.Comparison:
    """A room on ragged examples, an empty one and one of a token among them, within one stream and between two."""
    left, right = (_streams([longest, 0, 1, longest - 27], p, qs, dtype, n) for n in (0, 1))
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    found = []
    for other in (None, right):
        second = left if other is None else other
        got = room.grad_products(*_on(left, device), pairs.to(device), other and _on(other, device), longest)
        wide, wide2 = _wide(left), _wide(second)
        exact = reference(*wide, pairs, wide2, longest)
        same = reference(*left, pairs, second, longest)
        size = budgets.reach(*wide)[pairs[:, 0]] * budgets.reach(*wide2)[pairs[:, 1]]
        rows = left[2].diff()[pairs[:, 0]], second[2].diff()[pairs[:, 1]]
        steps = budgets.products_terms(p, sum(qs), *rows, way)
        truncated = budgets.truncations(device, dtype, impl) * budgets.products_truncated(p, sum(qs), *rows, way)
        allowed = budgets.budget((same - exact).abs(), size, steps, same.dtype, truncated)
        found.append(verified.compared(got, exact, allowed, "pair" if other is None else "pair of two streams,"))
    return verified.worst(found)


def ensure_layers(dtype: torch.dtype, tile: config.Tokens, aligned: bool, device: torch.device) -> None:
    """Refuses a tile with which many layers are multiplied in a launch, unless it has agreed on this device."""
    if verified.needed(device):
        key = ("grad_products", "triton", "layers", dtype, tile, "aligned" if aligned else "odd")
        verified.ensure(key, device, functools.partial(check_layers, dtype, tile, aligned, device))


def check_layers(dtype: torch.dtype, tile: config.Tokens, aligned: bool, device: torch.device) -> verified.Comparison:
    """A launch of two layers and an embedding over padded examples, an empty one and one of a token among them."""
    from fpo_kernels.products.grouped import Ledger  # triton loads where it is wanted

    lengths, rows = np.array([tile.tokens + 3, 0, 1, tile.tokens - 27]), tile.tokens + 9
    begin = np.arange(4) * rows
    extents = Extents(np.stack([begin, np.full(4, rows), rows - lengths, lengths], 1))
    kept = np.concatenate([np.arange(b + rows - n, b + rows) for b, n in zip(begin, lengths, strict=True)])
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    ledger, generator = Ledger(pairs.numpy()), torch.Generator().manual_seed(2)
    exact, allowed = torch.zeros(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    for p, qs in (ALIGNED, ODD)[not aligned], ((48, (16,)), (45, (7,)))[not aligned], (0, ALIGNED[1]):
        a, *ds = (torch.randn(4 * rows, n, generator=generator, dtype=torch.float64).to(dtype) for n in (p or 1, *qs))
        ids = torch.randint(0, 5, (4 * rows,), generator=generator)
        for d in ds:
            d[np.setdiff1d(np.arange(4 * rows), kept)] = 0
        given = a if p else ids
        ledger.note(given.to(device), [d.to(device) for d in ds], extents, 0.0)
        inputs = a if p else torch.nn.functional.one_hot(ids, 5).to(dtype)
        streams = inputs[kept], tuple(d[kept] for d in ds), offsets
        wide = _wide(streams)
        exact += reference(*wide, pairs, None, rows)
        size = budgets.reach(*wide)
        rows_x, rows_y = (offsets.diff()[side] for side in pairs.T)
        terms = budgets.products_terms(p or 5, sum(qs), rows_x, rows_y, "tokens")
        cut = budgets.products_truncated(p or 5, sum(qs), rows_x, rows_y, "tokens")
        scale = size[pairs[:, 0]] * size[pairs[:, 1]]
        truncated = budgets.truncations(device, dtype, "triton") * cut
        allowed += budgets.budget(torch.zeros_like(scale), scale, terms, torch.float32, truncated)
    got, leak = ledger.result()
    assert got is not None
    assert leak is not None
    return verified.compared(got.masked_fill(leak, torch.nan), exact, allowed, "pair of many layers,")


def _streams(lengths: list[int], p: int, qs: tuple[int, ...], dtype: torch.dtype, seed: int) -> Streams:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    a, *ds = (torch.randn(sum(lengths), n, generator=generator, dtype=torch.float64).to(dtype) for n in (p, *qs))
    return a, tuple(ds), offsets


def _wide(streams: Streams) -> Streams:
    a, ds, offsets = streams
    return a.double(), tuple(d.double() for d in ds), offsets


def _on(streams: Streams, device: torch.device) -> Streams:
    a, ds, offsets = streams
    return a.to(device), tuple(d.to(device) for d in ds), offsets.to(device)


def configurations(impl: str, way: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[int, tuple[int, ...]], int]]:
    """(what it is called, widths, tokens) of every launch that a room has."""
    for widths, rows in ((ALIGNED, "aligned"), (ODD, "odd rows")):
        if (impl, way) == ("triton", "tokens"):
            for tokens in (64, 128, 200):
                yield f"{rows}, {tokens} tokens", widths, tokens
        else:
            yield rows, widths, 70
    if way == "form":
        yield "narrow", NARROW, 70
        yield "narrow, odd rows", NARROW_ODD, 70


def missing(impl: str, device: torch.device) -> str | None:
    """Why a compiled room cannot run on a device; None where it can."""
    if impl == "native":
        return library.why_not("grad_products", torch.empty(0, device=device))
    return "needs a GPU" if impl == "triton" and device.type != "cuda" else None
