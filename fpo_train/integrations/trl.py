"""TRL: the reward model is retrained between a trainer's steps, and travels with its checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fpo_train.errors import RunError
from fpo_train.policy.adapters import POLICY
from fpo_train.whole import read_state, write_state, write_text

from .monitor import FPOMonitor
from .reward import FPOReward

WATCHED, HISTORY = "fpo_watch.json", "trainer_state.json"


class FPOCallback(TrainerCallback):
    """Retrains an FPOReward's model every so many optimizer steps, on what the trainer has generated since.

        GRPOTrainer(…, reward_funcs=reward, callbacks=[FPOCallback(reward)])

    `checkpoint-<step>/fpo.pt` holds the reward model, its optimizer, the labelled pairs and γ's running scale. A
    trainer that resumes there goes on as if it had not been interrupted, bit for bit where a new generation begins
    with the next step (TRL itself does not save completions that are not used up). When training ends, the reward
    model is written to `<output_dir>/reward_model`. (Of a reward with a name of its own, `<name>.pt` and
    `<name>_reward_model`.) Without an oracle there is nothing to train on, and the rest is kept all the same.

    transformers loads, of a PEFT model with several adapters, only those in sub-folders of a checkpoint; the trained
    one at its root is put back here.

    Args:
        reward: the one that the trainer calls. every: optimizer steps between trainings.
        resume: a checkpoint's folder to take the state from, where the trainer resumes from another place than
            `<output_dir>/checkpoint-<step>`.

    Raises:
        RunError: no FPOReward, or `every` below 1.
    """

    def __init__(self, reward: FPOReward, every: int = 1, resume: str | os.PathLike[str] | None = None) -> None:
        if not isinstance(reward, FPOReward):
            raise RunError(f"reward: wanted an FPOReward, the one that the trainer calls, got {reward!r:.80}")
        if every < 1:
            raise RunError(f"every: wanted 1 step or more, got {every}")
        self.reward, self.every = reward, every
        self._resume = None if resume is None else Path(resume)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **more: Any
    ) -> None:
        """Learn which model is trained and how, and go on from a checkpoint.

        Raises:
            RunError: the trainer resumes, and its checkpoint holds no state of a reward, or that of another one.
        """
        self.reward.watch(model, normalises(args))
        if state.global_step:
            folder = self._resume or checkpoint(args, state)
            refuse_other_run(folder, state)
            put_back(model, folder)
            self.reward.load_state_dict(state_in(folder, self.reward))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Retrain, where it is its turn."""
        if self.reward.trains and state.global_step % self.every == 0:
            self.reward.update()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Write the state beside the trainer's."""
        if state.is_world_process_zero:
            write_state(checkpoint(args, state) / f"{self.reward.__name__}.pt", self.reward.state_dict())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Write the reward model."""
        if state.is_world_process_zero:
            name = self.reward.__name__
            folder = "reward_model" if name == "fpo" else f"{name}_reward_model"
            self.reward.model.save(Path(args.output_dir or ".") / folder)


class MonitorCallback(TrainerCallback):
    """Tells an FPOMonitor which model is trained, and keeps its steps with the trainer's checkpoints.

    GRPOTrainer(…, reward_funcs=monitor, callbacks=[MonitorCallback(monitor)])
    """

    def __init__(self, monitor: FPOMonitor) -> None:
        if not isinstance(monitor, FPOMonitor):
            raise RunError(f"monitor: wanted an FPOMonitor, the one that the trainer calls, got {monitor!r:.80}")
        self.monitor = monitor

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **more: Any
    ) -> None:
        """Learn which model is trained, and go on from a checkpoint; one without a watch begins it anew."""
        self.monitor.watch(model)
        path = checkpoint(args, state) / WATCHED
        if state.global_step and path.is_file():
            self.monitor.load_state_dict({"rows": json.loads(path.read_text(encoding="utf-8"))})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Write the steps so far beside the trainer's state."""
        if state.is_world_process_zero:
            write_text(checkpoint(args, state) / WATCHED, json.dumps(self.monitor.state_dict()["rows"]) + "\n")


def checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the trainer keeps its state after the step it is at."""
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def normalises(args: Any) -> bool:
    """Whether a trainer with these arguments divides advantages by their spread (GRPO's and RLOO's settings)."""
    if hasattr(args, "scale_rewards"):
        grouped = getattr(args, "multi_objective_aggregation", "") == "normalize_then_sum"
        return grouped or args.scale_rewards in (True, "group", "batch")
    return bool(getattr(args, "normalize_advantages", False))


def refuse_other_run(folder: Path, state: TrainerState) -> None:
    """See that a checkpoint is the one that the trainer has resumed from.

    Raises:
        RunError: its history is another one.
    """
    path = folder / HISTORY
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["log_history"] != state.log_history:
        told = "is of another run than the checkpoint that the trainer resumes from"
        raise RunError(f"{folder} {told}; FPOCallback(…, resume=folder) names that one")


def put_back(model: Any, folder: Path) -> None:
    """The trained adapter of a PEFT model, from the root of a checkpoint; in place."""
    if POLICY not in getattr(model, "peft_config", {}) or not (folder / "adapter_model.safetensors").is_file():
        return
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter_name=POLICY)


def state_in(folder: Path, reward: FPOReward) -> dict[str, Any]:
    """What `FPOCallback` wrote of a reward into a trainer's checkpoint.

    Raises:
        RunError: nothing there, or a damaged file.
    """
    path = folder / f"{reward.__name__}.pt"
    if not path.is_file():
        told = "the trainer resumes, but its checkpoint holds no state of the reward"
        raise RunError(f"{path}: {told}; FPOCallback(…, resume=folder) names another place")
    return read_state(path)
