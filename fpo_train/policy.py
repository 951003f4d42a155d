"""The policy: a causal language model with a LoRA adapter; with the adapter off, it is the frozen base.

One copy of the base weights serves four roles: policy (adapter on), reference and oracle (adapter off), and
the body of the reward model, whose head reads the base's hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import PolicyConfig, RolloutConfig
from .data import Prompt
from .errors import RunError
from .sources import load_causal_lm


@dataclass(frozen=True)
class Sequences:
    """Chat-rendered prompt + reply rows, padded on the right."""

    ids: Tensor  # (R, T) int64; a reply that was cut off is closed with EOS, so that every row ends alike
    mask: Tensor  # (R, T) bool, False on padding
    reply: Tensor  # (R, T) bool, True on the tokens the model generated, its own EOS included

    def rows(self, index: Tensor) -> Sequences:
        """The chosen rows, trimmed to the longest of them."""
        mask = self.mask[index]
        width = int(mask.sum(1).max())
        return Sequences(self.ids[index, :width], mask[:, :width], self.reply[index, :width])


@dataclass(frozen=True)
class Encoded:
    """Sequences and the frozen base's last hidden states."""

    sequences: Sequences
    hidden: Tensor  # (R, T, H)

    @property
    def closing(self) -> Tensor:
        """The hidden state at each row's last token, (R, H) fp32: what the reward head reads."""
        last = self.sequences.mask.sum(1) - 1
        return self.hidden[torch.arange(len(last), device=last.device), last].float()


class Policy:
    """A causal language model with a LoRA adapter, its tokenizer, and access to the base beneath."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.lm = model.get_base_model()
        self.context: int = getattr(self.lm.config, "max_position_embeddings", None) or 2048
        self.eos: int = tokenizer.eos_token_id

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm.device

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def base(self) -> Iterator[None]:
        """The adapter switched off: the frozen base model."""
        with self.model.disable_adapter():
            yield

    @torch.no_grad()
    def generate(self, prompts: list[Prompt], replies: int, settings: RolloutConfig) -> list[list[int]]:
        """Sample `replies` replies a prompt (prompt-major), each cut behind its EOS; uses torch's global stream."""
        width = max(len(p.ids) for p in prompts)
        ids = torch.full((len(prompts), width), self.eos)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # generation needs its padding on the left
            ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, width - len(prompt.ids) :] = 1
        out = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            do_sample=True,
            num_return_sequences=replies,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            eos_token_id=self.eos,
            pad_token_id=self.eos,
        )
        return [self._cut(row) for row in out[:, width:].tolist()]

    def _cut(self, reply: list[int]) -> list[int]:
        return reply[: reply.index(self.eos) + 1] if self.eos in reply else reply

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

    def hidden(self, sequences: Sequences) -> Tensor:
        """Last hidden states (R, T, H), adapter as it stands, gradients as the caller has them."""
        body = self.lm.base_model
        return body(input_ids=sequences.ids, attention_mask=sequences.mask.long()).last_hidden_state

    @torch.no_grad()
    def encode(self, sequences: Sequences) -> Encoded:
        """The frozen base's reading of the rows: one forward that reward model and oracle share."""
        with self.base():
            return Encoded(sequences, self.hidden(sequences))

    @torch.no_grad()
    def base_log_probs(self, encoded: Encoded, rows: Tensor) -> tuple[Tensor, Tensor, Sequences]:
        """The frozen base's log p over the vocabulary at the rows' n reply tokens, those tokens, the rows."""
        sequences = encoded.sequences.rows(rows)
        with self.base():  # an adapter on the output embedding must not speak for the base
            logits, tokens = self.reply_logits(encoded.hidden[rows, : sequences.ids.shape[1]], sequences)
        return logits.log_softmax(1), tokens, sequences

    def reply_logits(self, hidden: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Logits (n, vocabulary) that predict the n reply tokens of all rows, fp32, and those tokens (n,)."""
        said = sequences.reply[:, 1:]
        return self.lm.get_output_embeddings()(hidden[:, :-1][said]).float(), sequences.ids[:, 1:][said]

    def decode(self, reply: list[int]) -> str:
        """A reply as text, special tokens left out."""
        return self.tokenizer.decode(reply, skip_special_tokens=True).strip()


def load_policy(config: PolicyConfig, seed: int, device: torch.device) -> Policy:
    """Load the base once and put a fresh adapter on it, drawn from `seed`.

    Raises:
        RunError: the model cannot be loaded, or its logits are not a plain projection of its last hidden states.
    """
    lm, tokenizer = load_causal_lm(config.model, getattr(torch, config.dtype))
    lm.to(device).eval().requires_grad_(False)
    _check_projection(lm, config.model)
    torch.manual_seed(seed)
    return Policy(add_adapter(lm, config), tokenizer)


def add_adapter(lm: Any, config: PolicyConfig) -> Any:
    """A PEFT model with a fresh LoRA adapter, its factors in fp32.

    Raises:
        RunError: the model has no layers of the names in `policy.lora_targets`.
    """
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(lm, lora)
    except ValueError as error:
        raise RunError(f"policy.lora_targets {list(config.lora_targets)}: {str(error).splitlines()[0]}") from error
    model.peft_config["default"].base_model_name_or_path = config.model  # as the user named it
    return model


@torch.no_grad()
def _check_projection(lm: Any, name: str) -> None:
    """Guard the short cut logits = W·hidden: models that scale or cap their logits must not pass in silence."""
    ids = torch.tensor([[1, 2, 3]], device=lm.device)
    whole = lm(input_ids=ids).logits
    short = lm.get_output_embeddings()(lm.base_model(input_ids=ids).last_hidden_state)
    if not torch.allclose(whole, short, rtol=1e-3, atol=1e-3):
        raise RunError(f"model {name}: its logits are not a plain projection of its hidden states")
