"""The operator torch.ops.fpo.grad_products: which implementation runs, and the checks that read values.

It is opaque to torch.compile, so the choice and the checks happen when it runs, never while tracing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from contextlib import nullcontext
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpo_kernels import library, ranges
from fpo_kernels.cost import Work, choose_way
from fpo_kernels.products import checked

Other = tuple[Tensor, tuple[Tensor, ...], Tensor]

IMPLEMENTATIONS = ("auto", "reference", "torch", "triton", "native")
WAYS = ("auto", "tokens", "form")
# (implementation, way) → the module that does it, imported where it is wanted: triton must not load on a machine
# that never calls it.
_ROOMS = {
    ("reference", "form"): "reference",
    ("torch", "tokens"): "blocked",
    ("torch", "form"): "formed",
    ("triton", "tokens"): "triton",
    ("triton", "form"): "triton_formed",
    ("native", "tokens"): "native",
}

# FRAGMENT: the other operations add themselves to the same namespace. Unlike torch.library.custom_op this
# imports no part of the compiler.
_LIBRARY = torch.library.Library("fpo", "FRAGMENT")
# d2 is empty where there is no other stream.
_LIBRARY.define(
    "grad_products(Tensor a, Tensor[] d, Tensor offsets, Tensor pairs,"
    " Tensor? a2, Tensor[] d2, Tensor? offsets2, str impl, str way) -> Tensor"
)


class Room(Protocol):
    """What every implementation's module offers."""

    def grad_products(
        self, a: Tensor, ds: tuple[Tensor, ...], offsets: Tensor, pairs: Tensor, other: Other | None, longest: int
    ) -> Tensor: ...


def _grad_products(
    a: Tensor,
    d: list[Tensor],
    offsets: Tensor,
    pairs: Tensor,
    a2: Tensor | None,
    d2: list[Tensor],
    offsets2: Tensor | None,
    impl: str,
    way: str,
) -> Tensor:
    other = None if a2 is None or offsets2 is None else (a2, tuple(d2), offsets2)
    work = None
    # A CUDA graph cannot sync; whoever captures has called once before, with the same shapes.
    if not (pairs.is_cuda and torch.cuda.is_current_stream_capturing()):
        work = _check_values(a, offsets, other, pairs)
    made = run(a, tuple(d), offsets, pairs, other, work, impl, way)
    return _in_range(made, a, tuple(d), offsets, pairs, other) if ranges.are_looked_at(made) else made


def _in_range(
    made: Tensor, a: Tensor, d: tuple[Tensor, ...], offsets: Tensor, pairs: Tensor, other: Other | None
) -> Tensor:
    a2, d2, offsets2 = other or (a, d, offsets)

    def scale() -> Tensor:
        own = ranges.scales(a, d, offsets)
        return own[pairs[:, 0]] * (own if other is None else ranges.scales(a2, d2, offsets2))[pairs[:, 1]]

    def again(rows: Tensor) -> Tensor:
        wide = None if other is None else (a2.double(), tuple(x.double() for x in d2), offsets2)
        return run(a.double(), tuple(x.double() for x in d), offsets, pairs[rows], wide, None, "torch", "form")

    return ranges.mended("grad_products", made, ranges.are_moderate(a, *d, a2, *d2), scale, again)


def _fake(
    a: Tensor,
    d: list[Tensor],
    offsets: Tensor,
    pairs: Tensor,
    a2: Tensor | None,
    d2: list[Tensor],
    offsets2: Tensor | None,
    impl: str,
    way: str,
) -> Tensor:
    return a.new_empty(pairs.shape[0], dtype=torch.float64 if a.dtype == torch.float64 else torch.float32)


_LIBRARY.impl("grad_products", _grad_products, "CompositeExplicitAutograd")
torch.library.register_fake("fpo::grad_products", _fake, lib=_LIBRARY)


