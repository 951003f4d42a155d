"""Prompts: read from people's files, rendered through the chat template once, dealt out in a seeded order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fpo_train.config import DataConfig
from fpo_train.errors import NoColumn, RunError

from .limits import check_tokens, named
from .places import rows_at
from .rows import Row, hub_rows, rows_of
from .turns import Talk, Turn, fitted, instructed, messages_of, plain, roles_of, talk_of, writable


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as written and as the model reads it."""

    name: str
    text: str
    """For a reader: a user's one turn as it is, several with their roles in front."""
    ids: tuple[int, ...]
    turns: tuple[Turn, ...] = ()
    """Role and text of each turn; empty where `text` is the only one, a user's."""

    @classmethod
    def of(cls, name: str, talk: Talk, ids: Sequence[int]) -> Prompt:
        """A prompt from what is asked."""
        return cls(name=name, text=plain(talk), ids=tuple(ids), turns=() if isinstance(talk, str) else talk)

    @property
    def talk(self) -> Talk:
        """What is asked, as one text or as turns."""
        return self.turns or self.text


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


def read_prompts(
    name: str = "questions",
    split: str = "train",
    limit: int = 0,
    *,
    column: str = "",
    system: str = "",
    subset: str = "",
    skipped: list[str] | None = None,
) -> list[tuple[str, Talk]]:
    """(id, what is asked) of each row of a file, of a set shipped with the package, or of a dataset on the hub.

    Args:
        name: the file, folder, set or dataset. split: of a dataset. limit: the first so many that can be read; 0: all.
        column: that holds the prompt, a text or a list of messages; empty: `prompt`, else `messages`. system: put
            before what has no system prompt of its own. subset: of a hub dataset. skipped: complaints about rows that
            are passed by; None: the first ends the reading.

    Raises:
        RunError: no such file, no prompt in it, a row without one, or an id used twice; a dataset that cannot be
            loaded; a split, subset or column of what has none.
    """
    path = rows_at(name, "data.prompts")

    def refuse(error: RunError) -> None:
        if skipped is None and isinstance(error, NoColumn):
            raise error
        if skipped is None:
            raise RunError(f"{error} (data.bad_rows skip leaves such rows out)") from error
        skipped.append(str(error))

    found: dict[str, Talk] = {}
    if path is None:
        rows = hub_rows(name, "data.prompts", split, subset)
    else:
        for setting, value, default in (("split", split, "train"), ("subset", subset, "")):
            if value != default and (path.is_file() or setting == "subset"):
                raise RunError(f"data.{setting}: {path} has none, got {value!r}")
        rows = rows_of(path, "data.prompts", split, refuse)
    for row in rows:
        try:
            ident, talk = _asked(row, column)
            if ident in found:
                raise RunError(f"data.prompts: {row.where} repeats the id {ident}")
        except RunError as error:
            refuse(error)
            continue
        found[ident] = instructed(talk, system)
        if len(found) == limit:
            break
    if not found:
        first = skipped[0].removeprefix("data.prompts: ") if skipped else ""
        why = f" that can be read, the first complaint of {len(skipped)} being: {first}" if skipped else ""
        raise RunError(f"data.prompts: {name} holds no prompts{why}")
    return list(found.items())


def prompts_of(config: DataConfig, skipped: list[str]) -> list[tuple[str, Talk]]:
    """`read_prompts` as a run's settings have it; under `data.bad_rows` "skip" complaints are put in `skipped`."""
    return read_prompts(
        config.prompts,
        config.split,
        config.limit,
        column=config.column,
        system=config.system,
        subset=config.subset,
        skipped=skipped if config.bad_rows == "skip" else None,
    )


def _asked(row: Row, column: str) -> tuple[str, Talk]:
    name = column or ("messages" if "prompt" not in row.columns and "messages" in row.columns else "prompt")
    where = f"data.prompts: {row.where}"
    talk = talk_of(row.columns, name, where, "data.column")
    ident = next((row.columns[key] for key in ("id", "prompt_id") if row.columns.get(key) is not None), row.number)
    writable(str(ident), "id", where)
    return str(ident), talk


