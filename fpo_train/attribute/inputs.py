"""The pairs that a reward model was trained on, and the replies to explain, as people keep them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fpo_train.config import AttributeConfig
from fpo_train.data.places import FORMATS, rows_at
from fpo_train.data.rows import Row, hub_rows, rows_of
from fpo_train.data.turns import Talk, instructed, messages_of, reply_of, talk_of, writable
from fpo_train.errors import RunError
from fpo_train.oracle.preferences import labelled

Text = tuple[Talk, str]  # a prompt and a reply to it


@dataclass(frozen=True, kw_only=True)
class TrainingPair:
    """A pair of replies to a prompt, and the probability that the first is the better one."""

    where: str
    prompt: Talk
    chosen: str
    rejected: str
    preference: float

    @property
    def texts(self) -> tuple[Text, Text]:
        """Both replies, each with its prompt."""
        return (self.prompt, self.chosen), (self.prompt, self.rejected)

    @property
    def digest(self) -> str:
        """By which its gradient is found again: of all its texts, but not its label."""
        told = json.dumps([messages_of(self.prompt), self.chosen, self.rejected])
        return hashlib.sha256(told.encode()).hexdigest()[:24]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply that is to be explained."""

    name: str
    prompt: Talk
    text: str


def read_pairs(config: AttributeConfig) -> list[TrainingPair]:
    """The pairs, in their order.

    Raises:
        RunError: nothing of that name, no pair in it, or a row of another form; it is named with its file and column.
    """
    path = rows_at(config.pairs, "pairs")
    if path is None:
        rows: Iterable[Row] = hub_rows(config.pairs, "pairs", config.split, config.subset)
    else:
        for setting, value, default in (("split", config.split, "train"), ("subset", config.subset, "")):
            if value != default and (path.is_file() or setting == "subset"):
                raise RunError(f"{setting}: {path} has none, got {value!r}")
        rows = rows_of(path, "pairs", config.split)
    found = [
        TrainingPair(where=where, prompt=prompt, chosen=chosen, rejected=rejected, preference=preference)
        for where, (prompt, chosen, rejected, preference) in islice(
            labelled(rows, "pairs", config.system), config.limit or None
        )
    ]
    if not found:
        raise RunError(f"pairs: {config.pairs} holds none")
    return found


def read_replies(config: AttributeConfig) -> list[Reply]:
    """The replies of the file, or the one of the command line.

    In a row the reply is `reply`, else `completion`: a text, or messages that end with the assistant's; the turns
    before it are the prompt where there is no `prompt`. `messages` alone are a prompt and its reply.

    Raises:
        RunError: no such file, no reply in it, or a row of another form; it is named with its file and column.
    """
    if config.reply:
        row = Row(1, "reply", {"prompt": config.prompt, "reply": config.reply})
        return [_reply(row, "the command line", config, unasked=not config.prompt)]
    path = Path(config.replies).expanduser()
    if not path.exists():
        raise RunError(f"replies: no file {config.replies}; read are {FORMATS}")
    found = [_reply(row, f"replies: {row.where}", config) for row in rows_of(path, "replies", config.split)]
    if not found:
        raise RunError(f"replies: {config.replies} holds none")
    return found


def _reply(row: Row, where: str, config: AttributeConfig, unasked: bool = False) -> Reply:
    columns: Mapping[str, Any] = row.columns
    name = next((one for one in ("reply", "completion", "messages") if one in columns), "reply")
    text = reply_of(columns, name, where).strip()
    if "prompt" not in columns and isinstance(columns[name], list | tuple):
        columns = {**columns, "prompt": columns[name][:-1]}
    prompt = "" if unasked else instructed(talk_of(columns, "prompt", where), config.system)
    ident = columns.get("id")
    told = str(row.number if ident is None else ident)
    writable(told, "id", where)
    return Reply(name=told, prompt=prompt, text=text)
