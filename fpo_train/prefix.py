"""Prompts read once: the keys and values that all replies to a prompt share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .data import Prompt
    from .policy import Policy


@dataclass(frozen=True)
class Prefix:
    """B prompts, padded on the left, as one state of the adapters reads them."""

    ids: Tensor  # (B, W) int64
    mask: Tensor  # (B, W) int64
    last: Tensor  # (B, H) hidden state at each prompt's last token
    layers: list[tuple[Tensor, Tensor]] | None  # (B, heads, W, d) keys and values; None where they cannot be shared

    def cache(self, prompts: Tensor, tokens: int) -> Any:
        """A cache of the first `tokens` positions for rows that answer `prompts` (R,): each row has its own copy."""
        return cache([(self, prompts)], tokens)


def cache(parts: Sequence[tuple[Prefix, Tensor]], tokens: int) -> Any:
    """A cache of the first `tokens` positions for rows of several prefixes: those of the first part, then the next's.

    Args:
        parts: a prefix and the prompts of it (R,) that its rows answer; the prefixes are of the same prompts.
    """
    from transformers import DynamicCache

    fresh = DynamicCache()
    layers = [prefix.layers for prefix, _ in parts]
    for number, each in enumerate(zip(*[layer or () for layer in layers], strict=True)):
        picked = [[kind[prompts, :, :tokens] for kind in pair] for pair, (_, prompts) in zip(each, parts, strict=True)]
        keys, values = (one[0] if len(one) == 1 else torch.cat(one) for one in zip(*picked, strict=True))
        fresh.update(keys, values, number)
    return fresh


@torch.no_grad()
def read(policy: Policy, prompts: list[Prompt]) -> Prefix:
    """Read prompts once, the adapters as they stand.

    A model whose cache holds something else than every position's keys and values (sliding windows, recurrent states)
    gives a prefix without layers: its prompts are then read again with each reply.
    """
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), policy.eos)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # generation needs its padding on the left
        ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, width - len(prompt.ids) :] = 1
    ids, mask = ids.to(policy.device), mask.to(policy.device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = policy.lm.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    return Prefix(ids, mask, out.last_hidden_state[:, -1], _layers(out.past_key_values, width))


def _layers(cache: Any, width: int) -> list[tuple[Tensor, Tensor]] | None:
    from transformers.cache_utils import DynamicLayer

    found = []
    for layer in getattr(cache, "layers", []):
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            return None
        if layer.keys.shape[2] != width:
            return None
        found.append((layer.keys, layer.values))
    return found or None
