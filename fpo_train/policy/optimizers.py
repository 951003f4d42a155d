"""Optimizers and learning-rate schedules of the policy and of the reward model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from fpo_train.config import Optimizer, Schedule
from fpo_train.errors import NotFinite, RunError

from .generation import check_finite


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], kind: Optimizer, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW with torch's betas and ε; `paged_adamw_8bit` keeps its moments in 8 bits, in memory that may be paged out.

    Raises:
        RunError: bitsandbytes, which the 8-bit one is from, is missing.
    """
    own = list(parameters)
    if kind == "adamw":
        return torch.optim.AdamW(own, lr=learning_rate, weight_decay=weight_decay)
    try:
        from bitsandbytes.optim import PagedAdamW8bit
    except ImportError as error:
        raise RunError(f"optimizer {kind}: needs the package bitsandbytes; install it, or choose adamw") from error
    return PagedAdamW8bit(own, lr=learning_rate, weight_decay=weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, kind: Schedule, warmup: int, total: int) -> LambdaLR:
    """A factor on the learning rate for each step s = 0 … total − 1.

    (s + 1)/warmup while s < warmup; then, with p = (s − warmup)/(total − warmup): 1 (`constant`), 1 − p (`linear`) or
    (1 + cos πp)/2 (`cosine`), and 0 behind `total` for the latter two.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        part = min(1.0, (step - warmup) / max(1, total - warmup))
        return {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}[kind]

    return LambdaLR(optimizer, factor)


def state_of(optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> dict[str, Any]:
    """Both states, for a checkpoint."""
    return {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}


def restore(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, state: dict[str, Any]) -> None:
    """Go on from `state_of`."""
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])


def move(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], said: str) -> None:
    """Step, and see that it has left numbers.

    Raises:
        NotFinite: `said`, where a weight is NaN or infinite, or the step itself is too long for a number.
    """
    try:
        optimizer.step()
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        raise NotFinite(said) from error
    check_finite(largest(parameters), said)


@torch.no_grad()
def largest(tensors: Iterable[Tensor]) -> Tensor:
    """The largest magnitude of each, (n,) float64; NaN where one is NaN. Copies none of them."""
    found = [torch.linalg.vector_norm(one, torch.inf).double() for one in tensors if one.numel()]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)
