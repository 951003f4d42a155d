"""Chat templates: from a file; and those that write the date, as Llama 3's do, which a run renders as of one moment."""

from __future__ import annotations

import functools
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from fpo_train.errors import RunError

CLOCK = "{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}"


def read(name: str) -> str | None:
    """The chat template that `data.chat_template` names: a Jinja file's; None for "auto" and "none".

    Raises:
        RunError: no such file, or none that can be read.
    """
    if name in ("auto", "none"):
        return None
    path = Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = "is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else "cannot be read"
        raise RunError(f"data.chat_template: {path} {why}; wanted auto, none or a Jinja file") from error


def choose(tokenizer: Any, name: str) -> None:
    """Give a tokenizer the chat template that `data.chat_template` names."""
    if name != "auto":
        tokenizer.chat_template = read(name)


def now() -> str:
    """The moment that chat templates would write by themselves, in ISO 8601 to the second."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(conversations=[[]], chat_template=CLOCK)
    return str(rendered[0][0])


def known(moment: Any) -> str:
    """A moment that a file was found to hold, or nothing where it is none."""
    try:
        datetime.fromisoformat(str(moment))
    except ValueError:
        return ""
    return str(moment)


def pin(tokenizer: Any, moment: str) -> None:
    """Let the tokenizer's chat template take `moment` (ISO 8601) for now, whoever has it rendered from here on."""
    if tokenizer is not None and "strftime_now" in json.dumps(tokenizer.chat_template):
        told = datetime.fromisoformat(moment).strftime
        tokenizer.apply_chat_template = functools.partial(tokenizer.apply_chat_template, strftime_now=told)
