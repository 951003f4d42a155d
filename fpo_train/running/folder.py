"""A run's folder: when it may be written or gone on with, and what describes the run in it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from fpo_train.config import CLASSIFIER, RunConfig
from fpo_train.data import templates
from fpo_train.data.adapters import base_model
from fpo_train.data.turns import Talk
from fpo_train.errors import RunError
from fpo_train.processes import TRACKING
from fpo_train.report import records
from fpo_train.report.records import CHECKPOINTS, CONFIG, ENVIRONMENT, latest
from fpo_train.whole import write_text

MODEL = "reward_model.model"
LATER = (
    "data.date",
    "data.chat_template",
    "data.column",
    "data.system",
    "data.subset",
    "data.bad_rows",
    "reward_model.fit",
)  # settings that runs of earlier versions do not have

DESCRIBED = (CONFIG, ENVIRONMENT)  # what a start writes before anything is bought or learnt

Facts = dict[str, Any]  # what `identity` says of a run's models and rendered prompts, and how many people's pairs fit


def dated(config: RunConfig) -> RunConfig:
    """The configuration with the moment that chat templates take for now: the one asked for, else the run's, else now.

    A resumed run reads what it began with, whatever its templates write of the day.
    """
    began = ""
    if config.resume and not config.data.date:
        with contextlib.suppress(RunError, OSError):  # `check` says what is wrong with the folder
            began = templates.known(_stored(Path(config.out)).get("data.date"))
    date = config.data.date or began or templates.now()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=date))


def check(config: RunConfig, prompts: Sequence[tuple[str, Talk]]) -> None:
    """See that `config.out` may be written, or gone on with under this very configuration.

    Raises:
        RunError: a file, a folder with something in it that is no run, a missing folder to resume, settings or
            prompts that are not those the run began with, more iterations done than asked for, or files cut short.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise RunError(f"out: {out} is a file; wanted a folder")
    holds = [path for path in out.iterdir() if path.suffix != ".tmp"] if out.is_dir() else []
    if not config.resume:
        if holds and (out / CONFIG).is_file():
            raise RunError(f"out: {out} is not empty; choose another folder, or go on in it with --resume true")
        if holds:
            raise RunError(f"out: {out} is not empty, and holds no run to go on with; choose another folder")
        return
    if not out.is_dir():
        raise RunError(f"out: there is no run to resume in {out}")
    if not holds:
        return
    if not (out / CONFIG).is_file():
        raise RunError(f"out: {out} holds something, but no run to resume (there is no {CONFIG} in it)")
    _check_settings(out, config)
    if _facts(out / ENVIRONMENT).get("prompts_sha256", digest(prompts)) != digest(prompts):
        raise RunError(f"resume: the prompts in {config.data.prompts} are not those that {out} began with")
    done = latest(out / CHECKPOINTS)
    if done > config.iterations:
        raise RunError(f"resume: {out} has done {done} iterations already; {config.iterations} were asked for")
    if done:
        _check_rows(out, done)


def _stored(out: Path) -> dict[str, Any]:
    """The settings that a run began with, flat."""
    try:
        return flat(yaml.safe_load((out / CONFIG).read_text(encoding="utf-8")))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise RunError(
            f"resume: {out / CONFIG} is no run's configuration; put the whole file back, or begin a new run"
        ) from error


def _check_settings(out: Path, config: RunConfig) -> None:
    before, now = _stored(out), flat(plain(config))
    free: tuple[str, ...] = ("out", "resume", "logging.", "memory.")
    if config.update.schedule == config.reward_model.schedule == "constant":  # the others fall over a known number
        free += ("iterations",)
    for one in (before, now):
        if one.get(MODEL) == "":
            one[MODEL] = CLASSIFIER
    if config.reward_model.kind != "classifier":  # earlier versions named one where none was used
        free += (MODEL,)
    free += tuple(key for key in LATER if key not in before)
    asked = [key for key in now if not key.startswith(free)]
    # before any value is compared: where a file was cut, the last value left is cut too
    missing = [key for key in asked if key not in before]
    missing += sorted({key.partition(".")[0] for key in now} - {key.partition(".")[0] for key in before})
    if missing:
        raise RunError(f"resume: {out / CONFIG} does not say what {missing[0]} was; put the whole file back")
    for key in asked:
        if before[key] != now[key]:
            again = f"the command that began it goes on, and so does --config {out / CONFIG}"
            raise RunError(f"resume: {key} was {before[key]!r} when {out} began and is {now[key]!r} now; {again}")


