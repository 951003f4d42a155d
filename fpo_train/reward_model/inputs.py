"""What a reward model reads of a prompt and a reply, tokenised once a text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpo_train.data.limits import check_tokens, named, oversized
from fpo_train.data.prompts import Serves, chat
from fpo_train.data.turns import Talk, fitted, messages_of, plain
from fpo_train.errors import RunError

BETWEEN = "\n\n"  # prompt and reply, for a tokenizer without a chat template
KEPT_TEXTS = 4096  # tokenised texts remembered: some iterations' and a replay's


class TextInputs:
    """Batches of token ids from texts, padded on the right."""

    def __init__(
        self,
        tokenizer: Any,
        kind: str,
        longest: int,
        eos: int | None = None,
        rows: int | None = None,
        pad: int | None = None,
    ) -> None:
        """`kind`: "chat", "pair", "reply", or "written": turns as "chat", a text with the reply right behind it.
        `longest`: in tokens. `eos`: closes every row, where given.

        Args:
            rows: of the model's embedding; None: any token will do. pad: what rows are filled up with; None: as the
                tokenizer would.

        Raises:
            RunError: `longest` holds no more than special tokens.
        """
        self._tokenizer = tokenizer
        self._kind = kind
        self._longest = longest
        self._rows = rows
        self._pad = (tokenizer.pad_token_id or 0) if pad is None else pad
        self._eos = eos
        self._setting = "reward_model.model" if eos is None else "policy.model"
        self._known: dict[tuple[Talk, str], dict[str, list[int]]] = {}
        self._told = False
        self._paired = kind == "pair" and eos is None
        special = tokenizer.num_special_tokens_to_add(self._paired) + (eos is not None)
        if longest <= special:
            raise RunError(
                f"reward_model.max_tokens: {longest} tokens of {named(tokenizer)} hold no text beside its {special} "
                f"special tokens; wanted {special + 1} or more"
            )

    def check(self, texts: Sequence[tuple[Talk, str]]) -> None:
        """See that the model can read these prompts and replies.

        Only a tokenizer with more tokens than the model has rows makes the rest differ from the first in that.

        Raises:
            RunError: a chat template that cannot be used, or a token without a row.
        """
        if self._kind in ("chat", "written") and self._eos is None:
            serves = Serves(self._tokenizer, self._setting, "assistant")
            for prompt, _ in texts if self._kind == "chat" else (row for row in texts if not isinstance(row[0], str)):
                serves(prompt, f"the prompt {plain(prompt)!r:.80}")
        whole = self._rows is not None and oversized(self._tokenizer, self._rows)
        for prompt, reply in texts if whole else texts[:1]:
            self._tokenize(prompt, reply)

    def batch(self, texts: Sequence[tuple[Talk, str]], device: torch.device) -> dict[str, Tensor]:
        """Keyword arguments of the model for (prompt, reply) rows; `attention_mask` says what is padding.

        Raises:
            RunError: see `check`.
        """
        rows = [self._row(*text) for text in texts]
        width = max(len(row["input_ids"]) for row in rows)
        batch = {}
        for key in rows[0]:
            fill = self._pad if key == "input_ids" else 0
            filled = [row[key] + [fill] * (width - len(row[key])) for row in rows]
            batch[key] = torch.tensor(filled, device=device)
        return batch

    def _row(self, prompt: Talk, reply: str) -> dict[str, list[int]]:
        key = (prompt if self._kind != "reply" else "", reply)
        if key not in self._known:
            if len(self._known) >= KEPT_TEXTS:
                self._known.clear()
            self._known[key] = self._tokenize(prompt, reply)
        return self._known[key]

    def _tokenize(self, prompt: Talk, reply: str) -> dict[str, list[int]]:
        room = self._longest - (self._eos is not None)
        row = self._join(prompt, reply)
        if len(row["input_ids"]) > room:
            if not self._told:
                told = f"a text of {len(row['input_ids'])} tokens is cut to {room}, as all longer ones are"
                print(f"reward_model: {told}", file=sys.stderr)
                self._told = True
            row = self._cut(prompt, reply, room)
        row = {key: list(value) for key, value in row.items()}
        row.setdefault("attention_mask", [1] * len(row["input_ids"]))
        if self._eos is not None or not row["input_ids"]:  # a model must be given something to read
            closing = {"input_ids": self._pad if self._eos is None else self._eos, "attention_mask": 1}
            for key, value in row.items():
                value.append(closing.get(key, 0))
        if self._rows is not None:
            text = reply if self._kind == "reply" else plain(prompt) + BETWEEN + reply
            check_tokens(row["input_ids"], self._rows, self._tokenizer, f"the text {text!r:.80}", self._setting)
        return row

    def _cut(self, prompt: Talk, reply: str, room: int) -> Any:
        """At most `room` tokens of a row that has more.

        Of prompt and reply as one text the prompt is shortened first (`fitted`): of replies that are cut off whole,
        one could not be told from another.
        """
        if self._kind == "reply" or self._paired:
            return self._join(prompt, reply, truncation=True, max_length=room)
        row = fitted(self._tokenizer, prompt, room, lambda shorter: self._join(shorter, reply))
        return row if len(row["input_ids"]) <= room else self._join(prompt, reply, truncation=True, max_length=room)

    def _join(self, prompt: Talk, reply: str, **cut: Any) -> Any:
        if self._kind == "reply":
            return self._tokenizer(reply, **cut)
        if self._paired:
            return self._tokenizer(plain(prompt), reply, **cut)  # truncation takes from the longer of both
        if self._kind == "written" and isinstance(prompt, str):
            begun = bool(self._tokenizer.bos_token) and prompt.startswith(self._tokenizer.bos_token)
            return self._tokenizer(prompt + reply, add_special_tokens=not begun, **cut)
        if self._kind in ("chat", "written") and self._tokenizer.chat_template:
            return chat(self._tokenizer, messages_of(prompt, reply), self._setting, return_dict=True, **cut)
        return self._tokenizer(plain(prompt) + BETWEEN + reply, **cut)
