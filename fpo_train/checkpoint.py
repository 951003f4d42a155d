"""Checkpoints on iteration boundaries: written whole or not at all, the last few kept.

The randomness of an iteration follows from the seed and its number (`sampling`, `loop.seed_stream`), and so do its
prompts: a checkpoint holds neither random state nor place in the data. The policy's adapter, the reward model with its
earlier states, both optimizers and schedules, the labelled pairs, γ's running scale and the oracle's counts are all
there is.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from .errors import RunError
from .loop import Parts

STATE = "state.pt"


def state_of(parts: Parts) -> dict[str, Any]:
    """Everything that an iteration changes."""
    return {
        "adapter": {name: p.detach() for name, p in parts.policy.trainable.items()},
        "update": parts.update.state_dict(),
        "reward_model": parts.reward_model.state_dict(),
        "replay": parts.replay.state_dict(),
        "penalty": parts.penalty.state(),
        "oracle": parts.oracle.state_dict(),
    }


def restore(parts: Parts, state: dict[str, Any]) -> None:
    """Put a `state_of` back."""
    with torch.no_grad():
        for name, parameter in parts.policy.trainable.items():
            parameter.copy_(state["adapter"][name])
    parts.update.load_state_dict(state["update"])
    parts.reward_model.load_state_dict(state["reward_model"])
    parts.replay.load_state_dict(state["replay"])
    parts.penalty.restore(state["penalty"])
    parts.oracle.load_state_dict(state["oracle"])


def save(folder: Path, iteration: int, parts: Parts, keep: int) -> None:
    """Write `folder/<iteration>/`, then remove all but the last `keep`."""
    folder.mkdir(exist_ok=True)
    half = folder / f".{iteration}"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    with (half / STATE).open("wb") as file:
        torch.save(state_of(parts), file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(folder / str(iteration), ignore_errors=True)
    half.rename(folder / str(iteration))
    for old in _whole(folder)[:-keep]:
        shutil.rmtree(folder / str(old))


def latest(folder: Path) -> int:
    """The iteration of the newest checkpoint, 0 without any."""
    return max(_whole(folder), default=0)


def load(folder: Path, iteration: int, parts: Parts) -> None:
    """Bring `parts` to the state after `iteration`.

    Raises:
        RunError: a damaged file.
    """
    path = folder / str(iteration) / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise RunError(f"resume: {path} is damaged; delete its folder to go on from the checkpoint before") from error
    restore(parts, state)


def _whole(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
