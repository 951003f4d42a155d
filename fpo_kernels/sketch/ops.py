"""The operator torch.ops.fpo.grad_sketch: which implementation runs, and the checks that read values.

It is opaque to torch.compile, so maps are made, and the choice and the checks happen, when it runs, never while
tracing.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol, cast

import torch
from torch import Tensor

from fpo_kernels import library, ranges, streams
from fpo_kernels.sketch import checked
from fpo_kernels.sketch.spec import TensorSketch

# implementation → the module that does it, imported where it is wanted: triton must not load on a machine that
# never calls it.
_ROOMS = {"reference": "reference", "torch": "blocked", "triton": "triton", "native": "native"}
IMPLEMENTATIONS = ("auto", *_ROOMS)

_LIBRARY = torch.library.Library("fpo", "FRAGMENT")
_LIBRARY.define(
    "grad_sketch(Tensor a, Tensor[] d, Tensor offsets, int dim, int seed, str family, str[] names, str impl) -> Tensor"
)


class Room(Protocol):
    """What every implementation's module offers."""

    def grad_sketch(
        self, a: Tensor, table_a: Tensor, ds: tuple[Tensor, ...], tables_d: tuple[Tensor, ...], offsets: Tensor
    ) -> Tensor: ...


def _grad_sketch(
    a: Tensor, d: list[Tensor], offsets: Tensor, dim: int, seed: int, family: str, names: list[str], impl: str
) -> Tensor:
    # a CUDA graph cannot sync; whoever captures has called once before, with the same shapes
    if not (a.is_cuda and torch.cuda.is_current_stream_capturing()):
        streams.refuse("grad_sketch", streams.offset_flaws(offsets, len(a)), offsets=offsets)
    p = a.shape[1]
    sketches = [TensorSketch(p, x.shape[1], dim, seed, name, family) for x, name in zip(d, names, strict=True)]
    made = unchecked_sketch(a, tuple(d), offsets, sketches, impl)
    if not ranges.are_looked_at(made):
        return made

    def again(rows: Tensor) -> Tensor:
        return unchecked_sketch(a.double(), tuple(x.double() for x in d), offsets, sketches, "torch")[rows]

    moderate = ranges.are_moderate(a, *d)
    return ranges.mended("grad_sketch", made, moderate, lambda: ranges.scales(a, d, offsets), again)


def _fake(
    a: Tensor, d: list[Tensor], offsets: Tensor, dim: int, seed: int, family: str, names: list[str], impl: str
) -> Tensor:
    return a.new_empty(offsets.shape[0] - 1, dim, dtype=torch.float64 if a.dtype == torch.float64 else torch.float32)


_LIBRARY.impl("grad_sketch", _grad_sketch, "CompositeExplicitAutograd")
torch.library.register_fake("fpo::grad_sketch", _fake, lib=_LIBRARY)


def unchecked_sketch(
    a: Tensor, ds: tuple[Tensor, ...], offsets: Tensor, sketches: Sequence[TensorSketch], impl: str = "auto"
) -> Tensor:
    """`grad_sketch` for callers who made the streams themselves: (B, dim), nothing checked, no dispatcher.

    Args:
        a, ds, offsets: as `grad_sketch` takes them, the d's as a tuple. sketches: one for each of them, of one
            family, seed and dim.
    """
    table_a = sketches[0].maps(a.device)[0].table
    tables_d = tuple(sketch.maps(a.device)[1].table for sketch in sketches)
    impl = choose(a) if impl == "auto" else impl
    room = load(impl)
    checked.ensure(room, impl, a, sketches)
    # A room multiplies in the dtypes it says it does, whatever an autocast around the call would make of `@`.
    kind = a.device.type
    plain = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    with torch.no_grad(), plain:
        return room.grad_sketch(a, table_a, ds, tables_d, offsets)


def load(impl: str) -> Room:
    """The room of an implementation."""
    if impl == "triton" and not importlib.util.find_spec("triton"):
        raise RuntimeError('grad_sketch: impl="triton" cannot run: triton is not installed')
    return cast(Room, importlib.import_module(f"fpo_kernels.sketch.{_ROOMS[impl]}"))


def choose(a: Tensor) -> str:
    """What "auto" stands for: on CUDA triton for what it takes, then and elsewhere native, torch."""
    if a.is_cuda and a.dtype != torch.float64 and importlib.util.find_spec("triton"):
        return "triton"
    return "native" if library.why_not("grad_sketch", a) is None else "torch"
