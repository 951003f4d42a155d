"""People as the oracle: a file of preferences, and a file of the pairs they have not seen yet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpo_train.data.prompts import parsed, text_of
from fpo_train.errors import RunError
from fpo_train.rollout import Readings, Rollout

from .base import Oracle, owner
from .lines import Lines

FIELDS = "prompt", "chosen", "rejected"
Labelled = tuple[str, str, str, float]  # prompt, chosen, rejected, preference


class FileOracle(Oracle):
    """p* as people gave it for this very prompt, reply and reference.

    Texts are compared letter for letter, spaces at the ends of replies aside (a reply is decoded without them). Both
    directions are known: preferring `chosen` by p is preferring `rejected` by 1 − p; of several labels for a pair the
    mean is taken. A pair nobody has labelled is NaN, counted as `unlabelled`, and written once to a file of the same
    form, for people to go through. Two equal replies need nobody: 0.5, counted as `identical`.
    """

    may_be_silent = True

    def __init__(self, file: Path, unlabelled: Path) -> None:
        """Raises: RunError: the file or a line of it cannot be used."""
        super().__init__()
        self._pairs = read_preferences(file)
        self._labels: dict[tuple[str, str, str], list[float]] = {}
        for prompt, chosen, rejected, preference in self._pairs:
            self._labels.setdefault((prompt, chosen, rejected), []).append(preference)
            self._labels.setdefault((prompt, rejected, chosen), []).append(1 - preference)
        self._unlabelled = Lines(unlabelled)
        earlier = enumerate(self._unlabelled.read(), start=1)
        self._written = {_checked(row, f"oracle: {unlabelled} line {n}")[:3] for n, row in earlier}

    def pairs(self) -> list[Labelled]:
        """The file's rows (prompt, chosen, rejected, preference), replies stripped: what people have said so far."""
        return list(self._pairs)

    def preference(self, rollout: Rollout, readings: Readings, rows: Tensor, references: Tensor) -> Tensor:
        """p* of rows (n,) against `references` (n,), fp32 (n,); NaN: nobody has said."""
        answers = [self._one(rollout, *pair) for pair in zip(rows.tolist(), references.tolist(), strict=True)]
        return torch.tensor(answers, dtype=torch.float32, device=rows.device)

    def _one(self, rollout: Rollout, row: int, reference: int) -> float:
        key = rollout.prompts[owner(rollout, row)].text, rollout.texts[row].strip(), rollout.texts[reference].strip()
        if labels := self._labels.get(key):
            self.counts["labelled"] += 1
            return sum(labels) / len(labels)
        if key[1] == key[2]:
            self.counts["identical"] += 1
            return 0.5
        self.counts["unlabelled"] += 1
        if key not in self._written:
            self._written.add(key)
            self._unlabelled.append(dict(zip(FIELDS, key, strict=True)))
        return math.nan


def read_preferences(path: Path) -> list[Labelled]:
    """The rows (prompt, chosen, rejected, preference) of a JSONL file; `preference` is 1 where it is left out.

    Raises:
        RunError: no such file, nothing in it, or a line of another form; the message gives the line's number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise RunError(f"oracle.file: {path} is not UTF-8 text") from error
    except OSError as error:
        raise RunError(f"oracle.file: {path} cannot be read: {error.strerror}") from error
    rows = [_row(line, f"oracle.file: {path} line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise RunError(f"oracle.file: {path} holds no preferences")
    return rows


def _row(line: str, where: str) -> Labelled:
    return _checked(parsed(line, where), where)


def _checked(row: Any, where: str) -> Labelled:
    if not isinstance(row, dict):
        raise RunError(f"{where} is not an object with {', '.join(FIELDS)}")
    prompt, chosen, rejected = (text_of(row, name, where, reply=name != "prompt") for name in FIELDS)
    preference = row.get("preference", 1.0)
    if isinstance(preference, bool) or not isinstance(preference, int | float) or not 0 <= preference <= 1:
        raise RunError(f"{where}: preference: wanted a number from 0 to 1, got {preference!r}")
    return prompt, chosen.strip(), rejected.strip(), float(preference)
