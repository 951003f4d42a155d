"""`SketchStore`: sketches on disk with the ids of their examples, appended safely, searched in bounded memory."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from . import durable

FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# `top` reads this many fp32 numbers at a time, 16 MiB: enough for a matrix product at full speed, and no more than
# the caches and their surroundings like. Queries meet a block in parts, so that few rows of it are sorted in each.
BLOCK_NUMBERS = 1 << 22
QUERIES = 256


@dataclass(frozen=True, kw_only=True)
class SketchSpace:
    """What sketches have to share for their inner products to mean something.

    Attributes:
        dim: numbers a sketch. seed: of its maps.
        layers: the canonical names of the parameters that it covers, kept sorted.
        model: `fk.fingerprint` of the model.
        maps: version of the way from a seed to bucket maps.

    Raises:
        ValueError, TypeError: a field that is none of that.
    """

    dim: int
    seed: int
    layers: tuple[str, ...]
    model: str
    maps: int = 1

    def __post_init__(self) -> None:
        for name in ("dim", "seed", "maps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: wanted an integer, got {value!r}")
        if self.dim < 1:
            raise ValueError(f"dim: wanted at least 1, got {self.dim}")
        if isinstance(self.layers, str) or not all(isinstance(layer, str) for layer in self.layers):
            raise TypeError(f"layers: wanted parameter names, got {self.layers!r}")
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers: wanted at least one name and none twice, got {self.layers!r}")
        if not isinstance(self.model, str):
            raise TypeError(f"model: wanted a fingerprint, got {self.model!r}")
        object.__setattr__(self, "layers", tuple(sorted(self.layers)))  # a sum has no order


class Top(NamedTuple):
    """For each of m queries the best `count` rows, best first.

    scores (m, count): inner products, fp32 or float64. ids: m lists of ids. rows (m, count) int64.
    """

    scores: Tensor
    ids: list[list[str | int]]
    rows: Tensor


class SketchStore:
    """Sketches of one space in a folder, each with the id of its example.

    Rows are numbered in the order of their appends. An id may come again — an example met twice, or at another
    checkpoint, has two rows. `len`, reading and searching see the rows that were there when the store was opened or
    last refreshed, and whatever this object appended since.

    Args:
        folder: a store, or with `space` given a place for a new one: not there yet, or empty.
        space: where the sketches live; None takes what is there.
        dtype: the numbers on the disk, torch.float32 (also when None), float16 or bfloat16; None takes what is there.

    Safety: an append is kept whole or dropped whole, wherever its process is killed; when `append` has returned it
    also outlives a failure of the power, as far as the disk keeps what fdatasync was told it keeps. Reading needs
    no lock and no right to write, and sees finished appends only. There is one writer at a time, by a file lock that
    ends with its process.

    Raises:
        FileNotFoundError: nothing is there and `space` is None.
        ValueError: the folder holds something else, a store of another space or dtype (the field is named, with what
            was given and what is there), or a damaged one. Nothing is changed then.

    Appending, and opening what another process just makes, needs a POSIX system.
    """

    def __init__(
        self, folder: str | os.PathLike[str], space: SketchSpace | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        self.folder = Path(folder)
        if dtype is not None and dtype not in DTYPES.values():
            raise ValueError(f"dtype: wanted one of {', '.join(map(str, DTYPES.values()))}, got {dtype}")
        if not (self.folder / durable.HEADER).exists():
            if space is None and self.folder.exists():
                raise ValueError(
                    f"{self.folder} is no store: there is no {durable.HEADER} in it; give space to make one"
                )
            if space is None:
                raise FileNotFoundError(f"{self.folder} is not there; give space to make a store")
            durable.create(self.folder, _header(space, dtype or torch.float32))
        self.space, self.dtype = _parse(self.folder)
        if space is not None:
            self._refuse_other(space)
        if dtype not in (None, self.dtype):
            raise ValueError(f"dtype: {dtype} was given, {self.folder} has {self.dtype}")
        self._row_bytes = self.space.dim * self.dtype.itemsize
        self._writer: durable.Writer | None = None
        self._turn = threading.Lock()
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return SketchStore, (self.folder,)  # another process opens files of its own

    def __repr__(self) -> str:
        return f"SketchStore({str(self.folder)!r}, {len(self)} sketches of {self.space.dim} {self.dtype})"

    def __len__(self) -> int:
        return len(self._ids)

    def __enter__(self) -> SketchStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another writer in. Reading goes on; the next append makes this the writer again."""
        with self._turn:
            self._leave()

    def _leave(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def refresh(self) -> int:
        """See what was appended since, here or elsewhere; the number of rows. Raises ValueError for a damaged store."""
        self._see(durable.committed(self.folder, self._row_bytes))
        return len(self)

    def _see(self, log: np.ndarray) -> None:
        self._log, self._ids = log, durable.Ids(self.folder, log)

    @property
    def ids(self) -> Sequence[str | int]:
        """The rows' ids, read from the disk when asked for: by row, slice, or one after the other."""
        return self._ids

    def append(self, sketches: Tensor, ids: Sequence[str | int], space: SketchSpace | None = None) -> None:
        """Add n rows at the end, whole or not at all.

        Each call waits for the disk three times: append some hundred rows at once where there are many.

        Args:
            sketches: (n, dim), floating point, any device; rounded to the store's dtype.
            ids: n texts or integers, kept as what they are.
            space: where the sketches live, to be compared with the store's.

        Raises:
            ValueError: another space, a shape or a number of ids that does not fit, an id that is neither text nor
                integer, or a sketch that is not finite in the store's dtype (its id is named). Nothing is written.
            RuntimeError: another writer has the store. Nothing is written.
            OSError: the disk is full or broken. The rows were not added.

        Any other interruption leaves the rows whole or not there; `refresh` says which.
        """
        if space is not None:
            self._refuse_other(space)
        if sketches.dim() != 2 or sketches.shape[1] != self.space.dim or not sketches.is_floating_point():
            raise ValueError(
                f"sketches: wanted floating point (n, {self.space.dim}), got {sketches.dtype} {tuple(sketches.shape)}"
            )
        if isinstance(ids, str) or len(ids) != len(sketches):
            raise ValueError(
                f"ids: wanted {len(sketches)}, one a sketch, got {ids if isinstance(ids, str) else len(ids)}"
            )
        names = durable.encode_ids(ids)
        rows = sketches.detach().to("cpu", self.dtype).contiguous()
        finite = rows.abs().amax(1).isfinite()  # NaN goes through amax; isfinite on everything takes 18 times as long
        if not finite.all():
            bad = int(finite.logical_not().nonzero()[0])
            raise ValueError(f"sketches[{bad}], of {ids[bad]!r}: not finite in {self.dtype}")
        if not names:
            return
        with self._turn:
            try:
                if self._writer is None or not self._writer.close.alive:  # closed in a forked child
                    self._writer = durable.Writer(self.folder, self._row_bytes)
                self._writer.append(_bytes_of(rows), names)
            except BaseException:
                self._leave()  # the next append begins with what the disk has
                raise
            self._see(self._writer.log)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start to stop as a slice takes them, (n, dim) in the store's dtype; memory for these alone."""
        first, last, _ = slice(start, stop).indices(len(self))
        found = torch.empty(max(0, last - first), self.space.dim, dtype=self.dtype)
        self._fill(found, first)
        return found

    def _fill(self, found: Tensor, first: int) -> None:
        if len(found):
            with open(self.folder / durable.ROWS, "rb", buffering=0) as file:
                durable.fill(file, first * self._row_bytes, _bytes_of(found))

    @overload
    def __getitem__(self, rows: int) -> Tensor: ...
    @overload
    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Tensor: ...
    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Tensor:
        """Copies of rows in the store's dtype, through a memory map that is dropped at once.

        (dim,) for an integer; (n, dim) for a slice, or for n integers in any order, from the end where negative.
        Raises IndexError for what is not there, TypeError for what is no integer.
        """
        index: Any = rows
        if not isinstance(rows, (int, slice)):
            index = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
            if index.size == 0:
                index = index.astype(np.int64)
            if index.ndim != 1 or index.dtype.kind not in "iu":
                raise TypeError(f"rows: wanted an integer, a slice or a list of integers, got {rows!r}")
        words, shape = np.dtype(f"i{self.dtype.itemsize}"), (len(self), self.space.dim)  # numpy has no bfloat16
        kept = np.memmap(self.folder / durable.ROWS, words, "r", shape=shape) if len(self) else np.empty(shape, words)
        return torch.from_numpy(np.array(kept[index], order="C")).view(self.dtype)

    def top(self, queries: Tensor, count: int = 10, largest: bool = True) -> Top:
        """⟨query, row⟩ over all rows, the `count` largest (or smallest) of each query.

        One pass through the file in blocks of at most 16 MiB as fp32: resident memory does not grow with the store.
        Products and sums are fp32, or float64 where the queries are, on the queries' device. Of equal scores the
        earlier row comes first.

        Args:
            queries: (m, dim) of the store's space, floating point, finite.
            count: rows wanted; a store of fewer gives all of them.
            largest: False for the most negative.

        Raises:
            ValueError: queries of another width, not floating point or not finite; a count below 1.
        """
        if queries.dim() != 2 or queries.shape[1] != self.space.dim or not queries.is_floating_point():
            raise ValueError(
                f"queries: wanted floating point (m, {self.space.dim}), got {queries.dtype} {tuple(queries.shape)}"
            )
        if count < 1:
            raise ValueError(f"count: wanted at least 1, got {count}")
        if not queries.isfinite().all():
            raise ValueError("queries: not finite")
        exact = torch.float64 if queries.dtype == torch.float64 else torch.float32
        sign = 1 if largest else -1
        parts = [_Best(part, count) for part in (queries.detach().to(exact) * sign).split(QUERIES)]
        size = max(1, BLOCK_NUMBERS // self.space.dim)
        buffer = torch.empty(min(size, len(self)), self.space.dim, dtype=self.dtype)
        for first in range(0, len(self), size):
            found = buffer[: len(self) - first]
            self._fill(found, first)
            block = found.to(queries.device, exact)
            for part in parts:
                part.meet(block, first)
        scores = torch.cat([part.scores for part in parts]) * sign
        rows = torch.cat([part.rows for part in parts])
        flat = iter(self._ids.at(rows.flatten().tolist()))
        return Top(scores, [[next(flat) for _ in range(rows.shape[1])] for _ in range(len(rows))], rows)

    def verify(self) -> None:
        """Read every row and id and compare them with the checksums of their appends (CRC-32).

        Raises:
            ValueError: naming the rows of the first append that is not what was written.
        """
        durable.check(self.folder, self._log, self._row_bytes)

    def _refuse_other(self, space: SketchSpace) -> None:
        for field in dataclasses.fields(space):
            given, wanted = getattr(space, field.name), getattr(self.space, field.name)
            if given != wanted:
                raise ValueError(_difference(f"space.{field.name}", given, wanted, self.folder))


class _Best:
    """The best rows so far of some queries; of equal scores the earlier."""

    def __init__(self, queries: Tensor, count: int) -> None:
        self.queries, self.count = queries, count
        self.scores = queries.new_empty(len(queries), 0)
        self.rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)

    def meet(self, block: Tensor, first: int) -> None:
        scores = self.queries @ block.T
        rows = torch.arange(first, first + len(block), device=block.device)
        if self.scores.shape[1] == self.count:  # sort only the few that may enter: later rows lose a tie
            entering = (scores > self.scores[:, -1:]).any(0).nonzero()[:, 0]
            scores, rows = scores[:, entering], rows[entering]
        merged = torch.cat([self.scores, scores], 1)
        numbers = torch.cat([self.rows, rows.expand(len(self.rows), -1)], 1)
        order = merged.sort(dim=1, descending=True, stable=True).indices[:, : self.count]
        self.scores, self.rows = merged.gather(1, order), numbers.gather(1, order)


def _bytes_of(rows: Tensor) -> memoryview:
    return rows.flatten().view(torch.uint8).numpy().data


def _header(space: SketchSpace, dtype: torch.dtype) -> dict[str, Any]:
    return {"format": FORMAT, "dtype": str(dtype).removeprefix("torch."), "space": dataclasses.asdict(space)}


def _parse(folder: Path) -> tuple[SketchSpace, torch.dtype]:
    header = durable.read_header(folder)
    if header.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {header.get('format')!r}, this version of fpo_kernels reads {FORMAT}")
    try:
        return SketchSpace(**header["space"]), DTYPES[header["dtype"]]
    except (KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"{folder / durable.HEADER} is no store's: {type(problem).__name__}: {problem}") from None


def _difference(name: str, given: Any, wanted: Any, folder: Path) -> str:
    """Of two long lists of layers, only what one of them has."""
    if not isinstance(given, tuple):
        return f"{name}: {given!r} was given, the store in {folder} has {wanted!r}"
    told = []
    for some, others, whose in ((given, wanted, "given"), (wanted, given, "the store's")):
        only = [layer for layer in some if layer not in set(others)]
        if only:
            told.append(f"{only[0]!r}{f' and {len(only) - 1} more' if only[1:] else ''} only among {whose}")
    return f"{name}: {len(given)} were given, the store in {folder} has {len(wanted)}: {', '.join(told)}"
