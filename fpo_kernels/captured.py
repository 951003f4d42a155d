"""Passes that come again, replayed: forward, backward and products recorded once, for every batch of a width.

A model's small kernels take less time than launching them (0.66 of an eager pass of an 8B model at 9 × 64 tokens on an
H200, 0.99 at 9 × 256). Widths are rounded up, and where examples begin and end is read on the device, so that one
recording serves every batch of a bucket. Weights are read where they lie: updated in place they are seen, replaced they
make the pass be recorded anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .batches import Batch
from .compare import close
from .gather import Layout
from .gradients import Pairs
from .streams import Extents, counted_tables, fill, tables_apart

MODES = ("auto", "never")
# Recordings an engine keeps, the least recently used makes room. They share one pool of memory, so that all take about
# what the largest takes: the peak of its pass.
MOST = 8
# Wider batches hide their launches: nothing to gain, and the memory of a pass to keep.
MOST_TOKENS = 2048
# Shapes that are remembered to have come once.
REMEMBERED = 256
# What is padded to a bucket's width, and with what (None: the model's pad id).
PADDED = {"input_ids": None, "attention_mask": 0, "token_type_ids": 0}

Answer = tuple[Tensor, Tensor]  # outputs (B,), products (n,)
Ask = Callable[[Batch, Pairs, Layout], Answer]


class Recording(Protocol):
    """Work recorded on a device: what it gave, and doing it again."""

    @property
    def answer(self) -> Answer: ...

    def replay(self) -> None: ...


class Recorder(Protocol):
    """What records: CUDA graphs."""

    def serves(self, device: torch.device) -> bool: ...

    def record(self, work: Callable[[], Answer]) -> Recording: ...


class CudaGraphs:
    """CUDA graphs in one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def serves(self, device: torch.device) -> bool:
        """Whether the device is one that records."""
        return device.type == "cuda" and torch.version.hip is None

    def record(self, work: Callable[[], Answer]) -> Recording:
        """Run once apart, which compiles kernels and makes lists, then record."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside), counted_tables() as room:
            work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with (
            tables_apart(room) as tables,
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            answer = work()
        tables.fill()
        return _CudaGraph(graph, answer, tables)


class _CudaGraph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    answer: Answer
    tables: object  # kept as long as the graph reads them

    def replay(self) -> None:
        self.graph.replay()


class StaticLayout(Layout):
    """The layout of a bucket: the host knows how much room an example has, the device where it lies in it."""

    static = True

    def __init__(self, examples: int, tokens: int, left: bool) -> None:
        super().__init__({"input_ids": torch.zeros(examples, tokens, device="meta")}, whole=True)
        self.in_place = True
        self._left = left
        self._tokens = np.full(examples, tokens, dtype=np.int64)

    def _extents(self, rows: int, scale: int, dropping: bool) -> Extents:
        whole = Extents.packed(np.full(self.shape.examples, rows, dtype=np.int64))
        if not dropping:
            return whole
        return Extents(whole.host, differs=True)

    def lie(self, at: Extents) -> None:
        """Say where the examples of the next replay lie: extents in tokens."""
        for packing in self._packings.values():
            lying = packing.extents.lying
            if lying is not None:
                scale = packing.extents.host[:, 1] // self.kept[1]
                begin, rows = packing.extents.host[:, 0], packing.extents.host[:, 1]
                fill(lying, np.stack([begin, rows, at.host[:, 2] * scale, at.host[:, 3] * scale], 1))


class _Slot(NamedTuple):
    key: tuple[object, ...]
    width: int | None  # to which the batch is padded; None: as it is


class _Kept(NamedTuple):
    recording: Recording
    inputs: dict[str, Any]
    layout: StaticLayout
    weights: object

    def answer(self, batch: Batch, layout: Layout, pads: dict[str, Any]) -> Answer:
        """The answer for another batch of the bucket."""
        for name, static in self.inputs.items():
            if isinstance(static, Tensor):
                _put(static, batch[name], layout.left, pads.get(name))
        self.layout.lie(_extents_in(layout, self.layout))
        self.recording.replay()
        outputs, products = self.recording.answer
        return outputs.clone(), products.clone()


class Captures:
    """An engine's recordings.

    Attributes:
        reason: why passes are not recorded though the device could; "" where they are.
    """

    def __init__(self, mode: str, recorder: Recorder | None = None) -> None:
        self._mode, self._recorder = mode, recorder or CudaGraphs()
        self.reason = ""
        self._met: set[tuple[object, ...]] = set()
        self._kept: OrderedDict[tuple[object, ...], _Kept] = OrderedDict()
        self._padding = True  # whether a wider batch was not seen to change the model's answer

    def answer(
        self, batch: Batch, pairs: Pairs, ask: Ask, layout: Layout, weights: Callable[[], object], pad_id: int | None
    ) -> Answer:
        """(outputs, products) of `ask(batch, pairs, layout)`, replayed from the third time that a shape comes.

        Args:
            ask: runs a pass in a layout. layout: the batch's. weights: where the model's numbers lie.
        """
        slot = self._slot(batch, pairs, layout, pad_id)
        if slot is None:
            return ask(batch, pairs, layout)
        pads = {name: pad_id if value is None else value for name, value in PADDED.items()}
        kept = self._kept.get(slot.key)
        if kept is not None and kept.weights == weights():
            self._kept.move_to_end(slot.key)
            return kept.answer(batch, layout, pads)
        eager = ask(batch, pairs, layout)
        if slot.key not in self._met:
            self._met = {slot.key} if len(self._met) >= REMEMBERED else self._met | {slot.key}
            return eager
        self._kept.pop(slot.key, None)
        self._keep(slot, batch, pairs, ask, layout, weights, pads, eager)
        return eager

    def _slot(self, batch: Batch, pairs: Pairs, layout: Layout, pad_id: int | None) -> _Slot | None:
        """What the batch shares with those that one recording serves; None where it is not for recording."""
        tokens, device = layout.shape.tokens, next(v.device for v in batch.values() if isinstance(v, Tensor))
        if self._mode == "never" or self.reason or tokens is None or not self._recorder.serves(device):
            return None
        if layout.shape.examples * tokens > MOST_TOKENS or not (layout.in_place or layout.is_full):
            return None
        width = None
        if self._padding and pad_id is not None and set(batch) <= PADDED.keys() and "attention_mask" in batch:
            width = bucket(tokens)
        entries: list[tuple[object, ...]] = []
        for name in sorted(batch):
            value = batch[name]
            if isinstance(value, Tensor):
                shape = value.shape if width is None else (layout.shape.examples, width)
                entries.append((name, tuple(shape), value.dtype, value.device))
            elif value is None or isinstance(value, (bool, int, float, str)):
                entries.append((name, value))
            else:
                return None
        # a batch without padding takes another path through some models than one with it
        return _Slot((pairs.host.tobytes(), tuple(entries), layout.left, width is None and layout.is_full), width)

    def _keep(
        self,
        slot: _Slot,
        batch: Batch,
        pairs: Pairs,
        ask: Ask,
        layout: Layout,
        weights: Callable[[], object],
        pads: dict[str, Any],
        eager: Answer,
    ) -> None:
        """Record a pass; what cannot be recorded, or gives other numbers, runs eagerly from then on."""
        examples, tokens = layout.shape
        width = slot.width or tokens
        assert width is not None
        static = StaticLayout(examples, width, layout.left)
        inputs = {
            name: value.new_empty((examples, width) if slot.width else value.shape)
            if isinstance(value, Tensor)
            else value
            for name, value in batch.items()
        }
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                _put(value, batch[name], layout.left, pads.get(name))
        try:
            ask(inputs, pairs, static)  # makes the layout's extents, which lie nowhere yet
            static.lie(_extents_in(layout, static))
            recording = self._recorder.record(lambda: ask(inputs, pairs, static))
            kept = _Kept(recording, inputs, static, weights())
            answer = kept.answer(batch, layout, pads)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # whatever a model does that a graph cannot hold
            first = (str(problem).strip().splitlines() or ["no message"])[0]
            self.reason = f"not captured in a CUDA graph ({type(problem).__name__}: {first})"
            return
        if not all(close(now, before) for now, before in zip(answer, eager, strict=True)):
            if slot.width is None or slot.width == tokens:
                self.reason = "not captured in a CUDA graph (a replay gave other numbers)"
            self._padding = False  # a model whose answer depends on the width: each width is its own
            return
        self._kept[slot.key] = kept
        if len(self._kept) > MOST:
            self._kept.popitem(last=False)


def bucket(width: int) -> int:
    """The width up to which batches share a recording: four steps an octave, of 8 tokens or more."""
    step = max(8, 1 << max(0, (width - 1).bit_length() - 3))
    return -(-width // step) * step


def _put(static: Tensor, given: Tensor, left: bool, pad: Any) -> None:
    """Copy a batch's entry into a recording's, padded on the side where the batch has its padding."""
    if static.shape != given.shape:
        static.fill_(pad)
        width = given.shape[1]
        static = static[:, -width:] if left else static[:, :width]
    static.copy_(given, non_blocking=True)


def _extents_in(layout: Layout, static: StaticLayout) -> Extents:
    """Where the examples lie once the batch is as wide as the recording, in tokens."""
    examples, tokens = layout.shape
    wide = static.shape.tokens
    assert tokens is not None
    assert wide is not None
    first, counts = layout.kept
    begin = np.arange(examples, dtype=np.int64) * wide
    first = first + (wide - tokens if layout.left else 0)
    return Extents(np.stack([begin, np.full_like(begin, wide), first, counts], 1))
