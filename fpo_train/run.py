"""A run from its configuration to its folder: alone, or several penalties side by side from one start."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from . import checkpoint, folder, metrics
from .config import PenaltyKind, RunConfig
from .data import Prompt, read_prompts, render, render_prompts
from .engine import Engine
from .errors import NotFinite, RunError
from .folder import CHECKPOINTS
from .loop import Parts, iterate, label_pairs
from .memory import Guard
from .oracle import FileOracle, Oracle, load_oracle
from .penalty import Penalty
from .plan import plan_for
from .policy import Policy, load_policy
from .progress import Progress
from .replay import Pair, Replay
from .report import write_report
from .reward_model import load_reward_model
from .rollout import Readings, Rollout, sampler
from .stopping import Request, Stopped, listening
from .trial import beyond_windows
from .update import load_update
from .watch import collapse

FIT_PLACE = 0  # place of the reward model's first fit in the run's random streams; iterations count from 1


def run(config: RunConfig) -> Path:
    """Run to the end and return the report's path.

    Raises:
        RunError: a folder that holds something else, prompts or models that cannot be used, a resumed run
            whose configuration has changed. Nothing has been written or removed then.
        Stopped: an end was asked for by a signal; the run is saved behind the iteration that it was in.
    """
    config = dataclasses.replace(config, out=str(Path(config.out).expanduser()))
    out = Path(config.out)
    configs = [_part(config, kind) for kind in config.compared] or [config]
    texts = read_prompts(
        config.data.prompts, config.data.split, config.data.limit
    )  # a wrong file or folder should not cost the loading of a model
    folder.check(config, texts)
    for one in configs:
        if one is not config and Path(one.out).is_dir():
            folder.check(one, texts)
    with listening() as request:
        workshop = Workshop(config, texts)
        engine = workshop.engine
        try:
            if engine.main:
                folder.describe(config, texts)
            for one in configs:
                _run_one(one, workshop, request)
            if engine.main and config.logging.controlled:
                _controlled(out)
            report = write_report(out) if engine.main else out / "report.html"
            engine.barrier()  # no process leaves while another still talks to it
            return report
        finally:
            engine.finish()


def _part(config: RunConfig, kind: PenaltyKind) -> RunConfig:
    penalty = dataclasses.replace(config.penalty, kind=kind)
    return dataclasses.replace(config, compare="", out=str(Path(config.out) / kind), penalty=penalty)


class Workshop:
    """What runs from one start share: the base weights, the prompts, the first adapter and the first reward model."""

    def __init__(self, config: RunConfig, texts: list[tuple[str, str]]) -> None:
        self.texts = texts
        self.engine = Engine()
        self.policy = load_policy(config.policy, config.seed, self.engine.device)
        room = self.policy.context - config.rollout.max_new_tokens - 1  # and the closing token
        self.prompts = render_prompts(texts, config.seed, self.policy.tokenizer, room, config.data)
        beyond_windows(self.policy, self.prompts.longest + config.rollout.max_new_tokens)
        self._adapter = {name: p.detach().clone() for name, p in self.policy.trainable.items()}
        self._fitted: dict[str, Any] | None = None

    def parts(self, config: RunConfig, resumed: bool = False) -> Parts:
        """A fresh start: first adapter, fitted reward model (a resumed run has its own), new optimizers."""
        for name, parameter in self.policy.trainable.items():
            parameter.data.copy_(self._adapter[name])
        policy, engine = self.policy, self.engine
        parts = Parts(
            config=config,
            engine=engine,
            memory=Guard(plan_for(config, policy, self.prompts.longest, engine.world), policy.device),
            prompts=self.prompts,
            policy=policy,
            sampler=sampler(policy, config.rollout, config.seed),
            reward_model=load_reward_model(config, policy, engine, policy.device),
            replay=Replay(config.reward_model.buffer),
            oracle=load_oracle(config, policy, engine),
            penalty=Penalty(config.penalty, engine, config.seed, config.reward_model.dropout_when_scoring),
            update=load_update(policy, config, engine),
        )
        if not resumed:
            parts.replay.add(human_pairs(parts.oracle, policy))
            self._fit(parts)
        return parts

    def _fit(self, parts: Parts) -> None:
        """Fit the score head once; what else starts from here takes the same."""
        if self._fitted is None:
            pairs = parts.replay.newest(parts.config.reward_model.fit_pairs) or first_pairs(parts)
            if pairs:
                parts.memory("score", lambda rows: parts.reward_model.fit(pairs, rows))
            self._fitted = parts.reward_model.state_dict()
        else:
            parts.reward_model.load_state_dict(self._fitted)


def first_pairs(parts: Parts) -> list[Pair]:
    """Pairs of base-model replies with the oracle's labels, for the first fit of the score head; all ranks' alike."""
    engine, config = parts.engine, parts.config
    count, at_once = config.reward_model.fit_pairs, max(1, config.rollout.prompts // engine.world)
    mine = range(count)[engine.rank * count // engine.world : (engine.rank + 1) * count // engine.world]
    prompts = parts.prompts.batch(0, count, stream=1) if count else []
    pairs: list[Pair] = []
    for start in mine[::at_once]:  # as many prompts as an iteration's: what the plan supposes

        def work(rows: int, start: int = start) -> list[Pair]:
            some = prompts[start : min(start + at_once, mine.stop)]
            replies = parts.sampler.base_replies(some, 2, FIT_PLACE, start, rows)
            rollout = Rollout.of(parts.policy, some, replies, candidates=1)
            readings = Readings(parts.policy, rollout, rows)
            reading = parts.reward_model.read(rollout, readings, rows)
            chosen, references = rollout.pairs()
            preferences = parts.oracle.preference(rollout, readings, chosen, references)[:, None]
            return label_pairs(rollout, reading, preferences.isfinite(), preferences, FIT_PLACE)

        pairs += parts.memory("score", work)
    return engine.gather_objects(pairs)


def human_pairs(oracle: Oracle, policy: Policy) -> list[Pair]:
    """The labelled pairs that an oracle of human preferences brings along, as the policy's tokens."""
    if not isinstance(oracle, FileOracle):
        return []
    pairs = []
    for number, (text, chosen, rejected, preference) in enumerate(oracle.pairs(), start=1):
        prompt = Prompt(name=f"human-{number}", text=text, ids=tuple(render(policy.tokenizer, text)))
        first, second = (policy.tokenizer(reply, add_special_tokens=False)["input_ids"] for reply in (chosen, rejected))
        pair = Pair(
            prompt=prompt,
            chosen=(*first, policy.eos),
            reference=(*second, policy.eos),
            chosen_text=chosen,
            reference_text=rejected,
            preference=preference,
            iteration=FIT_PLACE,
            features=None,
        )
        pairs.append(pair)
    return pairs


