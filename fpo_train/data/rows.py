"""Rows of whatever people keep data in: text files, tables, and what `datasets` saves, loads and downloads."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fpo_train.errors import RunError

from .places import FORMATS

SAVED = "state.json", "dataset_dict.json"  # by which save_to_disk's folders are known


class Row(NamedTuple):
    """A row, its number as its format counts, from 1, and what a complaint calls it."""

    number: int
    where: str
    columns: Mapping[str, Any]


def stop(error: RunError) -> None:
    """What becomes of a row that cannot be read, unless the reader is given something else."""
    raise error


def rows_of(path: Path, setting: str, split: str = "train", refuse: Callable[[RunError], None] = stop) -> Iterator[Row]:
    """The rows of a file or folder, by its name's ending: see FORMATS; any other ending is JSON lines.

    A row that is a text and no object has it under "prompt"; one that is neither has nothing.

    Args:
        setting: what a complaint begins with. split: of a saved DatasetDict. refuse: what is done about a row of a
            text file that is no JSON.

    Raises:
        RunError: the file cannot be read, is not UTF-8 or not what its ending says, or a package is absent.
    """
    if path.is_dir():
        saved = any((path / name).is_file() for name in SAVED)
        return _numbered(_saved(path, setting, split), str(path)) if saved else hub_rows(str(path), setting, split)
    read = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".txt": _lines, ".json": _json}
    return read.get(path.suffix.lower(), _json_lines)(path, setting, refuse)


def hub_rows(name: str, setting: str, split: str, subset: str = "") -> Iterator[Row]:
    """The rows of a dataset on the hub, or of a folder that holds one as the hub does.

    Raises:
        RunError: it cannot be loaded, or `datasets` is absent.
    """
    load = _package("datasets", setting, name).load_dataset
    try:
        rows = load(name, *([subset] if subset else []), split=split)
    except (OSError, ValueError) as error:  # datasets' own errors are of these kinds
        raise RunError(f"{setting}: {name}, split {split}, cannot be loaded: {first_line(error)}") from error
    return _numbered(rows, name)


def parsed(line: str, where: str) -> Any:
    """What a line of JSON says.

    Raises:
        RunError: it is not JSON, or nested or with numbers beyond all measure.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        told = error.msg if isinstance(error, json.JSONDecodeError) else str(error).split(";")[0]
        raise RunError(f"{where} is not JSON ({told})") from error


def first_line(error: Exception) -> str:
    """What an error says in its first line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _text(path: Path, setting: str, newline: str | None = None) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise RunError(f"{setting}: {path} is not UTF-8 text; read are {FORMATS}") from error
    except OSError as error:
        raise RunError(f"{setting}: {path} cannot be read: {error.strerror}") from error


def _json_lines(path: Path, setting: str, refuse: Callable[[RunError], None]) -> Iterator[Row]:
    for number, line in enumerate(_text(path, setting).split("\n"), start=1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                row = parsed(line, f"{setting}: {where}")
            except RunError as error:
                known = path.suffix.lower() in (".jsonl", ".json")
                refuse(error if known else RunError(f"{error}, as which it is read for its ending; read are {FORMATS}"))
            else:
                yield Row(number, where, _columns(row))


def _json(path: Path, setting: str, refuse: Callable[[RunError], None]) -> Iterator[Row]:
    text = _text(path, setting)
    if not text.lstrip().startswith("["):  # many a file of lines has this ending
        return _json_lines(path, setting, refuse)
    return _numbered(map(_columns, parsed(text, f"{setting}: {path}")), str(path))


def _lines(path: Path, setting: str, refuse: Callable[[RunError], None]) -> Iterator[Row]:
    for number, line in enumerate(_text(path, setting).split("\n"), start=1):
        if line.strip():
            yield Row(number, f"{path} line {number}", {"prompt": line.strip()})


def _csv(path: Path, setting: str, refuse: Callable[[RunError], None]) -> Iterator[Row]:
    between = "\t" if path.suffix.lower() == ".tsv" else ","
    table = csv.DictReader(io.StringIO(_text(path, setting, newline=""), newline=""), delimiter=between, strict=True)
    number = 0
    try:
        for number, row in enumerate(table, start=1):
            where = f"{path} row {number}"
            if None in row or None in row.values():  # the reader's key and value for what is too many or too few
                wanted = f"wanted a field for each of {', '.join(table.fieldnames or ())}"
                refuse(
                    RunError(f"{setting}: {where}, on line {table.line_num}, has too many or too few fields; {wanted}")
                )
            else:
                yield Row(number, where, row)
    except csv.Error as error:
        raise RunError(f"{setting}: {path} behind row {number} is no table: {error}") from error


def _parquet(path: Path, setting: str, refuse: Callable[[RunError], None]) -> Iterator[Row]:
    file = _package("pyarrow.parquet", setting, path).ParquetFile
    try:
        batches = file(path).iter_batches()
        yield from _numbered((row for batch in batches for row in batch.to_pylist()), str(path))
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        raise RunError(f"{setting}: {path} is no Parquet file: {first_line(error)}") from error


def _saved(path: Path, setting: str, split: str) -> Any:
    datasets = _package("datasets", setting, path)
    try:
        rows = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise RunError(f"{setting}: {path} cannot be loaded: {first_line(error)}") from error
    if isinstance(rows, dict):
        if split not in rows:
            raise RunError(f"{setting}: {path} has no split {split}; those it has: {', '.join(rows)}")
        return rows[split]
    return rows


def _numbered(rows: Any, name: str) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield Row(number, f"{name} row {number}", row)


def _columns(row: Any) -> dict[str, Any]:
    return row if isinstance(row, dict) else {"prompt": row} if isinstance(row, str) else {}


def _package(name: str, setting: str, what: Any) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = name.partition(".")[0]
        raise RunError(f"{setting}: to read {what}, install {wanted} (pip install {wanted})") from error
