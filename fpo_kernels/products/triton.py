"""impl="triton", way="tokens": the grouped kernel with one layer, or the layers that share a.

Its list is made on the device from a bound on the lengths, so that nothing is read back and a call can be captured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fpo_kernels.products import config_triton as config
from fpo_kernels.products.grouped import Lists, launch, member
from fpo_kernels.products.inputs_triton import refuse


def grad_products(
    a: Tensor,  # (S, p)
    ds: tuple[Tensor, ...],  # each (S, q_k)
    offsets: Tensor,  # (B+1,)
    pairs: Tensor,  # (n, 2)
    other: tuple[Tensor, tuple[Tensor, ...], Tensor] | None,
    longest: int,
) -> Tensor:  # (n,)
    refuse(a)
    if len(pairs) == 0:
        return a.new_empty(0, dtype=torch.float32)
    layers, unit = member(a, ds, None if other is None else other[:2])
    tile = config.tokens(a.dtype, longest, unit > 1, config.chip(a.device))
    lists = _lists(offsets, None if other is None else other[2], pairs, -(-longest // tile.tokens), tile.tokens)
    leak = torch.empty(1, dtype=torch.int32, device=a.device)  # every row counts: nothing writes it
    sums = launch([layers], lists, tile, unit, leak)
    return sums.view(len(pairs), -1).sum(1, dtype=torch.float64).float()


def _lists(offsets: Tensor, offsets2: Tensor | None, pairs: Tensor, tiles: int, tile: int) -> Lists:
    """Items for every tile that an example may have; those beyond its end add 0."""
    cuts = [offsets.long()] + ([] if offsets2 is None else [offsets2.long()])
    begin, length = torch.cat([cut[:-1] for cut in cuts]), torch.cat([cut.diff() for cut in cuts])
    extents = torch.stack([begin, length, torch.zeros_like(begin), length], 1)
    cell = torch.arange(len(pairs) * tiles * tiles, device=pairs.device)
    pair, row, column = cell // (tiles * tiles), cell // tiles % tiles, cell % tiles
    i, j = pairs[pair].unbind(1)
    weight = torch.ones_like(cell)
    if offsets2 is None:  # ⟨G_i, G_i⟩ is symmetric: tiles above the diagonal count twice, those below are none
        twin = i == j
        weight = torch.where(twin & (row < column), 2, weight)
        row = torch.where(twin & (row > column), tiles, row)
    else:
        j = j + len(offsets) - 1
    items = torch.stack([i, row, j, column, weight], 1).int()
    return Lists(items, extents, items.new_empty(0))
