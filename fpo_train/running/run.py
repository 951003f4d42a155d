"""A run from its configuration to its folder: alone, or several penalties from one start."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fpo_train.config import PenaltyKind, RunConfig
from fpo_train.data import identity, templates
from fpo_train.data.adapters import adapter_at, settle, words_in
from fpo_train.data.limits import rows_of
from fpo_train.data.prompts import prompts_of, render_prompts
from fpo_train.data.turns import Talk
from fpo_train.errors import NotFinite, RunError
from fpo_train.loop import Parts, iterate, label_pairs
from fpo_train.memory.guard import Guard
from fpo_train.memory.plan import plan_for
from fpo_train.oracle import load_oracle
from fpo_train.oracle.human import HumanPairs, human_pairs
from fpo_train.penalty.base import Penalty
from fpo_train.policy import STEPS, load_policy
from fpo_train.policy.adapters import POLICY
from fpo_train.policy.trial import beyond_windows
from fpo_train.processes import Processes
from fpo_train.report import records
from fpo_train.report.page import write_report
from fpo_train.report.progress import Progress, Steps, say, stage
from fpo_train.report.records import CHECKPOINTS
from fpo_train.report.watch import collapse
from fpo_train.reward_model import load_reward_model
from fpo_train.reward_model.replay import FIT_PLACE, Pair, Replay
from fpo_train.rollout import Readings, Rollout, sampler
from fpo_train.update import load_update

from . import checkpoint, folder
from .claim import claimed
from .preflight import look_ahead
from .side_by_side import at_once, run_side_by_side
from .stopping import Request, Stopped, listening
from .watched import Watched, cut

ANY_REPLY = "Yes."  # stands for the replies to a prompt where what reads both is tried


def run(config: RunConfig) -> Path:
    """Run to the end and return the report's path.

    Raises:
        RunError: a folder that holds something else, prompts or models that cannot be used, a resumed run
            whose configuration, prompts or models have changed. Nothing has been written or removed then, and of a
            run that fails before its first iteration is done no folder is left.
        Stopped: an end was asked for by a signal; the run is saved behind the iteration that it was in.
    """
    config = settle(folder.dated(dataclasses.replace(config, out=str(Path(config.out).expanduser()))))
    out = Path(config.out)
    configs = [_part(config, kind) for kind in config.compared] or [config]
    skipped: list[str] = []
    texts = prompts_of(config.data, skipped)  # a wrong file or folder should not cost the loading of a model
    folder.check(config, texts)
    for one in configs:
        if one is not config and Path(one.out).is_dir():
            folder.check(one, texts)
    look_ahead(config)
    fresh = folder.unwritten([*(Path(one.out) for one in configs if one is not config), out])
    with listening() as request, folder.withdrawing(fresh), claimed(out):
        if config.compared and (n := at_once(config, len(configs))) > 1:
            alone = [_alone(one) for one in configs]
            run_side_by_side(run, alone, n, request, lambda of: folder.describe_like(of, config, texts))
            return _finish(config)
        workshop = Workshop(config, texts, skipped)
        processes = workshop.processes
        try:
            workshop.refuse_unplanned(configs)
            for n, one in enumerate(configs, start=1):
                _run_one(one, workshop, request, f"penalty {n} of {len(configs)}, one after the other")
            report = _finish(config) if processes.main else out / "report.html"
            processes.barrier()  # no process leaves while another still talks to it
            return report
        finally:
            processes.finish()


def _alone(config: RunConfig) -> RunConfig:
    """A run of a comparison as one that is asked for by itself; what the comparison shows beside them, it makes."""
    resume, logging = config.resume and Path(config.out).is_dir(), dataclasses.replace(config.logging, controlled=False)
    return dataclasses.replace(config, resume=resume, logging=logging)


def _finish(config: RunConfig) -> Path:
    if config.logging.controlled:
        _controlled(Path(config.out))
    return write_report(Path(config.out))


def _part(config: RunConfig, kind: PenaltyKind) -> RunConfig:
    """A run of a comparison. Where an oracle costs no question, it is asked about what penalties are compared by."""
    penalty = dataclasses.replace(config.penalty, kind=kind)
    logging = dataclasses.replace(config.logging, audit=config.logging.audit or config.oracle.kind in ("base", "gold"))
    out = str(Path(config.out) / kind)
    return dataclasses.replace(config, compare="", out=out, penalty=penalty, logging=logging)


class Workshop:
    """What runs from one start share: the base weights, the prompts, the first adapter and the first reward model."""

    def __init__(self, config: RunConfig, texts: Sequence[tuple[str, Talk]], skipped: Sequence[str] = ()) -> None:
        """`texts`: ids and what is asked. `skipped`: complaints about rows that were passed by."""
        self.config, self.texts = settle(folder.dated(config)), texts
        self.processes = Processes()
        self._date = self.processes.gather_objects([self.config.data.date])[0]  # one moment for all processes
        what, main = f"loading policy.model {config.policy.model}", self.processes.main
        with Steps(what, STEPS + 1, "steps", shown=main, even=False) as step:
            self.policy = load_policy(self.config.policy, config.seed, self.processes.device, partial(step, 1))
            templates.choose(self.policy.tokenizer, self.config.data.chat_template)
            self._base = identity.of_model(self.policy.lm, self.policy.tokenizer)
            step(1, "fingerprint taken")
        self._begun_on = adapter_at(self.config.policy.model)
        self._say()
        templates.pin(self.policy.tokenizer, self._date)
        room = self.policy.context - config.rollout.max_new_tokens - 1  # and the closing token
        rows = rows_of(self.policy.lm)
        self._skipped = list(skipped)
        bad = self._skipped if config.data.bad_rows == "skip" else None
        self.prompts = render_prompts(texts, config.seed, self.policy.tokenizer, room, config.data, rows, bad)
        if self._skipped and self.processes.main:
            rows_told = "1 row" if len(self._skipped) == 1 else f"{len(self._skipped)} rows"
            told = f"{rows_told} skipped, {len(self.prompts)} prompts left"
            first = self._skipped[0].removeprefix("data.prompts: ")
            print(f"data.prompts: {told}; the first: {first}", file=sys.stderr)
        if (asked := config.rollout.prompts) > len(self.prompts) and self.processes.main:
            told = f"there are {len(self.prompts)}, so that an iteration asks some several times"
            print(f"rollout.prompts {asked}: {told}", file=sys.stderr)
        beyond_windows(self.policy, self.prompts.longest + config.rollout.max_new_tokens)
        self._human = human_pairs(config, self.policy) if config.oracle.kind == "file" else HumanPairs()
        if self.processes.main and (told := self._human.told()):
            print(told, file=sys.stderr)
        self._adapter = {name: p.detach().clone() for name, p in self.policy.trainable.items()}
        self._fitted: dict[str, Any] | None = None

    def _say(self) -> None:
        """What a user may take for something else: what the policy begins on, and how it reads its prompts."""
        said = []
        if self._begun_on is not None:
            self._base["adapter"] = identity.of_adapter(self.policy.model, POLICY)
            said.append(f"policy: goes on with {self._begun_on.told()}; the reference is that base without it")
            said.append(
                f"a run of seed {self.config.seed} asks the same prompts in the same order; --seed names another"
            )
        if self.config.data.chat_template == "auto" and self.policy.tokenizer.chat_template is None:
            said.append(
                f"policy.model {self.config.policy.model} has no chat template: prompts are read as they are written, "
                "without turns (data.chat_template none says that this is meant)"
            )
        for line in said if self.processes.main else ():
            print(line, file=sys.stderr)

    def save_policy(self, to: Path) -> None:
        """Write the policy's adapter as PEFT does, with the tokenizer and template of the adapter that it began on."""
        self.policy.model.save_pretrained(to, selected_adapters=[POLICY], save_embedding_layers=False)
        for path in words_in(self._begun_on.folder) if self._begun_on else ():
            shutil.copyfile(path, to / path.name)

    def refuse_unplanned(self, configs: list[RunConfig]) -> None:
        """See that the budget holds each run of a comparison, before the first of them begins.

        Raises:
            RunError: it does not.
        """
        for one in configs:
            if (plan := plan_for(one, self.policy, self.prompts.longest, self.processes.world)) is not None:
                plan.check()

    def parts(
        self, config: RunConfig, resumed: bool = False, ready: Callable[[Parts], None] = lambda parts: None
    ) -> Parts:
        """A fresh start: first adapter, fitted reward model (a resumed run has its own), new optimizers.

        `ready` is called when all that can be refused has been read, before anybody is asked for labels.
        """
        for name, parameter in self.policy.trainable.items():
            parameter.data.copy_(self._adapter[name])
        policy, processes = self.policy, self.processes
        plan = plan_for(config, policy, self.prompts.longest, processes.world)
        memory = Guard(plan, policy.device)
        samples = sampler(policy, config.rollout, config.seed, plan is not None and plan.unpacks)
        with stage("loading the reward model", processes.main):
            reward_model = load_reward_model(config, policy, processes, policy.device)
        with stage(f"loading the oracle, {config.oracle.kind}", processes.main):
            oracle = load_oracle(config, policy, processes)
        parts = Parts(
            config=config,
            processes=processes,
            memory=memory,
            prompts=self.prompts,
            policy=policy,
            sampler=samples,
            reward_model=reward_model,
            replay=Replay(config.reward_model.buffer),
            oracle=oracle,
            penalty=Penalty(config.penalty, processes, config.seed, config.reward_model.dropout_when_scoring),
            update=load_update(policy, config, processes),
        )
        for loaded in filter(None, (parts.reward_model.loaded, parts.oracle.loaded)):
            templates.pin(loaded[1], self._date)  # before the checks: what they tokenise is remembered
        prompts = [text for _, text in self.texts]
        parts.oracle.check(prompts)
        parts.reward_model.check([(text, ANY_REPLY) for text in prompts] + self._human.texts)
        ready(parts)
        if not resumed:
            parts.replay.add(self._human.pairs)
            self._fit(parts)
        return parts

    def facts(self, parts: Parts) -> folder.Facts:
        """What the run's folder says that it began on; of models that are loaded and have not learnt."""
        own = {"reward_model.model": parts.reward_model.loaded, "oracle.model": parts.oracle.loaded}
        known = {setting: identity.of_model(*loaded) for setting, loaded in own.items() if loaded}
        facts = {
            "rendered_sha256": identity.of_prompts(self.prompts),
            "models": {"policy.model": self._base, **known},
            "score_head": parts.reward_model.begins(),
            "reward_model_reads": parts.reward_model.reads(self.policy.tokenizer),
        }
        if self._begun_on is not None:
            facts["begins_on"] = self._begun_on.told()
        facts |= {"human_pairs": self._human.counts} if self._human.counts else {}
        return facts | ({"rows_skipped": len(self._skipped)} if self._skipped else {})

    def _fit(self, parts: Parts) -> None:
        """Fit the score head once; what else starts from here takes the same."""
        if self._fitted is None:
            wanted, main = parts.reward_model.to_fit, parts.processes.main
            if main:
                say(f"reward model: its score head is {parts.reward_model.begins()}")
                say(f"reward model: it reads {parts.reward_model.reads(self.policy.tokenizer)}")
                say(f"the oracle, which stands for the truth, is {self.config.oracle.told}")
            pairs = (parts.replay.newest(wanted) or first_pairs(parts)) if wanted else []
            if pairs:
                with stage(f"fitting the score head on {len(pairs)} pairs", main):
                    parts.memory("score", lambda rows: parts.reward_model.fit(pairs, rows))
            self._fitted = parts.reward_model.state_dict()
        else:
            parts.reward_model.load_state_dict(self._fitted)


