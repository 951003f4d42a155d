"""Token products of many layers at once: what the taps deliver is noted, and multiplied when it is worth a launch.

The list of work items depends on the examples' lengths and the pairs alone: it is made once and kept. A launch has a
table of its layers besides (`triton_grouped` says what is in it).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from fpo_kernels.beside import Beside
from fpo_kernels.products import config_triton as config
from fpo_kernels.products.inputs_triton import readable
from fpo_kernels.products.triton_grouped import grouped_products_kernel
from fpo_kernels.streams import Extents, fill, sent, table

Ints = NDArray[np.int64]
Ensure = Callable[[torch.dtype, config.Tokens, bool, torch.device], None]


class Lists(NamedTuple):
    """What all layers of the same lengths and pairs share, on a device."""

    items: Tensor  # (U, 5) int32, those of a pair one after another, then those that look at what does not count
    extents: Tensor  # (B + B2, 4) int64
    counts: Tensor  # (n + 1,) int64, how many items each pair has, and those behind


class Member(NamedTuple):
    """Layers that read one a, of one launch; x and y are the same where both examples of a pair are of one stream."""

    x: tuple[Tensor, ...]  # a (S, p) or ids (S,), then each d (S, q_k)
    y: tuple[Tensor, ...]


def items_of(x: Ints, y: Ints | None, pairs: Ints, tile: int) -> tuple[Ints, Ints]:
    """(U, 5) items of pairs (n, 2) between examples of these extents (B, 4), and (n + 1,) how many each pair has.

    y is None where both are of one stream: ⟨G_i, G_i⟩ is symmetric in (t, s), so that tiles above the diagonal count
    twice and those below not at all.
    """
    mirrored, right = y is None, x if y is None else y
    i, j = pairs[:, 0], pairs[:, 1]
    across = -(-right[j, 3] // tile)
    cells = -(-x[i, 3] // tile) * across
    ends = cells.cumsum()
    pair = np.repeat(np.arange(len(pairs)), cells)
    row, column = np.divmod(np.arange(len(pair)) - (ends - cells)[pair], np.maximum(across, 1)[pair])
    twin = mirrored & (i == j)[pair]
    weight = 1 + (twin & (row < column))
    kept = ~twin | (row <= column)
    there = j[pair] + (0 if mirrored else len(x))
    items = np.stack([i[pair], row, there, column, weight], 1)[kept]
    counts = np.bincount(pair[kept], minlength=len(pairs))
    looks = [_looks(x, 0, 0, tile)] + ([] if y is None else [_looks(y, len(x), -1, tile)])
    behind = np.concatenate(looks)
    return np.concatenate([items, behind]).astype(np.int32), np.append(counts, len(behind))


def _looks(extents: Ints, first: int, weight: int, tile: int) -> Ints:
    """Items for the tiles of rows that do not count."""
    tiles = -(-extents[:, 1] // tile) * (extents[:, 1] > extents[:, 3])
    example = np.repeat(np.arange(len(extents)), tiles)
    at = np.arange(len(example)) - (tiles.cumsum() - tiles)[example]
    left, count = extents[example, 2], extents[example, 3]
    some = (at * tile < left) | (np.minimum((at + 1) * tile, extents[example, 1]) > left + count)
    none = np.zeros_like(at)
    return np.stack([first + example, at, none, none, none + weight], 1)[some]


@functools.lru_cache(maxsize=64)
def _lists(x: bytes, y: bytes | None, pairs: bytes, tile: int, device: torch.device) -> Lists:
    left, right, listed = (
        None if b is None else np.frombuffer(b, np.int64).reshape(-1, w) for b, w in ((x, 4), (y, 4), (pairs, 2))
    )
    assert left is not None
    assert listed is not None
    items, counts = items_of(left, right, listed, tile)
    extents = left if right is None else np.concatenate([left, right])
    return Lists(*(sent(values, device) for values in (items, extents.copy(), counts)))


def _roomy_lists(extents: Extents, pairs: Ints, tile: int, device: torch.device) -> Lists:
    """For lengths that only the device knows: items for all the room there is; kept with the extents."""
    key = pairs.tobytes(), tile, device
    if key not in extents.lists:
        items, counts = items_of(extents.host, None, pairs, tile)
        empty = extents.host * np.array([1, 1, 1, 0])
        looks = _looks(empty, 0, 0, tile).astype(np.int32)
        counts[-1] = len(looks)
        made = (sent(values, device) for values in (np.concatenate([items, looks]), counts))
        extents.lists[key] = tuple(made)
    items_on, counts_on = extents.lists[key]
    return Lists(items_on, extents.on(device), counts_on)


class Ledger:
    """Σ over layers of ⟨G_i, G_j⟩ for one list of pairs: noted layer by layer, multiplied many layers at a time.

    Nothing here waits for the device or copies from pageable memory; launches run beside what follows them. The same
    layers in the same order give the same bits; an item beyond an example's end adds an exact zero.
    """

    def __init__(self, pairs: Ints, ensure: Ensure | None = None) -> None:
        """`pairs` is (n, 2) on the host; `ensure` refuses what is wrong on a device, before it is launched."""
        self._ensure = ensure
        self._pairs = pairs
        self._key = pairs.tobytes()
        self._noted: dict[tuple[object, ...], list[Member]] = {}
        self._flops = 0.0
        self._bytes = 0
        self._sums: dict[int, tuple[Lists, list[Tensor]]] = {}
        self._total: Tensor | None = None
        self._leak: dict[torch.device, Tensor] = {}
        self._beside = Beside()

    def note(
        self,
        a: Tensor,
        ds: Sequence[Tensor],
        extents: Extents,
        flops: float,
        other: tuple[Tensor, Sequence[Tensor], Extents] | None = None,
    ) -> None:
        """Keep the streams of layers that read one a, for a later launch.

        Args:
            a: (S, p), or (S,) int64 ids that stand for one-hot inputs. ds: each (S, q_k), of one dtype, that of a.
            extents: of the pairs' left examples, or of both.
            flops: what multiplying them takes.
            other: the same of the right examples.
        """
        layers, unit = member(a, ds, None if other is None else other[:2])
        key = ds[0].device, ds[0].dtype, unit, extents, None if other is None else other[2]
        self._noted.setdefault(key, []).append(layers)
        self._flops += flops
        self._bytes += sum(stream.nbytes for stream in layers.x)
        if self._flops >= config.ENOUGH_FLOPS or self._bytes >= config.KEPT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Multiply what was noted."""
        for key, members in self._noted.items():
            self._launch(members, *key)  # type: ignore[arg-type]
        self._noted, self._flops, self._bytes = {}, 0.0, 0

    def _launch(
        self,
        members: list[Member],
        device: torch.device,
        dtype: torch.dtype,
        unit: int,
        extents: Extents,
        extents2: Extents | None,
    ) -> None:
        # by how much room they have, not by how long they are: the same tile, and bits, whatever batch fills the room
        longest = max(int(e.host[:, 1].max(initial=0)) for e in (extents, extents2) if e is not None)
        tile = config.tokens(dtype, longest, unit > 1, config.chip(device))
        if self._ensure is not None:
            self._ensure(dtype, tile, unit > 1, device)
        if extents.differs:
            lists = _roomy_lists(extents, self._pairs, tile.tokens, device)
        else:
            other = None if extents2 is None else extents2.key
            lists = _lists(extents.key, other, self._key, tile.tokens, device)
            extents.lists[other, self._key, tile.tokens, device] = lists  # a recording reads them as long as it is
        if device not in self._leak:
            self._leak[device] = torch.zeros(1, dtype=torch.int32, device=device)
        leak = self._leak[device]
        sums = self._beside.run(device, functools.partial(launch, members, lists, tile, unit, leak), members)
        parts = self._sums.setdefault(id(lists.items), (lists, []))[1]
        parts.append(sums)
        if sum(part.nbytes for part in parts) > config.SUM_BYTES:
            self._add_up(id(lists.items))

    def _add_up(self, key: int) -> None:
        self._beside.join()
        lists, parts = self._sums.pop(key)
        items = torch.cat(parts, 1).sum(1, dtype=torch.float64)
        # one number after another, so that items that add nothing leave no trace; unsafe: no check that would wait
        pairs = torch.segment_reduce(items, "sum", lengths=lists.counts, unsafe=True, initial=0)[:-1]
        self._total = pairs if self._total is None else self._total + pairs.to(self._total.device)

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        """Σ (n,) float64, None if nothing was noted; and () bool, whether a row that does not count has a gradient."""
        self.flush()
        for key in list(self._sums):
            self._add_up(key)
        leak = None
        for flag in self._leak.values():
            found = (flag != 0).any()
            leak = found if leak is None else leak | found.to(leak.device)
        return self._total, leak


