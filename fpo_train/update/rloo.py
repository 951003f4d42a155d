"""All candidates by the score-function gradient, each against the mean of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from fpo_train.penalty.base import Judged
from fpo_train.policy import Encoded, Sequences
from fpo_train.policy.logits import token_log_probs
from fpo_train.rollout import Readings, Rollout

from .base import Update


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
