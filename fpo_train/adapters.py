"""Which of a model's LoRA adapters speaks: one of them, or none, which is the frozen base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

POLICY, REWARD = "default", "reward"


@contextmanager
def active(model: Any, name: str | None) -> Iterator[None]:
    """Run a PEFT model with the adapter `name`, or without any; nests, and puts everything back.

    PEFT's own switches also make the adapter they switch to trainable and freeze the others, which takes the weights
    out of any graph that is being prepared. Which weights are trained is not what this is about, so only the two
    attributes are written that those switches write beside the flags.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    former = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        yield
    finally:
        for layer, (disabled, names) in zip(layers, former, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, names
