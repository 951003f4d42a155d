"""What a reward model reads of a prompt and a reply, tokenised once a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpo_train.data import chat

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
        if self._kind == "reply":
            row = self._tokenizer(reply, truncation=True, max_length=room)
        elif self._kind == "pair" and self._eos is None:
            row = self._tokenizer(prompt, reply, truncation="longest_first", max_length=room)
        else:
            row = self._together(prompt, reply, room)
        row = {key: list(value) for key, value in row.items()}
        row.setdefault("attention_mask", [1] * len(row["input_ids"]))
        if self._eos is not None or not row["input_ids"]:  # a model must be given something to read
            row["input_ids"].append(self._tokenizer.pad_token_id if self._eos is None else self._eos)
            row["attention_mask"].append(1)
        return row

    def _together(self, prompt: str, reply: str, room: int) -> Any:
        """Prompt and reply as one text of at most `room` tokens.

        It is the prompt's end that goes first: of replies that are cut off whole, one could not be told from another.
        """
        whole = row = self._join(prompt, reply)
        if len(whole["input_ids"]) <= room:
            return whole
        words = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        keep = len(words)
        while keep > 0 and len(row["input_ids"]) > room:  # a shortened text may split into other tokens
            keep -= min(keep, len(row["input_ids"]) - room)
            row = self._join(self._tokenizer.decode(words[:keep]), reply)
        return row if len(row["input_ids"]) <= room else self._join(prompt, reply, truncation=True, max_length=room)

    def _join(self, prompt: str, reply: str, **cut: Any) -> Any:
        if self._kind == "chat" and self._tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
            return chat(self._tokenizer, turns, "reward_model.model", return_dict=True, **cut)
        return self._tokenizer(prompt + BETWEEN + reply, **cut)
