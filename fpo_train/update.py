"""What the policy learns from judged candidates: the best one by cross-entropy (the paper), or all of them by RLOO."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import RunConfig
from .engine import Engine
from .errors import NotFinite, RunError
from .logits import kl_to, token_log_probs
from .optimizers import make_optimizer, make_schedule, move, restore, state_of
from .penalty import Judged
from .policy import Encoded, Policy, Sequences
from .rollout import Readings, Rollout


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

    def __init__(self, policy: Policy, config: RunConfig, engine: Engine) -> None:
        settings = config.update
        self.config = settings
        self._policy = policy
        self._engine = engine
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
        self._engine.sum_gradients(self._parameters)
        loss, kl = self._engine.total(figures.double()).tolist()
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
        return token_log_probs(states, tokens, self._policy.project, self.config.logits_at_once)

    def _kl(self, hidden: Tensor, sequences: Sequences, base: Encoded) -> Tensor:
        """Σ KL(policy ‖ base) over the reply tokens, in nats."""
        states, policy = hidden[:, :-1][sequences.reply[:, 1:]], self._policy
        return kl_to(states, base.predicting, policy.project, policy.base_project, self.config.logits_at_once).sum()

    def _count(self, *numbers: int) -> list[float]:
        """Sums over ranks."""
        return self._engine.total(torch.tensor(numbers, dtype=torch.float64, device=self._policy.device)).tolist()


class BestOfN(Update):
    """−mean log π(token) of the best candidate of each prompt, + β · mean KL(policy ‖ base)."""

    def _accumulate(self, rollout: Rollout, readings: Readings, judged: Judged, rows_at_once: int) -> Tensor:
        policy, config = self._policy, self.config
        rows = rollout.chosen(judged.effective.argmax(1))[judged.effective.isfinite().any(1)]
        sequences = rollout.sequences.rows(rows) if len(rows) else None
        width = sequences.ids.shape[1] if sequences else 0
        if config.loss_on == "padded":  # the width of all ranks' rows together
            width = int(self._engine.gather(torch.tensor([width], device=policy.device)).max())
            sequences = widen(sequences, width, policy.eos) if sequences else None
        learnt = self._learnt(sequences) if sequences else torch.zeros(0, 1, dtype=torch.bool)
        replies = int(sequences.reply.sum()) if sequences else 0
        tokens, count, of_replies = self._count(int(learnt.sum()), len(rows), replies)
        figures = torch.zeros(2, device=policy.device)
        if sequences is None:
            return figures
        base = readings.of(rows)
        for index in torch.arange(len(rows), device=rows.device).split(rows_at_once or len(rows)):
            some, at = sequences.rows(index), learnt[index]
            if config.loss_on == "padded":
                some = Sequences(sequences.ids[index], sequences.mask[index], sequences.reply[index])
            at = at[:, : some.ids.shape[1]]
            each = at.sum(1, keepdim=True).expand_as(at)[at]
            weight = (
                1 / (each * count)
                if config.mean == "prompt"
                else torch.full_like(each, 1 / tokens, dtype=torch.float32)
            )
            hidden = policy.hidden(some, self._attention_mask)
            loss = -(weight * self._log_probs(hidden, some, at)).sum()
            with torch.set_grad_enabled(config.kl_weight > 0):
                kl = self._kl(hidden, some, base.rows(index)) / of_replies
            (loss + config.kl_weight * kl).backward()
            figures += torch.stack([loss.detach(), kl.detach()])
        return figures

    def _learnt(self, sequences: Sequences) -> Tensor:
        """The positions of the loss, (R, T) bool; a first token is predicted by nothing."""
        if self.config.loss_on == "reply":
            return sequences.reply
        if self.config.loss_on == "prompt_and_reply":  # without the closing token of a reply that was cut off
            at = sequences.reply.flip(1).cumsum(1).flip(1) > 0
        else:
            at = torch.ones_like(sequences.mask)
        at[:, 0] = False
        return at


class RLOO(Update):
    """−mean over candidates of A · Σ_t log π(token_t), A = R − mean R of the prompt's other candidates.

    R is the effective reward − β · Σ_t [log π(token_t) − log π_base(token_t)], a constant. Prompts with fewer than two
    candidates that could be judged are left out. Source: Ahmadian et al. 2024 (arXiv 2402.14740), section 3.
    """

    def _accumulate(self, rollout: Rollout, readings: Readings, judged: Judged, rows_at_once: int) -> Tensor:
        policy = self._policy
        usable = judged.effective.isfinite()
        usable &= (usable.sum(1) > 1)[:, None]
        rows = rollout.pairs()[0][usable.flatten()]
        sequences = rollout.sequences.rows(rows) if len(rows) else None
        count, replies = self._count(len(rows), int(sequences.reply.sum()) if sequences else 0)
        figures = torch.zeros(2, device=policy.device)
        if sequences is None:
            return figures
        base = readings.of(rows)
        reward = judged.effective.clone()
        if self.config.kl_weight:
            reward[usable] -= self.config.kl_weight * self._divergence(sequences, base, rows_at_once).to(reward.dtype)
        advantage = leave_one_out(reward, usable)[usable]
        for index in torch.arange(len(rows), device=rows.device).split(rows_at_once or len(rows)):
            some = sequences.rows(index)
            hidden = policy.hidden(some, self._attention_mask)
            weight = advantage[index].repeat_interleave(some.reply.sum(1)) / count
            loss = -(weight * self._log_probs(hidden, some, some.reply)).sum()
            loss.backward()
            with torch.no_grad():
                figures += torch.stack([loss, self._kl(hidden, some, base.rows(index)) / replies])
        return figures

    @torch.no_grad()
    def _divergence(self, sequences: Sequences, base: Encoded, rows_at_once: int) -> Tensor:
        """Σ_t [log π(token_t) − log π_base(token_t)] of each row, (R,); the policy without dropout, as it sampled."""
        policy, found, every = self._policy, [], torch.arange(len(sequences.ids), device=sequences.ids.device)
        with policy.at_rest():
            for index in every.split(rows_at_once or len(every)):
                some, other = sequences.rows(index), base.rows(index)
                own = self._log_probs(policy.hidden(some, self._attention_mask), some, some.reply)
                theirs = token_log_probs(
                    other.predicting, other.tokens, policy.base_project, self.config.logits_at_once
                )
                found.append(torch.segment_reduce(own - theirs, "sum", offsets=other.offsets))
        return torch.cat(found)


def leave_one_out(reward: Tensor, usable: Tensor) -> Tensor:
    """R minus the mean R of the prompt's other usable candidates, (B, N); 0 where not usable.

    Args:
        reward: (B, N). usable: (B, N) bool, in each row none or two and more.
    """
    known = torch.where(usable, reward, 0.0)
    others = (usable.sum(1, keepdim=True) - 1).clamp_min(1)
    return torch.where(usable, reward - (known.sum(1, keepdim=True) - known) / others, 0.0)


def widen(sequences: Sequences, width: int, eos: int) -> Sequences:
    """Padded with EOS on the right to `width` tokens."""
    more = width - sequences.ids.shape[1]
    ids = torch.nn.functional.pad(sequences.ids, (0, more), value=eos)
    mask, reply = (torch.nn.functional.pad(one, (0, more)) for one in (sequences.mask, sequences.reply))
    return Sequences(ids.masked_fill(~mask, eos), mask, reply)


def load_update(policy: Policy, config: RunConfig, engine: Engine) -> Update:
    """The update that `update.kind` names.

    Raises:
        RunError: settings that do not go together, or an optimizer whose package is missing.
    """
    if config.update.kind == "best_of_n":
        return BestOfN(policy, config, engine)
    if config.update.loss_on != "reply" or config.update.mean != "token":
        raise RunError("update: rloo learns reply tokens; update.loss_on and update.mean are best_of_n's")
    if config.rollout.candidates < 2:
        raise RunError(f"update: rloo needs 2 candidates or more, got rollout.candidates {config.rollout.candidates}")
    return RLOO(policy, config, engine)
