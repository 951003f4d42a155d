"""A loaded model is what its files say: no weight is drawn at random, no file is cut short, and none is passed over."""

from __future__ import annotations

import importlib.util
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
    wanted, kinds = type(model).__name__, getattr(model.config, "architectures", None) or [type(model).__name__]
    writes = ("ForCausalLM", "LMHead")
    silent = any(end in wanted for end in writes) and not any(end in kinds[0] for end in writes)
    told = f"; its config.json calls it a {kinds[0]}" + (", which writes no text" if silent else "")
    return "" if wanted in kinds else told


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


def quantized(quantization: str, dtype: Any) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for weights in 4 or 8 bits.

    Raises:
        RunError: bitsandbytes is missing.
    """
    if quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RunError(f"quantization {quantization}: needs the package bitsandbytes; install it, or choose none")
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **four)}
