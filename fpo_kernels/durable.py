"""Rows of bytes with their ids in a folder, appended whole or not at all; the files below `store`.

    header.json   what the rows are; written once, when the folder is made
    rows.bin      the rows, one after the other
    ids.bin       for each append of n rows: where each id's text ends, (n,) uint64, then the texts
    log.bin       for each append one RECORD: how far the two files above are filled by it, and checksums
    lock          locked by the process that appends; what it holds does not matter

An append writes rows and ids behind what the log covers, has them on the disk (fdatasync), then writes its record and
has that on the disk. So a record that can be read vouches for rows that can be read, wherever the process was killed
or the power failed; what lies behind the last record is an unfinished append: readers never look there, and the
next writer cuts it off. Nothing that a record covers is ever written again. Integers are little-endian.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import struct
import time
import weakref
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

try:
    import fcntl
except ImportError:  # not POSIX: reading works
    fcntl = None  # type: ignore[assignment]

HEADER, ROWS, IDS, LOG, LOCK = "header.json", "rows.bin", "ids.bin", "log.bin", "lock"
UNFINISHED = HEADER + ".tmp"
# Rows and bytes of ids up to and with this append; CRC-32 of its rows and of its ids; its number; CRC-32 of all that.
RECORD = np.dtype(
    [("rows", "<u8"), ("ids", "<u8"), ("rows_crc", "<u4"), ("ids_crc", "<u4"), ("number", "<u4"), ("seal", "<u4")]
)
FIELDS, SEAL = struct.Struct("<QQIII"), struct.Struct("<I")
PATIENCE = 10.0  # seconds for another process to make the folder that this one was about to make

_synced: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


def create(folder: Path, header: dict[str, Any]) -> None:
    """Make the folder with its header, unless another process has just done so.

    Raises:
        ValueError: the folder holds something without being one of these, or is a file.
    """
    deadline = time.monotonic() + PATIENCE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; wanted a folder")
    _refuse_foreign(folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync_folder(path.parent)
    while not (folder / HEADER).exists():
        try:
            with contextlib.closing(_Lock(folder)):
                _refuse_foreign(folder)
                if not (folder / HEADER).exists():
                    _write_header(folder, header)
        except RuntimeError:  # whoever holds the lock is making the folder
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _refuse_foreign(folder: Path) -> None:
    """What a killed `create` leaves is not foreign: the header comes last, and until then the files are empty."""
    if not folder.exists() or (folder / HEADER).exists():
        return
    for path in sorted(folder.iterdir()):
        ours = path.name in (LOCK, UNFINISHED) or (path.name in (ROWS, IDS, LOG) and not path.stat().st_size)
        if not ours and not (folder / HEADER).exists():  # another process may make it meanwhile
            raise ValueError(f"{folder} holds {path.name!r} and no {HEADER}: it is something else than a store")


def _write_header(folder: Path, header: dict[str, Any]) -> None:
    with open(folder / UNFINISHED, "w", encoding="utf-8") as file:
        file.write(json.dumps(header, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for name in (ROWS, IDS, LOG):
        (folder / name).touch()
    _sync_folder(folder)
    os.replace(folder / UNFINISHED, folder / HEADER)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_header(folder: Path) -> dict[str, Any]:
    """Raises FileNotFoundError where there is none, ValueError where it is no JSON object."""
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{folder / HEADER} cannot be read: {problem}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{folder / HEADER} cannot be read: it is no object")
    return header


def committed(folder: Path, row_bytes: int) -> np.ndarray:
    """The finished appends, one RECORD each, memory-mapped.

    Raises:
        ValueError: the files hold less than finished appends left there, or the log's end is not its own.
    """
    with open(folder / LOG, "rb", buffering=0) as file:
        count = os.fstat(file.fileno()).st_size // RECORD.itemsize
        # Read, not mapped: a writer may be cutting an unfinished record off, and what is cut must not be touched.
        first = max(0, count - 2)
        file.seek(first * RECORD.itemsize)
        tail = file.read(2 * RECORD.itemsize)
    sealed = [
        _is_sealed(tail[at : at + RECORD.itemsize], first + number)
        for number, at in enumerate(range(0, len(tail) - RECORD.itemsize + 1, RECORD.itemsize))
    ]
    finished = first + len(sealed)
    if sealed and not sealed[-1]:
        finished -= 1
        if len(sealed) == 2 and not sealed[0]:
            raise ValueError(f"{folder / LOG} is damaged: its record {finished - 1} is not what was written")
    if not finished:
        return np.empty(0, RECORD)
    log = np.memmap(folder / LOG, RECORD, "r", shape=(finished,))
    for name, least in ((ROWS, int(log[-1]["rows"]) * row_bytes), (IDS, int(log[-1]["ids"]))):
        found = (folder / name).stat().st_size
        if found < least:
            raise ValueError(f"{folder / name} is damaged: it has {found} bytes of the {least} that were written")
    return log


def _seal(fields: bytes) -> bytes:
    return SEAL.pack(zlib.crc32(fields))


def _is_sealed(record: bytes, number: int) -> bool:
    fields, seal = record[: FIELDS.size], record[FIELDS.size :]
    return seal == _seal(fields) and FIELDS.unpack(fields)[-1] == number & 0xFFFFFFFF


def fill(file: BinaryIO, start: int, into: memoryview) -> None:
    """Read as many bytes as `into` has, from byte `start` of an unbuffered file. Raises ValueError past its end."""
    file.seek(start)
    done = 0
    while done < len(into):  # one call reads 2 GiB at most
        got = file.readinto(into[done:])  # type: ignore[attr-defined]
        if not got:
            raise ValueError(f"{file.name} is damaged: it ends at byte {start + done}, wanted {len(into) - done} more")
        done += got


def span(log: np.ndarray, number: int, field: str) -> tuple[int, int]:
    """Where append `number` begins and ends: its rows, or its bytes of ids."""
    return int(log[number - 1][field]) if number else 0, int(log[number][field])


def check(folder: Path, log: np.ndarray, row_bytes: int, piece: int = 1 << 24) -> None:
    """Read everything that the log covers. Raises ValueError naming the first append whose bytes are not its own."""
    with open(folder / ROWS, "rb", buffering=0) as rows, open(folder / IDS, "rb", buffering=0) as ids:
        buffer = memoryview(bytearray(piece))
        for number in range(len(log)):
            sealed = _is_sealed(log[number].tobytes(), number)
            for file, field, unit in ((rows, "rows", row_bytes), (ids, "ids", 1)):
                begin, end = (at * unit for at in span(log, number, field))
                crc = 0
                for at in range(begin, end, piece):
                    part = buffer[: min(piece, end - at)]
                    fill(file, at, part)
                    crc = zlib.crc32(part, crc)
                sealed &= crc == int(log[number][f"{field}_crc"])
            if not sealed:
                first, last = span(log, number, "rows")
                raise ValueError(f"{folder} is damaged: rows {first} to {last - 1} are not what was appended")


def encode_ids(ids: Iterable[str | int]) -> list[bytes]:
    """Each id's bytes, of which text and number can be told apart. Raises ValueError for anything else."""
    return [_encode(row, name) for row, name in enumerate(ids)]


