"""What a command line says, made plain before a parser reads it, and which of it has an effect; imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from .settings import PENALTY_KINDS, RunConfig

NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-inf", re.IGNORECASE)
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
SWITCHES = ("--resume", "--dry_run", "--vectorised", "--curvature")  # true where they stand alone
STEERING = tuple(kind for kind in PENALTY_KINDS if kind != "none")
READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("penalty.gamma", "penalty.gamma_units", "penalty.parameters", "penalty.checkpoints"), STEERING),
    **dict.fromkeys(("penalty.sketch_dim", "penalty.pairs"), ("exact", "residual")),
    "penalty.damping": ("exact",),
    **dict.fromkeys(("penalty.lengths", "penalty.noises"), ("residual",)),
    **dict.fromkeys(("oracle.offset", "oracle.utility_range", "oracle.mean_over", "oracle.quantization"), ("base",)),
    **dict.fromkeys(("oracle.key_variable", "oracle.requests_per_minute", "oracle.concurrency"), ("judge",)),
    **dict.fromkeys(("oracle.retries", "oracle.timeout"), ("judge",)),
}
"""Setting → the kinds of its section that read it; what is not here all read, or its own class looks at."""


def arranged(arguments: list[str]) -> list[str]:
    """Files before options, so that options win over them wherever they stand; switches alone; lists as a,b."""
    files, options, lists = [], [], lists_of_a_run()
    apart = [part for word in arguments for part in (word.split("=", 1) if word.partition("=")[0] in lists else [word])]
    words = list(zip(apart, [*apart[1:], "--"], strict=False))[1:]
    while words:
        word, following = words.pop(0)
        if word == "--config" and words:
            files += [word, words.pop(0)[0]]
        elif word.startswith("--config="):
            files.append(word)
        elif word in SWITCHES and following.startswith("--"):
            options.append(f"{word}=true")
        elif word in lists and words and not following.startswith("["):
            options += [word, f"[{words.pop(0)[0]}]"]
        elif word.startswith("--") and "=" not in word and NEGATIVE.fullmatch(following):  # of which -1e-4 is no option
            options.append(f"{word}={words.pop(0)[0]}")
        else:
            options.append(word)
    return [*arguments[:1], *files, *options]


def lists_of_a_run() -> set[str]:
    """Options of a run that take several values."""
    return {
        f"--{section.name}.{one.name}"
        for section in dataclasses.fields(RunConfig)
        if section.default_factory is not dataclasses.MISSING
        for one in dataclasses.fields(section.default_factory())
        if str(one.type).startswith("tuple")
    }


def files_of(arguments: list[str]) -> list[Path]:
    """The configuration files that are named, in order."""
    found = []
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        found.append(following if word == "--config" else word.removeprefix("--config=") if "--config=" in word else "")
    return [Path(name) for name in found if name]


def refuse_torn(arguments: list[str]) -> None:
    """See that configuration files are YAML.

    Raises:
        ValueError: one is not; it is named, and the place.
    """
    for name in files_of(arguments):
        if name.is_file():
            try:
                yaml.safe_load(name.read_text(encoding="utf-8"))
            except yaml.MarkedYAMLError as error:
                mark = error.problem_mark
                place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
                raise ValueError(f"{name}{place}: {error.problem or 'no YAML'}") from error


def plain(complaint: str) -> str:
    """A parser's complaint on one line, with types and choices in words."""
    line = re.sub(r'^Parser key "([^"]*)"', r"\1", " ".join(complaint.split()))
    line = re.sub(r"Expected an? <class '(\w+)'>", lambda found: f"wanted {KINDS.get(found[1], found[1])}", line)
    return re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"wanted one of \1", line)


def meant(name: str, options: list[str], before: str = "") -> str:
    """The option that a name without its dashes comes close to, as the end of a complaint."""
    near = difflib.get_close_matches(name, [option.lstrip("-") for option in options], 1)
    return f"; did you mean {before}{near[0]}?" if near else ""


def refuse_idle(given: Iterable[str], config: RunConfig, penalties: Sequence[str]) -> None:
    """See that each setting of a command line has an effect; a file's may wait for another kind.

    Args:
        given: names, as penalty.gamma. penalties: kinds that will run.

    Raises:
        ValueError: one has none; the message says who reads it.
    """
    running = {"penalty": tuple(penalties), "oracle": (config.oracle.kind,)}
    for name in given:
        section = name.partition(".")[0]
        kinds = READ_BY.get(name)
        if kinds and not set(kinds) & set(running[section]):
            have = f"{' and '.join(kinds)} {'has' if len(kinds) == 1 else 'have'}"
            raise ValueError(f"{name}: {section}.kind {', '.join(running[section])} has no use for it, {have}")
    lora = config.reward_model.kind == "lora" or config.reward_model.train == "lora"
    for name in given:
        if name.startswith("reward_model.lora_") and not lora:
            told = "has no use for it, lora has, and a classifier with reward_model.train lora"
            raise ValueError(f"{name}: reward_model.kind {config.reward_model.kind} {told}")
        if name == "logging.project" and config.logging.tracker == "none":
            raise ValueError(f"{name}: logging.tracker none has no use for it")
