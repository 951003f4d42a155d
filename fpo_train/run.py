"""A run from its configuration to its folder: alone, or several penalties side by side from one start."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from . import checkpoint, folder, metrics
from .config import PenaltyKind, RunConfig
from .data import Prompts, read_prompts, render_prompts
from .folder import CHECKPOINTS
from .loop import Parts, iterate, seed_stream
from .oracle import BaseOracle
from .penalty import Penalty
from .policy import Policy, load_policy
from .progress import Progress
from .report import write_report
from .reward_model import HeadRewardModel
from .update import BestOfN

FIT_STREAM = -1  # place of the reward model's first fit in the run's random stream; iterations count from 1
ENCODE_ROWS = 32  # sequences a forward while the head is first fitted


def run(config: RunConfig) -> Path:
    """Run to the end and return the report's path.

    Raises:
        RunError: a folder that holds something else, prompts or models that cannot be used, a resumed run
            whose configuration has changed. Nothing has been written or removed then.
    """
    config = dataclasses.replace(config, out=str(Path(config.out).expanduser()))
    out = Path(config.out)
    configs = [_part(config, kind) for kind in config.compared] or [config]
    texts = read_prompts(config.data.prompts)  # a wrong file or folder should not cost the loading of a model
    folder.check(config, texts)
    for one in configs:
        if one is not config and Path(one.out).is_dir():
            folder.check(one, texts)
    workshop = Workshop(config, texts)
    folder.describe(config, texts)
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

    def __init__(self, config: RunConfig, texts: list[tuple[str, str]]) -> None:
        self.texts = texts
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.policy = load_policy(config.policy, config.seed, device)
        room = self.policy.context - config.rollout.max_new_tokens - 1  # and the closing token
        self.prompts = render_prompts(texts, config.seed, self.policy.tokenizer, room)
        self._adapter = {name: p.detach().clone() for name, p in self.policy.trainable.items()}
        self._head: torch.Tensor | None = None

    def parts(self, config: RunConfig, resumed: bool = False) -> Parts:
        """A fresh start: first adapter, fitted head (a resumed run has its own), new optimizers."""
        with torch.no_grad():
            for name, parameter in self.policy.trainable.items():
                parameter.copy_(self._adapter[name])
        oracle = BaseOracle(self.policy, config.oracle)
        width = self.policy.lm.config.hidden_size
        reward_model = HeadRewardModel(width, config.reward_model, self.policy.device)
        if not resumed:
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
    parts = workshop.parts(config, resumed=done > 0)
    folder.describe(config, workshop.texts)
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
    parts.reward_model.save(out / "reward_model", config.policy.model)
    write_report(out)


def _controlled(out: Path) -> None:
    """The paper's linear environment beside the run, redone if an earlier attempt was cut off."""
    from .simulate import linear

    done, half = out / "simulate", out / "simulate.tmp"
    if not done.is_dir():
        shutil.rmtree(half, ignore_errors=True)
        linear.run(("none", "relaxed", "practical"), (0,), half)
        half.rename(done)
