"""One iteration on random prompts of one length, with replies that are never cut short: what a plan supposes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fpo_train import loop
from fpo_train.config import RunConfig
from fpo_train.data.prompts import Prompt
from fpo_train.oracle import load_oracle
from fpo_train.penalty.base import Penalty
from fpo_train.policy import Policy, add_adapter
from fpo_train.policy.decoding import group_heads
from fpo_train.policy.load import checkpoint_layers
from fpo_train.processes import Processes
from fpo_train.reward_model import load_reward_model
from fpo_train.reward_model.replay import Replay
from fpo_train.rollout import sampler
from fpo_train.update import load_update

EOS = 2
WORDS = "word " * 200  # more than any reward model's `max_tokens`


class Bench:
    """The phases of a run by name, each called with rows at once, in the order of `PHASES`."""

    def __init__(self, lm: Any, config: RunConfig, prompt_tokens: int) -> None:
        device = next(lm.parameters()).device
        lm.requires_grad_(False).eval()
        group_heads(lm)
        if config.policy.gradient_checkpointing:
            checkpoint_layers(lm)
        tokenizer = SimpleNamespace(eos_token_id=EOS, decode=lambda reply, skip_special_tokens: WORDS)
        policy, processes = Policy(add_adapter(lm, config.policy), tokenizer), Processes()
        generator = torch.Generator().manual_seed(0)
        many = config.rollout.prompts
        ids = torch.randint(3, lm.config.vocab_size, (many, prompt_tokens), generator=generator).tolist()
        ids[0] = ids[0][1:]  # one is shorter, so that there is padding
        self.prompts = [Prompt(name=str(n), text=WORDS, ids=tuple(row)) for n, row in enumerate(ids)]
        self.parts = loop.Parts(
            config=config,
            processes=processes,
            memory=None,  # type: ignore[arg-type]
            prompts=None,  # type: ignore[arg-type]
            policy=policy,
            sampler=sampler(policy, config.rollout, 0),
            reward_model=load_reward_model(config, policy, processes, device),
            replay=Replay(64),
            oracle=load_oracle(config, policy, processes),
            penalty=Penalty(config.penalty, processes, 0),
            update=load_update(policy, config, processes),
        )
        torch.nn.init.normal_(self.parts.reward_model.head.weight)  # so that candidates differ

    def held(self) -> list[Tensor]:
        """The tensors that live on between iterations."""
        parts = self.parts
        modules = parts.policy.model, parts.reward_model.module
        weights = [t for module in modules for t in [*module.parameters(), *module.buffers()]]
        optimizers = parts.update.optimizer, parts.reward_model.optimizer
        states = [t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor)]
        kept = [t for state in parts.reward_model.history for t in state.weights.values()]
        return [*weights, *states, *kept, *parts.reward_model._start.values()]

    def generate(self, rows: int) -> None:
        """Candidates and references."""
        self.rollout = self.parts.sampler(self.prompts, 1, 0, rows)

    def score(self, rows: int) -> None:
        """Rewards and penalties."""
        self.readings, self.labels, self.reading, self.judged = loop.judge(self.parts, self.rollout, rows)
        self.readings.of()  # of all rows, where the reward model reads for itself too: the most there can be
        assert self.judged.effective.isfinite().all()

    def update(self, rows: int) -> None:
        """One step of the policy."""
        self.parts.update.gradient(self.rollout, self.readings, self.judged, rows)
        assert self.parts.update.step() > 0

    def retrain(self, rows: int) -> None:
        """One step of the reward model."""
        is_best = self.judged.is_best
        pairs = loop.label_pairs(self.rollout, self.reading, is_best, self.labels.preferences(is_best), 1)
        self.parts.reward_model.gradient(pairs, rows)
        self.parts.reward_model.step()

    def forget(self) -> None:
        """Let go of the iteration."""
        del self.rollout, self.readings, self.labels, self.reading, self.judged
