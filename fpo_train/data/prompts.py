"""Prompts: read from JSONL, rendered through the chat template once, dealt out in a seeded order."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpo_train.config import DataConfig
from fpo_train.errors import RunError

from .limits import check_tokens, named
from .places import prompts_file

UNSEEN = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # Unicode's controls, formats and separators


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as written and as the model reads it."""

    name: str
    text: str
    ids: tuple[int, ...]


class Prompts:
    """All prompts of a run; `batch(i)` is the same for the same seed, whatever ran before."""

    def __init__(self, prompts: list[Prompt], seed: int) -> None:
        self._prompts = prompts
        self._seed = seed

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.ids) for prompt in self._prompts)

    def batch(self, iteration: int, size: int, stream: int = 0) -> list[Prompt]:
        """`size` prompts for an iteration: epochs without repetition, each in an order of its own."""
        chosen = []
        for position in range(iteration * size, (iteration + 1) * size):
            epoch, place = divmod(position, len(self))
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch * 1_009 + stream)
            order = torch.randperm(len(self), generator=generator)
            chosen.append(self._prompts[int(order[place])])
        return chosen


def read_prompts(name: str, split: str = "train", limit: int = 0) -> list[tuple[str, str]]:
    """(id, prompt) of each line of a JSONL file, of a set shipped with the package, or of a dataset on the hub.

    Args:
        name: the file, set or dataset. split: of a dataset. limit: the first so many; 0: all.

    Raises:
        RunError: no such file, no prompt in it, a line without a text under "prompt", or an id used twice; a dataset
            that cannot be loaded.
    """
    path = prompts_file(name)
    found = _read_dataset(name, split) if path is None else _read_file(path)
    if not found:
        raise RunError(f"data.prompts: {name} holds no prompts")
    return list(found.items())[: limit or None]


