"""From what the taps deliver to complete streams: padding dropped, repeated calls joined, siblings together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .batches import Batch, rows_of, tokens_of
from .capture import Shape
from .course import Course
from .gradients import Factors, Packing, Stream, join_calls
from .layers import Site
from .reached import reached_rows
from .streams import Extents, sent

Consume = Callable[[list[Site], list[Stream]], None]


def ignore(sites: list[Site], streams: list[Stream]) -> None:
    """A consumer of a pass that is only looked at."""


class PaddingReadError(Exception):
    """Padded positions have a gradient in this model: its outputs read them, so their rows count."""


class Layout:
    """Where the rows of a batch's examples lie, and how padding is dropped: by packing, or in place.

    Attributes:
        in_place: streams stay as they are, padding is told by their extents; else it is cut out of them.
        static: of a pass that is recorded, whatever batch will fill it.
        leak: () bool, whether a dropped row had a gradient; None where none was dropped, or nobody looked.
    """

    static = False

    def __init__(self, batch: Batch, whole: bool, in_place: bool = False) -> None:
        """With `whole`, padded positions count like any other."""
        size = rows_of(batch)
        self.shape = Shape(size, tokens_of(batch))
        self.in_place = False
        self._packings: dict[tuple[int, bool, torch.device], Packing] = {}
        self._usual: tuple[Any, Any] = None, None  # what was asked for last
        self._indices: dict[tuple[bool, torch.device], Tensor] = {}
        mask = batch.get("attention_mask")
        self._tokens: np.ndarray[Any, Any] | None = None
        self._left = False
        self._first: np.ndarray[Any, Any] | None = None
        self.leak: Tensor | None = None
        if not whole and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == (size, self.shape.tokens):
            kept = mask.detach().cpu().numpy() != 0  # the one time that a pass waits for a device: before it begins
            counts = kept.sum(1)
            if counts.sum() < kept.size:
                self._tokens = counts.astype(np.int64)
                self._left = bool((~kept[:, 0]).any())
                self._kept = kept
                self._first = kept.argmax(1)
                ends = kept.shape[1] - kept[:, ::-1].argmax(1)
                unbroken = (ends - self._first)[counts > 0] == counts[counts > 0]
                self.in_place = in_place and bool(unbroken.all())

    @property
    def left(self) -> bool:
        """Whether padding stands on the left."""
        return self._left

    @property
    def is_full(self) -> bool:
        """Whether every row counts."""
        return self._tokens is None

    @property
    def kept(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """(B,) the first token of each example that counts, and how many do."""
        if self._tokens is None or self._first is None:
            whole = np.full(self.shape.examples, self.shape.tokens, dtype=np.int64)
            return np.zeros_like(whole), whole
        return self._first, self._tokens

    @property
    def kind(self) -> tuple[object, ...]:
        """What a model may take another path for: about how wide the batch is, on which side padding stands, and in
        what order the examples' lengths are."""
        width = (self.shape.tokens or 0).bit_length()
        if self._tokens is None:
            return (width,)
        steps = np.diff(self._tokens)
        return width, self._left, bool((steps > 0).any()), bool((steps < 0).any())

    def pack(self, x: Tensor, per_token: int | None) -> Tensor:
        """(B, R, …) → (S, …), without padding where the R rows are the batch's tokens, `per_token` rows each."""
        if self._tokens is None or per_token is None or self.in_place:
            return x.flatten(0, 1)
        tokens = x.reshape(-1, per_token, *x.shape[2:])
        return tokens.index_select(0, self._rows(True, x.device)).flatten(0, 1)

    def _rows(self, kept: bool, device: torch.device) -> Tensor:
        """Which rows of (B·T, …) are kept, or dropped."""
        if (kept, device) not in self._indices:
            self._indices[kept, device] = sent(np.flatnonzero(self._kept == kept), device)
        return self._indices[kept, device]

    def packing(self, rows: int, per_token: int | None, device: torch.device) -> Packing:
        """Where the examples lie in what `pack` returns of (B, rows, …)."""
        usual, packing = self._usual
        if usual == (rows, per_token, device):
            return packing
        dropping = self._tokens is not None and per_token is not None
        key = (per_token if dropping and per_token else rows), dropping, device
        if key not in self._packings:
            self._packings[key] = Packing.among(self._extents(rows, key[0], dropping), device)
        self._usual = (rows, per_token, device), self._packings[key]
        return self._packings[key]

    def _extents(self, rows: int, scale: int, dropping: bool) -> Extents:
        whole = np.full(self.shape.examples, rows, dtype=np.int64)
        if not dropping:
            return Extents.packed(whole)
        assert self._tokens is not None
        assert self._first is not None
        if not self.in_place:
            return Extents.packed(scale * self._tokens)
        begin = np.arange(len(whole)) * rows
        return Extents(np.stack([begin, whole, scale * self._first, scale * self._tokens], 1))

    def look_at_padding(self, d: Tensor, per_token: int | None) -> None:
        """Remember whether a dropped row of d (B, R, q) has a gradient; read once, by `check`."""
        if self._tokens is not None and per_token is not None and not self.in_place:
            dropped = d.reshape(-1, per_token * d.shape[2]).index_select(0, self._rows(False, d.device))
            leak = (dropped != 0).any()
            self.leak = leak if self.leak is None else self.leak | leak.to(self.leak.device)

    def check(self) -> None:
        """Raises PaddingReadError where a dropped row had a gradient."""
        if self.leak is not None and bool(self.leak):
            raise PaddingReadError


