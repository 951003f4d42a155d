"""The policy: a causal language model with a LoRA adapter; with the adapter off, it is the frozen base.

One copy of the base weights serves four roles: policy (adapter on), reference and oracle (adapter off), and
the body of the reward model, whose head reads the base's hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpo_train.data.limits import context_of
from fpo_train.data.prompts import Prompt

from .adapters import POLICY, active
from .generation import check_finite, end_tokens, ended

NO_STATES = "score: the base's hidden states are not finite numbers; another policy.dtype may help"


@dataclass(frozen=True)
class Sequences:
    """Chat-rendered prompt + reply rows, padded on the right."""

    ids: Tensor  # (R, T) int64; a reply that does not end with EOS is closed with it: every row ends alike
    mask: Tensor  # (R, T) bool, False on padding
    reply: Tensor  # (R, T) bool, True on the tokens the model generated, its own end token included

    def rows(self, index: Tensor) -> Sequences:
        """The chosen rows, trimmed to the longest of them."""
        mask = self.mask[index]
        width = int(mask.sum(1).max())
        return Sequences(self.ids[index, :width], mask[:, :width], self.reply[index, :width])


@dataclass(frozen=True)
class Encoded:
    """The frozen base's reading of R rows: of its last hidden states, only those that anyone asks for."""

    sequences: Sequences
    closing: Tensor  # (R, H) fp32 (float64 of a float64 base), at each row's last token: what the reward head reads
    predicting: Tensor  # (S, H) those that predict the reply tokens, row after row
    offsets: Tensor  # (R+1,) int64: row r owns predicting[offsets[r] : offsets[r + 1]]

    @property
    def tokens(self) -> Tensor:
        """The reply tokens that `predicting` predicts, (S,) int64."""
        return self.sequences.ids[self.sequences.reply]

    def rows(self, index: Tensor) -> Encoded:
        """The chosen rows."""
        sequences = self.sequences.rows(index)
        spans = self.spans()
        predicting = torch.cat([spans[row] for row in index.tolist()])
        return Encoded(sequences, self.closing[index], predicting, offsets_of(sequences))

    def spans(self) -> tuple[Tensor, ...]:
        """`predicting` row by row; the offsets are fetched from the device once."""
        return self.predicting.split(self.offsets.diff().tolist())


def wide(tensor: Tensor) -> Tensor:
    """In fp32, or float64 where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def offsets_of(sequences: Sequences) -> Tensor:
    """Where each row's reply tokens begin in a packed stream, (R+1,) int64."""
    return torch.nn.functional.pad(sequences.reply.sum(1).cumsum(0), (1, 0))


class Policy:
    """A causal language model with a LoRA adapter, its tokenizer, and access to the base beneath."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.lm = model.get_base_model()
        self.context: int = context_of(self.lm) or 2048
        self.eos: int = tokenizer.eos_token_id  # closes replies that were cut off
        self.ends = end_tokens(self.lm, tokenizer)  # what a reply ends by itself with
        self.caches = True  # whether what it has read may be kept; see `trial`

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm.device

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The policy's adapter's parameters by name; no other adapter's."""
        own = f".{POLICY}."
        return {name: p for name, p in self.model.named_parameters() if own in name}

    @property
    def base_name(self) -> str:
        """The model that the base was loaded from, as it is named."""
        return str(self.model.peft_config[POLICY].base_model_name_or_path)

    def adapter(self, name: str | None) -> AbstractContextManager[None]:
        """Run with the adapter of that name, or with none: the frozen base; see `adapters.active`."""
        return active(self.model, name)

    def base(self) -> AbstractContextManager[None]:
        """The adapters switched off: the frozen base model."""
        return active(self.model, None)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """In eval mode, as it samples and is read: no dropout, and no gradient checkpointing, which drops caches."""
        learning = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(learning)

    def cut(self, reply: list[int]) -> list[int]:
        """A sampled reply up to its first end token."""
        return ended(reply, self.ends)

    def sequences(self, prompts: list[Prompt], replies: list[list[int]]) -> Sequences:
        """Rows prompt + reply, without tokenising anything again."""
        rows = []
        for prompt, reply in zip(prompts, replies, strict=True):
            closing = [] if reply and reply[-1] == self.eos else [self.eos]
            rows.append((list(prompt.ids), reply, closing))
        width = max(sum(map(len, row)) for row in rows)
        ids = torch.full((len(rows), width), self.eos)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        said = torch.zeros_like(mask)
        for n, (prompt_ids, reply, closing) in enumerate(rows):
            whole = prompt_ids + reply + closing
            ids[n, : len(whole)] = torch.tensor(whole)
            mask[n, : len(whole)] = True
            said[n, len(prompt_ids) : len(prompt_ids) + len(reply)] = True
        return Sequences(ids.to(self.device), mask.to(self.device), said.to(self.device))

    def hidden(self, sequences: Sequences, attention_mask: bool = True) -> Tensor:
        """Last hidden states (R, T, H), adapters as they stand, gradients as the caller has them.

        Without an attention mask, padding (on the right) is read like tokens; the tokens before it do not see it.
        """
        mask = sequences.mask if attention_mask else torch.ones_like(sequences.mask)
        return self.lm.base_model(
            input_ids=sequences.ids, attention_mask=mask.long(), use_cache=False
        ).last_hidden_state

    def project(self, states: Tensor) -> Tensor:
        """Logits (…, V) fp32 of states (…, H); an adapter on the output embedding has its say if it is active."""
        return wide(self.lm.get_output_embeddings()(states))

    @property
    def projects_frozen(self) -> bool:
        """Whether nothing in `project` learns."""
        return not any(p.requires_grad for p in self.lm.get_output_embeddings().parameters())

    def base_project(self, states: Tensor) -> Tensor:
        """`project` by the frozen base: an adapter on the output embedding must not speak for it."""
        if not hasattr(self.lm.get_output_embeddings(), "active_adapters"):
            return self.project(states)
        with self.base():
            return self.project(states)

    @torch.no_grad()
    def encode(self, sequences: Sequences, rows_at_once: int = 0) -> Encoded:
        """The frozen base's reading of the rows, `rows_at_once` of them a forward."""
        closing, predicting = [], []
        with self.at_rest(), self.base():
            for index in torch.arange(len(sequences.ids), device=self.device).split(rows_at_once or len(sequences.ids)):
                some = sequences.rows(index)
                hidden = self.hidden(some)
                last = some.mask.sum(1) - 1
                closing.append(wide(hidden[torch.arange(len(last), device=last.device), last]))
                predicting.append(hidden[:, :-1][some.reply[:, 1:]])
        check_finite(torch.cat(closing), NO_STATES)
        return Encoded(sequences, torch.cat(closing), torch.cat(predicting), offsets_of(sequences))

    def decode(self, reply: list[int]) -> str:
        """A reply as text, special tokens and its end token left out."""
        said = reply[:-1] if reply and reply[-1] in self.ends else reply  # not every end token is a special one
        return self.tokenizer.decode(said, skip_special_tokens=True).strip()
