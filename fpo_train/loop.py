"""The iteration of Foresighted Policy Optimization: sample, score, penalise, learn the best, retrain the judge."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fpo_train.config import RunConfig
from fpo_train.config.seeds import mix
from fpo_train.data.prompts import Prompts
from fpo_train.memory.guard import Guard
from fpo_train.oracle import Labels, Oracle
from fpo_train.penalty.base import Judged, Penalty
from fpo_train.policy import Policy
from fpo_train.processes import Processes
from fpo_train.report.metrics import Clock, Row, Sample, measure, peak_memory, samples_of
from fpo_train.reward_model import Reading, RewardModel
from fpo_train.reward_model.replay import Pair, Replay
from fpo_train.rollout import Readings, Rollout, Sampler
from fpo_train.update import Update


@dataclass(frozen=True)
class Parts:
    """What an iteration works on."""

    config: RunConfig
    processes: Processes
    memory: Guard
    prompts: Prompts
    policy: Policy
    sampler: Sampler
    reward_model: RewardModel
    replay: Replay
    oracle: Oracle
    penalty: Penalty
    update: Update


def iterate(parts: Parts, iteration: int) -> tuple[Row, list[Sample]]:
    """One iteration, numbered from 1; returns its metrics and samples, the same on all ranks.

    `parts.memory` calls each phase's work with the number of sequences that may be held at once, and calls again with
    half of it when memory runs out: until its `step`, a phase changes nothing that calling it again would not.
    """
    config, processes = parts.config, parts.processes
    clock = Clock(parts.policy.device)
    seed_stream(config.seed, iteration, processes.rank)

    with clock("generate"):
        prompts = processes.share(parts.prompts.batch(iteration - 1, config.rollout.prompts))
        first = processes.rank * len(prompts)
        rollout = parts.memory("generate", lambda rows: parts.sampler(prompts, iteration, first, rows))

    with clock("score"):
        readings, labels, reading, judged = parts.memory("score", lambda rows: judge(parts, rollout, rows))

    with clock("update"):
        learnt = parts.memory("update", lambda rows: parts.update.gradient(rollout, readings, judged, rows))
        norm = parts.update.step()

    with clock("retrain"):
        pairs = label_pairs(rollout, reading, judged.is_best, labels.preferences(judged.is_best), iteration)
        labels.check(processes)
        parts.replay.add(processes.gather_objects(pairs))
        fitted = retrain(parts, iteration)

    best = judged.effective.argmax(1)  # (B,)
    row = measure(
        iteration,
        judged,
        labels,
        best,
        rollout,
        processes,
        learnt=learnt,
        grad_norm=norm,
        learning_rate=float(parts.update.scheduler.get_last_lr()[0]),
        reward_model_loss=fitted,
        reward_model_drift=parts.reward_model.drift(),
        seconds=clock.seconds,
        peak=peak_memory(parts.policy.device),
        memory_planned=parts.memory.planned,
        memory_measured=parts.memory.measured,
        audit=config.logging.audit,
    )
    return row, samples_of(rollout, judged, best, iteration, processes, labels)


def judge(parts: Parts, rollout: Rollout, rows: int) -> tuple[Readings, Labels, Reading, Judged]:
    """Candidates scored and penalised, and the best one labelled, `rows` sequences at a time.

    The base reads each reply once at most.
    """
    readings = Readings(parts.policy, rollout, rows)
    labels = Labels(parts.oracle, rollout, readings)
    reading = parts.reward_model.read(rollout, readings, rows)
    judged = parts.penalty(parts.reward_model, reading, labels, parts.replay, rollout, rows)
    labels.preferences(judged.is_best)  # here, where too little memory means fewer rows
    return readings, labels, reading, judged


def label_pairs(rollout: Rollout, reading: Reading, is_best: Tensor, preferences: Tensor, iteration: int) -> list[Pair]:
    """(best, reference) of each prompt with its soft label; without one, where the oracle failed, there is no pair."""
    stride, found = rollout.candidates + 1, []
    places, labels = is_best.nonzero().tolist(), preferences[is_best].tolist()
    for (b, n), preference in zip(places, labels, strict=True):
        if preference != preference:
            continue
        chosen, reference = b * stride + n, b * stride + rollout.candidates
        features = None if reading.features is None else reading.features[[chosen, reference]].cpu()
        pair = Pair(
            prompt=rollout.prompts[b],
            chosen=tuple(rollout.replies[chosen]),
            reference=tuple(rollout.replies[reference]),
            chosen_text=rollout.texts[chosen],
            reference_text=rollout.texts[reference],
            preference=preference,
            iteration=iteration,
            features=None if features is None else (features[0].clone(), features[1].clone()),
        )
        found.append(pair)
    return found


def retrain(parts: Parts, iteration: int) -> float | None:
    """Train the reward model on the pairs since its last training, and on kept ones; mean loss in nats a pair.

    None where it is not its turn, or there is nothing to learn from.
    """
    config, model, losses = parts.config.reward_model, parts.reward_model, []
    if iteration % config.every:
        return None
    before = iteration - config.every
    fresh = parts.replay.since(before)
    generator = torch.Generator().manual_seed(mix("replay", parts.config.seed, iteration))
    for _ in range(config.steps):
        if batch := fresh + parts.replay.draw(config.replay_pairs, generator, before):
            losses.append(float(parts.memory("retrain", partial(model.gradient, batch))))
            model.step()
    return sum(losses) / len(losses) if losses else None


def seed_stream(seed: int, place: int, rank: int = 0) -> None:
    """Torch's random stream (dropout) of one place in a run: to resume takes no more than the iteration's number."""
    torch.manual_seed(mix("dropout", seed, place, rank))