class _Call:
    """One delivery as the rules want it (layers.Call)."""

    __slots__ = ("_a", "_dims", "_inputs", "_layout", "_packed", "_per_token", "d")

    def __init__(self, a: Tensor | None, d: Tensor, layout: Layout, inputs: dict[tuple[Any, ...], Tensor]) -> None:
        size, tokens = layout.shape
        self._a, self._dims = a, d.ndim
        if d.ndim != 3 or d.shape[0] != size:
            if size == 1 and d.ndim < 3:
                d = d[None]
            elif d.shape[0] != size:  # (B·T, q)
                d = d.unflatten(0, (size, -1))
        own = d.shape[1] if d.ndim >= 3 else 1
        self.d = d if d.ndim == 3 else d.reshape(size, -1, d.shape[-1])
        # rows that belong to a token: dropping those of padding is right wherever their gradient is zero
        self._per_token = self.d.shape[1] // own if own == tokens and d.ndim >= 3 else None
        self._layout, self._inputs = layout, inputs
        self._packed: Tensor | None = None

    @property
    def a(self) -> Tensor:
        a = self._a
        assert a is not None  # a rule that reads the input says so
        if a.ndim == 3 and a.shape[:2] == self.d.shape[:2]:
            return a
        features = a.ndim - (self._dims - 1)  # ids have no feature dimension
        return a.reshape(*self.d.shape[:2], *a.shape[a.ndim - features :])

    def inputs(self, dtype: torch.dtype | None) -> Tensor:
        a = self.a
        key = dtype, a.shape, self._per_token
        packed = self._inputs.get(key)
        if packed is None:
            packed = self._layout.pack(a.detach(), self._per_token)
            packed = packed if dtype is None else packed.to(dtype)
            self._inputs[key] = packed
        return packed

    def gradients(self) -> tuple[Tensor, Packing]:
        if self._packed is None:
            self._layout.look_at_padding(self.d, self._per_token)
            self._packed = self._layout.pack(self.d, self._per_token)
        return self._packed, self._layout.packing(self.d.shape[1], self._per_token, self.d.device)


class _Few(NamedTuple):
    """Of a group's input the rows that a gradient reached; siblings that were reached alike share it."""

    of: Tensor
    rows: Tensor
    a: Tensor
    packing: Packing


