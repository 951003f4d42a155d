"""Prompts read once: the keys and values that all replies to a prompt share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .decoding import Roomy, cache_name, cache_of
from .generation import positions

if TYPE_CHECKING:
    from fpo_train.data.prompts import Prompt

    from .base import Policy


@dataclass(frozen=True)
class Prefix:
    """B prompts, padded on the left, as one state of the adapters reads them."""

    ids: Tensor  # (B, W) int64
    mask: Tensor  # (B, W) int64
    last: Tensor  # (B, H) hidden state at each prompt's last token
    layers: list[tuple[Tensor, Tensor]] | None  # (B, heads, W, d) keys and values; None where they cannot be shared


def cache(parts: Sequence[tuple[Prefix, Tensor]], tokens: int, more: int) -> Any:
    """A cache for rows of several prefixes: those of the first part, then the next's; each row has its own copy.

    Args:
        parts: a prefix and the prompts of it (R,) that its rows answer; the prefixes are of the same prompts.
        tokens: positions of the prompts to take, from the left. more: positions to have room for behind them.
    """
    from transformers import DynamicCache

    fresh = DynamicCache()
    layers = [prefix.layers for prefix, _ in parts]
    for each in zip(*[layer or () for layer in layers], strict=True):
        picked = [[kind[prompts, :, :tokens] for kind in pair] for pair, (_, prompts) in zip(each, parts, strict=True)]
        keys, values = (one[0] if len(one) == 1 else torch.cat(one) for one in zip(*picked, strict=True))
        fresh.layers.append(Roomy(keys, values, tokens + more))
    return fresh


@torch.no_grad()
def read(policy: Policy, prompts: list[Prompt]) -> Prefix:
    """Read prompts once, the adapters as they stand.

    A model whose cache holds something else than every position's keys and values (sliding windows, recurrent states),
    or is of no use, gives a prefix without layers: its prompts are then read again with each reply.
    """
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), policy.eos)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # generation needs its padding on the left
        ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, width - len(prompt.ids) :] = 1
    ids, mask = ids.to(policy.device), mask.to(policy.device)
    body = policy.lm.base_model
    out = body(input_ids=ids, attention_mask=mask, use_cache=policy.caches, **positions(body, mask))
    kept = cache_of(out) if policy.caches else None
    return Prefix(ids, mask, out.last_hidden_state[:, -1], _layers(kept, width))


def go_on(policy: Policy, known: Prefix, owners: Tensor, ids: Tensor, within: Tensor) -> Tensor:
    """Hidden states (r, t, H) of tokens behind prompts, from the prompts' keys and values, the adapters as they stand.

    Args:
        owners: the prompts of the rows, (r,) int64. ids: (r, t) int64. within: (r, t) bool, False on padding, which is
            on the right.
    """
    body, width = policy.lm.base_model, ids.shape[1]
    mask = torch.cat([known.mask[owners], within.long()], 1)
    places = known.mask.sum(1)[owners][:, None] + torch.arange(width, device=ids.device)
    return body(
        input_ids=ids,
        attention_mask=mask,
        use_cache=True,
        **{cache_name(body): cache([(known, owners)], known.ids.shape[1], width)},
        **({"position_ids": places} if positions(body, mask) else {}),
    ).last_hidden_state


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
