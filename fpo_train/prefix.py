"""Prompts read once: the keys and values that all replies to a prompt share."""

from __future__ import annotations

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
        from transformers import DynamicCache

        if self.layers is None:
            raise RuntimeError("these prompts' keys and values cannot be shared")
        fresh = DynamicCache()
        for number, (keys, values) in enumerate(self.layers):
            fresh.update(keys[prompts, :, :tokens], values[prompts, :, :tokens], number)
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
