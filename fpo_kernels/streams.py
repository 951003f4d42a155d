"""What packed token streams must be: the checks that operations share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_stream(a: Tensor, d: Tensor, offsets: Tensor, whose: str = "") -> None:
    """Refuses a (S, p), d (S, q), offsets (B+1,) whose shapes, dtypes or devices do not fit; reads no values."""
    if a.ndim != 2 or d.ndim != 2 or a.shape[0] != d.shape[0]:
        raise ValueError(
            f"{whose}a and d must be (S, p) and (S, q) with the same S, got {tuple(a.shape)} and {tuple(d.shape)}"
        )
    if a.dtype not in DTYPES:
        raise TypeError(f"{whose}a must be float32, float64, bfloat16 or float16, got {a.dtype}")
    if d.dtype != a.dtype:
        raise TypeError(f"{whose}d must have the dtype of a, {a.dtype}, got {d.dtype}")
    if d.device != a.device or offsets.device != a.device:
        raise ValueError(
            f"{whose}d and offsets must be on the device of a, {a.device}, got {d.device} and {offsets.device}"
        )
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{whose}offsets must be (B+1,), got {tuple(offsets.shape)}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{whose}offsets must be int32 or int64, got {offsets.dtype}")


def offset_flaws(offsets: Tensor, rows: int, name: str = "offsets") -> dict[str, Tensor]:
    """What offsets that do not cut a stream of `rows` rows would break: sentence → () bool, not read yet."""
    return {
        f"{name} must start at 0": offsets[0] != 0,
        f"{name} must not fall": (offsets.diff() < 0).any(),
        f"{name} must end at the number of rows, {rows}": offsets[-1] != rows,
    }


def refuse(operation: str, flaws: Mapping[str, Tensor], **given: Tensor) -> None:
    """ValueError with the first flaw that is there; all are read together, with one synchronisation on CUDA."""
    found = torch.stack(list(flaws.values())).tolist()
    for flaw, bad in zip(flaws, found, strict=True):
        if bad:
            got = ", ".join(f"{name} {brief(values)}" for name, values in given.items())
            raise ValueError(f"{operation}: {flaw}; got {got}")


def brief(x: Tensor) -> str:
    """At most eight values."""
    values = str(x.flatten()[:8].tolist())
    return values if x.numel() <= 8 else values[:-1] + ", …]"


class Extents:
    """Where each example's rows lie in a stream, and which of them count: on the host, and on a device when wanted.

    Attributes:
        host: (B, 4) int64: first row, how many rows, the first of these that counts, how many count.
        key: its bytes.
        differs: the device's own differ from call to call, and the host says how much room there is.
        lying: the device's own, once asked for.
        lists: what operations make of them, once.
    """

    def __init__(self, host: NDArray[np.int64], differs: bool = False) -> None:
        self.host = host
        self.key = host.tobytes()
        self.differs = differs
        self.lying: Tensor | None = None
        self.lists: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    @staticmethod
    def packed(lengths: NDArray[np.int64]) -> Extents:
        """Of examples that lie one after another, every row of which counts."""
        lengths = lengths.astype(np.int64)
        begin = lengths.cumsum() - lengths
        return Extents(np.stack([begin, lengths, np.zeros_like(lengths), lengths], 1))

    def on(self, device: torch.device) -> Tensor:
        """The device's own, made of the host's when first asked for."""
        if self.lying is None:
            self.lying = sent(self.host, device)
        return self.lying


# Tables begin at multiples of so many bytes, as allocations do.
_APART = 256


class Tables:
    """What a recording reads beside its inputs, in memory that was there before it.

    What is allocated while a CUDA graph is captured may lie where an earlier kernel of the graph writes, and every
    replay writes there again; a table that is filled once would be lost. Copies from the host are left out of the
    graph: they are noted, and made by `fill` when it is whole.
    """

    def __init__(self, room: dict[torch.device, int]) -> None:
        """`room`: the bytes that `counted_tables` found."""
        self._free = {device: torch.empty(size, dtype=torch.uint8, device=device) for device, size in room.items()}
        self._noted: list[tuple[Tensor, NDArray[Any]]] = []

    def take(self, size: int, device: torch.device) -> Tensor:
        """(size,) bytes; RuntimeError if the work makes other tables than when they were counted."""
        room = self._free.get(device)
        if room is None or len(room) < size:
            raise RuntimeError("a pass that is recorded makes other tables than the one before it")
        self._free[device] = room[_whole(size) :]
        return room[:size]

    def note(self, held: Tensor, values: NDArray[Any]) -> None:
        """`held` is to have these values."""
        self._noted.append((held, values))

    def fill(self) -> None:
        """Make the copies that were noted."""
        for held, values in self._noted:
            fill(held, values)
        self._noted.clear()


# Host memory that graphs which others capture copy from in every replay: a few KiB a capture, kept for good.
_READ_BY_GRAPHS: list[Tensor] = []

_counted: dict[torch.device, int] | None = None
_tables: Tables | None = None


@contextmanager
def counted_tables() -> Iterator[dict[torch.device, int]]:
    """The bytes that tables made within take on each device."""
    global _counted
    before, _counted = _counted, {}
    try:
        yield _counted
    finally:
        _counted = before


@contextmanager
def tables_apart(room: dict[torch.device, int]) -> Iterator[Tables]:
    """Within, tables are made in `room` bytes that are allocated first, and filled by whoever records."""
    global _tables
    before, _tables = _tables, Tables(room)
    try:
        yield _tables
    finally:
        _tables = before


def table(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room on a device for a small host array, which `fill` brings."""
    size = math.prod(shape) * dtype.itemsize
    if _counted is not None:
        _counted[device] = _counted.get(device, 0) + _whole(size)
    if _tables is not None:
        return _tables.take(size, device).view(dtype).view(*shape)
    return torch.empty(*shape, dtype=dtype, device=device)


def sent(values: NDArray[Any], device: torch.device) -> Tensor:
    """A small host array on a device."""
    host = torch.from_numpy(values)
    return fill(table(host.shape, host.dtype, device), values)


def fill(held: Tensor, values: NDArray[Any]) -> Tensor:
    """`held` with the values of a host array, copied without waiting for the device: from pinned memory."""
    if _tables is not None:
        _tables.note(held, values)
        return held
    host = torch.from_numpy(values)
    if held.is_cuda:
        host = host.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            _READ_BY_GRAPHS.append(host)
    return held.copy_(host, non_blocking=True)


def _whole(size: int) -> int:
    return -(-size // _APART) * _APART
