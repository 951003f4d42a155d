"""What decoding a token at a time need not do: copy every key and value once a token, and once more a group of heads.

transformers joins a cache's tensors to make room for one token, and repeats keys and values to the queries' heads
before attention. Here a cache has room from the start, and the queries that share a key head attend to it together;
rows that have ended are dropped, and on a GPU the host looks for them every few tokens alone. A token there is so many
small launches that the device waits for them: all its tensors stay where they are, and one recorded graph is it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

RENAMED = "cache" in {field.name for field in fields(BaseModelOutputWithPast)}  # it was past_key_values
GROUPED = "sdpa_grouped"
AHEAD = "cuda"  # the device that the host runs ahead of: there steps are recorded, and looks are rare
LOOK = 8  # tokens between two looks at what has ended on a GPU, where each look waits for the device
FEWER = 8  # one row in so many has to have ended for the others to be moved together
FEWER_RECORDED = (
    2  # where a step is recorded: for fewer rows it has to be recorded again, which takes some tokens' time
)


def cache_name(body: Any) -> str:
    """The argument by which a model's forward takes a cache: `cache`, or `past_key_values` as it was called before.

    One whose forward names neither takes what transformers' own models take.
    """
    takes = inspect.signature(body.forward).parameters
    named = [name for name in ("past_key_values", "cache") if name in takes]
    return named[0] if named else "cache" if RENAMED else "past_key_values"


def cache_of(out: Any) -> Any:
    """The cache that a model returns; None where it returns none."""
    return getattr(out, "cache", None) if RENAMED else getattr(out, "past_key_values", None)


class Roomy(DynamicLayer):
    """A layer of a cache that begins with keys and values (R, heads, n, d) and takes `room` positions in place."""

    _at: Tensor | None = None

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._whole = tuple(one.new_empty(*one.shape[:2], room, one.shape[3]) for one in (keys, values))
        self._put(keys, values, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Keys and values so far, (R, heads, n + t, d) each; beyond the room they are joined as in any cache."""
        if self._at is not None:
            for whole, new in zip(self._whole, (key_states, value_states), strict=True):
                whole.index_copy_(2, self._at, new)
            return self._whole[0], self._whole[1]
        before = self.get_seq_length()
        if before + key_states.shape[2] > self._whole[0].shape[2]:
            return super().update(key_states, value_states, *more, **named)
        return self._put(key_states, value_states, before)

    def write_at(self, at: Tensor) -> None:
        """Write at `at` (1,) int64 from now on, and give all positions: a mask has to say which of them count."""
        self._at = at
        for whole in self._whole:  # what is masked is multiplied by 0, so it has to be a number
            whole[:, :, self.get_seq_length() :].zero_()

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


class Speech:
    """What R rows have said and where they stand, in tensors that are written in place from token to token.

    Attributes:
        said: (R, most) int64, `pad` behind an end. rows: those that still speak, (r,) indices of R.
        done: of these, who has ended since they were last chosen, (r,) bool.
        last, place: the token that each reads next, and its position, (r, 1) int64.
        step: tokens said so far, (1,) int64.
    """

    def __init__(self, ids: Tensor, mask: Tensor, ends: tuple[int, ...], pad: int, most: int, least: int) -> None:
        device = ids.device
        self.said = torch.full((len(ids), most), pad, device=device)
        self.rows = torch.arange(len(ids), device=device)
        self.done = torch.zeros(len(ids), dtype=torch.bool, device=device)
        self.last, self.place = ids[:, -1:].clone(), mask.sum(1, keepdim=True) - 1
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self._ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self._pad, self._least = pad, least

    def take(self, logits: Tensor, choose: Any) -> None:
        """One token more of each row, from logits (r, V) fp32, which may be written on."""
        if self._least and len(self._ends):
            logits[:, self._ends] = logits[:, self._ends].masked_fill(self.step < self._least, -torch.inf)
        token = choose(self.step, self.rows, logits).masked_fill(self.done, self._pad)
        self.said[self.rows, self.step] = token
        self.done |= (token[:, None] == self._ends).any(1)
        self.last.copy_(token[:, None])
        self.place += 1
        self.step += 1

    def keep(self, rows: Tensor) -> None:
        """Go on with those alone, (r,) indices of the rows that still speak."""
        self.rows, self.done, self.last, self.place = (
            one[rows] for one in (self.rows, self.done, self.last, self.place)
        )


