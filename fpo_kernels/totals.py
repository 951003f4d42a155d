"""What the parameters contribute, added up, and matrices from blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .gather import Consume
from .gradients import Factors, Pairs, Rows, Scaled, Stream, Vectors
from .layers import Site
from .products import are_grouped, choose_way, new_ledger

if TYPE_CHECKING:
    from .products.grouped import Ledger

Held = dict[str, Stream]
# Vectors of a norm's or a bias's size; what a fallback formed, of a whole weight, is multiplied at once.
SMALL_BYTES = 4 * 2**20
# Norms' inputs and gradients that are kept to be made into vectors together.
WAITING_BYTES = 128 * 2**20


class Total:
    """Sums what the parameters contribute, in float64.

    Where a device takes many layers in a launch, their streams are noted and multiplied together (`products.Ledger`).
    Vectors, which are small, are multiplied at the end, those of a size together.
    """

    def __init__(self, padding_read: Callable[[Tensor], None]) -> None:
        """`padding_read` is told, as () bool, whether rows that do not count had a gradient, and may raise."""
        self._padding_read = padding_read
        self._value: Tensor | None = None
        self._ledger: Ledger | None = None
        self._pairs: Pairs | None = None
        self._scaled: list[tuple[Scaled, Vectors]] = []
        self._waiting = 0
        self._small: dict[tuple[object, ...], list[tuple[Vectors, Vectors]]] = {}

    def add(self, part: Tensor) -> None:
        """A parameter's contribution, one number a pair or an example."""
        part = part.double()
        self._value = part if self._value is None else self._value + part.to(self._value.device)

    def multiply(self, sites: list[Site], streams: list[Stream], pairs: Pairs, held: Held | None = None) -> None:
        """Add the products of `pairs`, within the streams or with the held ones; siblings are multiplied together.

        All calls are for the same pairs.
        """
        self._pairs = pairs
        if held is None:
            self._take(streams, pairs, None)
            return
        together: dict[int, list[tuple[Stream, Stream]]] = {}
        for site, stream in zip(sites, streams, strict=True):
            if site.name in held:
                own, other = _alike(stream, held[site.name])
                together.setdefault(id(other.a) if isinstance(other, Factors) else 0, []).append((own, other))
        for members in together.values():
            left, right = zip(*members, strict=True)
            self._take(left, pairs, right)

    def _take(self, own: Sequence[Stream], pairs: Pairs, other: Sequence[Stream] | None) -> None:
        first = own[0]
        if isinstance(first, Vectors):
            right = first if other is None else other[0]
            assert isinstance(right, Vectors)
            if isinstance(first, Scaled) and first.d is not None and are_grouped(first.d):
                self._scaled.append((first, right))
                self._waiting += first.waiting
                if self._waiting >= WAITING_BYTES:
                    self._make()
                return
            if first.v.nbytes <= SMALL_BYTES:
                key = first.v.shape, right.v.shape, first.v.dtype, first.v.device, first is right
                self._small.setdefault(key, []).append((first, right))
                return
        elif self._note(own, pairs, other):
            return
        self.add(type(first).products(own, pairs, other))  # type: ignore[arg-type]

    def _make(self) -> None:
        """Norms' vectors, of which like ones take a launch together."""
        scaled, self._scaled, self._waiting = self._scaled, [], 0
        Scaled.make([first for first, _ in scaled])
        for first, right in scaled:
            assert self._pairs is not None
            self._take([first], self._pairs, None if right is first else [right])

    def _note(self, own: Sequence[Stream], pairs: Pairs, other: Sequence[Stream] | None) -> bool:
        """Keep streams for a launch of many layers, where the device has such and tokens are the way to multiply."""
        first, right = own[0], None if other is None else other[0]
        assert not isinstance(first, Vectors)
        assert not isinstance(right, Vectors)
        if not are_grouped(first.d):
            return False
        work = pairs.work(first.packing, None if right is None else right.packing)
        ds = [stream.d for stream in own if not isinstance(stream, Vectors)]
        if isinstance(first, Factors) and choose_way(first.a, ds, work) != "tokens":
            return False
        if self._ledger is None:
            self._ledger = new_ledger(pairs.host)
        second = None
        if other is not None and right is not None:
            held = [stream.d for stream in other if not isinstance(stream, Vectors)]
            second = _inputs(right), held, right.packing.extents
        width = sum(d.shape[1] for d in ds) + (first.a.shape[1] if isinstance(first, Factors) else 0)
        self._ledger.note(_inputs(first), ds, first.packing.extents, 2 * width * work.token_pairs, second)
        return True

    def over(self, pairs: Pairs) -> Consume:
        """A consumer that adds the products of these pairs."""
        return lambda sites, streams: self.multiply(sites, streams, pairs)

    def result(self, outputs: Tensor, n: int) -> Tensor:
        """The sum in the outputs' precision, or zeros where no gradient reached any chosen parameter."""
        self._make()
        for members in self._small.values():
            left, right = zip(*members, strict=True)
            assert self._pairs is not None
            self.add(Vectors.of_many(left, self._pairs, None if left[0] is right[0] else right))
        self._small = {}
        if self._ledger is not None:
            products, leak = self._ledger.result()
            self._ledger = None
            if products is not None:
                self.add(products)
            if leak is not None and self._value is not None:
                self._padding_read(leak)
                self._value = self._value.masked_fill(leak.to(self._value.device), torch.nan)
        like = wide(outputs)
        return like.new_zeros(n) if self._value is None else self._value.to(like)


def unread(leak: Tensor) -> None:
    """For passes that are recorded, in which nothing can be read back: what reads its padding is NaN."""


def _inputs(stream: Factors | Rows) -> Tensor:
    return stream.a if isinstance(stream, Factors) else stream.ids.long()


def _alike(left: Stream, right: Stream) -> tuple[Stream, Stream]:
    """Streams of one kind: a tied embedding may have met its linear layer in one batch only."""
    if isinstance(left, Rows) and isinstance(right, Factors):
        return left.as_factors(), right
    if isinstance(left, Factors) and isinstance(right, Rows):
        return left, right.as_factors()
    return left, right


def holding(held: Held) -> Consume:
    """A consumer that keeps every stream by its parameter's name."""

    def consume(sites: list[Site], streams: list[Stream]) -> None:
        Scaled.make([stream for stream in streams if isinstance(stream, Scaled)])  # or it would keep what it is made of
        held.update((site.name, stream) for site, stream in zip(sites, streams, strict=True))

    return consume


def mirrored(upper: Tensor, b: int) -> Tensor:
    """A symmetric matrix (b, b) from its numbers on and above the diagonal, row by row."""
    rows, cols = torch.triu_indices(b, b, device=upper.device)
    whole = upper.new_empty(b, b)
    whole[rows, cols] = upper
    whole[cols, rows] = upper
    return whole


def symmetric(blocks: list[list[Tensor]]) -> Tensor:
    """A symmetric matrix from its blocks on and above the diagonal."""
    sizes = [row[0].shape[0] for row in blocks]
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    whole = blocks[0][0].new_empty(sum(sizes), sum(sizes))
    for n, row in enumerate(blocks):
        top = slice(starts[n], starts[n] + sizes[n])
        upper = torch.cat(row, 1)
        whole[top, starts[n] :] = upper
        whole[starts[n] :, top] = upper.T
    return whole


def wide(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x if x.dtype == torch.float64 else x.float()
