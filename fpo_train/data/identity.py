"""By what a resumed run knows its models and prompts again: names and settings may stay while their content changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import fpo_kernels as fk

from .prompts import Prompt


class _Base(nn.Module):
    """A model's weights as they were before adapters were put on it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._whole = [model]  # in a list, so that it is no submodule

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """See `nn.Module`."""
        whole = self._whole[0].state_dict(*arguments, **options)
        return {name.replace(".base_layer.", "."): entry for name, entry in whole.items() if ".lora_" not in name}


class _Adapter(nn.Module):
    """The factors of one adapter of a model, and what its layers multiply them by."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self._whole, self._name = [model], name

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """See `nn.Module`."""
        whole = self._whole[0].state_dict(*arguments, **options)
        factors = {name: entry for name, entry in whole.items() if ".lora_" in name and f".{self._name}." in name}
        scales = {
            f"{path}.scaling": torch.tensor(module.scaling[self._name])
            for path, module in self._whole[0].named_modules()
            if self._name in getattr(module, "lora_A", {})
        }
        return factors | scales


def of_adapter(model: nn.Module, name: str) -> str:
    """Digest of what one of the adapters of a loaded model adds."""
    return fk.fingerprint(_Adapter(model, name))


def of_model(model: nn.Module, tokenizer: Any = None) -> dict[str, str]:
    """Digests of a loaded model's weights, adapters left out, and of its tokenizer."""
    known = {"weights": fk.fingerprint(_Base(model))}
    return known if tokenizer is None else known | {"tokenizer": of_tokenizer(tokenizer)}


def of_prompts(prompts: Iterable[Prompt]) -> str:
    """SHA-256 of the prompts as the model reads them."""
    return hashlib.sha256(json.dumps([(prompt.name, prompt.ids) for prompt in prompts]).encode()).hexdigest()


def of_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of what the tokenizer makes of texts: its vocabulary and rules, special tokens, chat template."""
    if tokenizer.is_fast:
        told = json.loads(tokenizer.backend_tokenizer.to_str())
        told = {key: part for key, part in told.items() if key not in ("truncation", "padding")}  # of its last call
    else:
        told = tokenizer.get_vocab()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([told, special, tokenizer.chat_template], sort_keys=True).encode()).hexdigest()
