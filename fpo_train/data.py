"""Prompts: read from JSONL, rendered through the chat template once, dealt out in a seeded order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import DataConfig
from .errors import RunError

SHIPPED = Path(__file__).parent / "prompts"


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
    shipped = SHIPPED / f"{name}.jsonl"
    path = shipped if shipped.is_file() and not Path(name).exists() else Path(name).expanduser()
    if path.is_file():
        found = _read_file(path)
    elif name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).suffix:
        found = _read_dataset(name, split)
    else:
        raise RunError(f"data.prompts: no file {name} and no shipped set of that name")
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
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RunError(f"{setting}: {path} line {number} is not JSON ({error.msg})") from error
        yield number, row if isinstance(row, dict) else {}


def _read_dataset(name: str, split: str) -> dict[str, str]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise RunError(f"data.prompts: {name} is no file; to load it from the hub, install datasets") from error
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
    text = row.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise RunError(f'data.prompts: {where} has no text under "prompt"')
    ident = str(row.get("id", number))
    if ident in found:
        raise RunError(f"data.prompts: {where} repeats the id {ident}")
    found[ident] = text


def render_prompts(
    texts: list[tuple[str, str]], seed: int, tokenizer: Any, room: int, config: DataConfig | None = None
) -> Prompts:
    """Render and check the prompts; `room` is the context less the longest reply, in tokens.

    Raises:
        RunError: a prompt that does not fit, under `data.truncate` "refuse".
    """
    config = config or DataConfig()
    if room < 1:
        raise RunError(f"rollout.max_new_tokens: the longest reply alone overruns the model's context by {1 - room}")
    longest = min(room, config.max_tokens or room)
    prompts = []
    for ident, text in texts:
        ids = render(tokenizer, text, config.double_bos)
        if len(ids) > longest:
            ids = _shorten(tokenizer, ident, text, ids, longest, config)
        prompts.append(Prompt(name=ident, text=text, ids=tuple(ids)))
    return Prompts(prompts, seed)


def _shorten(tokenizer: Any, ident: str, text: str, ids: list[int], longest: int, config: DataConfig) -> list[int]:
    if config.truncate == "right":
        return ids[:longest]
    if config.truncate == "header":
        words = tokenizer(text, add_special_tokens=False)["input_ids"]
        keep = len(words)
        while keep > 0 and len(ids) > longest:  # a shortened text may split into other tokens than its beginning did
            keep -= min(keep, len(ids) - longest)
            ids = render(tokenizer, tokenizer.decode(words[:keep]), config.double_bos)
        if len(ids) <= longest:
            return ids
    bound = "data.max_tokens leaves" if config.max_tokens == longest else "the model's context leaves"
    raise RunError(
        f"data.prompts: prompt {ident} takes {len(ids)} tokens, but {bound} {longest} beside the longest reply"
    )


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
    name, templates = getattr(tokenizer, "name_or_path", ""), tokenizer.chat_template
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
