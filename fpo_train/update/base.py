"""The step of the policy: a gradient over its adapter, summed over rows and ranks, and an optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpo_train.config import RunConfig
from fpo_train.errors import NotFinite
from fpo_train.penalty.base import Judged
from fpo_train.policy import Encoded, Policy, Sequences
from fpo_train.policy.logits import kl_to, token_log_probs
from fpo_train.policy.optimizers import make_optimizer, make_schedule, move, restore, state_of
from fpo_train.processes import Processes
from fpo_train.rollout import Readings, Rollout


class Learnt(NamedTuple):
    """The loss, and KL(policy ‖ base) before the step in nats a reply token; both over the learnt replies of all ranks.

    The loss is in nats a token (best_of_n), or the mean of advantage × log-probability (rloo). With
    `policy.lora_dropout` above 0 both are those of the policy with its dropout on.
    """

    loss: float
    kl: float


class Update(ABC):
    """An optimizer over the adapter; a gradient, which may be taken again, and a step.

    Denominators count the tokens and replies of all ranks, so that a gradient depends neither on how many sequences
    are on a tape nor, beyond rounding, on how many processes there are.
    """

    def __init__(self, policy: Policy, config: RunConfig, processes: Processes) -> None:
        settings = config.update
        self.config = settings
        self._policy = policy
        self._processes = processes
        self._attention_mask = config.rollout.attention_mask
        self._parameters = list(policy.trainable.values())
        self.optimizer = make_optimizer(
            self._parameters, settings.optimizer, settings.learning_rate, settings.weight_decay
        )
        self.scheduler = make_schedule(self.optimizer, settings.schedule, settings.warmup, config.iterations)

    def gradient(self, rollout: Rollout, readings: Readings, judged: Judged, rows_at_once: int = 0) -> Learnt:
        """Set the adapter's gradient, summed over ranks, from at most `rows_at_once` sequences on a tape (0: all).

        Where nothing can be learnt there is no gradient, and both numbers are 0.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with self._learning():
            figures = self._accumulate(rollout, readings, judged, rows_at_once)
        self._processes.sum_gradients(self._parameters)
        loss, kl = self._processes.total(figures.double()).tolist()
        return Learnt(loss, kl)

    def step(self) -> float:
        """Clip, and step optimizer and schedule; returns the gradient's norm. Without a gradient nothing moves.

        Raises:
            NotFinite: a gradient that is not finite, which would leave an adapter of NaN; nothing has moved then. Or a
                step that has left such an adapter.
        """
        if all(p.grad is None for p in self._parameters):
            return 0.0
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self.config.max_grad_norm or float("inf")))
        if not math.isfinite(norm):
            raise NotFinite(
                f"update: the policy's gradient has the norm {norm}; a smaller update.learning_rate may help"
            )
        said = "update: the step has left weights that are not finite numbers; update.learning_rate is too large"
        move(self.optimizer, self._parameters, said)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and schedule."""
        return state_of(self.optimizer, self.scheduler)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        restore(self.optimizer, self.scheduler, state)

    @abstractmethod
    def _accumulate(self, rollout: Rollout, readings: Readings, judged: Judged, rows_at_once: int) -> Tensor:
        """Add up the gradient of this rank's part of the loss; its parts of loss and KL, (2,)."""

    @contextmanager
    def _learning(self) -> Iterator[None]:
        self._policy.model.train()
        try:
            yield
        finally:
            self._policy.model.eval()

    def _log_probs(self, hidden: Tensor, sequences: Sequences, at: Tensor) -> Tensor:
        """log p of the tokens at the positions `at` (R, T) bool, packed row after row."""
        states, tokens = hidden[:, :-1][at[:, 1:]], sequences.ids[:, 1:][at[:, 1:]]
        policy, at_once = self._policy, self.config.logits_at_once
        return token_log_probs(states, tokens, policy.project, at_once, frozen=policy.projects_frozen)

    def _kl(self, hidden: Tensor, sequences: Sequences, base: Encoded) -> Tensor:
        """Σ KL(policy ‖ base) over the reply tokens, in nats."""
        states, policy = hidden[:, :-1][sequences.reply[:, 1:]], self._policy
        sides, at_once = (policy.project, policy.base_project), self.config.logits_at_once
        return kl_to(states, base.predicting, *sides, at_once, frozen=policy.projects_frozen).sum()

    def _count(self, *numbers: int) -> list[float]:
        """Sums over ranks."""
        return self._processes.total(torch.tensor(numbers, dtype=torch.float64, device=self._policy.device)).tolist()
