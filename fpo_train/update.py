"""What the policy learns from judged candidates: best-of-n, cross-entropy on the best reply's tokens (the paper)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .config import UpdateConfig
from .policy import Encoded, Policy


class Learnt(NamedTuple):
    """Loss in nats a token, and KL(policy ‖ base) in nats a token before the step, both over the learnt replies."""

    loss: float
    kl: float


class BestOfN:
    """AdamW on −mean log π(token) over the reply tokens of the best candidates."""

    def __init__(self, policy: Policy, config: UpdateConfig) -> None:
        self._policy = policy
        self._parameters = list(policy.trainable.values())
        self._max_norm = config.max_grad_norm
        self.optimizer = torch.optim.AdamW(self._parameters, lr=config.learning_rate, weight_decay=config.weight_decay)

    def step(self, encoded: Encoded, rows: Tensor) -> Learnt:
        """Learn the chosen rows; the base's hidden states in `encoded` give the KL its other side.

        With `policy.lora_dropout` above 0 the KL is that of the policy with its dropout on.
        """
        base, _, sequences = self._policy.base_log_probs(encoded, rows)
        self._policy.model.train()
        logits, tokens = self._policy.reply_logits(self._policy.hidden(sequences), sequences)
        self._policy.model.eval()
        own = logits.log_softmax(1)
        loss = -own.gather(1, tokens[:, None]).mean()
        with torch.no_grad():
            kl = (own.exp() * (own - base)).sum(1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self.optimizer.step()
        return Learnt(loss.item(), kl.item())
