"""What decoding a token at a time need not do: copy every key and value once a token, and once more a group of heads.

transformers joins a cache's tensors to make room for one token, and repeats keys and values to the queries' heads
before attention. Here a cache has room from the start, and the queries that share a key head attend to it together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "sdpa_grouped"


class Roomy(DynamicLayer):
    """A layer of a cache that begins with keys and values (R, heads, n, d) and takes `room` positions in place."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._whole = tuple(one.new_empty(*one.shape[:2], room, one.shape[3]) for one in (keys, values))
        self._put(keys, values, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Keys and values so far, (R, heads, n + t, d) each; beyond the room they are joined as in any cache."""
        before = self.get_seq_length()
        if before + key_states.shape[2] > self._whole[0].shape[2]:
            return super().update(key_states, value_states, *more, **named)
        return self._put(key_states, value_states, before)

    def _put(self, keys: Tensor, values: Tensor, before: int) -> tuple[Tensor, Tensor]:
        after = before + keys.shape[2]
        for whole, new in zip(self._whole, (keys, values), strict=True):
            whole[:, :, before:after] = new
        known = self._whole[0][:, :, :after], self._whole[1][:, :, :after]
        self.keys, self.values = known
        return known


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa` attention; for one query token (R, H, 1, d) on fewer key heads, without repeating these.

    The g queries of a key head become g query positions of it: softmax(q·k) is the same, position by position.
    Returns (R, 1, H, d) and None.
    """
    rows, heads, tokens, width = query.shape
    if tokens > 1 or heads == key.shape[1] or (attention_mask is not None and attention_mask.shape[1] > 1):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    together = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], -1, width),
        key,
        value,
        attn_mask=None if attention_mask is None else attention_mask[..., : key.shape[2]],
        dropout_p=dropout,
        scale=scaling,
    )
    return together.reshape(rows, 1, heads, width), None


def group_heads(model: Any) -> None:
    """Let a model that attends by `sdpa` attend by `attend`."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED)


AttentionInterface.register(GROUPED, attend)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
