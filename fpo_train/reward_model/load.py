"""The reward model that a configuration names."""

from __future__ import annotations

import torch

from fpo_train.config import RunConfig
from fpo_train.errors import RunError
from fpo_train.policy import Policy
from fpo_train.processes import Processes

from .base import RewardModel
from .classifier import ClassifierRewardModel
from .on_base import AdapterRewardModel, HeadRewardModel


def load_reward_model(config: RunConfig, policy: Policy, processes: Processes, device: torch.device) -> RewardModel:
    """A fresh reward model of `reward_model.kind`; what is drawn at random follows from the run's seed.

    Raises:
        RunError: a model that cannot be loaded or is no reward model, or layers to adapt that it does not have.
    """
    settings = config.reward_model
    if settings.kind == "classifier":
        if settings.dtype == "float16" and settings.optimizer == "adamw":
            raise RunError("reward_model: torch's AdamW cannot train float16 (its ε is 0 there); take paged_adamw_8bit")
        return ClassifierRewardModel(config, processes, device)
    kind = HeadRewardModel if settings.kind == "head" else AdapterRewardModel
    return kind(policy, config, processes)