def first_pairs(parts: Parts) -> list[Pair]:
    """Pairs of base-model replies with the oracle's labels, for the first fit of the score head; all ranks' alike."""
    processes, config = parts.processes, parts.config
    count, at_once = config.reward_model.fit_pairs, max(1, config.rollout.prompts // processes.world)
    mine = range(count)[processes.rank * count // processes.world : (processes.rank + 1) * count // processes.world]
    prompts = parts.prompts.batch(0, count, stream=1) if count else []
    pairs: list[Pair] = []

    def work(start: int, rows: int) -> list[Pair]:
        some = prompts[start : min(start + at_once, mine.stop)]
        replies = parts.sampler.base_replies(some, 2, FIT_PLACE, start, rows)
        rollout = Rollout.of(parts.policy, some, replies, candidates=1)
        readings = Readings(parts.policy, rollout, rows)
        reading = parts.reward_model.read(rollout, readings, rows)
        chosen, references = rollout.pairs()
        preferences = parts.oracle.preference(rollout, readings, chosen, references)[:, None]
        return label_pairs(rollout, reading, preferences.isfinite(), preferences, FIT_PLACE)

    with Steps("first fit", len(mine), "pairs", shown=processes.main) as steps:
        for start in mine[::at_once]:  # as many prompts as an iteration's: what the plan supposes
            pairs += parts.memory("score", partial(work, start))
            steps(min(at_once, mine.stop - start))
    return processes.gather_objects(pairs)


def _run_one(config: RunConfig, workshop: Workshop, request: Request, turn: str) -> None:
    """A run from its start to its report. turn: which it is of a comparison's, said before its first iteration."""
    out, main = Path(config.out), workshop.processes.main
    done = records.latest(out / CHECKPOINTS)

    def begin(parts: Parts) -> None:
        """What is written comes after all that can be refused."""
        parts.reward_model.names(config.penalty.parameters)
        facts = workshop.facts(parts)
        asked = {one.out: one for one in (workshop.config, config)}.values()  # a comparison's folder, and this run's
        for one in asked:
            folder.check_identity(one, facts)
        if done:
            checkpoint.load(out / CHECKPOINTS, done, parts)
        for one in asked if main else ():
            folder.describe(one, workshop.texts, facts)

    parts = workshop.parts(config, done > 0, begin)
    if main:
        for name in (records.METRICS, records.SAMPLES, records.MEMORY):
            records.cut(out / name, done)
        cut(out / records.WATCHED, done, config.iterations)
    processes = parts.processes
    if main and done:
        rest = config.iterations - done
        say(f"goes on after iteration {done} of {config.iterations}" + ("" if rest else ": nothing is left to do"))
    if main and workshop.config.compare:
        say(f"{config.penalty.kind}: {turn}")
    processes.barrier()
    processes.start_tracking(config, done)
    rows, watched = records.read(out / records.METRICS), Watched(parts)
    with Progress(f"{config.penalty.kind:>9}", config.iterations, done, main) as progress, request.finishing():
        parts.memory.told = progress.phase
        for iteration in range(done + 1, config.iterations + 1):
            try:
                row, samples = iterate(parts, iteration)
                again = watched(iteration, row) if watched.due(iteration) else []
            except NotFinite as error:
                raise RunError(f"iteration {iteration}: {error}") from error
            parts.oracle.gather(processes)  # what was asked for the metrics alone too
            row, memory = records.split_memory(row)
            row["warning"] = collapse([*rows, row], config.logging.window)
            rows.append(row)
            stop = processes.broadcast_flag(request.made)
            if main:
                records.append(out / records.SAMPLES, samples)
                if again:
                    records.append(out / records.WATCHED, again)
                records.append(out / records.MEMORY, [memory])
                records.append(out / records.METRICS, [row])
                if stop or iteration % config.logging.checkpoint_every == 0 or iteration == config.iterations:
                    checkpoint.save(out / CHECKPOINTS, iteration, parts, config.logging.checkpoint_keep)
            processes.track(row, iteration)
            progress(row)
            if stop and iteration < config.iterations:
                raise Stopped(iteration)
    processes.stop_tracking()
    if main:
        workshop.save_policy(out / "policy")
        if config.logging.save == "all":
            parts.reward_model.save(out / "reward_model")
        write_report(out)


def _controlled(out: Path) -> None:
    """The paper's linear environment beside the run, redone if an earlier attempt was cut off."""
    from fpo_train.simulate import linear

    done, half = out / "simulate", out / "simulate.tmp"
    if not done.is_dir():
        shutil.rmtree(half, ignore_errors=True)
        linear.run(("none", "relaxed", "practical"), (0,), half)
        half.rename(done)
