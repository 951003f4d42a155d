"""What a reward model reads of a prompt and a reply, tokenised once a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BETWEEN = "\n\n"  # prompt and reply, for a tokenizer without a chat template
KEPT_TEXTS = 4096  # tokenised texts remembered: some iterations' and a replay's


class TextInputs:
    """Batches of token ids from texts, padded on the right."""

    def __init__(self, tokenizer: Any, kind: str, longest: int, eos: int | None = None) -> None:
        """`kind`: "chat", "pair" or "reply". `longest`: in tokens. `eos`: closes every row, where given."""
        self._tokenizer = tokenizer
        self._kind = kind
        self._longest = longest
        self._eos = eos
        self._known: dict[tuple[str, str], dict[str, list[int]]] = {}

    def batch(self, texts: Sequence[tuple[str, str]], device: torch.device) -> dict[str, Tensor]:
        """Keyword arguments of the model for (prompt, reply) rows; `attention_mask` says what is padding."""
        rows = [self._row(*text) for text in texts]
        width = max(len(row["input_ids"]) for row in rows)
        pad = {"input_ids": self._tokenizer.pad_token_id or 0}
        batch = {}
        for key in rows[0]:
            filled = [row[key] + [pad.get(key, 0)] * (width - len(row[key])) for row in rows]
            batch[key] = torch.tensor(filled, device=device)
        return batch

    def _row(self, prompt: str, reply: str) -> dict[str, list[int]]:
        key = (prompt if self._kind != "reply" else "", reply)
        if key not in self._known:
            if len(self._known) >= KEPT_TEXTS:
                self._known.clear()
            self._known[key] = self._tokenize(prompt, reply)
        return self._known[key]

    def _tokenize(self, prompt: str, reply: str) -> dict[str, list[int]]:
        room = self._longest - (self._eos is not None)
        cut = {"truncation": True, "max_length": room}
        if self._kind == "reply":
            row = self._tokenizer(reply, **cut)
        elif self._kind == "pair" and self._eos is None:
            row = self._tokenizer(prompt, reply, truncation="longest_first", max_length=room)
        elif self._kind == "chat" and self._tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
            row = self._tokenizer.apply_chat_template(turns, return_dict=True, **cut)
        else:
            row = self._tokenizer(prompt + BETWEEN + reply, **cut)
        row = {key: list(value) for key, value in row.items()}
        row.setdefault("attention_mask", [1] * len(row["input_ids"]))
        if self._eos is not None or not row["input_ids"]:  # a model must be given something to read
            row["input_ids"].append(self._tokenizer.pad_token_id if self._eos is None else self._eos)
            row["attention_mask"].append(1)
        return row
