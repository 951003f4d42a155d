"""A loaded model is what its files say: no weight is drawn at random, no file is cut short, and none is passed over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from fpo_train.errors import RunError

SHOWN = 3  # names that a complaint lists before it counts the rest
ADAPTER_CONFIG = "adapter_config.json"


def refuse_missing(name: str, model: Any, info: Mapping[str, Any], may_draw: frozenset[str] = frozenset()) -> None:
    """See that every weight of `model` came from its files; tied ones come with those that they are tied to.

    transformers draws what it does not find and goes on: an untrained layer that is another one at each start.

    Args:
        name: the model's, for the complaint.
        info: what `from_pretrained` says with `output_loading_info`.
        may_draw: names that the files need not hold.

    Raises:
        RunError: weights that are not there, or not in the shape that the configuration asks for.
    """
    reshaped = {key for key, *_ in info["mismatched_keys"]}
    missing = sorted(set(info["missing_keys"]) - may_draw | reshaped)
    if missing:
        total = len(model.state_dict())
        raise RunError(
            f"model {name}: {len(missing)} of its {total} weights are missing from its files: {listed(missing)}; "
            f"wanted a whole {type(model).__name__}{_surplus(info['unexpected_keys'])}{_of_another(model)}"
        )
    if info["error_msgs"]:
        raise RunError(f"model {name}: cannot be loaded: {' '.join(info['error_msgs'][0].split())}")


def _surplus(unexpected: Iterable[str]) -> str:
    """A name that only the files have often shows what went wrong: another prefix, another kind of model."""
    names = sorted(unexpected)
    return f", but the files hold {listed(names, 1)}" if names else ""


def _of_another(model: Any) -> str:
    """What the files are of by their own configuration, where that is another kind of model."""
    kinds = getattr(model.config, "architectures", None) or [type(model).__name__]
    return "" if type(model).__name__ in kinds else f"; its config.json calls it a {kinds[0]}"


def listed(names: list[str], shown: int = SHOWN) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def damaged_file(folder: Path) -> Path | None:
    """The first file of a model's folder that is cut short, if one can be told to be."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.json")):
        if not is_json(path):
            return path
    for path in sorted(folder.glob("*.bin")):
        if not is_zipfile(path):  # as torch saves
            return path
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError):
            return path
    return None


def is_json(path: Path) -> bool:
    """Whether a file is a whole JSON text."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
