"""A classifier that a run has trained, as its `reward_model/` keeps it: whose it is, and the weights that differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fpo_train.errors import RunError

TRAINED = "trained.safetensors"


@dataclass(frozen=True)
class Kept:
    """What such a folder holds."""

    folder: Path
    model: str
    """The classifier that was trained, by the name it had."""
    trained: str
    """`head` or `lora`."""

    def take_up(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the weights into the classifier's, by their names there.

        Raises:
            RunError: a damaged file, or weights that have no place.
        """
        where = f"reward_model.model {self.folder}"
        try:
            weights: dict[str, Tensor] = load_file(self.folder / TRAINED)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{where}: its {TRAINED} is damaged: {error}") from error
        lost = [name for name, weight in weights.items() if shape_of(parameters.get(name)) != weight.shape]
        if lost:
            wanted = f"it was trained with reward_model.train {self.trained}, which its weights need"
            raise RunError(f"{where}: {len(lost)} of its {len(weights)} weights have no place, {lost[0]} one; {wanted}")
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)


def shape_of(parameter: nn.Parameter | None) -> torch.Size | None:
    """Of a parameter that may not be there."""
    return None if parameter is None else parameter.shape


def kept_in(name: str) -> Kept | None:
    """What a folder of that name keeps, if it is one of a run's.

    Raises:
        RunError: it does not say of which model.
    """
    folder = Path(name).expanduser()
    if not (folder / TRAINED).is_file():
        return None
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return Kept(folder, str(said["model"]), str(said["trained"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f'reward_model.model: {folder} has no config.json that names its "model"') from error


def classifier_of(name: str) -> str:
    """The model that has to be loaded for that name."""
    kept = kept_in(name)
    return name if kept is None else kept.model
