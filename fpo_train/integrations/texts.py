"""Prompts and completions as other trainers hand them over: texts, or lists of messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fpo_train.data.prompts import Prompt
from fpo_train.data.turns import Talk, turn_of
from fpo_train.errors import RunError
from fpo_train.processes import Ranks
from fpo_train.reward_model.replay import Pair

from .groups import Grouped
from .references import next_in_group, talk_in

Reference = str | Callable[[Sequence[Any]], Sequence[str]]
OF_GROUP = "group"
TRAINERS = ("completion_ids", "trainer_state", "environments")  # what a trainer adds to a data set's columns
BLANK = "–"  # stands in where a text cannot be read, and is not scored


def grouped(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
    reference: Reference,
    ranks: Ranks,
    device: torch.device,
    matters: Callable[[str], bool] = lambda column: False,
) -> tuple[Grouped, list[str]]:
    """Completions with their references, and why some cannot be scored: these are not usable.

    Args:
        reference: see `FPOReward`. ranks: among which groups may be split. device: of the tensors.
        matters: whether a column of the data makes of two equal prompts two.

    Raises:
        RunError: nothing to score, lists of different lengths, or no such column.
    """
    if len(prompts) != len(completions):
        raise RunError(f"completions: wanted one for each of {len(prompts)} prompts, got {len(completions)}")
    if not len(prompts):
        raise RunError("prompts: wanted at least one, got none")
    talks: list[Talk] = []
    replies, usable, complaints = [], [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        try:
            talk, reply = talk_in(prompt, "prompts"), reply_in(completion, "completions")
            usable.append(True)
        except RunError as error:
            talk, reply = BLANK, BLANK
            usable.append(False)
            complaints.append(str(error))
        talks.append(talk)
        replies.append(reply)
    passed = {key: value for key, value in columns.items() if isinstance(value, list) and len(value) == len(talks)}
    passed = {key: value for key, value in passed.items() if key not in TRAINERS}
    telling = sorted(key for key in passed if matters(key))
    marks = [repr([passed[key][n] for key in telling]) if telling else "" for n in range(len(talks))]
    rows = enumerate(zip(talks, usable, marks, strict=True))
    keys = [f"{'' if may else n}{talk!r}{mark}" for n, (talk, may, mark) in rows]
    others = references(prompts, keys, replies, columns, reference, ranks, usable)
    for place, other in enumerate(others):
        if other is None:
            usable[place] = False
            complaints.append("the reference is no text")
    known = [BLANK if other is None else other for other in others]
    written = Grouped.of(talks, replies, known, device, usable, marks)
    return Grouped(**vars(written) | {"groups": keys, "columns": passed}), complaints


def references(
    prompts: Sequence[Any],
    keys: Sequence[str],
    replies: Sequence[str],
    columns: Mapping[str, Any],
    reference: Reference,
    ranks: Ranks,
    usable: Sequence[bool],
) -> list[str | None]:
    """What each completion is compared with; None where that is no text.

    Args:
        keys: the completions' groups. usable: whose prompts can be read. The rest: see `grouped`.

    Raises:
        RunError: no such column, or a function that returns something else than a text a prompt.
    """
    if reference == OF_GROUP:
        every = ranks.gather_objects(list(zip(keys, replies, strict=True)))
        after = dict(zip(every, next_in_group(*map(list, zip(*every, strict=True))), strict=True))
        return [after[one] for one in zip(keys, replies, strict=True)]
    if isinstance(reference, str):
        found = column(columns, reference, len(keys))
    else:
        asked = [prompt for prompt, may in zip(prompts, usable, strict=True) if may]
        said = reference(asked) if asked else []
        if not isinstance(said, list | tuple) or len(said) != len(asked):
            wanted = f"wanted {len(asked)} texts, one a prompt"
            raise RunError(f"reference: the function returned {said!r:.80}; {wanted}")
        answers = iter(said)
        found = [next(answers) if may else None for may in usable]
    others: list[str | None] = []
    for one in found:
        try:
            others.append(reply_in(one, "reference"))
        except RunError:
            others.append(None)
    return others


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


def labelled(talk: Talk, chosen: str, reference: str, preference: float, call: int) -> Pair:
    """A pair of texts."""
    return Pair(
        prompt=Prompt.of("", talk, ()),
        chosen=(),
        reference=(),
        chosen_text=chosen,
        reference_text=reference,
        preference=preference,
        iteration=call,
        features=None,
    )
