"""What the Triton kernels of the sketch read instead of arguments: where streams, tables and examples lie.

A plan is one small int64 table, made on the host for every call and brought over without waiting. Addresses in it are
distances from one tensor's. It depends on where streams lie, on their widths and on the longest example, never on
lengths: those the device reads. `triton_grouped.py` reads what `lay` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fpo_kernels.sketch import config_triton as config
from fpo_kernels.streams import sent

# Bytes that addresses and widths must be multiples of for loads of 16 bytes a thread.
_VECTOR = 16
# bfloat16 parts whose sum a number of a stream is.
_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


class Streams(NamedTuple):
    """A layer, or siblings that read one input, by their maps.

    Attributes:
        sides: a's, and the d's, each (stream (S, n), gather table (rows, k) int32 of `maps.BucketMap`).
        starts, lengths: (B,) int64: example i owns rows starts[i] to starts[i] + lengths[i].
        longest: what no length exceeds.
        slot: the sum it adds to.
    """

    sides: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]
    starts: Tensor
    lengths: Tensor
    longest: int
    slot: int


class Piece(NamedTuple):
    """At most a span's features of a stream, and the rounds of entries that gather them.

    Attributes:
        first, width: the features first to first + width.
        entries: (rounds · ENTRIES,) int16: j − first, bit 15 for minus; `width` for none, a place in the span that is
            zero. A round is of one block of buckets, bucket after bucket, as many rows of the gather table as make a
            round.
        gathers: of them, each of `config.rounds`.
        wide: whether from the wider span.
    """

    first: int
    width: int
    entries: Tensor
    gathers: int
    wide: bool


class Cut(NamedTuple):
    """Streams cut to a launch's spans: its sides' pieces, with the stream each is of, and bfloat16 parts of buckets."""

    sides: tuple[list[tuple[Tensor, Piece]], list[tuple[Tensor, Piece]]]
    parts: tuple[int, int]
    starts: Tensor
    lengths: Tensor
    slot: int


class Run(NamedTuple):
    """Streams first to last of a launch, which its programs add up."""

    first: int
    last: int
    slot: int


class Launch(NamedTuple):
    """What one launch takes: streams of one dtype and alignment; `wide`: some are cut to wider spans.

    Attributes:
        align: elements that every address and width is a multiple of.
        place: of its first partial sum, of which it has one for each run and chunk (and example).
        chunks: of the longest example.
    """

    dtype: torch.dtype
    wide: bool
    align: int
    place: int
    chunks: int
    streams: list[Cut]
    runs: list[Run]


class Layout(NamedTuple):
    """A launch's arguments; `triton_grouped.py` describes the rows of the last three."""

    base: Tensor
    entries: Tensor
    rows: Tensor
    runs: Tensor
    members: Tensor
    pieces: Tensor


# Features left out of a span that a stream is cut to: a place of zeros, and 16 bytes of whatever dtype.
_ZEROS = 8

_PIECES: WeakIdKeyDictionary = WeakIdKeyDictionary()  # gather table → spans → pieces


def pieces(table: Tensor, width: int, span: int) -> list[Piece]:
    """A gather table (rows, k) int32 of `width` features cut to spans; kept as long as the table is.

    A table wider than the span is read back, once: what falls into each span is not known before.
    """
    kept = _PIECES.setdefault(table, {})
    key = span, config.SPAN
    if key not in kept:
        if fits(width, table.shape[1], span):
            kept[key] = [_piece(table, 0, width, span)]
        else:
            whole, step = table.cpu().numpy(), span - _ZEROS
            cut = [(first, min(step, width - first)) for first in range(0, width, step)]
            parts = [torch.from_numpy(_within(whole, *part)).to(table.device) for part in cut]
            kept[key] = [_piece(part, *where, span) for part, where in zip(parts, cut, strict=True)]
    return kept[key]


def fits(width: int, k: int, span: int) -> bool:
    """Whether a span holds so many features, and a zero where entries stand for none."""
    return width < span or (width == span and not span % max(k, config.ENTRIES))


def _within(table: NDArray[np.int32], first: int, width: int) -> NDArray[np.int32]:
    """The gather table of the features first to first + width, each bucket's in the order they had."""
    inside = (table >= 2 * first) & (table < 2 * (first + width))
    front = np.argsort(~inside, axis=0, kind="stable")[: max(1, int(inside.sum(0).max()))]
    return np.take_along_axis(np.where(inside, table - 2 * first, -1), front, axis=0).astype(np.int32)


