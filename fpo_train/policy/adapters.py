"""Which of a model's LoRA adapters speaks: one of them, or none, which is the frozen base; in all rows, or in some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fpo_train.data.weights import listed
from fpo_train.errors import RunError

POLICY, REWARD = "default", "reward"
EMBEDDING_A = "lora_embedding_A"


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


class Speaking:
    """The rows of a batch in which an adapter speaks, (R,) bool."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def kept(self, rows: Tensor) -> None:
        """Only these rows, (r,) int64, are gone on with."""
        self.rows = self.rows[rows]


@contextmanager
def only_in(model: Any, name: str, speaking: Speaking) -> Iterator[None]:
    """The adapter `name` speaks in those rows alone; the others of a batch are the base's, to the bit.

    What the adapter adds is multiplied by 0 there, so both kinds of rows share each pass over the base's weights.
    """

    def silence(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * speaking.rows[:, None, None].to(output.dtype)

    ends = [module for path, module in model.named_modules() if path.endswith(f".lora_B.{name}")]
    hooks = [module.register_forward_hook(silence) for module in ends]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def refuse_unmatched(model: nn.Module, adapter: str, targets: Sequence[str], setting: str) -> None:
    """See that each target name chose a layer that `adapter` now sits on; PEFT complains only where none does.

    A name chooses the modules whose path is it, or ends with it behind a dot.

    Raises:
        RunError: names that chose nothing, with the linear layers that there are.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    paths = {path.removeprefix("base_model.model."): module for path, module in model.named_modules()}
    layers = {path: module for path, module in paths.items() if isinstance(module, BaseTunerLayer)}
    carriers = [
        path for path, m in layers.items() if any(adapter in getattr(m, kind, {}) for kind in ("lora_A", EMBEDDING_A))
    ]
    lost = [name for name in targets if not any(f".{path}".endswith(f".{name}") for path in carriers)]
    if lost:
        beneath = {path for path in paths if any(path.startswith(f"{layer}.") for layer in layers)}
        linear = {path for path, module in paths.items() if isinstance(module, (nn.Linear, Conv1D))}
        known = linear - beneath | layers.keys()
        there = ", ".join(sorted({path.rpartition(".")[2] for path in known}))
        raise RunError(f"{setting}: {', '.join(map(repr, lost))} names no layer of the model; its layers are {there}")


def of_base(lm: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the weights of `lm` that an adapter's file brings too, under the file's names.

    PEFT saves an embedding or output projection whole where it carries an adapter, or was resized.
    """
    plain = {name.removeprefix("base_model.model."): weight for name, weight in lm.state_dict().items()}
    own = {f"base_model.model.{name.replace('.base_layer.', '.')}": weight for name, weight in plain.items()}
    there = {name: name.replace(".base_layer.", ".") for name in given if ".lora_" not in name}
    return {name: own[short].clone() for name, short in there.items() if short in own}


def refuse_unfit(model: Any, adapter: str, given: Mapping[str, Tensor], base: Mapping[str, Tensor], where: str) -> None:
    """See that an adapter's file holds the weights of `adapter` as it sits on the model, and nothing else.

    Args:
        given: the file's tensors. base: `of_base` of them, from before any was loaded.
        where: what the complaint begins with.

    Raises:
        RunError: weights that are missing, that have another shape or no place, or base weights that are not the
            base's.
    """
    from peft import get_peft_model_state_dict

    wanted = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if missing := sorted(wanted.keys() - given.keys()):  # PEFT draws them and warns
        raise RunError(f"{where}: {len(missing)} of {len(wanted)} weights are missing from it: {listed(missing)}")
    if unknown := sorted(given.keys() - wanted.keys() - base.keys()):
        raise RunError(f"{where}: {len(unknown)} of its weights have no place there: {listed(unknown)}")
    if reshaped := sorted(name for name, weight in wanted.items() if given[name].shape != weight.shape):
        shapes = f"{tuple(given[reshaped[0]].shape)} for {tuple(wanted[reshaped[0]].shape)}"
        raise RunError(f"{where}: {len(reshaped)} of its weights have another shape: {reshaped[0]} {shapes}")
    trained = sorted(
        name for name in base.keys() - wanted.keys() if not torch.equal(given[name].to(base[name]), base[name])
    )
    if trained:
        raise RunError(f"{where}: it brings weights of the base that are not the base's: {listed(trained)}")


def complaint(error: ValueError) -> str:
    """What PEFT says of the layers that it was to adapt, without the whole of a module that it prints."""
    first, rest, _ = str(error).partition("\n")
    return f"{first.rstrip('(')} is not supported" if rest else first
