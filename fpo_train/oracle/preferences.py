"""People as the oracle: a file of preferences, and a file of the pairs they have not seen yet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpo_train.data.rows import Row, rows_of
from fpo_train.data.turns import Talk, instructed, messages_of, reply_of, talk_of
from fpo_train.errors import RunError
from fpo_train.rollout import Readings, Said

from .base import Oracle
from .lines import Lines

FIELDS = "prompt", "chosen", "rejected"
Labelled = tuple[Talk, str, str, float]  # prompt, chosen, rejected, preference


class FileOracle(Oracle):
    """p* as people gave it for this very prompt, reply and reference.

    Texts are compared letter for letter, spaces at the ends of replies aside (a reply is decoded without them). Both
    directions are known: preferring `chosen` by p is preferring `rejected` by 1 − p; of several labels for a pair the
    mean is taken. A pair nobody has labelled is NaN, counted as `unlabelled`, and written once to a file of the same
    form, for people to go through. Two equal replies need nobody: 0.5, counted as `identical`.
    """

    may_be_silent = True

    def __init__(self, file: Path, unlabelled: Path, system: str = "") -> None:
        """`system`: put before prompts that have no system prompt of their own.

        Raises:
            RunError: the file or a row of it cannot be used.
        """
        super().__init__()
        self._pairs = read_preferences(file, system)
        self._labels: dict[tuple[Talk, str, str], list[float]] = {}
        for prompt, chosen, rejected, preference in self._pairs:
            self._labels.setdefault((prompt, chosen, rejected), []).append(preference)
            self._labels.setdefault((prompt, rejected, chosen), []).append(1 - preference)
        self._unlabelled = Lines(unlabelled)
        earlier = enumerate(self._unlabelled.read(), start=1)
        self._written = {_checked(row, f"oracle: {unlabelled} line {n}")[:3] for n, row in earlier}

    def pairs(self) -> list[Labelled]:
        """The file's rows (prompt, chosen, rejected, preference), replies stripped: what people have said so far."""
        return list(self._pairs)

    def preference(self, rollout: Said, readings: Readings, rows: Tensor, references: Tensor) -> Tensor:
        """p* of rows (n,) against `references` (n,), fp32 (n,); NaN: nobody has said."""
        answers = [self._one(rollout, *pair) for pair in zip(rows.tolist(), references.tolist(), strict=True)]
        return torch.tensor(answers, dtype=torch.float32, device=rows.device)

    def _one(self, rollout: Said, row: int, reference: int) -> float:
        key = rollout.talk(row), rollout.texts[row].strip(), rollout.texts[reference].strip()
        if labels := self._labels.get(key):
            self.counts["labelled"] += 1
            return sum(labels) / len(labels)
        if key[1] == key[2]:
            self.counts["identical"] += 1
            return 0.5
        self.counts["unlabelled"] += 1
        if key not in self._written:
            self._written.add(key)
            prompt = key[0] if isinstance(key[0], str) else messages_of(key[0])
            self._unlabelled.append(dict(zip(FIELDS, (prompt, *key[1:]), strict=True)))
        return math.nan


def read_preferences(path: Path, system: str = "") -> list[Labelled]:
    """The rows (prompt, chosen, rejected, preference) of a file (`rows_of`); `preference` is 1 where it is left out.

    `system` is put before what has no system prompt of its own; see `labelled`.

    Raises:
        RunError: no such file, nothing in it, or a row of another form; the message gives its number.
    """
    rows = [row for _, row in labelled(rows_of(path, "oracle.file"), "oracle.file", system)]
    if not rows:
        raise RunError(f"oracle.file: {path} holds no preferences")
    return rows


def labelled(rows: Iterable[Row], setting: str, system: str = "") -> Iterator[tuple[str, Labelled]]:
    """Each row as a labelled pair, behind the place where it stands.

    A prompt is a text or messages, a reply a text or messages that end with it; without a prompt, the turns before
    both replies are the prompt.

    Args:
        setting: what a complaint begins with. system: put before what has no system prompt of its own.

    Raises:
        RunError: a row of another form; the message gives its number.
    """
    for row in rows:
        prompt, chosen, rejected, preference = _checked(row.columns, f"{setting}: {row.where}")
        yield row.where, (instructed(prompt, system), chosen, rejected, preference)


def _checked(row: Any, where: str) -> Labelled:
    if not isinstance(row, Mapping) or not row:
        raise RunError(f"{where} is not an object with {', '.join(FIELDS)}")
    chosen, rejected = (reply_of(row, name, where) for name in FIELDS[1:])
    if "prompt" not in row and isinstance(row["chosen"], list):
        row = {**row, "prompt": row["chosen"][:-1]}
        if row["rejected"][:-1] != row["prompt"]:
            raise RunError(f"{where} has no prompt, and its replies stand behind different turns")
    preference = row.get("preference", 1.0)
    try:
        number = 1.0 if preference in ("", None) else float(preference)  # a table's field may be empty
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(preference, bool) or not 0 <= number <= 1:
        raise RunError(f"{where}: preference: wanted a number from 0 to 1, got {preference!r}")
    return talk_of(row, "prompt", where), chosen.strip(), rejected.strip(), number
