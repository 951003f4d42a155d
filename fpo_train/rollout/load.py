"""Which sampler a run asks for."""

from __future__ import annotations

from fpo_train.config import RolloutConfig
from fpo_train.policy import Policy

from .base import Sampler
from .local import TransformersSampler


def sampler(policy: Policy, config: RolloutConfig, seed: int, unpacks: bool = False) -> Sampler:
    """The sampler that `rollout.engine` names; `unpacks`: see `TransformersSampler`.

    Raises:
        RunError: it is not installed.
    """
    if config.engine == "vllm":
        from .vllm import VllmSampler

        return VllmSampler(policy, config, seed)
    return TransformersSampler(policy, config, seed, unpacks)
