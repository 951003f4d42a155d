"""The iteration of Foresighted Policy Optimization: sample, score, penalise, learn the best, retrain the judge."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import RunConfig
from .data import Prompts
from .metrics import Clock, Row, Sample, measure, peak_memory, samples_of
from .oracle import BaseOracle, Labels
from .penalty import Penalty
from .policy import Policy
from .reward_model import HeadRewardModel
from .rollout import sample
from .update import BestOfN


@dataclass(frozen=True)
class Parts:
    """What an iteration works on."""

    config: RunConfig
    prompts: Prompts
    policy: Policy
    reward_model: HeadRewardModel
    oracle: BaseOracle
    penalty: Penalty
    update: BestOfN


def seed_stream(seed: int, place: int) -> None:
    """Torch's random stream of one place in a run: a resumed run needs no more than the iteration's number."""
    torch.manual_seed(seed * 1_000_003 + place)


def iterate(parts: Parts, iteration: int) -> tuple[Row, list[Sample]]:
    """One iteration, numbered from 1; returns its metrics and its samples."""
    settings = parts.config.rollout
    clock = Clock()
    seed_stream(parts.config.seed, iteration)

    with clock("generate"):
        prompts = parts.prompts.batch(iteration - 1, settings.prompts)
        rollout = sample(parts.policy, prompts, settings)

    with clock("score"):
        encoded = parts.policy.encode(rollout.sequences)
        labels = Labels(parts.oracle, encoded, settings.prompts, settings.candidates)
        features = encoded.closing.view(settings.prompts, settings.candidates + 1, -1)  # (B, N+1, H)
        candidates, references = features[:, :-1], features[:, -1:]
        reward, reference_reward = parts.reward_model.score(candidates), parts.reward_model.score(references)
        product = parts.reward_model.steering(candidates, references)
        judged = parts.penalty(
            reward,
            reference_reward,
            product,
            lambda: labels.preferences(torch.ones_like(reward, dtype=torch.bool)),
        )
        best = judged.effective.argmax(1)  # (B,)

    with clock("update"):
        learnt = parts.update.step(encoded, rollout.chosen(best))

    with clock("retrain"):
        is_best = torch.nn.functional.one_hot(best, settings.candidates).bool()
        preference = labels.preferences(is_best)[is_best]
        fitted = parts.reward_model.learn(candidates[is_best], references[:, 0], preference)

    row = measure(iteration, judged, reference_reward, labels, is_best, rollout)
    row |= {"kl": learnt.kl, "policy_loss": learnt.loss, "reward_model_loss": fitted}
    row |= {"seconds": clock.seconds, "peak_memory_bytes": peak_memory(parts.policy.device)}
    return row, samples_of(parts.policy, rollout, judged, best, iteration)
