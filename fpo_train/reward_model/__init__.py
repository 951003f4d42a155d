"""The reward model: what is trained on preferences, and what the policy learns from."""

from .base import Reading, RewardModel, State
from .load import load_reward_model

__all__ = ["Reading", "RewardModel", "State", "load_reward_model"]
