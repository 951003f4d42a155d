"""impl="torch", way="form": a tile of every example's gradient, multiplied on the spot.

A tile is a block of rows and columns of every listed example's G, formed by batched matrix products and small enough
for `FORM_BYTES` however many examples there are; with more than `MOST_EXAMPLES` the list is done block by block.
Examples stand by falling length, so that neighbours can share a batch, the shorter padded with zero rows. The tiles'
products are added up in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpo_kernels.products.config import (
    ELEMENTWISE_BYTES,
    FORM_BYTES,
    HUB_PAIRS,
    LEAST_HEIGHT,
    LEAST_TOKENS,
    MOST_EXAMPLES,
    PAD_FLOPS,
    PIECE,
    RECTANGLE_FILL,
    ROW_BYTES,
)

Ints = NDArray[np.int64]
Span = tuple[int, int]  # first, past the last


def grad_products(
    a: Tensor,  # (S, p)
    ds: tuple[Tensor, ...],  # (S, q_k)
    offsets: Tensor,  # (B+1,)
    pairs: Tensor,  # (n, 2)
    other: tuple[Tensor, tuple[Tensor, ...], Tensor] | None,
    longest: int,
) -> Tensor:  # (n,)
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    a2, ds2, offsets2 = other or (a, ds, offsets)
    rows_i = offsets.cpu().numpy().astype(np.int64)
    rows_j = rows_i if other is None else offsets2.cpu().numpy().astype(np.int64)
    listed = pairs.cpu().numpy()
    i, j = listed[:, 0], listed[:, 1]
    out = torch.zeros(len(listed), dtype=torch.float64, device=a.device)
    present = np.flatnonzero((np.diff(rows_i)[i] > 0) & (np.diff(rows_j)[j] > 0))
    if not len(present) or not a.shape[1]:
        return out.to(dtype)
    for block in _blocks(i, j, present, mirrored=other is None):
        whole = len(block) == len(out)
        sums = out if whole else torch.zeros(len(block), dtype=torch.float64, device=a.device)
        if other is None:
            names = np.unique(np.concatenate([i[block], j[block]]))
            left = right = _Side.of(a, names, rows_i, sum(d.shape[1] for d in ds))
        else:
            left = _Side.of(a, np.unique(i[block]), rows_i, sum(d.shape[1] for d in ds))
            right = _Side.of(a2, np.unique(j[block]), rows_j, sum(d.shape[1] for d in ds))
        plan = _Plan.of(left.place(i[block]), right.place(j[block]), a.device)
        _add_products(sums, plan, (left, ds), (right, ds2), dtype)
        if not whole:
            out[torch.from_numpy(block).to(a.device)] = sums
    return out.to(dtype)


def _blocks(i: Ints, j: Ints, present: Ints, mirrored: bool) -> Iterator[Ints]:
    """Which pairs to do together: at most `MOST_EXAMPLES` distinct examples, left and right."""
    distinct_i, rank_i = np.unique(i[present], return_inverse=True)
    distinct_j, rank_j = np.unique(j[present], return_inverse=True)
    both = len(np.union1d(distinct_i, distinct_j)) if mirrored else len(distinct_i) + len(distinct_j)
    if both <= MOST_EXAMPLES:
        yield present
        return
    half = MOST_EXAMPLES // 2
    key = rank_i // half * (len(distinct_j) // half + 1) + rank_j // half
    order = np.argsort(key, kind="stable")
    yield from np.split(present[order], np.flatnonzero(np.diff(key[order])) + 1)


@dataclass(frozen=True, slots=True)
class _Side:
    """The listed examples of one stream, by falling length."""

    a: Tensor
    names: Ints  # (m,) which examples
    start: Ints  # (m,) their first rows
    length: Ints  # (m,) their rows, at least 1
    groups: list[Span]  # neighbours that share a batch

    @classmethod
    def of(cls, a: Tensor, names: Ints, rows: Ints, outputs: int) -> _Side:
        start, length = rows[names], rows[names + 1] - rows[names]
        order = np.argsort(-length, kind="stable")
        start, length = start[order], length[order]
        # A group ends where its padding costs more than another batch would.
        allowed = PAD_FLOPS / (2 * max(1, a.shape[1] * outputs))
        before = np.concatenate([[0], np.cumsum(length)])
        groups, first = [], 0
        while first < len(names):
            padding = length[first] * np.arange(1, len(names) - first + 1) - (before[first + 1 :] - before[first])
            stop = first + max(1, int(np.searchsorted(padding, allowed, side="right")))
            groups.append((first, stop))
            first = stop
        return cls(a, names[order], start, length, groups)

    @property
    def padded(self) -> int:
        """Rows that all groups take, their padding included."""
        return sum(int(self.length[first]) * (stop - first) for first, stop in self.groups)

    def evenly(self, x: Tensor, span: Span, dtype: torch.dtype) -> int | None:
        """The step between the examples' first rows if a stream can be read in place, else None."""
        start, length = self.start[span[0] : span[1]], self.length[span[0] : span[1]]
        steps = np.diff(start)
        step = int(steps[0]) if len(steps) else int(length[0])
        adjacent = x.dtype == dtype and x.stride(1) == 1 and x.stride(0) >= x.shape[1]
        return step if adjacent and step > 0 and length[0] == length[-1] and (steps == step).all() else None

    def rows(self, x: Tensor, span: Span, t: int, tokens: int, dtype: torch.dtype) -> Tensor:
        """(m, tokens, features): rows t to t + tokens of each example, zeros past its end; a view where it can be."""
        first_row = self.start[span[0] : span[1]]
        start, left = first_row + t, self.length[span[0] : span[1]] - t
        tokens = min(tokens, int(left[0]))
        step = self.evenly(x, span, dtype)
        if step is not None:
            row = x.stride(0)
            offset = x.storage_offset() + int(start[0]) * row
            return x.as_strided((len(start), tokens, x.shape[1]), (step * row, row, 1), offset)
        inside = np.arange(tokens) < left[:, None]
        # An example's own first row stands in past its end: `start` may lie past the stream's.
        index = np.where(inside, start[:, None] + np.arange(tokens), first_row[:, None])
        picked = torch.from_numpy(index.ravel()).to(x.device)
        # index_select would first make the whole of a strided stream contiguous
        rows = (x.index_select(0, picked) if x.is_contiguous() else x[picked]).view(len(start), tokens, -1).to(dtype)
        if not inside.all():
            rows.masked_fill_(torch.from_numpy(~inside).to(x.device)[:, :, None], 0)
        return rows

    def place(self, names: Ints) -> Ints:
        """Where these examples stand."""
        order = np.argsort(self.names)
        return order[np.searchsorted(self.names, names, sorter=order)]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which rows of two lists of formed tiles to multiply, and where the results go.

    Pairs that fill enough of a rectangle (a Gram matrix; a partner that many share) are one matrix product, the rest
    are multiplied elementwise.
    """

    rectangle: tuple[Ints, Ints] | None  # its rows and its columns
    within: tuple[Tensor, Tensor, Tensor] | None  # its pairs: row, column, place in the list
    rest: tuple[Ints, Ints]  # (m,) left and right of the others
    rest_at: Tensor  # (m,) their places in the list

    @classmethod
    def of(cls, i: Ints, j: Ints, device: torch.device) -> _Plan:
        columns, column, count = np.unique(j, return_inverse=True, return_counts=True)
        dense = np.arange(len(i))
        rows = np.unique(i)
        if len(i) * RECTANGLE_FILL < len(rows) * len(columns):
            dense = np.flatnonzero(count[column] >= HUB_PAIRS)
            rows, columns = np.unique(i[dense]), np.unique(j[dense])
            if len(dense) * RECTANGLE_FILL < len(rows) * len(columns):
                dense = dense[:0]
        rest = np.setdiff1d(np.arange(len(i)), dense, assume_unique=True)
        rectangle, within = None, None
        if len(dense):
            rectangle = rows, columns
            at_row, at_column, place = (
                torch.from_numpy(x).to(device)
                for x in (np.searchsorted(rows, i[dense]), np.searchsorted(columns, j[dense]), dense)
            )
            within = at_row, at_column, place
        return cls(rectangle, within, (i[rest], j[rest]), torch.from_numpy(rest).to(device))

    def add(self, sums: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds the products of tiles left (m, e) and right (n, e) to sums (pairs,) float64."""
        if self.rectangle is not None and self.within is not None:
            rows, columns = self.rectangle
            at_row, at_column, place = self.within
            sums[place] += _gram(_rows(left, rows), _rows(right, columns))[at_row, at_column]
        i, j = self.rest
        step = max(1, ELEMENTWISE_BYTES // max(1, left.shape[1] * left.element_size()))
        for first in range(0, len(i), step):
            some = slice(first, first + step)
            x = _rows(left, i[some])
            y = x if left is right and np.array_equal(i[some], j[some]) else _rows(right, j[some])
            sums[self.rest_at[some]] += (x * y).sum(1).double()


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """(m, n) float64: x (m, e) times yᵀ (e, n), piece by piece of e, the pieces added up in float64."""
    pieces = x.shape[1] // PIECE
    whole = pieces * PIECE
    total = (x[:, whole:] @ y[:, whole:].T).double()
    if pieces:
        cut, cut2 = (z[:, :whole].view(-1, pieces, PIECE).transpose(0, 1) for z in (x, y))
        total += (cut @ cut2.mT).sum(0, dtype=torch.float64)
    return total


def _rows(tiles: Tensor, index: Ints) -> Tensor:
    """A view where the rows follow one another, a copy otherwise."""
    if (np.diff(index) == 1).all():
        return tiles[int(index[0]) : int(index[-1]) + 1]
    return tiles.index_select(0, torch.from_numpy(index).to(tiles.device))


def _add_products(
    sums: Tensor,
    plan: _Plan,
    of_left: tuple[_Side, tuple[Tensor, ...]],
    of_right: tuple[_Side, tuple[Tensor, ...]],
    dtype: torch.dtype,
) -> None:
    """Adds the products of all layers to sums (pairs,) float64, tile by tile."""
    (left, ds), (right, ds2) = of_left, of_right
    p = left.a.shape[1]
    examples = len(left.names) + (0 if left is right else len(right.names))
    elements = FORM_BYTES // (dtype.itemsize * examples)
    width = _width(p, elements)
    for column in range(0, p, width):
        columns = slice(column, min(p, column + width))
        heights = [_even(d.shape[1], max(1, elements // width)) for d in ds]
        former = _Former(left, columns, max(heights), dtype)
        former2 = former if left is right else _Former(right, columns, max(heights), dtype)
        for d, d2, height in zip(ds, ds2, heights, strict=True):
            for row in range(0, d.shape[1], height):
                rows = slice(row, row + height)
                x = former.tiles(d[:, rows])
                y = x if left is right else former2.tiles(d2[:, rows])
                plan.add(sums, x, y)


def _width(p: int, elements: int) -> int:
    """Columns of a tile of at most `elements`: whole rows of G where enough of them fit."""
    return _even(p, p if p * LEAST_HEIGHT <= elements else max(1, elements // LEAST_HEIGHT))


def _even(whole: int, most: int) -> int:
    """The size of pieces of at most `most` that cut `whole` evenly."""
    return max(1, -(-whole // max(1, -(-whole // most))))


class _Former:
    """Forms tiles of the examples of one side over some columns of G."""

    def __init__(self, side: _Side, columns: slice, height: int, dtype: torch.dtype) -> None:
        """`height` is that of the highest tile of any layer."""
        self.side, self.a, self.dtype = side, side.a[:, columns], dtype
        # The same cut for every tile of every layer, or kept rows would not fit: the columns' width bounds a's rows,
        # the highest tile d's.
        a_row = self.a.dtype.itemsize + dtype.itemsize + 1
        self.most = max(1, ROW_BYTES // (a_row * max(1, self.a.shape[1], height)))
        # Rows that had to be copied serve every layer and every tile of these columns, if they are few enough.
        copied = side.padded * self.a.shape[1] * dtype.itemsize
        self.kept: dict[tuple[int, int], Tensor] | None = {} if copied <= ROW_BYTES else None

    def tiles(self, d: Tensor) -> Tensor:
        """(m, rows · columns): a tile of each example's Σ_t d_t a_tᵀ."""
        side, a = self.side, self.a
        tiles = d.new_empty(len(side.names), d.shape[1], a.shape[1], dtype=self.dtype)
        for group in side.groups:
            for first, stop, tokens in self._batches(d, group):
                out = tiles[first:stop]
                for t in range(0, int(side.length[first]), tokens):
                    x, y = self._inputs((first, stop), t, tokens), side.rows(d, (first, stop), t, tokens, self.dtype)
                    if t == 0:
                        torch.bmm(y.mT, x, out=out)
                    else:
                        out.baddbmm_(y.mT, x)
                    del x, y  # or the next rows would be gathered beside them
        return tiles.flatten(1)

    def _inputs(self, span: Span, t: int, tokens: int) -> Tensor:
        if self.kept is None or self.side.evenly(self.a, span, self.dtype) is not None:
            return self.side.rows(self.a, span, t, tokens, self.dtype)
        key = span[0], t
        if key not in self.kept:
            self.kept[key] = self.side.rows(self.a, span, t, tokens, self.dtype)
        return self.kept[key]

    def _batches(self, d: Tensor, group: Span) -> Iterator[tuple[int, int, int]]:
        """Examples first to stop of a group, `tokens` rows of each at a time: what the copies' bound allows."""
        first, stop = group
        longest = int(self.side.length[first])
        if all(self.side.evenly(z, group, self.dtype) is not None for z in (self.a, d)):
            yield first, stop, longest
            return
        members = max(1, min(stop - first, self.most // min(longest, LEAST_TOKENS)))
        tokens = max(1, min(longest, self.most // members))
        for member in range(first, stop, members):
            yield member, min(stop, member + members), tokens
