"""What the parameters' streams come to in one sketch, or in one each."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .beside import Beside
from .gradients import Factors, Packing, Rows, Stream, Vectors
from .layers import Site
from .sketch import (
    BucketMap,
    Member,
    TensorSketch,
    check_dim,
    check_seed,
    grouped_sketch,
    is_grouped,
    kept_map,
    row_buckets,
    spectrum,
    unchecked_sketch,
    vector_buckets,
)
from .sketch.config import KEPT_BYTES
from .totals import wide

# A transformer block's layers share C_a, whatever they read: q, k and v read one input, as do LoRA's first factors.
_BLOCK = re.compile(r"(.*\.\d+)\..*")


def family_of(name: str) -> str:
    """What a parameter's C_a is keyed by: its name up to the last component that is a number, "" without one."""
    block = _BLOCK.fullmatch(name)
    return block[1] if block else ""


@dataclass(frozen=True)
class Maps:
    """The maps of every parameter for one dim and seed, by the parameter's canonical name and shape alone.

    A matrix (r, c), or what has more dimensions flattened to that, is a TensorSketch(p=c, q=r); a vector has one map.
    """

    dim: int
    seed: int

    def __post_init__(self) -> None:
        check_dim(self.dim)
        check_seed(self.seed)

    def matrix(self, name: str, rows: int, columns: int) -> TensorSketch:
        """Of a parameter (rows, columns)."""
        return TensorSketch(columns, rows, self.dim, self.seed, name, family_of(name))

    def vector(self, name: str, size: int, device: torch.device) -> BucketMap:
        """Of a parameter with one dimension, or none."""
        return kept_map(size, self.dim, self.seed, name, "v", device)


class Sketched:
    """Adds up what `consume` meets, in float64: linear layers' sketches, and the rest in buckets until the end.

    Where a device takes many layers in a launch, their streams are kept for it. Rows of padding that were not cut out
    are read like others: their d is zero.
    """

    def __init__(self, maps: Maps, shapes: Mapping[str, tuple[int, ...]], per_layer: bool) -> None:
        """`shapes` are the chosen parameters'; `per_layer` keeps them apart by name, else the sum's name is ""."""
        self._maps, self._shapes, self._per_layer = maps, shapes, per_layer
        self._noted: list[tuple[str, Member]] = []  # by the sum that it adds to
        self._kept_bytes = 0
        self._made: list[tuple[list[str], Tensor]] = []  # names, and what was sketched of each
        self._beside = Beside()
        self._cuts: dict[Packing, tuple[Tensor, Tensor]] = {}
        self._spectra: dict[str, Tensor] = {}
        self._buckets: dict[str, Tensor] = {}

    def consume(self, sites: list[Site], streams: list[Stream]) -> None:
        """A `gather.Consume`: siblings come together."""
        together: dict[tuple[str, bool], list[tuple[str, Factors]]] = {}
        for site, stream in zip(sites, streams, strict=True):
            if isinstance(stream, Factors):
                key = (site.name if self._per_layer else family_of(site.name)), stream.transposed
                together.setdefault(key, []).append((site.name, stream))
            else:
                self._add(self._buckets, site.name, self._in_buckets(site.name, stream))
        for members in together.values():
            # a transposed parameter (p, q) has a's features for rows: nothing to share, its rows' map is its own
            alone = [[member] for member in members] if members[0][1].transposed else [members]
            for group in alone:
                self._factors(group)

    def _factors(self, members: list[tuple[str, Factors]]) -> None:
        name, first = members[0]
        sides = [(f.a, f.d) if f.transposed else (f.d, f.a) for _, f in members]  # rows, columns
        sketches = [
            self._maps.matrix(name, rows.shape[1], columns.shape[1])
            for (name, _), (rows, columns) in zip(members, sides, strict=True)
        ]
        a, ds = sides[0][1], tuple(rows for rows, _ in sides)
        if not is_grouped(a):
            self._add(self._spectra, name, unchecked_sketch(a, ds, first.packing.offsets, sketches))
            return
        packing = first.packing
        if packing not in self._cuts:
            self._cuts[packing] = packing.offsets[:-1], packing.offsets.diff()
        longest = int(packing.lengths.max(initial=0))
        member = Member(a, ds, *self._cuts[packing], longest, sketches, slot=0)
        self._noted.append((name if self._per_layer else "", member))
        self._kept_bytes += a.nbytes + sum(d.nbytes for d in ds)
        if self._kept_bytes >= KEPT_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Sketch what was kept."""
        by_device: dict[torch.device, list[tuple[str, Member]]] = {}
        for name, member in self._noted:
            by_device.setdefault(member.a.device, []).append((name, member))
        for device, named in by_device.items():
            slots = {name: slot for slot, name in enumerate(dict.fromkeys(name for name, _ in named))}
            members = [member._replace(slot=slots[name]) for name, member in named]
            sums = self._beside.run(device, functools.partial(grouped_sketch, members, len(slots)), members)
            self._made.append((list(slots), sums))
        self._noted, self._kept_bytes = [], 0

    def _in_buckets(self, name: str, stream: Rows | Vectors) -> Tensor:
        shape = self._shapes[name]
        if isinstance(stream, Vectors):
            v = stream.v
            if len(shape) < 2:
                return vector_buckets(v, self._maps.vector(name, v.shape[1], v.device))
            # a matrix that was formed: its rows, as an embedding's
            ids = torch.arange(shape[0], device=v.device).repeat(len(v))
            x = v.reshape(len(v) * shape[0], -1)
            offsets = torch.arange(len(v) + 1, device=v.device) * shape[0]
        else:
            ids, x, offsets = stream.ids, stream.d, stream.packing.offsets
        columns, rows = self._maps.matrix(name, shape[0], x.shape[1]).maps(x.device)
        return row_buckets(ids, x, offsets, rows, columns)

    def _add(self, to: dict[str, Tensor], name: str, part: Tensor) -> None:
        key = name if self._per_layer else ""
        before = to.get(key)
        to[key] = part.double() if before is None else before.add_(part.to(before.device))

    def result(self, outputs: Tensor) -> dict[str, Tensor]:
        """Name → (B, dim) in the outputs' precision, zeros where nothing came."""
        self._flush()
        self._beside.join()
        for names, sums in self._made:
            for name, own in zip(names, sums, strict=True):
                self._add(self._spectra, name, own)
        self._made = []
        like = wide(outputs)
        every = {}
        for name in self._shapes if self._per_layer else ("",):
            total = self._spectra.get(name)
            if name in self._buckets:
                rest = spectrum(self._buckets[name])
                total = rest if total is None else total + rest.to(total.device)
            every[name] = like.new_zeros(len(outputs), self._maps.dim) if total is None else total.to(like)
        return every
