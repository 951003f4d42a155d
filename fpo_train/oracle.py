"""The oracle: what humans would say, played by the base model's mean log-likelihood of a reply.

U(z) = mean over the reply's tokens of log p_base(token | prompt, tokens before), in nats a token; prompt and
padding are left out (the paper adds a constant, which cancels). p* = σ((U(z) − U(ref)) / temperature).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import OracleConfig
from .policy import Encoded, Policy


class BaseOracle:
    """Utilities of replies under the frozen base model."""

    def __init__(self, policy: Policy, config: OracleConfig) -> None:
        self.temperature = config.temperature
        self._policy = policy

    @torch.no_grad()
    def utility(self, encoded: Encoded, rows: Tensor, rows_at_once: int = 16) -> Tensor:
        """U of the chosen rows, (n,) fp32; the logits of at most `rows_at_once` replies exist at a time."""
        parts = [self._utility(encoded, some) for some in rows.split(rows_at_once)]
        return torch.cat(parts)

    def _utility(self, encoded: Encoded, rows: Tensor) -> Tensor:
        log_probs, tokens, sequences = self._policy.base_log_probs(encoded, rows)
        log_probability = log_probs.gather(1, tokens[:, None])[:, 0]
        counts = sequences.reply.sum(1)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return torch.segment_reduce(log_probability, "mean", offsets=offsets)

    def preference(self, difference: Tensor) -> Tensor:
        """p* = σ(difference / temperature)."""
        return torch.sigmoid(difference / self.temperature)


class Labels:
    """The oracle's labels of one iteration: bought when first asked for, counted, never bought twice."""

    def __init__(self, oracle: BaseOracle, encoded: Encoded, prompts: int, candidates: int) -> None:
        self._oracle = oracle
        self._encoded = encoded
        self._shape = prompts, candidates + 1
        device = encoded.hidden.device
        self._utility = torch.full(self._shape, float("nan"), device=device)  # (B, N+1), the reference last
        self._labelled = torch.zeros(prompts, candidates, dtype=torch.bool, device=device)

    @property
    def calls(self) -> int:
        """How many (candidate, reference) pairs the oracle has labelled."""
        return int(self._labelled.sum())

    def utilities(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """U of the candidates with wanted (B, N) True, NaN elsewhere, (B, N), and of the references, (B, 1)."""
        self._labelled |= wanted
        needed = torch.cat([wanted, wanted.any(1, keepdim=True)], 1) & self._utility.isnan()
        rows = needed.flatten().nonzero()[:, 0]
        if len(rows):
            self._utility.view(-1)[rows] = self._oracle.utility(self._encoded, rows)
        known = self._utility.masked_fill(~torch.cat([wanted, wanted.any(1, keepdim=True)], 1), float("nan"))
        return known[:, :-1], known[:, -1:]

    def preferences(self, wanted: Tensor) -> Tensor:
        """p* of the wanted candidates against their reference, NaN elsewhere, (B, N)."""
        utility, reference = self.utilities(wanted)
        return self._oracle.preference(utility - reference)