def _run_one(config: RunConfig, workshop: Workshop, request: Request) -> None:
    out, main = Path(config.out), workshop.engine.main
    done = checkpoint.latest(out / CHECKPOINTS)
    parts = workshop.parts(config, resumed=done > 0)
    if main:
        folder.describe(config, workshop.texts)
    if done:
        checkpoint.load(out / CHECKPOINTS, done, parts)
    if main:
        for name in (metrics.METRICS, metrics.SAMPLES, metrics.MEMORY):
            metrics.cut(out / name, done)
    engine = parts.engine
    engine.barrier()
    engine.start_tracking(config, done)
    rows = metrics.read(out / metrics.METRICS)
    with Progress(f"{config.penalty.kind:>9}", config.iterations, done, main) as progress, request.finishing():
        for iteration in range(done + 1, config.iterations + 1):
            try:
                row, samples = iterate(parts, iteration)
            except NotFinite as error:
                raise RunError(f"iteration {iteration}: {error}") from error
            row, memory = metrics.split_memory(row)
            row["warning"] = collapse([*rows, row], config.logging.window)
            rows.append(row)
            stop = engine.broadcast_flag(request.made)
            if main:
                metrics.append(out / metrics.SAMPLES, samples)
                metrics.append(out / metrics.MEMORY, [memory])
                metrics.append(out / metrics.METRICS, [row])
                if stop or iteration % config.logging.checkpoint_every == 0 or iteration == config.iterations:
                    checkpoint.save(out / CHECKPOINTS, iteration, parts, config.logging.checkpoint_keep)
            engine.track(row, iteration)
            progress(row)
            if stop and iteration < config.iterations:
                raise Stopped(iteration)
    engine.stop_tracking()
    if main:
        parts.policy.model.save_pretrained(out / "policy", selected_adapters=["default"], save_embedding_layers=False)
        if config.logging.save == "all":
            parts.reward_model.save(out / "reward_model")
        write_report(out)


def _controlled(out: Path) -> None:
    """The paper's linear environment beside the run, redone if an earlier attempt was cut off."""
    from .simulate import linear

    done, half = out / "simulate", out / "simulate.tmp"
    if not done.is_dir():
        shutil.rmtree(half, ignore_errors=True)
        linear.run(("none", "relaxed", "practical"), (0,), half)
        half.rename(done)