def _encode(row: int, name: Any) -> bytes:
    try:
        if isinstance(name, str):
            return b"s" + name.encode()
        if not isinstance(name, (bool, np.bool_)):
            return b"i%d" % operator.index(name)
    except (TypeError, UnicodeEncodeError):
        pass
    raise ValueError(f"ids[{row}]: wanted Unicode text or an integer, got {name!r}")


class Ids(Sequence[str | int]):
    """The ids of the rows that a log covers, read from the disk as they are asked for, an append's at a time."""

    def __init__(self, folder: Path, log: np.ndarray) -> None:
        self._path, self._log = folder / IDS, log

    def __len__(self) -> int:
        return int(self._log[-1]["rows"]) if len(self._log) else 0

    def __iter__(self) -> Iterator[str | int]:
        return self._at(range(len(self)))

    def __getitem__(self, row: Any) -> Any:
        """The id of a row, or a list of those of a slice. Raises IndexError."""
        if isinstance(row, slice):
            return list(self._at(range(len(self))[row]))
        return next(self._at([range(len(self))[row]]))

    def at(self, rows: Iterable[int]) -> list[str | int]:
        """The ids of these rows, in their order."""
        return list(self._at(rows))

    def _at(self, rows: Iterable[int]) -> Iterator[str | int]:
        ends, texts, first, last = np.empty(0, "<u8"), memoryview(b""), 0, 0
        with open(self._path, "rb", buffering=0) as file:
            for row in rows:
                if not first <= row < last:
                    number = bisect_right(self._log["rows"], row)
                    first, last = span(self._log, number, "rows")
                    begin, end = span(self._log, number, "ids")
                    block = memoryview(bytearray(end - begin))
                    fill(file, begin, block)
                    ends = np.frombuffer(block, "<u8", last - first)
                    texts = block[ends.nbytes :]
                n = row - first
                text = bytes(texts[int(ends[n - 1]) if n else 0 : int(ends[n])])
                yield text[1:].decode() if text[:1] == b"s" else int(text[1:])


