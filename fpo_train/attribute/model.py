"""The reward model that is asked, as `reward_model.kind classifier` loads it, and its earlier states."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import fpo_kernels as fk
from fpo_train.config import ReadModelConfig, RewardModelConfig, RunConfig
from fpo_train.data.adapters import TRAINED, classifier_of
from fpo_train.data.identity import of_tokenizer
from fpo_train.data.sources import look_at_classifier
from fpo_train.errors import RunError, about
from fpo_train.processes import Processes
from fpo_train.reward_model.classifier import ClassifierRewardModel

BASE_HEAD = "head.safetensors"  # of a reward model on a policy's base, as runs leave it
SETTING = "reward_model.model"


def described(config: ReadModelConfig) -> RewardModelConfig:
    """The reward model as a run's settings have it, by its folder alone: nothing is loaded.

    Raises:
        RunError: nothing under that name, more outputs than one, or a reward model that needs a policy's base.
    """
    folder = Path(config.model).expanduser()
    if (folder / BASE_HEAD).is_file():
        raise RunError(f"{SETTING}: {folder} is trained on a policy's base; wanted a classifier of its own")
    told: dict[str, Any] = _told(folder) if (folder / TRAINED).is_file() else {}
    with about("reward_model"):
        look_at_classifier(classifier_of(config.model))
    reads = told.get("reads", "chat") if config.input == "auto" else config.input
    more: dict[str, Any] = {key: told[key] for key in ("lora_rank", "lora_alpha", "lora_targets") if key in told}
    more |= {"train": told.get("trained", "head"), "input": reads, "model": config.model}
    try:
        return RewardModelConfig(kind="classifier", max_tokens=config.max_tokens, dtype=config.dtype, **more)
    except (ValueError, TypeError) as error:
        raise RunError(f"{SETTING}: {folder / 'config.json'} is no reward model's ({error})") from error


def load(config: ReadModelConfig, settings: RewardModelConfig, device: torch.device) -> ClassifierRewardModel:
    """The reward model with its trained weights, dropout off.

    Raises:
        RunError: it cannot be loaded, has no trained score head, or files of a run that do not fit it.
    """
    model = ClassifierRewardModel(RunConfig(reward_model=settings), Processes(), device)
    if not model.comes_trained:
        raise RunError(f"{SETTING} {config.model}: its files hold no score head; wanted a trained reward model")
    return model


def chosen(model: ClassifierRewardModel, parameters: str) -> list[str]:
    """Names in the model's module of the weights that gradients are over; a score head's bias cancels in every pair.

    Raises:
        RunError: a choice that names nothing but that bias, or nothing.
    """
    bias = model.head.bias
    named = dict(model.module.named_parameters())
    found = [name for name in model.names(parameters, "parameters") if named[name] is not bias]
    if not found:
        raise RunError("parameters: the score head's bias alone, which cancels in every pair; wanted other weights")
    return found


def identity(model: ClassifierRewardModel, beneath: bool = False) -> str:
    """By what a store knows whose numbers it has: weights, tokenizer, and how texts are read.

    Args:
        beneath: of all but the score head, on which what that head reads does not depend.
    """
    settings, tokenizer = model.config, of_tokenizer(model.tokenizer)
    weights = fk.fingerprint(_Beneath(model) if beneath else model.module)
    return f"{weights} {tokenizer} {settings.input} {settings.max_tokens} {settings.lora_alpha}"


class _Beneath(nn.Module):
    """A reward model's weights without its score head's."""

    def __init__(self, model: ClassifierRewardModel) -> None:
        super().__init__()
        self._whole = [model]  # in a list, so that it is no submodule

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """See `nn.Module`."""
        (model,) = self._whole
        head = {id(parameter) for parameter in model.head.parameters()}
        whole = model.module.state_dict(*arguments, **options)
        return {name: entry for name, entry in whole.items() if id(entry) not in head}


class Checkpoints:
    """Earlier states of the reward model from a `CheckpointStore`, all looked at before the first is taken."""

    def __init__(self, folder: str, model: ClassifierRewardModel) -> None:
        """Raises: RunError: no checkpoint in the folder, a damaged one, or one of another model."""
        whole, _ = model.loaded or (model.module, None)
        self._own = {**dict(whole.named_parameters()), **dict(model.module.named_parameters())}
        self._kept = stored(folder)
        for checkpoint in self._kept:
            for name, shape in checkpoint.shapes.items():
                if name not in self._own or tuple(self._own[name].shape) != shape:
                    what = f"has no {name} of shape {tuple(shape)}"
                    raise RunError(f"checkpoints: {checkpoint.path}: the reward model {what}")

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[float]:
        """Bring the model to each state in turn, with its learning rate; it is as it was when the turns are over."""
        names = {name for checkpoint in self._kept for name in checkpoint.shapes}
        with _kept({name: self._own[name] for name in names}) as before:
            for checkpoint in self._kept:
                given = {**before, **checkpoint.load()}
                with torch.no_grad():
                    for name in names:
                        self._own[name].copy_(given[name])
                yield checkpoint.learning_rate


def stored(folder: str) -> list[Any]:
    """The checkpoints of a folder, in the order of their steps.

    Raises:
        RunError: none, or a folder of something else.
    """
    path = Path(folder).expanduser()
    try:
        found = list(fk.CheckpointStore(path)) if path.is_dir() else []
    except ValueError as error:
        raise RunError(f"checkpoints: {error}") from error
    if not found:
        raise RunError(f"checkpoints: {folder} holds none; wanted a folder that fpo_kernels.CheckpointStore wrote")
    return found


@contextmanager
def _kept(parameters: dict[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """A copy of the parameters, which are put back in the end."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


def _told(folder: Path) -> dict[str, Any]:
    """What the `config.json` of a run's reward model says, and the layers that its adapter is on."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        told = {"trained": found["trained"], "reads": found["reads"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f'{SETTING}: {path} does not say what is "trained" and what it "reads"') from error
    if told["trained"] == "lora":
        factors = [name for name in _weights(folder / TRAINED) if ".lora_" in name]
        layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in factors}
        told |= {key: found[key] for key in ("lora_rank", "lora_alpha") if key in found}
        told["lora_targets"] = tuple(sorted(layers))
    return told


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{SETTING}: {path} is damaged or cut short ({error}); put the whole file back") from error
