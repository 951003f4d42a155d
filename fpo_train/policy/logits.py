"""What is asked of logits, a few tokens at a time: (tokens × vocabulary) numbers never exist at once.

Each chunk's logits are made again in the backward pass and dropped. torch's own `linear_cross_entropy` does the like
for a summed loss from 2.13 on; policy gradients need the log-probability of each token, and KL needs two models'.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Project = Callable[[Tensor], Tensor]  # states (n, H) → logits (n, V), fp32 or float64


def token_log_probs(states: Tensor, tokens: Tensor, project: Project, at_once: int) -> Tensor:
    """log p(token) of each state's softmax(project(state)), (n,); differentiable in the states and in `project`.

    Args:
        states: (n, H). tokens: (n,) int64. at_once: states projected at a time.
    """

    def some(states: Tensor, tokens: Tensor) -> Tensor:
        logits = project(states)
        return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)

    return _in_chunks(some, (states, tokens), at_once)


def kl_to(states: Tensor, base_states: Tensor, project: Project, base_project: Project, at_once: int) -> Tensor:
    """KL(softmax(project(state)) ‖ softmax(base_project(base_state))) over the vocabulary, (n,) in nats.

    Differentiable as `token_log_probs`; the base's side is a constant.
    """

    def some(states: Tensor, base_states: Tensor) -> Tensor:
        own = project(states).log_softmax(1)
        with torch.no_grad():
            base = base_project(base_states).log_softmax(1)
        return (own.exp() * (own - base)).sum(1)

    return _in_chunks(some, (states, base_states), at_once)


def _in_chunks(some: Callable[..., Tensor], inputs: tuple[Tensor, Tensor], at_once: int) -> Tensor:
    parts = [
        checkpoint(some, *chunk, use_reentrant=False) if torch.is_grad_enabled() else some(*chunk)
        for chunk in zip(*(one.split(at_once) for one in inputs), strict=True)
    ]
    return torch.cat(parts)
