"""Random streams a reply: what a candidate says depends on its own place alone, not on who is sampled beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from fpo_train.config import RolloutConfig
from fpo_train.config.seeds import mix
from fpo_train.policy.generation import Chooser

NO_LOGITS = (
    "rollout: the policy's logits are not finite numbers; try a smaller update.learning_rate or another policy.dtype"
)


def row_seed(seed: int, place: int, prompt: int, candidate: int) -> int:
    """The seed of one reply's stream, 63 bits; `place` is the iteration's number, prompts count over all processes."""
    return mix("reply", seed, place, prompt, candidate)


def uniforms(seed: int, place: int, rows: list[tuple[int, int]], count: int) -> Tensor:
    """Numbers in [0, 1), (R, count) float64 on the CPU: a stream for each row (prompt b, candidate n) of one place.

    `place` is the iteration's number; b counts the prompts of all processes.
    """
    streams = (torch.Generator().manual_seed(row_seed(seed, place, b, n)) for b, n in rows)
    return torch.stack([torch.rand(count, generator=stream, dtype=torch.float64) for stream in streams])


class RowSampler(Chooser):
    """The token that each row's own uniform picks.

    The distribution is that of transformers' sampling: softmax(logits / temperature), of the `top_k` likeliest, of
    these the smallest set that holds `top_p`. The token is the inverse of its cumulative distribution, likeliest
    first, at the uniform; sums are in float64.
    """

    def __init__(self, settings: RolloutConfig, uniforms: Tensor) -> None:
        super().__init__(NO_LOGITS)
        self._settings = settings
        self._uniforms = uniforms  # (R, max_new_tokens), on the logits' device

    def __call__(self, step: int | Tensor, rows: Tensor, logits: Tensor) -> Tensor:
        """See `Chooser`; logits that are no distribution are noted."""
        probability, tokens = kept(logits, self._settings)
        self.note(probability[:, 0])  # the likeliest: NaN where a logit is NaN or +∞, or all are −∞
        running = probability.cumsum(-1)
        u = self._uniforms[rows, step][:, None] * running[:, -1:]
        last = ((probability > 0).sum(-1, keepdim=True) - 1).clamp_min(0)
        place = torch.minimum((running <= u).sum(-1, keepdim=True), last)
        return tokens.gather(1, place)[:, 0]


def kept(scores: Tensor, settings: RolloutConfig) -> tuple[Tensor, Tensor]:
    """Probabilities, float64, 0 outside the kept set, and tokens, both (R, min(top_k, V)), the likeliest first."""
    top, tokens = scores.float().topk(min(settings.top_k, scores.shape[-1]), dim=-1)
    probability = (top / settings.temperature).double().softmax(-1)
    before = probability.cumsum(-1) - probability
    return probability.masked_fill(before >= settings.top_p, 0.0), tokens
