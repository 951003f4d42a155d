"""What decoding a token at a time need not do: copy every key and value once a token, and once more a group of heads.

transformers joins a cache's tensors to make room for one token, and repeats keys and values to the queries' heads
before attention. Here a cache has room from the start, and the queries that share a key head attend to it together;
rows that have ended are dropped, and on a GPU the host looks for them every few tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "sdpa_grouped"
LOOK = 8  # tokens between two looks at what has ended on a GPU, where each look waits for the device
FEWER = 8  # one row in so many has to have ended for the others to be moved together


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

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with those rows alone, (r,) int64."""
        self._whole = tuple(one[indices] for one in self._whole)
        after = self.get_seq_length()
        self.keys, self.values = (one[:, :, :after] for one in self._whole)

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
    together = query.reshape(rows, key.shape[1], -1, width)
    mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
    if query.is_cpu and not dropout:  # two products of small matrices take half the time of the fused kernel
        scores = together @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
        if mask is not None:
            least = torch.finfo(scores.dtype).min  # and not −∞: a query that sees nothing gets numbers
            scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
        said = scores.softmax(-1) @ value
    else:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        said = sdpa(together, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return said.reshape(rows, 1, heads, width), None


def group_heads(model: Any) -> None:
    """Let a model that attends by `sdpa` attend by `attend`."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED)


AttentionInterface.register(GROUPED, attend)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def write(
    lm: Any,
    ids: Tensor,
    mask: Tensor,
    choose: Any,
    cache: Any,
    ends: tuple[int, ...],
    pad: int,
    most: int,
    least: int,
    takes_positions: bool,
    kept: Callable[[Tensor], None],
) -> Tensor:
    """`generation.generate` on a cache of `Roomy` layers, (R, W + t): each forward reads one token a row."""
    device, look = ids.device, LOOK if ids.is_cuda else 1
    said = torch.full((len(ids), most), pad, device=device)
    rows = torch.arange(len(ids), device=device)  # that still speak
    done = torch.zeros(len(ids), dtype=torch.bool, device=device)
    ending = torch.tensor(ends, dtype=torch.int64, device=device)
    whole = torch.cat([mask, mask.new_ones(len(mask), most)], 1)  # (r, W + most), of which a step sees its part
    last, place, step = ids[:, -1:], mask.sum(1, keepdim=True) - 1, 0
    for step in range(most):
        where = {"position_ids": place + step} if takes_positions else {}
        seen = whole[:, : ids.shape[1] + step]
        out = lm(input_ids=last, attention_mask=seen, past_key_values=cache, use_cache=True, **where)
        logits = out.logits[:, -1].float()
        if step < least:
            logits.index_fill_(1, ending, -torch.inf)
        token = choose(step, rows, logits).masked_fill(done, pad)
        said[rows, step] = token
        done |= torch.isin(token, ending)
        last = token[:, None]
        if (step + 1) % look == 0:
            choose.check()
            ended = int(done.sum())
            if ended == len(done):
                break
            if ended * FEWER >= len(done):
                speaking = (~done).nonzero()[:, 0]
                rows, done, last, whole, place = (one[speaking] for one in (rows, done, last, whole, place))
                cache.batch_select_indices(speaking)
                kept(speaking)
    choose.check()
    return torch.cat([ids, said[:, : step + 1]], 1)