def run(
    a: Tensor,
    ds: tuple[Tensor, ...],
    offsets: Tensor,
    pairs: Tensor,
    other: Other | None,
    work: Work | None,
    impl: str,
    way: str,
) -> Tensor:
    """Chooses the room and calls it without autograd and autocast; `work` None: nothing is known of the lengths."""
    impl, way = choose(a, [d.shape[1] for d in ds], work, impl, way)
    room = load(impl, way)
    longest = len(a) if work is None else work.longest
    checked.ensure(room, impl, way, a, ds, longest)
    kind = a.device.type
    # A room multiplies in the dtypes it says it does, whatever an autocast around the call would make of `@`.
    plain = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    with torch.no_grad(), plain:
        return room.grad_products(a, ds, offsets, pairs, other, longest)


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed; it is not loaded for that."""
    return importlib.util.find_spec("triton") is not None


def load(impl: str, way: str) -> Room:
    """The room of an implementation and way."""
    if impl == "triton" and not has_triton():
        raise RuntimeError('grad_products: impl="triton" cannot run: triton is not installed')
    if (impl, way) not in _ROOMS:
        can = ", ".join(repr(w) for i, w in _ROOMS if i == impl)
        raise RuntimeError(f"grad_products: impl={impl!r} cannot run way={way!r}: it has {can} only")
    return cast(Room, importlib.import_module(f"fpo_kernels.products.{_ROOMS[impl, way]}"))


def choose(a: Tensor, qs: list[int], work: Work | None, impl: str, way: str) -> tuple[str, str]:
    """What "auto" stands for: the implementation by device, the way by the cost model.

    With nothing known of the lengths the way is "tokens": what it takes beyond its result depends on the number of
    pairs alone.
    """
    rooms = {w: room for w in ("tokens", "form") if (room := _room(a, impl, w))}
    if way == "auto" and len(rooms) == 2:
        if work is None:
            way = "tokens"
        else:
            way = choose_way(work, a.shape[1], tuple(qs), a.device.type, rooms["tokens"], rooms["form"])
    elif way == "auto":
        way = next(iter(rooms))
    return rooms.get(way, impl), way


def _room(a: Tensor, impl: str, way: str) -> str | None:
    """The implementation that does a way: the one named, if it has it, else the first of the device's that can."""
    if impl != "auto":
        return impl if (impl, way) in _ROOMS else None
    if a.is_cuda and a.dtype != torch.float64 and has_triton():
        return "triton"
    if way == "tokens" and library.why_not("grad_products", a) is None:
        return "native"
    # By torch, forming on a GPU is thousands of small launches planned on the host: up to a second a layer (measured
    # on an H200), where tokens took 12 ms.
    return None if a.is_cuda and way == "form" else "torch"


def _check_values(a: Tensor, offsets: Tensor, other: Other | None, pairs: Tensor) -> Work:
    """Refuses offsets that do not cut the stream and pairs that name no example; on CUDA this syncs once."""
    cut, cut2, listed = _read(offsets, None if other is None else other[2], pairs)
    for name, cut_, rows in (("offsets", cut, len(a)), ("other's offsets", cut2, len(other[0]) if other else 0)):
        if cut_ is None:
            continue
        flaw = (
            "start at 0"
            if cut_[0] != 0
            else "not fall"
            if (cut_[1:] < cut_[:-1]).any()
            else f"end at the number of rows, {rows}"
            if cut_[-1] != rows
            else ""
        )
        if flaw:
            raise ValueError(f"grad_products: {name} must {flaw}; got {_brief(cut_)}")
    examples, examples2 = len(cut) - 1, len(cut if cut2 is None else cut2) - 1
    if len(listed) and (listed.min() < 0 or (listed.max(0) >= (examples, examples2)).any()):
        raise ValueError(
            f"grad_products: pairs name an example that is not there; got {_brief(listed.ravel())}, with "
            f"{examples} examples on the left and {examples2} on the right"
        )
    return Work.of(np.diff(cut), listed, None if cut2 is None else np.diff(cut2))


def _read(
    offsets: Tensor, offsets2: Tensor | None, pairs: Tensor
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None, NDArray[np.int64]]:
    """All three on the host, from a device in one copy."""
    given = [offsets, pairs] if offsets2 is None else [offsets, pairs, offsets2]
    if pairs.device.type == "cpu":
        first, listed, *second = (x.numpy() for x in given)
    else:
        joined = torch.cat([x.flatten().long() for x in given]).cpu()
        first, listed, *second = (x.numpy() for x in joined.split([x.numel() for x in given]))
    return first, second[0] if second else None, listed.reshape(-1, 2)


def _brief(values: NDArray[np.int64]) -> str:
    shown = str(values[:8].tolist())
    return shown if len(values) <= 8 else shown[:-1] + ", …]"
