"""Checkpoints on iteration boundaries: written whole or not at all, the last few kept.

A checkpoint is a folder with a state in it. The state is put there by renaming a file that is on the disk already, and
only then, the folder on the disk too, older ones are removed: neither a kill nor a power cut loses the newest whole
one, with `checkpoint_keep` 1 as well. A folder without a state is what a kill has left, and goes with the next save.

The randomness of an iteration follows from the seed and its number (`sampling`, `loop.seed_stream`), and so do its
prompts: a checkpoint holds neither random state nor place in the data. The policy's adapter, the reward model with its
earlier states, both optimizers and schedules, the labelled pairs, γ's running scale, the oracle's counts and how often
rows were halved for want of memory (sums are rounded by rows at once) are all there is.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fpo_train.errors import RunError
from fpo_train.report.records import COUNTS, STATE, whole
from fpo_train.whole import read_state, sync_folder, write_state

if TYPE_CHECKING:
    from fpo_train.loop import Parts


def state_of(parts: Parts) -> dict[str, Any]:
    """Everything that an iteration changes."""
    return {
        "adapter": {name: p.detach() for name, p in parts.policy.trainable.items()},
        "update": parts.update.state_dict(),
        "reward_model": parts.reward_model.state_dict(),
        "replay": parts.replay.state_dict(),
        "penalty": parts.penalty.state(),
        "oracle": parts.oracle.state_dict(),
        "memory": parts.memory.state_dict(),
    }


def restore(parts: Parts, state: dict[str, Any]) -> None:
    """Put a `state_of` back."""
    with torch.no_grad():
        for name, parameter in parts.policy.trainable.items():
            parameter.copy_(state["adapter"][name].view(parameter.shape))  # never one number for many
    parts.update.load_state_dict(state["update"])
    parts.reward_model.load_state_dict(state["reward_model"])
    parts.replay.load_state_dict(state["replay"])
    parts.penalty.restore(state["penalty"])
    if parts.processes.main:  # it holds all processes' counts: once is enough
        parts.oracle.load_state_dict(state["oracle"])
    parts.memory.load_state_dict(state["memory"])


def save(folder: Path, iteration: int, parts: Parts, keep: int) -> None:
    """Write `folder/<iteration>/`, then remove all but the last `keep`.

    Beside the state lie the oracle's counts as JSON, for people and for the report.
    """
    own = folder / str(iteration)
    own.mkdir(parents=True, exist_ok=True)
    state = state_of(parts)
    (own / COUNTS).write_text(json.dumps(state["oracle"]["counts"], sort_keys=True) + "\n", encoding="utf-8")
    write_state(own / STATE, state)
    sync_folder(folder)
    kept = {str(number) for number in whole(folder)[-keep:]}
    for path in folder.iterdir():
        if path.name.isdigit() and path.name not in kept:
            (path / STATE).unlink(missing_ok=True)  # first, so that no broken folder passes for a checkpoint
            shutil.rmtree(path)


def load(folder: Path, iteration: int, parts: Parts) -> None:
    """Bring `parts` to the state after `iteration`.

    Raises:
        RunError: a damaged file, or one that lacks what this run has.
    """
    path = folder / str(iteration) / STATE
    advice = "delete its folder to go on from the checkpoint before, or, where there is none, from the beginning"
    state = read_state(path, f"resume: {path}", advice)
    try:
        restore(parts, state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        lacks = f"lacks {error}" if isinstance(error, KeyError) else f"does not fit this run: {error}"
        raise RunError(f"resume: {path} {lacks}; {advice}") from error
