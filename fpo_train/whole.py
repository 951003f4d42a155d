"""Files written whole or not at all, through a power cut too: beside their place first, on the disk, then renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch

from fpo_train.errors import RunError

State = dict[str, Any]


def write_text(path: Path, text: str) -> None:
    """A text in UTF-8."""
    _write(path, lambda file: file.write(text.encode()))


def write_state(path: Path, state: State) -> None:
    """Tensors and plain values, as `torch.save` has them."""
    _write(path, lambda file: torch.save(state, file))


def read_state(path: Path, what: str = "", advice: str = "") -> State:
    """What `write_state` wrote, on the CPU.

    Args:
        what: it is that is damaged, as the complaint begins; empty: the path. advice: what to do then.

    Raises:
        RunError: a damaged file. OSError: it cannot be opened.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError, LookupError, AttributeError, ValueError) as error:
        if isinstance(error, OSError) and error.filename:  # a seek past a cut file's end names no file
            raise
        raise RunError(f"{what or path} is damaged{f'; {advice}' if advice else f': {error}'}") from error


def sync_folder(folder: Path) -> None:
    """See that the names in a folder are on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.tmp")
    with half.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)
    sync_folder(path.parent)
