"""The paper's oracle: the frozen base model's mean log-likelihood of a reply."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

import torch
from torch import Tensor

from fpo_train.config import RunConfig
from fpo_train.errors import RunError
from fpo_train.policy import Encoded, Policy, load_policy
from fpo_train.rollout import Readings, Rollout, Said, sampled

from .base import UtilityOracle


class BaseOracle(UtilityOracle):
    """U(z) = offset + mean over tokens of log p_base(token | prompt, tokens before), cut to `utility_range`.

    In nats a token. The mean is over the reply's own tokens, its EOS included where the model said it; the prompt
    and the token that closes a reply cut off at its longest are left out.

    With `mean_over: padded` it also counts the padding behind the reply, as the published script does: a prompt's
    candidates are padded with EOS to the longest of them, the model reads that padding as if it had been said
    (nothing is masked), and each of those EOS tokens is scored like any other. The reference is judged by itself,
    so it has no padding. A row's utility does not depend on which rows are asked for.

    With `quantization: int8` a second copy of the base in 8 bits says so, in place of the policy's own base.

    A reply without tokens has no utility (NaN).
    """

    local = True

    def __init__(self, policy: Policy, config: RunConfig) -> None:
        """Raises: RunError: an 8-bit copy is wanted where bitsandbytes is not installed."""
        super().__init__(config.oracle.temperature)
        self._config = config.oracle
        self._at_once = config.update.logits_at_once
        self._shared = config.oracle.quantization in ("none", config.policy.quantization)
        self._model = policy if self._shared else _second_copy(policy, config)
        self.from_readings = self._shared and config.oracle.mean_over != "padded"

    @torch.no_grad()
    def utility(self, rollout: Said, readings: Readings, rows: Tensor) -> Tensor:
        """U of rows (n,), fp32 (n,); logits of at most `update.logits_at_once` tokens exist at a time."""
        rollout = sampled(rollout)
        if self._config.mean_over == "padded":
            encoded = self._read_padded(rollout, readings, rows)
        elif self._shared:
            encoded = readings.of(rows)
        else:
            encoded = self._model.encode(rollout.sequences.rows(rows), readings.rows_at_once)
        utility = self._config.offset + self._mean_log_likelihood(encoded)
        if self._config.utility_range is not None:
            utility = utility.clamp(*self._config.utility_range)
        empty = rollout.sequences.reply[rows].sum(1) == 0  # with padding behind it, even nothing has a likelihood
        return self._count(utility.masked_fill(empty, float("nan")).float(), silent="empty")

    def _read_padded(self, rollout: Rollout, readings: Readings, rows: Tensor) -> Encoded:
        n = rollout.candidates
        prompts, replies = [], []
        for row in rows.tolist():
            prompt, reply = row // (n + 1), rollout.replies[row]
            first = prompt * (n + 1)
            together = rollout.replies[first : first + n] if row < first + n else [reply]
            prompts.append(rollout.prompts[prompt])
            replies.append(reply + [self._model.eos] * (max(map(len, together)) - len(reply)))
        return self._model.encode(self._model.sequences(prompts, replies), readings.rows_at_once)

    def _mean_log_likelihood(self, encoded: Encoded) -> Tensor:
        """Mean log p of each row's tokens, float64 (n,); NaN for a row without any."""
        parts = [encoded.predicting.new_zeros(0, dtype=torch.float64)]
        with self._model.base():  # an adapter on the output embedding must not speak for the base
            for states, tokens in zip(
                encoded.predicting.split(self._at_once), encoded.tokens.split(self._at_once), strict=True
            ):
                logits = self._model.project(states)
                said = logits.gather(1, tokens[:, None])[:, 0]
                parts.append((said - logits.logsumexp(1)).double())
        return torch.segment_reduce(torch.cat(parts), "mean", offsets=encoded.offsets)


def _second_copy(policy: Policy, config: RunConfig) -> Policy:
    """The base once more in 8 bits. Its adapter is never switched on, so it is as small as can be."""
    if find_spec("bitsandbytes") is None:
        raise RunError("oracle.quantization: int8 needs bitsandbytes, which is not installed")
    asked = dataclasses.replace(
        config.policy, model=policy.base_name, quantization="int8", lora_rank=1, gradient_checkpointing=False
    )
    return load_policy(asked, config.seed, policy.device)