class Gather:
    """Joins what the taps deliver into one stream a parameter and passes it on when complete, siblings together."""

    def __init__(self, course: Course, layout: Layout, consume: Consume) -> None:
        """`course` says how many deliveries complete each parameter."""
        self._course, self._layout, self._consume = course, layout, consume
        # of a linear weight's delivery, a row a token, nothing is packed: what the rule makes of it is known
        as_they_are = layout.in_place or layout.is_full
        self._weights = course.weights if as_they_are else {}
        self._grid = layout.shape
        self._missing = dict(course.missing)
        self._awaited = dict(course.awaited)
        self._unread = dict(course.unread)
        self._inputs: dict[int, dict[tuple[Any, ...], Tensor]] = {}
        self._usual: dict[int, tuple[Tensor, Packing]] = {}  # a group's input as it lies
        self._few: dict[int, _Few] = {}  # and of it the rows that a gradient reached
        self._parts: dict[Site, list[Stream]] = {}
        self._ready: dict[int, list[tuple[Site, Factors]]] = {}

    def deliver(self, module: nn.Module, group: int, a: Tensor | None, d: Tensor) -> None:
        """A tap's callback."""
        weight = self._weights.get(module)
        if weight is not None and a is not None:
            usual = self._usual.get(group) or self._as_it_lies(group, a, d)
            if usual is not None and d.shape[:-1] == self._grid and d.dtype == usual[0].dtype:
                site, family = weight
                flat = d.view(-1, d.shape[-1]) if d.is_contiguous() else d.flatten(0, 1)
                self._sibling(site, self._of_reached(group, Factors(usual[0], flat, usual[1])), family)
                self._was_read(group)
                return
        inputs = self._inputs.setdefault(group, {})
        call = _Call(a, d, self._layout, inputs)
        for site, stream_of, own_family in self._course.served[module]:
            stream = stream_of(module, call)
            if own_family is not None:
                if isinstance(stream, Factors):
                    stream = self._of_reached(group, stream)
                self._sibling(site, stream, own_family)
                continue
            self._parts.setdefault(site, []).append(stream)
            self._missing[site] -= 1
            if not self._missing[site]:
                self._complete(site)
        self._was_read(group)

    def _was_read(self, group: int) -> None:
        left = self._unread[group] - 1
        self._unread[group] = left
        if not left:
            self._inputs.pop(group, None)
            self._usual.pop(group, None)
            self._few.pop(group, None)

    def _as_it_lies(self, group: int, a: Tensor, d: Tensor) -> tuple[Tensor, Packing] | None:
        """A group's input, a row a token, and where its examples lie; None where it is no such input."""
        if a.dim() != 3 or a.shape[:2] != self._grid or a.device != d.device:
            return None
        found = a.detach().flatten(0, 1), self._layout.packing(a.shape[1], 1, a.device)
        self._usual[group] = found
        return found

    def _of_reached(self, group: int, stream: Factors) -> Factors:
        """The stream without the rows that no gradient reached, where these are most."""
        rows = reached_rows(stream.d)
        if rows is None:
            return stream
        few = self._few.get(group)
        if few is None or few.of is not stream.a or not torch.equal(few.rows, rows):
            ends = np.cumsum(stream.packing.lengths)
            owners = np.searchsorted(ends, rows.numpy(), side="right")
            lengths = np.bincount(owners, minlength=len(ends)).astype(np.int64)
            few = _Few(stream.a, rows, stream.a[rows], Packing.of(lengths, rows.device))
            self._few[group] = few
        return Factors(few.a, stream.d[rows], few.packing, stream.transposed)

    def finish(self) -> None:
        """Pass on what is left: parameters of which some calls, or siblings, did not reach the output."""
        for site in list(self._parts):
            self._complete(site)
        for family in list(self._ready):
            self._pass_on(family)

    def _complete(self, site: Site) -> None:
        self._consume([site], [join_calls(self._parts.pop(site))])

    def _sibling(self, site: Site, stream: Stream, family: int) -> None:
        left = self._awaited[family] - 1
        self._awaited[family] = left
        if not isinstance(stream, Factors) or (not left and family not in self._ready):
            self._consume([site], [stream])
        else:
            self._ready.setdefault(family, []).append((site, stream))
        if not left and family in self._ready:
            self._pass_on(family)

    def _pass_on(self, family: int) -> None:
        # siblings that did not come to share a tensor (a dtype apart, another layout) go one by one
        together: dict[int, tuple[list[Site], list[Stream]]] = {}
        for site, stream in self._ready.pop(family):
            sites, streams = together.setdefault(id(stream.a), ([], []))
            sites.append(site)
            streams.append(stream)
        for sites, streams in together.values():
            self._consume(sites, streams)