def _check_rows(out: Path, done: int) -> None:
    """See that no row before the last checkpoint is lost; those after it are cut off and made again.

    Every iteration has a row in the metrics, which says how many prompts have none in the samples.
    """
    rows = [row for row in records.read(out / records.METRICS) if row["iteration"] <= done]
    samples = Counter(row["iteration"] for row in records.read(out / records.SAMPLES))
    records.read(out / records.MEMORY)
    if [row["iteration"] for row in rows] != list(range(1, done + 1)):
        raise _cut_short(out, records.METRICS, done)
    prompts = _stored(out).get("rollout.prompts")
    if any(samples[row["iteration"]] != prompts - row["prompts_left_out"] for row in rows if "prompts_left_out" in row):
        raise _cut_short(out, records.SAMPLES, done)


def _cut_short(out: Path, name: str, done: int) -> RunError:
    return RunError(
        f"resume: {out / name} lacks rows of the {done} iterations that are done; put the whole file back, or begin a "
        "new run"
    )


def check_identity(config: RunConfig, facts: Facts) -> None:
    """See that the models and the rendered prompts are those that the run in `config.out` began with.

    A folder that says nothing of them, a new one or one of an earlier version, is gone on with.

    Raises:
        RunError: they are others.
    """
    out = Path(config.out)
    before = _facts(out / ENVIRONMENT)
    if before.get("rendered_sha256", facts["rendered_sha256"]) != facts["rendered_sha256"]:
        raise RunError(
            f"resume: the prompts are rendered otherwise than when {out} began; put the chat template and tokenizer of "
            f"policy.model {config.policy.model} back"
        )
    for setting, now in facts["models"].items():
        for kind, digest in before.get("models", {}).get(setting, now).items():
            if now.get(kind) != digest:
                section = getattr(config, setting.partition(".")[0])
                name = getattr(section, "classifier", section.model)
                what = {"weights": "other weights", "adapter": "other weights in its adapter"}.get(
                    kind, "another tokenizer or chat template"
                )
                name = base_model(name) if setting == "policy.model" and kind == "weights" else name
                raise RunError(f"resume: {setting} {name} has {what} than when {out} began; put the former model back")


def describe(config: RunConfig, prompts: Sequence[tuple[str, Talk]], known: Facts | None = None) -> None:
    """Write what was asked for, ready to be asked for again, and what the run began on; `known` is kept beside it."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    asked = plain(dataclasses.replace(config, resume=False))
    write_text(out / CONFIG, yaml.safe_dump(asked, sort_keys=False, allow_unicode=True))
    if not (out / ENVIRONMENT).is_file():
        facts = {**environment(), "prompts_sha256": digest(prompts), **(known or {})}
        write_text(out / ENVIRONMENT, json.dumps(facts, indent=2) + "\n")


def describe_like(out: Path, config: RunConfig, prompts: Sequence[tuple[str, Talk]]) -> None:
    """`describe` a comparison that begins on what the run in `out` begins on."""
    kept = ("rendered_sha256", "models", "begins_on", "score_head", "reward_model_reads", "human_pairs", "rows_skipped")
    describe(config, prompts, {name: fact for name, fact in _facts(out / ENVIRONMENT).items() if name in kept})


def unwritten(outs: Iterable[Path]) -> dict[Path, bool]:
    """Of these folders those in which nothing is yet, and whether they are there."""
    return {out: out.is_dir() for out in outs if not out.is_dir() or not any(out.iterdir())}


@contextlib.contextmanager
def withdrawing(fresh: dict[Path, bool]) -> Iterator[None]:
    """A run that fails in here before its first iteration is done leaves no folder.

    One that holds more by then, as answers of a judge that were paid for, stays, to be resumed.

    Args:
        fresh: see `unwritten`; a folder after those that lie in it.
    """
    try:
        yield
    except (RunError, OSError):
        for out, there in fresh.items() if os.environ.get("RANK", "0") == "0" else ():
            _withdraw(out, there)
        raise


def _withdraw(out: Path, there: bool) -> None:
    files = [path for path in out.rglob("*") if not path.is_dir()] if out.is_dir() else []
    if any(path.parent.name != TRACKING and path.name not in DESCRIBED and path.stat().st_size for path in files):
        return
    for path in out.iterdir() if out.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if out.is_dir() and not there:
        out.rmdir()


def digest(prompts: Sequence[tuple[str, Talk]]) -> str:
    """SHA-256 of the prompts' ids and texts."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as YAML keeps it, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as one mapping, names joined by dots."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _facts(path: Path) -> dict[str, Any]:
    """What a run began on; empty where it was killed before it wrote that down."""
    if not path.is_file():
        return {}
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {"prompts_sha256": facts["prompts_sha256"], **facts}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"resume: {path} does not say which prompts the run began with; put the whole file back"
        ) from error


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
