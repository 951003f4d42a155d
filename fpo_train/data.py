"""Prompts: read from JSONL, rendered through the chat template once, dealt out in a seeded order."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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

    def batch(self, iteration: int, size: int, stream: int = 0) -> list[Prompt]:
        """`size` prompts for an iteration: epochs without repetition, each in an order of its own."""
        chosen = []
        for position in range(iteration * size, (iteration + 1) * size):
            epoch, place = divmod(position, len(self))
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch * 1_009 + stream)
            order = torch.randperm(len(self), generator=generator)
            chosen.append(self._prompts[int(order[place])])
        return chosen


def read_prompts(name: str) -> list[tuple[str, str]]:
    """(id, prompt) of each line of a JSONL file, or of a set shipped with the package.

    Raises:
        RunError: no such file, no prompt in it, a line without a text under "prompt", or an id used twice.
    """
    shipped = SHIPPED / f"{name}.jsonl"
    path = shipped if shipped.is_file() and not Path(name).exists() else Path(name).expanduser()
    if not path.is_file():
        raise RunError(f"data.prompts: no file {name} and no shipped set of that name")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise RunError(f"data.prompts: {path} is not UTF-8 text") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RunError(f"data.prompts: {path} line {number} is not JSON ({error.msg})") from error
        text = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise RunError(f'data.prompts: {path} line {number} has no text under "prompt"')
        ident = str(row.get("id", number))
        if ident in found:
            raise RunError(f"data.prompts: {path} line {number} repeats the id {ident}")
        found[ident] = text
    if not found:
        raise RunError(f"data.prompts: {path} holds no prompts")
    return list(found.items())


def render_prompts(texts: list[tuple[str, str]], seed: int, tokenizer: Any, room: int) -> Prompts:
    """Render and check the prompts; `room` is the context less the longest reply, in tokens.

    Raises:
        RunError: a prompt that does not fit.
    """
    if room < 1:
        raise RunError(f"rollout.max_new_tokens: the longest reply alone overruns the model's context by {1 - room}")
    prompts = []
    for ident, text in texts:
        ids = render(tokenizer, text)
        if len(ids) > room:
            raise RunError(
                f"data.prompts: prompt {ident} takes {len(ids)} tokens, but the model's context leaves {room} "
                "beside the longest reply"
            )
        prompts.append(Prompt(name=ident, text=text, ids=tuple(ids)))
    return Prompts(prompts, seed)


def render(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a user's message up to where the reply begins.

    The chat template writes the special tokens itself, so it also tokenises: no second BOS is added.
    """
    if tokenizer.chat_template is None:
        return tokenizer(text)["input_ids"]
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
