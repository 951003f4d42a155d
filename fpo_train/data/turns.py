"""What is asked of a model: one text of a user's, or turns of which the last is the user's."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fpo_train.errors import NoColumn, RunError

Turn = tuple[str, str]  # whose it is, and what it says
Talk = str | tuple[Turn, ...]
Row = TypeVar("Row", bound=Mapping[str, Any])

ROLES = "system", "user", "assistant"
UNSEEN = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # Unicode's controls, formats and separators


def turns_of(talk: Talk) -> tuple[Turn, ...]:
    """All turns; a text is the user's only one."""
    return (("user", talk),) if isinstance(talk, str) else talk


def roles_of(talk: Talk) -> tuple[str, ...]:
    """Whose turns they are, in order."""
    return tuple(role for role, _ in turns_of(talk))


def messages_of(talk: Talk, reply: str | None = None) -> list[dict[str, str]]:
    """The turns as chat templates take them, with the assistant's reply behind them, where one is given."""
    turns = turns_of(talk) + (() if reply is None else (("assistant", reply),))
    return [{"role": role, "content": text} for role, text in turns]


def plain(talk: Talk) -> str:
    """One text for a reader: the user's own, or all turns, each with its role in front."""
    if isinstance(talk, str):
        return talk
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in talk)


def instructed(talk: Talk, system: str) -> Talk:
    """The turns behind a system prompt, unless they have one of their own."""
    return talk if not system or roles_of(talk)[0] == "system" else (("system", system), *turns_of(talk))


def talk_of(row: Mapping[str, Any], name: str, where: str, setting: str = "") -> Talk:
    """What a row asks under a name: a text, or a list of messages up to the user's last turn.

    Args:
        where: what the complaint begins with. setting: by which another name can be given.

    Raises:
        RunError: it is neither.
    """
    value = row.get(name)
    if not isinstance(value, list | tuple):
        return text_of(row, name, where, setting=setting)
    turns = [turn_of(message, name, where) for message in value]
    while turns and turns[-1][0] != "user":
        turns.pop()
    if not turns:
        raise RunError(f'{where} has no text under "{name}": no message in it is a user\'s')
    return turns[0][1] if len(turns) == 1 else tuple(turns)


def reply_of(row: Mapping[str, Any], name: str, where: str) -> str:
    """The reply that a row has under a name: a text, or messages of which the last is the assistant's.

    Raises:
        RunError: it is neither.
    """
    value = row.get(name)
    if not isinstance(value, list | tuple):
        return text_of(row, name, where, reply=True)
    if not value or _role(value[-1]) != "assistant":
        raise RunError(f'{where} has no reply under "{name}": its last message is not the assistant\'s')
    return text_of({name: _content(value[-1])}, name, where, reply=True)


def turn_of(message: Any, name: str, where: str) -> Turn:
    """Role and text of a message that stands under a name.

    Raises:
        RunError: it is none, or of another role than `ROLES`.
    """
    role = _role(message)
    if role not in ROLES:
        wanted = f'{{"role": one of {", ".join(ROLES)}, "content": a text}}'
        raise RunError(f'{where} has no text under "{name}": wanted messages as {wanted}, got {message!r:.80}')
    return role, text_of({name: _content(message)}, name, where, reply=role == "assistant")


def _role(message: Any) -> str:
    role = message.get("role") if isinstance(message, Mapping) else None
    return role if isinstance(role, str) else ""


def _content(message: Mapping[str, Any]) -> Any:
    """A message's text; of one in parts, as models that see images take them, where all of them are texts."""
    content = message.get("content")
    if isinstance(content, list | tuple) and all(isinstance(part, Mapping) for part in content):
        parts = [part.get("text") for part in content if part.get("type") == "text"]
        return "".join(parts) if len(parts) == len(content) and all(isinstance(one, str) for one in parts) else None
    return content


def text_of(row: Mapping[str, Any], name: str, where: str, reply: bool = False, setting: str = "") -> str:
    """The text that a row has under a name: Unicode that a file can hold, with something in it to be seen.

    Args:
        where: what the complaint begins with. reply: it may say nothing, or have a NUL in it, as models' replies do.
        setting: by which another name can be given.

    Raises:
        RunError: it is none.
    """
    text = row.get(name)
    if not isinstance(text, str) or not (reply or text.strip()):
        told = f'{where} has no text under "{name}"'
        if row and name not in row:
            told += f", it has {', '.join(map(str, row)):.200}"
            told += f"; which of them, {setting} says" if setting else ""
            raise NoColumn(told)
        raise RunError(told)
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


def fitted(tokenizer: Any, talk: Talk, longest: int, rendered: Callable[[Talk], Row]) -> Row:
    """A rendering of at most `longest` tokens, where shortening the talk can bring that about.

    The oldest turns go first, a system prompt aside, then the end of the user's last one.

    Args:
        rendered: `input_ids` of a talk, and what else goes with them.
    """
    row = rendered(talk)
    while len(row["input_ids"]) > longest and (later := _without_oldest(talk)):
        talk = later
        row = rendered(talk)
    earlier, (role, text) = turns_of(talk)[:-1], turns_of(talk)[-1]
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    keep = len(words)
    while keep > 0 and len(row["input_ids"]) > longest:  # a shortened text may split into other tokens
        keep -= min(keep, len(row["input_ids"]) - longest)
        last = tokenizer.decode(words[:keep])
        row = rendered((*earlier, (role, last)) if earlier else last)
    return row


def _without_oldest(talk: Talk) -> Talk:
    """The talk without what was said before the user's second turn; empty where there is none."""
    roles = roles_of(talk)
    if roles.count("user") < 2:
        return ()
    turns, kept = turns_of(talk), roles[0] == "system"
    first = roles.index("user", 1 + kept) if roles[kept] == "user" else roles.index("user")
    rest = turns[first:]
    return (turns[0], *rest) if kept else rest if len(rest) > 1 else rest[0][1]
