"""Foresighted Policy Optimization: iterative RLHF whose policy answers for how it steers its reward model."""

__version__ = "0.1.0"