def _piece(table: Tensor, first: int, width: int, span: int) -> Piece:
    rows, k = table.shape
    wide = not fits(width, k, min(config.SPAN, span))
    buckets, rounds = config.sides(k).buckets, config.rounds(k, span) if wide else 1
    together = config.ENTRIES // buckets
    padded = torch.nn.functional.pad(table, (0, 0, 0, -rows % (together * rounds)), value=-1)
    # (rounds of rows, rows, blocks, buckets) → a round is of one block, and a bucket's rows adjacent in it
    entries = padded.view(-1, together, k // buckets, buckets).permute(0, 2, 3, 1).flatten()
    entries = torch.where(entries < 0, width, entries >> 1 | (entries & 1) << 15)
    return Piece(first, width, entries.to(torch.int16), len(entries) // config.ENTRIES // rounds, wide)


def plan(streams: Sequence[Streams], k: int, major: int) -> list[Launch]:
    """Launches for these streams, and in each the runs of its programs; a run ends where its slot or RUN_WORK does."""
    groups: dict[tuple[torch.dtype, bool, int], list[Streams]] = {}
    for one in streams:
        of_a, of_d = ([(_readable(x), table) for x, table in side] for side in one.sides)
        every = [x for x, _ in (*of_a, *of_d)]
        dtype = every[0].dtype
        if dtype not in _PARTS:
            raise RuntimeError(f'grad_sketch: impl="triton" takes no {str(dtype).removeprefix("torch.")}')
        align = _VECTOR // dtype.itemsize if all(map(_aligned, every)) else 1
        # read one by one, the features of a wide span take more registers than there are
        wide = align > 1 and not all(fits(x.shape[1], k, config.SPAN) for x in every)
        groups.setdefault((dtype, wide, align), []).append(one._replace(sides=(of_a, of_d)))
    launches, place = [], 0
    for (dtype, wide, align), together in groups.items():
        together.sort(key=lambda one: one.slot)
        span = config.wide_span(k, dtype, major) if wide else config.SPAN
        cut = [_cut(one, span, k) for one in together]
        runs = _runs(cut, k)
        chunks = -(-max(one.longest for one in together) // config.CHUNK)
        launches.append(Launch(dtype, wide, align, place, chunks, cut, runs))
        place += len(runs) * chunks
    return launches


def _cut(one: Streams, span: int, k: int) -> Cut:
    of_a, of_d = ([(x, piece) for x, table in side for piece in pieces(table, x.shape[1], span)] for side in one.sides)
    parts = []
    for side in one.sides:
        # no bucket holds more than one coordinate: one of a block, of several, adds up those of as many blocks
        alone = len(side) == 1 and len(side[0][1]) == 1 and config.sides(k).blocks == 1
        parts.append(_PARTS[side[0][0].dtype if alone else torch.float32])
    return Cut((of_a, of_d), (parts[0], parts[1]), _long(one.starts), _long(one.lengths), one.slot)


def _runs(streams: list[Cut], k: int) -> list[Run]:
    runs: list[Run] = []
    work = 0
    for n, one in enumerate(streams):
        # entries gathered, and the numbers of two spectra
        own = 2 * k + sum(piece.entries.numel() for side in one.sides for _, piece in side)
        if runs and runs[-1].slot == one.slot and work + own <= config.RUN_WORK:
            runs[-1] = runs[-1]._replace(last=n + 1)
            work += own
        else:
            runs.append(Run(n, n + 1, one.slot))
            work = own
    return runs


def _readable(x: Tensor) -> Tensor:
    """x (S, n), copied unless its features are adjacent."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _long(x: Tensor) -> Tensor:
    return x if x.dtype == torch.int64 and x.is_contiguous() else x.long().contiguous()


def _aligned(x: Tensor) -> bool:
    return not (x.data_ptr() % _VECTOR or x.stride(0) * x.itemsize % _VECTOR or x.shape[1] * x.itemsize % _VECTOR)


def lay(launches: Sequence[Launch], slots: int) -> tuple[list[Layout], Tensor, Tensor]:
    """Every launch's arguments; and for `add_runs` (place, chunks) of every run, slot by slot, and where slots begin.

    One copy brings it all, from pinned memory.
    """
    sections: list[list[int]] = []
    bases = []
    by_slot: list[list[int]] = [[] for _ in range(slots)]
    for launch in launches:
        base, members, parts = _rows(launch)
        bases.append(base)
        sections += [[n for run in launch.runs for n in (run.first, run.last)], members, parts]
        for n, run in enumerate(launch.runs):
            by_slot[run.slot] += [launch.place + n * launch.chunks, launch.chunks]
    begin = np.cumsum([0, *(len(of_slot) // 2 for of_slot in by_slot)]).tolist()
    sections += [[n for of_slot in by_slot for n in of_slot], begin]
    laid = _brought(sections, launches[0].streams[0].starts.device)
    return [Layout(*base, *laid[3 * n : 3 * n + 3]) for n, base in enumerate(bases)], laid[-2], laid[-1]


def _rows(launch: Launch) -> tuple[tuple[Tensor, Tensor, Tensor], list[int], list[int]]:
    """The tensors that addresses count from, the rows of its members and those of their pieces."""
    (base, first), starts = launch.streams[0].sides[0][0], launch.streams[0].starts
    members: list[int] = []
    rows: list[int] = []
    for one in launch.streams:
        of_a, of_d = one.sides
        members += [_distance(one.starts, starts), _distance(one.lengths, starts), len(rows) // 6]
        members += [len(of_a), len(of_d), *one.parts]
        for x, piece in (*of_a, *of_d):
            rows += [_distance(x, base) + piece.first, x.stride(0), piece.width]
            rows += [_distance(piece.entries, first.entries), piece.gathers, int(piece.wide)]
    return (base, first.entries, starts), members, rows


def _distance(x: Tensor, base: Tensor) -> int:
    """In elements."""
    return (x.data_ptr() - base.data_ptr()) // base.itemsize


def _brought(sections: list[list[int]], device: torch.device) -> list[Tensor]:
    """Each section on the device, all of one tensor, at addresses that are multiples of 16 bytes."""
    padded = [n for section in sections for n in (*section, *[0] * (len(section) % 2))]
    sizes = [len(section) + len(section) % 2 for section in sections]
    return list(sent(np.array(padded, dtype=np.int64), device).split(sizes))
