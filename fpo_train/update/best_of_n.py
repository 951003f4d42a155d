"""What the paper learns: the best of n by cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from fpo_train.penalty.base import Judged
from fpo_train.policy import Sequences
from fpo_train.rollout import Readings, Rollout

from .base import Update


class BestOfN(Update):
    """−mean log π(token) of the best candidate of each prompt, + β · mean KL(policy ‖ base)."""

    def _accumulate(self, rollout: Rollout, readings: Readings, judged: Judged, rows_at_once: int) -> Tensor:
        policy, config = self._policy, self.config
        rows = rollout.chosen(judged.effective.argmax(1))[judged.effective.isfinite().any(1)]
        sequences = rollout.sequences.rows(rows) if len(rows) else None
        width = sequences.ids.shape[1] if sequences else 0
        if config.loss_on == "padded":  # the width of all ranks' rows together
            width = int(self._processes.gather(torch.tensor([width], device=policy.device)).max())
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


def widen(sequences: Sequences, width: int, eos: int) -> Sequences:
    """Padded with EOS on the right to `width` tokens."""
    more = width - sequences.ids.shape[1]
    ids = torch.nn.functional.pad(sequences.ids, (0, more), value=eos)
    mask, reply = (torch.nn.functional.pad(one, (0, more)) for one in (sequences.mask, sequences.reply))
    return Sequences(ids.masked_fill(~mask, eos), mask, reply)
