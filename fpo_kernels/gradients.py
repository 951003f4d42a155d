"""Per-example gradients of one parameter, unformed: what the taps deliver, ready for the operations.

Three kinds cover the layers of `layers.py`. Each knows its inner products over listed pairs of examples and
its product with a stored direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cost import Work
from .direction import unchecked_direction
from .products import unchecked_products
from .streams import Extents, sent

Lengths = NDArray[np.int64]

# The most that gathered rows of two sides may take at a time, whatever the pairs.
SCRATCH_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False, slots=True)
class Packing:
    """Which rows of a stream belong to which example, and which of these count: of the others d is zero."""

    lengths: Lengths  # (B,) rows of each example, on the host
    offsets: Tensor  # (B+1,) int64, on the stream's device: example i owns rows offsets[i]:offsets[i+1]
    extents: Extents

    @staticmethod
    def of(lengths: Lengths, device: torch.device) -> Packing:
        """The packing of examples with these lengths, one after another; every row counts."""
        return Packing.among(Extents.packed(lengths), device)

    @staticmethod
    def among(extents: Extents, device: torch.device) -> Packing:
        """The packing of examples that lie one after another, whose rows do not all count."""
        rows = extents.host[:, 1]
        return Packing(rows, sent(np.concatenate([[0], rows.cumsum()]), device), extents)


class Pairs:
    """Pairs (i, j) of examples, on the host and the device, and what multiplying them takes in any layer."""

    def __init__(self, listed: Tensor) -> None:
        """`listed` is (n, 2) int64 on the CPU."""
        self.host: NDArray[np.int64] = listed.numpy()
        self._on: dict[torch.device, Tensor] = {listed.device: listed}
        self._work: dict[tuple[int, int], tuple[Packing, Packing | None, Work]] = {}

    def on(self, device: torch.device) -> Tensor:
        """The list on a device, sent there once."""
        if device not in self._on:
            self._on[device] = sent(self.host, device)
        return self._on[device]

    def work(self, left: Packing, right: Packing | None) -> Work:
        """The cost model's summary for these streams, made once for all layers that share their packings."""
        key = id(left), id(right)
        if key not in self._work:
            lengths = None if right is None else right.lengths
            # by the room that examples have, so that a batch is multiplied alike whether it is recorded or not;
            # the packings are kept beside the answer, so that no other can take their identities
            self._work[key] = left, right, Work.of(left.lengths, self.host, lengths)
        return self._work[key][2]


