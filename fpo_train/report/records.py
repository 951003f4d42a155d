"""What a run leaves in its folder for others to read: names, JSONL rows, and what checkpoints say of themselves."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from fpo_train.errors import RunError

Row = dict[str, Any]
Sample = dict[str, Any]
CONFIG, ENVIRONMENT, CHECKPOINTS = "config.yaml", "environment.json", "checkpoints"
METRICS, SAMPLES, MEMORY = "metrics.jsonl", "samples.jsonl", "memory.jsonl"
WATCHED = "watched.jsonl"  # what the policy says to the same questions over time
STATE, COUNTS = "state.pt", "oracle.json"  # of a checkpoint


def tidy(value: Any) -> Any:
    """Numbers as JSON has them: tensors as numbers, NaN and infinities as None, in mappings and lists too."""
    if isinstance(value, dict):
        return {key: tidy(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(one) for one in value]
    if isinstance(value, Tensor):
        return tidy(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a JSONL file; what is no finite number becomes null."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(tidy(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())  # no checkpoint may outlive the rows before it


def read(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSONL file; a last line without its line break is left out.

    Raises:
        RunError: another line is not JSON.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):  # others may stand inside a reply
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{path} line {number} is not JSON; put the whole file back") from error
    return rows


def split_memory(row: Row) -> tuple[Row, Row]:
    """A row without, and with nothing but, the bytes by phase: those go to a file of their own.

    So `metrics.jsonl` of a run that was stopped and resumed equals an uninterrupted one's but for `seconds` and
    `peak_memory_bytes`.
    """
    apart = {key: value for key, value in row.items() if key.startswith("memory_")}
    return {key: value for key, value in row.items() if key not in apart}, {"iteration": row["iteration"], **apart}


def read_run(folder: Path) -> list[Row]:
    """The metrics of a run, the bytes by phase put back."""
    memory = {row["iteration"]: row for row in read(folder / MEMORY)}
    return [{**memory.get(row["iteration"], {}), **row} for row in read(folder / METRICS)]


def cut(path: Path, last: int) -> None:
    """Drop the rows after iteration `last`."""
    kept = [row for row in read(path) if row["iteration"] <= last]
    replacement = path.with_suffix(".tmp")
    replacement.write_text("", encoding="utf-8")
    append(replacement, kept)
    replacement.replace(path)


def counts(folder: Path) -> dict[str, int]:
    """What the newest checkpoint says of the oracle's questions; nothing without one.

    Raises:
        RunError: a damaged file.
    """
    path = folder / str(latest(folder)) / COUNTS
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged; delete it, the state beside it has the counts too") from error


def latest(folder: Path) -> int:
    """The iteration of the newest checkpoint, 0 without any."""
    return max(whole(folder), default=0)


def finished(out: Path, iterations: int) -> bool:
    """Whether the run in a folder has done that many iterations and written its report."""
    return latest(out / CHECKPOINTS) == iterations and (out / "report.html").is_file()


def whole(folder: Path) -> list[int]:
    """The iterations of the checkpoints with a state in them, rising."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and (path / STATE).is_file())
