"""A run from its configuration to its folder: alone, or several penalties side by side from one start."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from . import checkpoint, metrics
from .config import PenaltyKind, RunConfig
from .data import Prompts, load_prompts, read_prompts
from .errors import RunError
from .loop import Parts, iterate, seed_stream
from .oracle import BaseOracle
from .penalty import Penalty
from .policy import Policy, load_policy
from .progress import Progress
from .report import write_report
from .reward_model import HeadRewardModel
from .update import BestOfN

FIT_STREAM = -1  # place of the reward model's first fit in the run's random stream; iterations count from 1
CHECKPOINTS, FINISHED = "checkpoints", "reward_model"
ENCODE_ROWS = 32  # sequences a forward while the head is first fitted


def run(config: RunConfig) -> Path:
    """Run to the end and return the report's path.

    Raises:
        RunError: a folder that holds something else, prompts or models that cannot be used, a resumed run
            whose configuration has changed. Nothing has been written or removed then.
    """
    out = Path(config.out)
    configs = [_part(config, kind) for kind in config.compared] or [config]
    _check_out(out, config)
    for one in configs:
        _check_resumable(one)
    read_prompts(config.data.prompts)  # a wrong file should not cost the loading of a model
    workshop = Workshop(config)
    out.mkdir(parents=True, exist_ok=True)
    if config.compared:
        _describe(out, config)
    for one in configs:
        _run_one(one, workshop)
    if config.logging.controlled:
        _controlled(out)
    return write_report(out)


def _part(config: RunConfig, kind: PenaltyKind) -> RunConfig:
    penalty = dataclasses.replace(config.penalty, kind=kind)
    return dataclasses.replace(config, compare="", out=str(Path(config.out) / kind), penalty=penalty)


class Workshop:
    """What runs from one start share: the base weights, the prompts, the first adapter and the first head."""

    def __init__(self, config: RunConfig) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.policy = load_policy(config.policy, config.seed, device)
        room = self.policy.context - config.rollout.max_new_tokens - 1  # and the closing token
        self.prompts = load_prompts(config.data.prompts, config.seed, self.policy.tokenizer, room)
        self._adapter = {name: p.detach().clone() for name, p in self.policy.trainable.items()}
        self._head: torch.Tensor | None = None

    def parts(self, config: RunConfig) -> Parts:
        """A fresh start: first adapter, fitted head, new optimizers."""
        with torch.no_grad():
            for name, parameter in self.policy.trainable.items():
                parameter.copy_(self._adapter[name])
        oracle = BaseOracle(self.policy, config.oracle)
        width = self.policy.lm.config.hidden_size
        reward_model = HeadRewardModel(width, config.reward_model, self.policy.device)
        if self._head is None:
            fit_head(reward_model, self.policy, oracle, self.prompts, config)
            self._head = reward_model.head.weight.detach().clone()
        with torch.no_grad():
            reward_model.head.weight.copy_(self._head)
        update = BestOfN(self.policy, config.update)
        return Parts(config, self.prompts, self.policy, reward_model, oracle, Penalty(config.penalty), update)


@torch.no_grad()
def fit_head(
    reward_model: HeadRewardModel, policy: Policy, oracle: BaseOracle, prompts: Prompts, config: RunConfig
) -> None:
    """Fit the head on pairs of base-model replies labelled by the oracle, so that it starts as a reward model."""
    seed_stream(config.seed, FIT_STREAM)
    pairs = prompts.batch(0, config.reward_model.fit_pairs, stream=1)
    with policy.base():
        replies = policy.generate(pairs, 2, config.rollout)
    owners = [prompt for prompt in pairs for _ in range(2)]
    features, utilities = [], []
    for start in range(0, len(owners), ENCODE_ROWS):
        rows = slice(start, start + ENCODE_ROWS)
        encoded = policy.encode(policy.sequences(owners[rows], replies[rows]))
        features.append(encoded.closing)
        utilities.append(oracle.utility(encoded, torch.arange(len(encoded.closing), device=policy.device)))
    h, u = torch.cat(features), torch.cat(utilities)
    reward_model.fit(h[::2] - h[1::2], oracle.preference(u[::2] - u[1::2]), config.reward_model.fit_ridge)


def _run_one(config: RunConfig, workshop: Workshop) -> None:
    out = Path(config.out)
    done = checkpoint.latest(out / CHECKPOINTS)
    parts = workshop.parts(config)
    _describe(out, config)
    if done:
        checkpoint.load(out / CHECKPOINTS, done, parts)
    for name in (metrics.METRICS, metrics.SAMPLES):
        metrics.cut(out / name, done)
    with Progress(f"{config.penalty.kind:>9}", config.iterations, done) as progress:
        for iteration in range(done + 1, config.iterations + 1):
            row, samples = iterate(parts, iteration)
            metrics.append(out / metrics.SAMPLES, samples)
            metrics.append(out / metrics.METRICS, [row])
            if iteration % config.logging.checkpoint_every == 0 or iteration == config.iterations:
                checkpoint.save(out / CHECKPOINTS, iteration, parts, config.logging.checkpoint_keep)
            progress(row)
    parts.policy.model.save_pretrained(out / "policy", save_embedding_layers=False)
    parts.reward_model.save(out / FINISHED, config.policy.model)
    write_report(out)


def _check_out(out: Path, config: RunConfig) -> None:
    if out.exists() and not out.is_dir():
        raise RunError(f"out: {out} is a file; wanted a folder")
    if config.resume:
        if not out.is_dir():
            raise RunError(f"out: there is no run to resume in {out}")
    elif out.is_dir() and any(out.iterdir()):
        raise RunError(f"out: {out} is not empty; choose another folder, or go on in it with --resume true")


def _check_resumable(config: RunConfig) -> None:
    """A run goes on only under the configuration it began with; only its length may change."""
    stored = Path(config.out) / "config.yaml"
    if not config.resume or not stored.is_file():
        return
    before = _flat(yaml.safe_load(stored.read_text(encoding="utf-8")))
    now = _flat(_plain(config))
    free = ("out", "resume", "iterations", "logging.")
    changed = [k for k in now if before.get(k) != now[k] and not k.startswith(free)]
    if changed:
        key = changed[0]
        raise RunError(f"resume: {key} was {before.get(key)!r} when {config.out} began and is {now[key]!r} now")
    done = checkpoint.latest(Path(config.out) / CHECKPOINTS)
    if done > config.iterations:
        raise RunError(f"resume: {config.out} has done {done} iterations already; {config.iterations} were asked for")


def _plain(config: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))  # tuples as lists, as YAML keeps them


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _describe(out: Path, config: RunConfig) -> None:
    """Write what was asked for and what it runs on."""
    out.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
    (out / "config.yaml").write_text(text, encoding="utf-8")
    (out / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")


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


def _controlled(out: Path) -> None:
    from .simulate import linear

    if not (out / "simulate").exists():
        linear.run(("none", "relaxed", "practical"), (0,), out / "simulate")