def render_prompts(
    texts: Sequence[tuple[str, Talk]],
    seed: int,
    tokenizer: Any,
    room: int,
    config: DataConfig | None = None,
    rows: int | None = None,
    skipped: list[str] | None = None,
) -> Prompts:
    """Render and check the prompts.

    Args:
        room: the context less the longest reply, in tokens. rows: of the model's embedding; None: any token will do.
        skipped: complaints about prompts that are passed by; None: the first ends the reading.

    Raises:
        RunError: a prompt that does not fit, under `data.truncate` "refuse", or that the model cannot read; a chat
            template that cannot be used; no prompt that can be.
    """
    config = config or DataConfig()
    if room < 1:
        raise RunError(f"rollout.max_new_tokens: the longest reply alone overruns the model's context by {1 - room}")
    serves, longest = Serves(tokenizer, "policy.model"), min(room, config.max_tokens or room)
    prompts = []
    for ident, talk in texts:
        where = f"data.prompts: prompt {ident}"
        if isinstance(talk, str):
            serves(talk, where)  # where it does not, no row is at fault
        try:
            serves(talk, where)
            whole = render(tokenizer, talk, config.double_bos)
            ids = shorten(tokenizer, talk, whole, longest, config)
            if ids is None:
                bound = "data.max_tokens leaves" if config.max_tokens == longest else "the model's context leaves"
                raise RunError(f"{where} takes {len(whole)} tokens, but {bound} {longest} beside the longest reply")
            if rows is not None:
                check_tokens(ids, rows, tokenizer, where, "policy.model")
        except RunError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        prompts.append(Prompt.of(ident, talk, ids))
    if skipped and not prompts:
        raise RunError(f"data.prompts: none can be used, the last complaint being: {skipped[-1]}")
    return Prompts(prompts, seed)


def shorten(tokenizer: Any, talk: Talk, ids: list[int], longest: int, config: DataConfig) -> list[int] | None:
    """A rendered prompt in at most `longest` tokens, as `data.truncate` has it; None where that is not to be had."""
    if len(ids) <= longest:
        return ids
    if config.truncate == "right":
        return ids[:longest] if longest > 0 else None
    if config.truncate == "header":
        row = fitted(tokenizer, talk, longest, lambda some: {"input_ids": render(tokenizer, some, config.double_bos)})
        if len(row["input_ids"]) <= longest:
            return row["input_ids"]
    return None


def render(tokenizer: Any, talk: Talk, double_bos: bool = False) -> list[int]:
    """Token ids of what is asked up to where the reply begins.

    The chat template writes the special tokens itself, so it also tokenises: no second BOS is added, unless
    `double_bos` asks for the published script's way: the rendered text through the tokenizer once more. Without a
    template a user's one turn is read as it is, behind the system prompt where there is one.
    """
    if tokenizer.chat_template is None:
        return tokenizer(talk if isinstance(talk, str) else "\n\n".join(text for _, text in talk))["input_ids"]
    messages = messages_of(talk)
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
    """See that the chat template, where there is one, serves turns of these roles and says what each of them says.

    A template of another make of messages (of parts, as with images) may leave the words out without a complaint.

    Raises:
        RunError: it does not.
    """
    if tokenizer.chat_template is None:
        return
    for place, role in enumerate(roles):
        said = []
        for told in ("One", "Two"):
            turns = [(one, told if n == place else "Say a number.") for n, one in enumerate(roles)]
            asks = roles[-1] == "user"
            said.append(chat(tokenizer, messages_of(tuple(turns)), setting, add_generation_prompt=asks, tokenize=False))
        if said[0] == said[1]:
            told = f"leaves out what the {role} says" if said[0].strip() else "renders nothing"
            raise RunError(f"{setting} {named(tokenizer)}: its chat template {told}")


class Serves:
    """`check_template` for each order of roles that turns up, once."""

    def __init__(self, tokenizer: Any, setting: str, *reply: str) -> None:
        """`reply`: the role that follows what is asked, where one does."""
        self._tokenizer, self._setting, self._reply = tokenizer, setting, reply
        self._served: set[tuple[str, ...]] = set()

    def __call__(self, talk: Talk, where: str) -> None:
        """`where`: what a complaint about a talk of several turns begins with.

        Raises:
            RunError: the template does not serve it, or there is none to tell its turns apart.
        """
        roles = roles_of(talk)
        if roles in self._served:
            return
        if self._tokenizer.chat_template is None and len(roles) - ("system" in roles) > 1:
            told = "has several turns, and the tokenizer has no chat template to write them with"
            raise RunError(f"{where} {told} ({self._setting} {named(self._tokenizer)})")
        try:
            check_template(self._tokenizer, [*roles, *self._reply], self._setting)
        except RunError as error:
            if isinstance(talk, str):
                raise
            raise RunError(f"{where}: {error}") from error
        self._served.add(roles)
