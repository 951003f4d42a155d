"""Whole iterations that are run again and again from one start: the published procedure's, and ours."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import procedure
from benchmarks.fixed import Answers, Fixed, exact_over
from fpo_train.config import RunConfig
from fpo_train.loop import iterate, judge, label_pairs
from fpo_train.penalty.base import Penalty
from fpo_train.rollout import Readings, Rollout
from fpo_train.running.run import Workshop, first_pairs


class Ours:
    """fpo_train's iteration of one configuration; a call puts everything back to the start and runs number 1."""

    def __init__(
        self, config: RunConfig, workshop: Workshop, answer: Callable[[Ours], Tensor], beside: Ours | None = None
    ) -> None:
        """With another beside it, models and optimizers are that one's, and the penalty alone is of its own."""
        if beside is None:
            self.parts = workshop.parts(config)
        else:
            penalty = Penalty(config.penalty, workshop.processes, config.seed)
            self.parts = dataclasses.replace(beside.parts, config=config, penalty=penalty)
        if config.penalty.kind == "residual":  # before the first iteration it would have nothing to foretell from
            self.parts.replay.add(first_pairs(self.parts))
        self._answer: Callable[[], Tensor] = functools.cache(lambda: answer(self))
        self._adapter = {name: p.detach().clone() for name, p in self.parts.policy.trainable.items()}
        parts = self.parts
        self._start = copy.deepcopy([parts.reward_model.state_dict(), parts.update.state_dict(), parts.penalty.state()])
        self._replay = parts.replay.state_dict()
        self.seconds: list[Mapping[str, float]] = []

    def __call__(self) -> Tensor:
        answer = self._answer()
        self.restart()
        row, _ = iterate(self.parts, 1)
        self.seconds.append(row["seconds"])
        return answer

    def restart(self) -> None:
        """As a run begins."""
        parts = self.parts
        put(parts.policy.trainable, self._adapter)
        reward_model, update, penalty = copy.deepcopy(self._start)
        parts.reward_model.load_state_dict(reward_model)
        parts.update.load_state_dict(update)
        parts.penalty.restore(penalty)
        parts.replay.load_state_dict(self._replay)

    def judged(self, fixed: Fixed) -> Answers:
        """What it makes of fixed replies; see `fixed.exact`."""
        parts, rollout = self.parts, self._begun_with(fixed)
        readings, labels, reading, judged = judge(parts, rollout, 0)
        found = {"reward": judged.reward, "penalty": judged.penalty}
        if judged.product is not None:
            found["product"] = judged.product
        pairs = label_pairs(rollout, reading, judged.is_best, labels.preferences(judged.is_best), 1)
        policy_loss = parts.update.gradient(rollout, readings, judged).loss
        found["policy_loss"] = torch.tensor([policy_loss])
        found["reward_loss"] = parts.reward_model.gradient(pairs)[None]
        utilities = labels.utilities(torch.ones_like(judged.is_best))
        if utilities is not None:
            found["utility"] = torch.cat(utilities, 1) - parts.config.oracle.offset
        return found

    def exact(self, fixed: Fixed, parameters: str) -> Answers:
        """What it should make of fixed replies with ∇ over those weights of its reward model; see `exact_over`."""
        parts, rollout = self.parts, self._begun_with(fixed)
        reading = parts.reward_model.read(rollout, Readings(parts.policy, rollout))
        model = parts.reward_model
        return exact_over(model.module, reading.batch or {}, model.names(parameters), rollout.candidates)

    def _begun_with(self, fixed: Fixed) -> Rollout:
        """The fixed replies as a rollout, everything at its start."""
        self.restart()
        replies = [reply for some in fixed.replies for reply in some]
        return Rollout.of(self.parts.policy, fixed.prompts, replies, candidates=len(fixed.texts[0]) - 1)


class Published:
    """The procedure's iteration; a call puts everything back to the start and runs number 1."""

    def __init__(
        self, peer: procedure.Procedure, prompts: Sequence[str], answer: Callable[[Published], Tensor]
    ) -> None:
        self.peer, self.prompts = peer, prompts
        self._answer: Callable[[], Tensor] = functools.cache(lambda: answer(self))
        models = peer.models
        self._trained = {
            f"{number}.{name}": p
            for number, model in enumerate((models.policy, models.reward_model))
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        self._start = {name: p.detach().clone() for name, p in self._trained.items()}
        self.seconds: list[Mapping[str, float]] = []

    def __call__(self) -> Tensor:
        answer = self._answer()
        self.restart()
        self.seconds.append(self.peer.iterate(self.prompts, seed=0))
        return answer

    def restart(self) -> None:
        """As a run begins."""
        put(self._trained, self._start)
        self.peer.forget()
        self.peer.begin()

    def judged(self, fixed: Fixed) -> Answers:
        """What it makes of fixed replies; see `fixed.exact`."""
        peer, share = self.peer, 1 / len(fixed.prompts)
        self.restart()
        found, policy_loss, reward_loss = [], torch.zeros(1), torch.zeros(1)
        for prompt, (*candidates, reference) in zip(fixed.prompts, fixed.texts, strict=True):
            judged = peer.judge(prompt.text, candidates, reference)
            best = int((judged.reward - peer.settings.gamma * judged.penalty).argmax())
            policy_loss += share * peer.learn(prompt.text, candidates[best], share).cpu()
            reward_loss += share * peer.retrain(candidates[best], reference, judged.preference[best], share).cpu()
            found.append(judged)
        return {
            "reward": torch.stack([one.reward for one in found]),
            "penalty": torch.stack([one.penalty for one in found]),
            "utility": torch.stack([one.utility for one in found]) - peer.settings.offset,
            "policy_loss": policy_loss,
            "reward_loss": reward_loss,
        }


@torch.no_grad()
def put(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