def launch(members: Sequence[Member], lists: Lists, tile: config.Tokens, unit: int, leak: Tensor) -> Tensor:
    """(U, L) fp32 sums of every item and layer, L the members; heavy layers first, so that the last wave is light."""
    x = members[0].x[1]
    device, dtype = x.device, x.dtype
    members = sorted(members, key=lambda m: -sum(s.shape[1] for s in m.x if s.ndim == 2))
    streams = sum(len(m.x) for m in members)
    entries = np.empty(4 * len(members) + 5 * streams, dtype=np.int64)
    layers, rows = entries[: 4 * len(members)].reshape(-1, 4), entries[4 * len(members) :].reshape(-1, 5)
    held = table([len(entries)], torch.int64, device)
    # offsets count from `held` itself, which is aligned as all allocations are
    at, start, size = 0, held.data_ptr(), x.element_size()
    for n, member in enumerate(members):
        ids = member.x[0].ndim == 1
        layers[n] = at, at + len(member.x), ids, 0
        for own, other in zip(member.x, member.y, strict=True):
            element = 8 if own.ndim == 1 else size
            left = (own.data_ptr() - start) // element
            right = left if other is own else (other.data_ptr() - start) // element
            rows[at] = left, own.stride(0), right, other.stride(0), own.shape[1] if own.ndim == 2 else 1
            at += 1
    fill(held, entries)
    sums = torch.empty(len(lists.items), len(members), dtype=torch.float32, device=device)
    with torch.cuda.device_of(x):
        if sums.numel():
            grouped_products_kernel[len(lists.items), len(members)](
                held.view(dtype), held, held, held[4 * len(members) :], lists.items, lists.extents, leak, sums,
                T=tile.tokens, F=tile.features, UNIT=unit, PRECISION=config.PRECISION[dtype],
                INTERPRETED=triton.knobs.runtime.interpret, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return sums


def member(a: Tensor, ds: Sequence[Tensor], other: tuple[Tensor, Sequence[Tensor]] | None) -> tuple[Member, int]:
    """The streams as the kernel reads them, copied where it cannot; and the elements in which it may count."""
    x = _readable(a, ds)
    y = x if other is None else _readable(*other)
    streams = [stream for stream in (x if y is x else (*x, *y)) if stream.ndim == 2]
    return Member(x, y), min(map(_unit, streams))


def _readable(a: Tensor, ds: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (a if a.ndim == 1 else readable(a), *map(readable, ds))


def _unit(x: Tensor) -> int:
    """Elements in 16 bytes where rows begin and end at multiples of that, else 1."""
    size = x.element_size()
    whole = (x.data_ptr() | x.stride(0) * size | x.shape[1] * size) % 16 == 0
    return 16 // size if whole else 1