def _read_file(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, row in json_lines(path, "data.prompts"):
        _keep(found, row, number, f"{path} line {number}")
    return found


def json_lines(path: Path, setting: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of each line of a JSONL file that is not blank; what is JSON but no object comes as {}.

    Raises:
        RunError: the file is not UTF-8, or a line of it is not JSON; `setting` is what the complaint begins with.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise RunError(f"{setting}: {path} is not UTF-8 text") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = parsed(line, f"{setting}: {path} line {number}")
        yield number, row if isinstance(row, dict) else {}


def parsed(line: str, where: str) -> Any:
    """What a line of JSON says.

    Raises:
        RunError: it is not JSON, or nested or with numbers beyond all measure.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        told = error.msg if isinstance(error, json.JSONDecodeError) else str(error).split(";")[0]
        raise RunError(f"{where} is not JSON ({told})") from error


def text_of(row: dict[str, Any], name: str, where: str, reply: bool = False) -> str:
    """The text that a row has under a name: Unicode that a file can hold, with something in it to be seen.

    Args:
        where: what the complaint begins with. reply: it may say nothing, or have a NUL in it, as models' replies do.

    Raises:
        RunError: it is none.
    """
    text = row.get(name)
    if not isinstance(text, str) or not (reply or text.strip()):
        raise RunError(f'{where} has no text under "{name}"')
    writable(text, name, where)
    if reply:
        return text
    if "\0" in text:
        raise RunError(f'{where} holds a NUL character under "{name}"')
    if all(unicodedata.category(one) in UNSEEN for one in text):
        raise RunError(f'{where} has no text under "{name}", but characters alone that cannot be seen')
    return text


def writable(text: str, name: str, where: str) -> None:
    """See that a file can hold what stands under a name: JSON can spell half a character.

    Raises:
        RunError: it cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise RunError(f'{where} is not Unicode text: {half} under "{name}" is half a character') from error


def _read_dataset(name: str, split: str) -> dict[str, str]:
    from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]

    try:
        rows = load_dataset(name, split=split)
    except (OSError, ValueError) as error:  # datasets' own errors are of these kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"data.prompts: {name}, split {split}, cannot be loaded: {first}") from error
    found: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        _keep(found, {"id": row.get("prompt_id", number), **row}, number, f"{name} row {number}")
    return found


def _keep(found: dict[str, str], row: dict[str, Any], number: int, where: str) -> None:
    text = text_of(row, "prompt", f"data.prompts: {where}")
    ident = str(row.get("id", number))
    writable(ident, "id", f"data.prompts: {where}")
    if ident in found:
        raise RunError(f"data.prompts: {where} repeats the id {ident}")
    found[ident] = text


def render_prompts(
    texts: list[tuple[str, str]],
    seed: int,
    tokenizer: Any,
    room: int,
    config: DataConfig | None = None,
    rows: int | None = None,
) -> Prompts:
    """Render and check the prompts.

    Args:
        room: the context less the longest reply, in tokens. rows: of the model's embedding; None: any token will do.

    Raises:
        RunError: a prompt that does not fit, under `data.truncate` "refuse", or that the model cannot read; a chat
            template that cannot be used.
    """
    config = config or DataConfig()
    if room < 1:
        raise RunError(f"rollout.max_new_tokens: the longest reply alone overruns the model's context by {1 - room}")
    check_template(tokenizer, ["user"], "policy.model")
    longest = min(room, config.max_tokens or room)
    prompts = []
    for ident, text in texts:
        whole = render(tokenizer, text, config.double_bos)
        ids = shorten(tokenizer, text, whole, longest, config)
        if ids is None:
            bound = "data.max_tokens leaves" if config.max_tokens == longest else "the model's context leaves"
            raise RunError(
                f"data.prompts: prompt {ident} takes {len(whole)} tokens, but {bound} {longest} beside the longest "
                "reply"
            )
        if rows is not None:
            check_tokens(ids, rows, tokenizer, f"data.prompts: prompt {ident}", "policy.model")
        prompts.append(Prompt(name=ident, text=text, ids=tuple(ids)))
    return Prompts(prompts, seed)


def shorten(tokenizer: Any, text: str, ids: list[int], longest: int, config: DataConfig) -> list[int] | None:
    """A rendered prompt in at most `longest` tokens, as `data.truncate` has it; None where that is not to be had."""
    if len(ids) <= longest:
        return ids
    if config.truncate == "right":
        return ids[:longest] if longest > 0 else None
    if config.truncate == "header":
        words = tokenizer(text, add_special_tokens=False)["input_ids"]
        keep = len(words)
        while keep > 0 and len(ids) > longest:  # a shortened text may split into other tokens than its beginning did
            keep -= min(keep, len(ids) - longest)
            ids = render(tokenizer, tokenizer.decode(words[:keep]), config.double_bos)
        if len(ids) <= longest:
            return ids
    return None


def render(tokenizer: Any, text: str, double_bos: bool = False) -> list[int]:
    """Token ids of a user's message up to where the reply begins.

    The chat template writes the special tokens itself, so it also tokenises: no second BOS is added, unless
    `double_bos` asks for the published script's way: the rendered text through the tokenizer once more.
    """
    if tokenizer.chat_template is None:
        return tokenizer(text)["input_ids"]
    messages = [{"role": "user", "content": text}]
    if double_bos:
        rendered = chat(tokenizer, messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(rendered)["input_ids"]
    return chat(tokenizer, messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def chat(tokenizer: Any, messages: list[dict[str, str]], setting: str = "model", **options: Any) -> Any:
    """Messages through the tokenizer's chat template: what its `apply_chat_template` returns.

    Args:
        setting: that names the model; a complaint begins with it. options: of `apply_chat_template`.

    Raises:
        RunError: several templates and none of them the default, or one that refuses the messages or has a fault.
    """
    name, templates = named(tokenizer), tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        told = ", ".join(sorted(templates)) or "none"
        raise RunError(f"{setting} {name}: it has no chat template named default; those it has: {told}")
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        turns = " and ".join(message["role"] for message in messages)
        first = (str(error).strip().splitlines() or [""])[0]
        raise RunError(
            f"{setting} {name}: its chat template cannot render a {turns} message: {type(error).__name__}: {first}"
        ) from error


def check_template(tokenizer: Any, roles: Sequence[str], setting: str = "model") -> None:
    """See that the chat template, where there is one, serves turns of these roles and says what the last one says.

    A template of another make of messages (of parts, as with images) may leave the words out without a complaint.

    Raises:
        RunError: it does not.
    """
    if tokenizer.chat_template is None:
        return
    said = []
    for last in ("One", "Two"):
        messages = [{"role": role, "content": "Say a number."} for role in roles[:-1]]
        messages.append({"role": roles[-1], "content": last})
        said.append(chat(tokenizer, messages, setting, add_generation_prompt=roles[-1] == "user", tokenize=False))
    if said[0] == said[1]:
        told = f"leaves out what the {roles[-1]} says" if said[0].strip() else "renders nothing"
        raise RunError(f"{setting} {named(tokenizer)}: its chat template {told}")
