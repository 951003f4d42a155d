"""A run's folder: when it may be written or gone on with, and what describes the run in it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from .checkpoint import latest
from .config import RunConfig
from .errors import RunError

CONFIG, ENVIRONMENT, CHECKPOINTS = "config.yaml", "environment.json", "checkpoints"


def check(config: RunConfig, prompts: list[tuple[str, str]]) -> None:
    """See that `config.out` may be written, or gone on with under this very configuration.

    Raises:
        RunError: a file, a folder with something in it that is no run, a missing folder to resume, settings or
            prompts that are not those the run began with, or more iterations done than asked for.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise RunError(f"out: {out} is a file; wanted a folder")
    holds = [path for path in out.iterdir() if path.suffix != ".tmp"] if out.is_dir() else []
    if not config.resume:
        if holds:
            raise RunError(f"out: {out} is not empty; choose another folder, or go on in it with --resume true")
        return
    if not out.is_dir():
        raise RunError(f"out: there is no run to resume in {out}")
    if not holds:
        return
    if not (out / CONFIG).is_file():
        raise RunError(f"out: {out} holds something, but no run to resume (there is no {CONFIG} in it)")
    _check_settings(out, config)
    began = _began(out / ENVIRONMENT)
    if began and began != digest(prompts):
        raise RunError(f"resume: the prompts in {config.data.prompts} are not those that {out} began with")
    done = latest(out / CHECKPOINTS)
    if done > config.iterations:
        raise RunError(f"resume: {out} has done {done} iterations already; {config.iterations} were asked for")


def _check_settings(out: Path, config: RunConfig) -> None:
    try:
        stored = yaml.safe_load((out / CONFIG).read_text(encoding="utf-8"))
        before = _flat(stored)
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise RunError(f"resume: {out / CONFIG} is no run's configuration") from error
    now = _flat(plain(config))
    free: tuple[str, ...] = ("out", "resume", "logging.", "memory.")
    if config.update.schedule == config.reward_model.schedule == "constant":  # the others fall over a known number
        free += ("iterations",)
    for key in (k for k in now if before.get(k) != now[k] and not k.startswith(free)):
        raise RunError(f"resume: {key} was {before.get(key)!r} when {out} began and is {now[key]!r} now")


def describe(config: RunConfig, prompts: list[tuple[str, str]], known: dict[str, Any] | None = None) -> None:
    """Write what was asked for, ready to be asked for again, and what the run began on; `known` is kept beside it."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    asked = plain(dataclasses.replace(config, resume=False))
    write_text(out / CONFIG, yaml.safe_dump(asked, sort_keys=False, allow_unicode=True))
    if not (out / ENVIRONMENT).is_file():
        facts = {**environment(), "prompts_sha256": digest(prompts), **(known or {})}
        write_text(out / ENVIRONMENT, json.dumps(facts, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, through a power cut too."""
    half = path.with_name(path.name + ".tmp")
    with half.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)


def digest(prompts: list[tuple[str, str]]) -> str:
    """SHA-256 of the prompts' ids and texts."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as YAML keeps it, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _began(path: Path) -> str:
    """The digest of the prompts that a run began with; empty where it was killed before it wrote that down."""
    if not path.is_file():
        return ""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["prompts_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"resume: {path} does not say which prompts the run began with") from error


def environment() -> dict[str, Any]:
    """Versions and devices, for `environment.json` and `fpo-train doctor`."""
    names = ("fpo-kernels", "torch", "triton", "transformers", "peft", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "versions": {name: version(name) for name in names},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
