"""A JSONL file that only grows, by one process, and outlives a kill in the middle of a line."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from fpo_train.errors import RunError


class Lines:
    """Rows appended one by one, each on disk before the next; safe to append to from several threads."""

    def __init__(self, path: Path, setting: str = "oracle") -> None:
        """`setting`: what complaints about the file begin with."""
        self.path = path
        self._setting = setting
        self._lock = threading.Lock()
        self._mended = False

    def read(self) -> list[Any]:
        """The rows so far; a last line that a kill cut off is left out.

        Raises:
            RunError: the file cannot be read, or another line of it is not JSON.
        """
        try:
            whole, _, last = self.path.read_bytes().rpartition(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{self._setting}: {self.path} cannot be read: {error.strerror}") from error
        rows = []
        for number, line in enumerate(whole.split(b"\n"), start=1):
            if line.strip():
                row = _parsed(line)
                if row is None:
                    raise RunError(f"{self._setting}: {self.path} line {number} is not JSON")
                rows.append(row)
        if (row := _parsed(last)) is not None:  # an editor may have left the last line without its break
            rows.append(row)
        return rows

    def append(self, row: dict[str, Any]) -> None:
        """Write a row and hand it to the system at once."""
        with self._lock:
            if not self._mended:
                self._mend()
            with self.path.open("ab") as file:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def _mend(self) -> None:
        """See that the next row begins on a line of its own: close a last line that is whole, drop one that is torn."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            file.seek(0)
            whole, newline, last = file.read().rpartition(b"\n")
            if last and _parsed(last) is not None:
                file.write(b"\n")
            elif last:
                file.truncate(len(whole) + len(newline))
        self._mended = True


def _parsed(line: bytes) -> Any:
    """What the line says, or None where it is no JSON."""
    try:
        return json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        return None
