"""Prompts and completions as other trainers hand them over: texts, or lists of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fpo_train.data.turns import Talk, turn_of
from fpo_train.errors import RunError


def talk_in(prompt: Any, where: str) -> Talk:
    """What is asked: a text stays one, messages become turns, all of them.

    Raises:
        RunError: it is neither, or a message of another role than system, user and assistant.
    """
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list | tuple) or not prompt:
        raise RunError(f"{where}: wanted a text or a list of messages, got {prompt!r:.80}")
    return tuple(turn_of(message, "prompt", where) for message in prompt)


def reply_in(completion: Any, where: str) -> str:
    """The reply: a text, or the content of the assistant's one message.

    Raises:
        RunError: anything else, such as several messages with tool calls between them.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list | tuple) or len(completion) != 1:
        raise RunError(f"{where}: wanted a text or one message of the assistant, got {completion!r:.80}")
    role, text = turn_of(completion[0], "completion", where)
    if role != "assistant":
        raise RunError(f"{where}: wanted a message of the assistant, got one of the {role}")
    return text


def column(columns: Mapping[str, Any], name: str, count: int) -> Sequence[Any]:
    """A data set's column, as a trainer passes it on: a value a completion.

    Raises:
        RunError: there is none of that name, or it has another length.
    """
    if name not in columns:
        there = ", ".join(sorted(key for key, value in columns.items() if isinstance(value, list))) or "none"
        raise RunError(
            f'reference: the data set has no column "{name}"; those passed on: {there}. reference="group" '
            "compares with another completion of the prompt, and a function is called with the prompts"
        )
    found = columns[name]
    if not isinstance(found, list | tuple) or len(found) != count:
        size = f"{len(found)} values" if isinstance(found, list | tuple) else type(found).__name__
        raise RunError(f'reference: the column "{name}" holds {size} for {count} completions; wanted one each')
    return found
