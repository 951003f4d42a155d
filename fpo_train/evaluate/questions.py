"""The questions of an evaluation: a set that ships with the package, TruthfulQA from the hub, or a local file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fpo_train.data.places import SHIPPED
from fpo_train.data.rows import first_line, rows_of
from fpo_train.data.turns import text_of, writable
from fpo_train.errors import RunError

TRUTHFULQA = ("truthfulqa/truthful_qa", "generation", "validation")  # dataset, its configuration, its split


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, and the kind of question it is."""

    name: str  # no other question's of the set
    text: str
    category: str  # empty where the set has none


def read_questions(name: str, limit: int = 0) -> list[Question]:
    """The questions of a set, in its order.

    Args:
        name: `truthfulqa`, a shipped set, or a file with a prompt a row (`rows_of`); a file of that name comes first.
        limit: the first so many; 0: all.

    Raises:
        RunError: nothing of that name, no questions in it, a line without a text under "prompt", an id used twice, a
            text that is not Unicode; a dataset that cannot be loaded.
    """
    path, shipped = Path(name).expanduser(), SHIPPED / f"{name}.jsonl"
    if path.is_file():
        rows = _file(path)
    elif shipped.is_file():
        rows = _file(shipped)
    elif name == "truthfulqa":
        rows = _truthfulqa()
    else:
        raise RunError(f"questions: no file {name}, and no set of that name")
    found: dict[str, Question] = {}
    for where, row in rows:
        question = _question(where, row)
        if question.name in found:
            raise RunError(f"questions: {where} repeats the id {question.name}")
        found[question.name] = question
    if not found:
        raise RunError(f"questions: {name} holds none")
    return list(islice(found.values(), limit or None))


def _file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in rows_of(path, "questions"):
        yield row.where, {"id": row.number, **row.columns}


def _truthfulqa() -> Iterator[tuple[str, dict[str, Any]]]:
    """TruthfulQA's rows; copies of the set write its columns `question` and `category`, or with a capital."""
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise RunError("questions: to load truthfulqa from the hub, install datasets, or name a JSONL file") from error
    name, configuration, split = TRUTHFULQA
    try:
        rows = load_dataset(name, configuration, split=split)
    except (OSError, ValueError) as error:  # datasets' own errors are of these kinds
        raise RunError(f"questions: {name} cannot be loaded: {first_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        columns = {column.lower(): value for column, value in row.items()}
        asked = {"id": number, "prompt": columns.get("question"), "category": columns.get("category")}
        yield f"{name} row {number}", asked


def _question(where: str, row: dict[str, Any]) -> Question:
    text, category = text_of(row, "prompt", f"questions: {where}"), row.get("category")
    question = Question(name=str(row["id"]), text=text, category="" if category is None else str(category).strip())
    for name, value in (("id", question.name), ("category", question.category)):
        writable(value, name, f"questions: {where}")
    return question
