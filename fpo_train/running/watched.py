"""The same few questions put to the policy while it learns, so that its replies can be read over time."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import torch

from fpo_train.data.prompts import Prompt
from fpo_train.errors import NotFinite
from fpo_train.loop import Parts
from fpo_train.oracle import Labels
from fpo_train.oracle.base import Unasked
from fpo_train.report import records
from fpo_train.report.metrics import Clock
from fpo_train.report.records import Row, Sample
from fpo_train.rollout import Readings, TransformersSampler

STREAM = 2  # of the prompts' order: training draws from stream 0, the first fit from 1


class Watched:
    """Greedy replies of the policy and of the base to `logging.watched` of the run's own questions.

    The penalty beside a reply is that of the iteration's scale; where it takes ḡ, that is the mean over the replies
    asked for here. The oracle is asked where it is a model of this process, or with `logging.audit`. Nothing that the
    run goes on with is changed, its oracle's counts apart.
    """

    def __init__(self, parts: Parts) -> None:
        config = parts.config
        greedy = dataclasses.replace(config.rollout, engine="transformers", candidates=1, top_k=1, lora_dropout=False)
        self._parts, self._sampler = parts, TransformersSampler(parts.policy, greedy, config.seed)
        self._ask = config.logging.audit or parts.oracle.local
        count = min(config.logging.watched, len(parts.prompts))
        self._questions = parts.prompts.batch(0, count, stream=STREAM) if count else []

    def due(self, iteration: int) -> bool:
        """Whether they are asked after this iteration."""
        return bool(self._questions) and (_is_kept(iteration) or iteration == self._parts.config.iterations)

    def __call__(self, iteration: int, row: Row) -> list[Sample]:
        """The replies after an iteration, a sample a question; every process must call it.

        The time is added to the iteration's `row`, as seconds["audit"]. Labels asked for are each sample's audit_calls,
        and none of the row's: a run that ends here and goes on has the rows of one that did not end. A policy whose
        numbers are not finite has no replies: the next iteration says so.
        """
        parts, samples = self._parts, []
        clock, at_once = Clock(parts.policy.device), max(1, parts.config.rollout.prompts // parts.processes.world)
        with clock("audit"), contextlib.suppress(NotFinite):
            for first in range(0, len(self._questions), at_once):  # as many as an iteration's: what the plan supposes
                samples += self._ask_some(self._questions[first : first + at_once], iteration, first)
        row["seconds"]["audit"] = round(row["seconds"].get("audit", 0.0) + clock.seconds["audit"], 4)
        return samples

    def _ask_some(self, questions: list[Prompt], iteration: int, first: int) -> list[Sample]:
        parts = self._parts
        rollout = parts.memory("generate", lambda rows: self._sampler(questions, iteration, first, rows))

        def score(rows: int) -> list[Sample]:
            readings = Readings(parts.policy, rollout, rows)
            labels = Labels(parts.oracle if self._ask else Unasked(), rollout, readings)
            reading = parts.reward_model.read(rollout, readings, rows)
            judged = parts.penalty(parts.reward_model, reading, labels, parts.replay, rollout, rows)
            wanted = rollout.usable if self._ask else torch.zeros_like(rollout.usable)
            labels.preferences(wanted)
            utility, base = labels.known()
            samples = []
            for b, prompt in enumerate(questions):
                sample = {
                    "iteration": iteration,
                    "id": prompt.name,
                    "prompt": prompt.text,
                    "reply": rollout.texts[2 * b],
                    "reference": rollout.texts[2 * b + 1],
                    "reward": judged.reward[b, 0],
                    "penalty": judged.penalty[b, 0],
                    "utility": utility[b, 0],
                    "reference_reward": judged.reference_reward[b, 0],
                    "reference_utility": base[b, 0],
                    "audit_calls": int(wanted[b, 0]) * parts.processes.world,
                }
                samples.append(records.tidy(sample))
            return samples

        return parts.memory("score", score)


def cut(path: Path, last: int, ends: int) -> None:
    """Drop the replies after iteration `last`, and those that were its run's last and are so no more."""
    if path.is_file():
        records.cut(path, last)
        if last < ends and not _is_kept(last):
            records.cut(path, last - 1)


def _is_kept(iteration: int) -> bool:
    """Whether it is a power of 4."""
    return iteration & (iteration - 1) == 0 and iteration.bit_length() % 2 == 1