class Growing:
    """A token of every row that speaks; attention sees as many positions as there are."""

    fewer = property(lambda self: FEWER)

    def __init__(self, lm: Any, cache: Any, mask: Tensor, speech: Speech, choose: Any, takes_positions: bool) -> None:
        self._lm, self._cache, self._speech, self._choose = lm, cache, speech, choose
        self._seen = torch.cat([mask, mask.new_ones(len(mask), speech.said.shape[1])], 1)  # a step sees its part
        self._width, self._takes, self._named = mask.shape[1], takes_positions, cache_name(lm)

    def __call__(self) -> None:
        known = {self._named: self._cache} | ({"position_ids": self._speech.place} if self._takes else {})
        seen = self._seen[:, : self._width]
        out = self._lm(input_ids=self._speech.last, attention_mask=seen, use_cache=True, **known)
        self._speech.take(out.logits[:, -1].float(), self._choose)
        self._width += 1

    def keep(self, rows: Tensor) -> None:
        """See `Speech`."""
        self._cache.batch_select_indices(rows)
        self._seen = self._seen[rows]


class Steady:
    """The same, of the same shapes at the same addresses every time: on a GPU it is recorded and replayed.

    Attention runs over all positions that there is room for, those to come masked. The first token of every set of
    rows is said without a graph, for libraries to set themselves up; where recording fails, all are, and that is said.
    """

    fewer = property(lambda self: FEWER_RECORDED)

    def __init__(self, lm: Any, cache: Any, mask: Tensor, speech: Speech, choose: Any) -> None:
        self._lm, self._cache, self._speech, self._choose = lm, cache, speech, choose
        room = mask.new_zeros(len(mask), speech.said.shape[1] - 1)
        self._seen = torch.cat([mask, room], 1).bool()[:, None, None]  # (r, 1, 1, W + most - 1), as attention takes it
        self._at = torch.tensor([mask.shape[1] - 1], device=mask.device)
        for layer in cache.layers:
            layer.write_at(self._at)
        self._begun, self._named = False, cache_name(lm)
        self._graph: Any = None
        self._records = mask.device.type == AHEAD

    def __call__(self) -> None:
        if self._graph is None and self._begun and self._records:
            self._record()
        if self._graph is not None:
            self._graph.replay()
        else:
            self.step()
        self._begun = True

    def step(self) -> None:
        """What is recorded: nothing in it waits for the device, or depends on what number of a token it is."""
        self._seen.index_fill_(3, self._at, True)
        out = self._lm(
            input_ids=self._speech.last,
            attention_mask=self._seen,
            position_ids=self._speech.place,
            use_cache=True,
            **{self._named: self._cache},
        )
        self._speech.take(out.logits[:, -1].float(), self._choose)
        self._at += 1

    def keep(self, rows: Tensor) -> None:
        """See `Speech`; what was recorded was of all the rows before."""
        self._cache.batch_select_indices(rows)
        self._seen = self._seen[rows]
        self._graph = None

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step()
        except RuntimeError as error:
            self._records = False
            said = (str(error).splitlines() or [type(error).__name__])[0]
            print(
                f"generate: a token's step could not be recorded and is launched anew each time ({said})",
                file=sys.stderr,
            )
        else:
            self._graph = graph


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
    steady: bool | None = None,
) -> Tensor:
    """`generation.generate` on a cache of `Roomy` layers, (R, W + t): each forward reads one token a row.

    `steady`: by a `Steady` step; None: on a GPU, where the model attends as `attend` does and takes positions, and the
    choice is one that can be recorded.
    """
    if steady is None:
        known = takes_positions and choose.steady and lm.config._attn_implementation == GROUPED
        steady = known and ids.device.type == AHEAD
    speech = Speech(ids, mask, ends, pad, most, least)
    step = (
        Steady(lm, cache, mask, speech, choose) if steady else Growing(lm, cache, mask, speech, choose, takes_positions)
    )
    look, number = LOOK if ids.device.type == AHEAD else 1, 0
    for number in range(1, most + 1):
        step()
        if number % look == 0:
            choose.check()
            ended = int(speech.done.sum())
            if ended == len(speech.done):
                break
            if ended * step.fewer >= len(speech.done):
                speaking = (~speech.done).nonzero()[:, 0]
                speech.keep(speaking)
                step.keep(speaking)
                kept(speaking)
    choose.check()
    return torch.cat([ids, speech.said[:, :number]], 1)
