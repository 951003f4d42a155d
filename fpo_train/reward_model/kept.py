"""Classifiers by name: whole ones, those that a run has trained, and adapters of PEFT's on one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fpo_train.data.adapters import TRAINED, Kept, classifier_of, kept_in
from fpo_train.data.sources import Classifier, load_sequence_classifier
from fpo_train.data.weights import ADAPTER_CONFIG
from fpo_train.errors import RunError


def take_up(kept: Kept, parameters: Mapping[str, nn.Parameter], wanted: Collection[str]) -> None:
    """Put the weights that a run has trained into a classifier's, by their names there.

    Args:
        wanted: names that the file must have.

    Raises:
        RunError: a damaged file, or weights that are missing or have no place.
    """
    where = f"reward_model.model {kept.folder}"
    try:
        weights: dict[str, Tensor] = load_file(kept.folder / TRAINED)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{where}: its {TRAINED} is damaged: {error}") from error
    lost = [name for name, weight in weights.items() if shape_of(parameters.get(name)) != weight.shape]
    if lost:
        needs = f"it was trained with reward_model.train {kept.trained}, which its weights need"
        raise RunError(f"{where}: {len(lost)} of its {len(weights)} weights have no place, {lost[0]} one; {needs}")
    if missing := sorted(set(wanted) - set(weights)):
        raise RunError(f"{where}: its {TRAINED} does not fit {kept.model}: it lacks {missing[0]}")
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def shape_of(parameter: nn.Parameter | None) -> torch.Size | None:
    """Of a parameter that may not be there."""
    return None if parameter is None else parameter.shape


def load_classifier(name: str, dtype: torch.dtype) -> Classifier:
    """The classifier of that name; an adapter that PEFT trained on one is added into its weights, head and all.

    Raises:
        RunError: it cannot be loaded, or an adapter that is none of a classifier with one output.
    """
    kept = kept_in(name)
    folder = Path(name if kept is None else kept.model).expanduser()
    loaded = load_sequence_classifier(classifier_of(name), dtype)
    if not (folder / ADAPTER_CONFIG).is_file():
        return loaded
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(loaded.model, folder)
        copies = [module for name, module in model.named_modules() if ".modules_to_save." in name]
        saved = any(isinstance(module, nn.Linear) and module.out_features == 1 for module in copies)
        whole = model.merge_and_unload(safe_merge=True)
    except Exception as error:  # of packages of their own, over files of all kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"model {folder}: its adapter cannot be put on {classifier_of(name)}: {first}") from error
    return Classifier(whole, loaded.tokenizer, loaded.trained or saved)
