"""Which of a model's LoRA adapters speaks: one of them, or none, which is the frozen base; in all rows, or in some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

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


@contextmanager
def only_in(model: Any, name: str, rows: Tensor) -> Iterator[None]:
    """The adapter `name` speaks in the rows (R,) bool alone; the others of a batch are the base's, to the bit.

    What the adapter adds is multiplied by 0 there, so both kinds of rows share each pass over the base's weights.
    """
    said = rows[:, None, None]

    def silence(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * said.to(output.dtype)

    ends = [module for path, module in model.named_modules() if path.endswith(f".lora_B.{name}")]
    hooks = [module.register_forward_hook(silence) for module in ends]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
