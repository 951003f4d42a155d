"""Chat templates that write the date, as Llama 3's do: all that a run renders is rendered as of one moment."""

from __future__ import annotations

import functools
import json
from datetime import datetime
from typing import Any

CLOCK = "{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}"


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