@dataclass(eq=False, slots=True)
class Factors:
    """G_i = Σ_t d_t a_tᵀ: a linear layer's weight."""

    a: Tensor  # (S, p) inputs; siblings (layers that read the same input) share the very tensor
    d: Tensor  # (S, q) output gradients
    packing: Packing
    transposed: bool = False  # the parameter holds (p, q), as transformers' Conv1D does

    def direction(self, vector: Tensor) -> Tensor:
        """(B,) of the parameter's shape (q, p), or (p, q) where transposed."""
        turned = vector.T if self.transposed else vector
        return unchecked_direction(self.a, self.d, self.packing.offsets, turned)

    @staticmethod
    def products(own: Sequence[Factors], pairs: Pairs, other: Sequence[Factors] | None) -> Tensor:
        """(n,) Σ over siblings, whose token products of the shared input are taken once."""
        first, second = own[0], None if other is None else other[0]
        right = None
        if other is not None and second is not None:
            right = second.a, tuple(f.d for f in other), second.packing.offsets
        work = pairs.work(first.packing, None if second is None else second.packing)
        ds = tuple(f.d for f in own)
        return unchecked_products(first.a, ds, first.packing.offsets, pairs.on(first.a.device), right, work)

    @staticmethod
    def interleave(parts: Sequence[Factors]) -> Factors:
        """Several calls over the same examples: each example's tokens of every call together."""
        order, packing = _interleaved([part.packing for part in parts])
        a, d = torch.cat([part.a for part in parts]), torch.cat([part.d for part in parts])
        return Factors(a[order], d[order], packing, parts[0].transposed)


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """G_i has Σ_{t: id_t = r} d_t in row r: an embedding's weight."""

    ids: Tensor  # (S,) int64
    d: Tensor  # (S, h)
    packing: Packing
    table: int  # rows of the parameter

    def as_factors(self) -> Factors:
        """The same gradient as a linear layer's: one-hot output gradients. Takes (S, table) numbers."""
        hot = self.d.new_zeros(len(self.ids), self.table).scatter_(1, self.ids.long()[:, None], 1)
        return Factors(self.d, hot, self.packing)

    def direction(self, vector: Tensor) -> Tensor:
        """(B,) for a vector (table, h)."""
        wide = _wide(self.d)
        return segment_sums((wide * vector.to(wide.dtype)[self.ids]).sum(1), self.packing)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """One row for each (example, id) that occurs: keys (u,) = example·table + id, rising, and sums (u, h)."""
        owner = np.repeat(np.arange(len(self.packing.lengths)), self.packing.lengths)
        key = torch.from_numpy(owner).to(self.ids.device) * self.table + self.ids
        key, order = key.sort(stable=True)
        keys, counts = key.unique_consecutive(return_counts=True)
        return keys, torch.segment_reduce(_wide(self.d)[order], "sum", lengths=counts, axis=0, unsafe=True)

    @staticmethod
    def products(own: Sequence[Rows], pairs: Pairs, other: Sequence[Rows] | None) -> Tensor:
        """(n,) Σ over the ids that both examples of a pair hold. Scratch: `SCRATCH_BYTES` and (n, longest) keys."""
        (left,) = own
        keys, sums = left.gathered()
        keys2, sums2 = (keys, sums) if other is None else other[0].gathered()
        starts = torch.searchsorted(keys, torch.arange(len(left.packing.lengths) + 1, device=keys.device) * left.table)
        i, j = pairs.on(keys.device).unbind(1)
        counts = starts.diff()[i]
        pair = torch.repeat_interleave(counts)  # (m,): the pair that each row of a left example is looked up for
        row = torch.arange(len(pair), device=keys.device) - (counts.cumsum(0) - counts - starts[i])[pair]
        wanted = keys[row] + (j - i)[pair] * left.table
        found = torch.searchsorted(keys2, wanted).clamp(max=max(len(keys2) - 1, 0))
        hit = keys2[found] == wanted if len(keys2) else torch.zeros_like(wanted, dtype=torch.bool)
        pair, row, found = pair[hit], row[hit], found[hit]
        step = max(1, SCRATCH_BYTES // (2 * sums.element_size() * max(sums.shape[1], 1)))
        parts = [
            (sums[row[k : k + step]] * sums2[found[k : k + step]]).sum(1, dtype=torch.float64)
            for k in range(0, len(row), step)
        ]
        met = torch.bincount(pair, minlength=len(pairs.host))
        every = torch.cat(parts) if parts else sums.new_zeros(0, dtype=torch.float64)
        return torch.segment_reduce(every, "sum", lengths=met, unsafe=True, initial=0)

    @staticmethod
    def interleave(parts: Sequence[Rows]) -> Rows:
        """Several calls over the same examples: each example's tokens of every call together."""
        order, packing = _interleaved([part.packing for part in parts])
        ids, d = torch.cat([part.ids for part in parts]), torch.cat([part.d for part in parts])
        return Rows(ids[order], d[order], packing, parts[0].table)


@dataclass(eq=False, slots=True)
class Vectors:
    """g_i itself, formed: a bias, a norm's weight, or what the fallback computed."""

    v: Tensor  # (B, n), fp32 or float64

    def direction(self, vector: Tensor) -> Tensor:
        """(B,) for a vector of n elements, any shape."""
        return self.v @ vector.to(self.v.dtype).flatten()

    @staticmethod
    def products(own: Sequence[Vectors], pairs: Pairs, other: Sequence[Vectors] | None) -> Tensor:
        """(n,) row by row, or through one matrix product where the pairs fill half of it."""
        left = own[0].v
        right = left if other is None else other[0].v
        i, j = pairs.on(left.device).unbind(1)
        if 2 * len(pairs.host) >= len(left) * len(right):
            return (left @ right.T)[i, j]
        step = max(1, SCRATCH_BYTES // (3 * left.element_size() * max(left.shape[1], 1)))
        parts = [(left[i[k : k + step]] * right[j[k : k + step]]).sum(1) for k in range(0, len(i), step)]
        return torch.cat(parts) if parts else left.new_zeros(0)

    @staticmethod
    def of_many(own: Sequence[Vectors], pairs: Pairs, other: Sequence[Vectors] | None) -> Tensor:
        """(n,) float64: the products of many parameters of one size, added up."""
        left = torch.stack([vectors.v for vectors in own], 1)  # (B, L, n)
        right = None if other is None else [Vectors(torch.stack([vectors.v for vectors in other], 1).flatten(1))]
        return Vectors.products([Vectors(left.flatten(1))], pairs, right).double()

    @staticmethod
    def interleave(parts: Sequence[Vectors]) -> Vectors:
        """Several calls over the same examples: their gradients add up."""
        return Vectors(torch.stack([part.v for part in parts]).sum(0))


class Scaled(Vectors):
    """g_i = Σ_t d_t ∘ x̂_t of a norm's weight, made of its input when asked for; those of like norms together."""

    __slots__ = ("_made", "a", "d", "kind", "normalised")

    def __init__(self, d: Tensor, a: Tensor, normalised: Callable[[Tensor], Tensor], kind: object) -> None:
        """d and a are (B, R, n); `normalised` gives x̂ of the module's input; modules of one `kind` do so alike."""
        self.d: Tensor | None
        self.a: Tensor | None
        self.d, self.a, self.normalised, self.kind = d, a, normalised, kind
        self._made: Tensor | None = None

    @property
    def v(self) -> Tensor:  # type: ignore[override]
        """(B, n), fp32 or float64."""
        if self._made is None:
            Scaled.make([self])
        assert self._made is not None
        return self._made

    @property
    def waiting(self) -> int:
        """Bytes of what it is still to be made of; 0 once it is."""
        return 0 if self.d is None or self.a is None else self.d.nbytes + self.a.nbytes

    @staticmethod
    def make(streams: Sequence[Scaled]) -> None:
        """Make those that are not, a launch for all that are alike."""
        alike: dict[tuple[object, ...], list[tuple[Scaled, Tensor, Tensor]]] = {}
        for n, stream in enumerate(streams):
            d, a = stream.d, stream.a
            if d is not None and a is not None:
                kind = n if stream.kind is None else stream.kind
                alike.setdefault((kind, a.shape, a.dtype, d.dtype, d.device), []).append((stream, d, a))
        for members in alike.values():
            first, d, a = members[0]
            if len(members) > 1:
                d, a = (torch.cat([member[side] for member in members]) for side in (1, 2))  # type: ignore[misc]
            dtype = torch.float64 if d.dtype == torch.float64 else torch.float32
            made = (d.to(dtype) * first.normalised(a).to(dtype)).sum(1)
            for (stream, _, _), own in zip(members, made.chunk(len(members)), strict=True):
                stream._made, stream.d, stream.a = own, None, None


Stream = Factors | Rows | Vectors


def join_calls(parts: Sequence[Stream]) -> Stream:
    """The gradient of a parameter that was used several times: the sum over its uses, cross terms included."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Vectors):
        return Vectors.interleave([part for part in parts if isinstance(part, Vectors)])
    rows = [part for part in parts if isinstance(part, Rows)]
    if len(rows) == len(parts):
        return Rows.interleave(rows)
    # with Factors among them: a tied weight, looked up by an embedding and multiplied by a linear layer
    factors = [part.as_factors() if isinstance(part, Rows) else part for part in parts]
    return Factors.interleave([part for part in factors if isinstance(part, Factors)])


def join_batches(parts: Sequence[dict[str, Stream]], sizes: Sequence[int]) -> dict[str, Stream]:
    """Name → stream of the examples of several batches, of the given sizes; siblings go on sharing their input."""
    joined: dict[str, Stream] = {}
    shared: dict[tuple[int, ...], tuple[Tensor, Packing]] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        own = [part.get(name) for part in parts]
        first = next(stream for stream in own if stream is not None)
        if isinstance(first, Vectors):
            blank = first.v.new_zeros(max(sizes), first.v.shape[1])
            v = [s.v if isinstance(s, Vectors) else blank[:n] for s, n in zip(own, sizes, strict=True)]
            joined[name] = Vectors(torch.cat(v))
            continue
        if isinstance(first, Rows) and any(isinstance(s, Factors) for s in own):
            own = [s.as_factors() if isinstance(s, Rows) else s for s in own]
        present = [s for s in own if isinstance(s, (Factors, Rows))]
        read = [s.a if isinstance(s, Factors) else s.ids for s in present]
        ids = iter(read)
        key = tuple(0 if s is None else id(next(ids)) for s in own)
        if key not in shared:
            lengths = [
                s.packing.lengths if isinstance(s, (Factors, Rows)) else np.zeros(n, np.int64)
                for s, n in zip(own, sizes, strict=True)
            ]
            shared[key] = torch.cat(read), Packing.of(np.concatenate(lengths), read[0].device)
        inputs, packing = shared[key]
        d = torch.cat([stream.d for stream in present])
        last = present[-1]
        if isinstance(last, Factors):
            joined[name] = Factors(inputs, d, packing, last.transposed)
        else:
            joined[name] = Rows(inputs, d, packing, last.table)
    return joined


def segment_sums(x: Tensor, packing: Packing) -> Tensor:
    """Σ of each example's rows, (S, …) → (B, …), in a fixed order."""
    return torch.segment_reduce(x, "sum", offsets=packing.offsets, axis=0, initial=0)


def _interleaved(packings: Sequence[Packing]) -> tuple[Tensor, Packing]:
    """The order that brings concatenated streams example by example, and where the examples then lie."""
    lengths = [packing.lengths for packing in packings]
    owner = np.concatenate([np.repeat(np.arange(len(n)), n) for n in lengths])
    device = packings[0].offsets.device
    order = torch.from_numpy(owner.argsort(kind="stable")).to(device)
    return order, Packing.of(np.sum(lengths, 0), device)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