class _Lock:
    """The folder's lock, this process's until closed or killed. Raises RuntimeError where another has it."""

    def __init__(self, folder: Path) -> None:
        if fcntl is None:
            raise RuntimeError("appending to a store needs POSIX file locks, which this system has not")
        self._handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise RuntimeError(f"{folder}: another writer has it, and there may be one at a time") from None

    def close(self) -> None:
        os.close(self._handle)


class Writer:
    """Appends to a folder. Made by cutting off what an earlier writer left unfinished.

    Raises:
        RuntimeError: another writer has the folder. ValueError: as `committed`.
    """

    def __init__(self, folder: Path, row_bytes: int) -> None:
        self._folder, self._row_bytes = folder, row_bytes
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(_Lock(folder)))
            self.log = committed(folder, row_bytes)
            rows, ids = (int(self.log[-1][field]) if len(self.log) else 0 for field in ("rows", "ids"))
            self._ends = {ROWS: rows * row_bytes, IDS: ids, LOG: len(self.log) * RECORD.itemsize}
            self._files: dict[str, int] = {}
            for name, end in self._ends.items():
                self._files[name] = handle = os.open(folder / name, os.O_RDWR | os.O_CLOEXEC)
                stack.callback(os.close, handle)
                if os.fstat(handle).st_size > end:
                    os.ftruncate(handle, end)
            # After the files, the lock: nothing is written once another may write.
            self.close = weakref.finalize(self, stack.pop_all().close)
        _writers.add(self)

    def append(self, rows: memoryview, ids: Sequence[bytes]) -> None:
        """Add rows (bytes) and their encoded ids; `log` covers them afterwards. After an exception: close."""
        ends = np.cumsum([len(name) for name in ids], dtype="<u8")
        block = memoryview(ends.tobytes() + b"".join(ids))
        number = len(self.log)
        record = FIELDS.pack(
            (self._ends[ROWS] + len(rows)) // self._row_bytes,
            self._ends[IDS] + len(block),
            zlib.crc32(rows),
            zlib.crc32(block),
            number & 0xFFFFFFFF,
        )
        self._write(ROWS, rows)
        self._write(IDS, block)
        _synced(self._files[ROWS])
        _synced(self._files[IDS])
        try:
            self._write(LOG, memoryview(record + _seal(record)))
            _synced(self._files[LOG])
        except OSError:  # the disk may have the record or not: leave no doubt
            with contextlib.suppress(OSError):
                os.ftruncate(self._files[LOG], number * RECORD.itemsize)
            raise
        self._ends = {ROWS: self._ends[ROWS] + len(rows), IDS: self._ends[IDS] + len(block)}
        self._ends[LOG] = (number + 1) * RECORD.itemsize
        self.log = np.memmap(self._folder / LOG, RECORD, "r", shape=(number + 1,))

    def _write(self, name: str, data: memoryview) -> None:
        done = 0
        while done < len(data):  # one call writes 2 GiB at most
            done += os.pwrite(self._files[name], data[done:], self._ends[name] + done)


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """A forked child closes its copies: its parent goes on writing, and if that is killed nobody holds the lock."""
    for writer in list(_writers):
        writer.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
