"""impl="torch": token tiles of the listed pairs, multiplied by batched matrix products.

Every example is cut into tiles of at most `TILE_TOKENS` rows, so a pair is a small grid of tile pairs. The
cells of all grids are numbered through and taken in chunks small enough for `SCRATCH_BYTES`, whatever the
lengths and however long the list. Within a chunk, cells of like size are multiplied together: as one matrix
product where they fill a rectangle (a shared partner, a Gram matrix, a long example), else as a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpo_kernels.products.config import DENSE_FILL, FEATURE_CHUNK, SCRATCH_BYTES, TILE_TOKENS

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles of one stream, named by where they lie."""

    start: Ints  # (m,) first row
    length: Ints  # (m,) rows, at least 1

    def take(self, index: Ints | slice) -> _Tiles:
        return _Tiles(self.start[index], self.length[index])

    def distinct(self) -> tuple[_Tiles, Ints]:
        """The tiles without repetition, and for each tile its place among them."""
        _, first, place = np.unique(self.start, return_index=True, return_inverse=True)
        return self.take(first), place

    def mask(self, device: torch.device) -> Tensor | None:
        """(m, t), true where a row belongs to the tile; None where every row does."""
        t = self.length.max()
        if self.length.min() == t:
            return None
        return torch.from_numpy(np.arange(t) < self.length[:, None]).to(device)


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
    mirrored = other is None
    listed = pairs.cpu().numpy()
    i, j = listed[:, 0], listed[:, 1]
    rows_i = offsets.cpu().numpy().astype(np.int64)
    rows_j = rows_i if mirrored else offsets2.cpu().numpy().astype(np.int64)
    grid_i = -(-np.diff(rows_i) // TILE_TOKENS)[i]  # (n,) tiles of the left example
    grid_j = -(-np.diff(rows_j) // TILE_TOKENS)[j]
    ends = np.cumsum(grid_i * grid_j)
    out = torch.zeros(len(pairs), dtype=torch.float64, device=a.device)
    if not len(ends) or not ends[-1]:
        return out.to(dtype)

    longest = max(np.diff(rows_i)[i].max(), np.diff(rows_j)[j].max())
    step = _cells_per_chunk(min(int(longest), TILE_TOKENS), max(x.shape[1] for x in (a, *ds)), a.dtype, dtype)
    for first in range(0, int(ends[-1]), step):
        cell = np.arange(first, min(first + step, int(ends[-1])))
        pair = np.searchsorted(ends, cell, side="right")
        cell = cell - (ends - grid_i * grid_j)[pair]
        row, column = np.divmod(cell, grid_j[pair])
        weight = np.ones(len(cell))
        if mirrored:  # ⟨G_i, G_i⟩ is symmetric in (t, s): tiles above the diagonal count twice, those below not
            weight += (i == j)[pair] & (row < column)
            keep = (i != j)[pair] | (row <= column)
            pair, row, column, weight = pair[keep], row[keep], column[keep], weight[keep]
            if not len(pair):
                continue
        tiles_i = _tiles(rows_i, i[pair], row)
        tiles_j = _tiles(rows_j, j[pair], column)
        products = _chunk((a, *ds), (a2, *ds2), tiles_i, tiles_j, mirrored, dtype)  # (cells,)
        products *= torch.from_numpy(weight).to(a.device)
        counts = torch.from_numpy(np.bincount(pair - pair[0])).to(a.device)
        # segment_reduce, not index_add_: on CUDA the latter adds by atomics, in no fixed order. `unsafe` skips
        # a check of counts that would sync.
        out[pair[0] : pair[-1] + 1] += torch.segment_reduce(products, "sum", lengths=counts, unsafe=True)
    return out.to(dtype)


def _cells_per_chunk(tile: int, features: int, given: torch.dtype, dtype: torch.dtype) -> int:
    """How many tile pairs keep the gathered rows (2 tiles) and the token products (2, and a mask) in bounds."""
    copies = dtype.itemsize + (given.itemsize if given != dtype else 0)
    gathered = 2 * tile * min(features, FEATURE_CHUNK) * copies
    multiplied = DENSE_FILL * tile * tile * (2 * dtype.itemsize + 1)
    return max(1, SCRATCH_BYTES // (gathered + multiplied))


def _tiles(offsets: Ints, example: Ints, tile: Ints) -> _Tiles:
    start = offsets[example] + tile * TILE_TOKENS
    return _Tiles(start, np.minimum(offsets[example + 1] - start, TILE_TOKENS))


def _chunk(
    left: tuple[Tensor, ...],
    right: tuple[Tensor, ...],
    tiles_i: _Tiles,
    tiles_j: _Tiles,
    mirrored: bool,
    dtype: torch.dtype,
) -> Tensor:
    """(m,) float64: Σ_{t, s} (a_t·a_s)(Σ_k d^k_t·d^k_s) of each tile pair."""
    # Tiles within a factor of two in length share a batch; a tile with itself is apart, its rows gathered once.
    bits_i, bits_j = (np.frexp(np.maximum(t.length, 8) - 1)[1] for t in (tiles_i, tiles_j))
    same = (tiles_i.start == tiles_j.start) & mirrored
    buckets = (bits_i * 64 + bits_j) * 2 + same
    products = torch.empty(len(buckets), dtype=torch.float64, device=left[0].device)
    for bucket in np.unique(buckets):
        chosen = np.flatnonzero(buckets == bucket)
        x, y = tiles_i.take(chosen), tiles_j.take(chosen)
        if bucket & 1:
            sums = _multiply(left, right, x, x, dense=False, dtype=dtype).flatten()
        else:
            ux, at_x = x.distinct()
            uy, at_y = y.distinct()
            if len(ux.start) * len(uy.start) <= DENSE_FILL * len(chosen):
                sums = _multiply(left, right, ux, uy, dense=True, dtype=dtype)
                sums = sums[torch.from_numpy(at_x), torch.from_numpy(at_y)]
            else:
                sums = _multiply(left, right, x, y, dense=False, dtype=dtype).flatten()
        products[torch.from_numpy(chosen)] = sums.double()
    return products


def _multiply(
    left: tuple[Tensor, ...],  # a, d of the first layer, d of the second, …
    right: tuple[Tensor, ...],
    x: _Tiles,  # m tiles of t rows or fewer
    y: _Tiles,  # n tiles of s rows or fewer
    *,
    dense: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Tile products: (m, n) of every x with every y where dense, else (m, 1) of each x with its own y."""
    m, n = len(x.start), len(y.start) if dense else 1
    t, s = int(x.length.max()), int(y.length.max())
    tiles = _gram(left[1], right[1], x, y, dense, dtype)  # Σ_k d^k_t·d^k_s, (1, m·t, n·s) or (m, t, s)
    for d, d2 in zip(left[2:], right[2:], strict=True):
        tiles = _gram(d, d2, x, y, dense, dtype, tiles)
    tiles *= _gram(left[0], right[0], x, y, dense, dtype)
    tiles = tiles.view(m, t, n, s)
    mask_x, mask_y = x.mask(tiles.device), y.mask(tiles.device)
    if mask_x is not None:
        tiles.masked_fill_(~mask_x.view(m, t, 1, 1), 0)
    if mask_y is not None:
        tiles.masked_fill_(~(mask_y.view(1, 1, n, s) if dense else mask_y.view(m, 1, 1, s)), 0)
    return tiles.sum((1, 3))


def _gram(
    left: Tensor,
    right: Tensor,
    x: _Tiles,
    y: _Tiles,
    dense: bool,
    dtype: torch.dtype,
    total: Tensor | None = None,
) -> Tensor:
    """`total` + token products of x's rows with y's, (1, m·t, n·s) or (m, t, s), a chunk of features at a time."""
    same = x is y
    for first in range(0, max(left.shape[1], 1), FEATURE_CHUNK):
        columns = slice(first, first + FEATURE_CHUNK)
        rows_x = _rows(left[:, columns], x, dtype)
        rows_y = rows_x if same else _rows(right[:, columns], y, dtype)
        if dense:
            rows_x, rows_y = rows_x.flatten(0, 1)[None], rows_y.flatten(0, 1)[None]
        total = rows_x @ rows_y.mT if total is None else total.baddbmm_(rows_x, rows_y.mT)
        del rows_x, rows_y  # or the next columns would be gathered beside them
    assert total is not None
    return total


def _rows(stream: Tensor, tiles: _Tiles, dtype: torch.dtype) -> Tensor:
    """(m, t, features): a view where the tiles lie evenly spaced, a copy otherwise.

    Rows past a tile's end are whatever the stream holds there; the caller masks their products.
    """
    m, t = len(tiles.start), int(tiles.length.max())
    steps = np.diff(tiles.start)
    step = int(steps[0]) if m > 1 else 0
    row, column = stream.stride()
    if step >= 0 and (steps == step).all() and tiles.start[-1] + t <= len(stream):
        offset = stream.storage_offset() + int(tiles.start[0]) * row
        return stream.as_strided((m, t, stream.shape[1]), (step * row, row, column), offset).to(dtype)
    index = np.minimum(tiles.start[:, None] + np.arange(t), len(stream) - 1)
    picked = torch.from_numpy(index.ravel()).to(stream.device)
    # index_select would first make the whole of a strided stream contiguous
    rows = stream.index_select(0, picked) if stream.is_contiguous() else stream[picked]
    return rows.view(m, t, -1).to(dtype)
