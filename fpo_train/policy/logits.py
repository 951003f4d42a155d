"""What is asked of logits, a few tokens at a time: (tokens × vocabulary) numbers never exist at once.

A token's number depends on its own state alone, so that under a frozen projection the gradients of all are known as
soon as a chunk's logits are: they are taken there, and the chunk is dropped for good. Where something in the projection
learns, each chunk's logits are made again in the backward pass. torch's own `linear_cross_entropy` does the like for a
summed loss from 2.13 on; policy gradients need the log-probability of each token, and KL needs two models'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Project = Callable[[Tensor], Tensor]  # states (n, H) → logits (n, V), fp32 or float64


def token_log_probs(states: Tensor, tokens: Tensor, project: Project, at_once: int, *, frozen: bool = False) -> Tensor:
    """log p(token) of each state's softmax(project(state)), (n,); differentiable in the states and in `project`.

    Args:
        states: (n, H). tokens: (n,) int64. at_once: states projected at a time.
        frozen: nothing in `project` learns; the gradient is one in the states alone.
    """

    def some(states: Tensor, tokens: Tensor) -> Tensor:
        logits = project(states)
        return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)

    return _in_chunks(some, (states, tokens), at_once, frozen)


def kl_to(
    states: Tensor, base_states: Tensor, project: Project, base_project: Project, at_once: int, *, frozen: bool = False
) -> Tensor:
    """KL(softmax(project(state)) ‖ softmax(base_project(base_state))) over the vocabulary, (n,) in nats.

    Differentiable as `token_log_probs`; the base's side is a constant.
    """

    def some(states: Tensor, base_states: Tensor) -> Tensor:
        own = project(states).log_softmax(1)
        with torch.no_grad():
            base = base_project(base_states).log_softmax(1)
        return (own.exp() * (own - base)).sum(1)

    return _in_chunks(some, (states, base_states), at_once, frozen)


class _Ahead(torch.autograd.Function):
    """Numbers of states, and what each one's gradient in its own state is, both from one look at its logits."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, beside: Tensor, some: Callable[..., Tensor], at_once: int) -> Tensor:
        numbers, gradients = [], []
        for chunk, other in zip(states.split(at_once), beside.split(at_once), strict=True):
            leaf = chunk.detach().requires_grad_()
            with torch.enable_grad():
                found = some(leaf, other)
                gradients += torch.autograd.grad(found.sum(), leaf)
            numbers.append(found.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(numbers)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (upstream[:, None] * gradient).to(gradient.dtype), None, None, None


def _in_chunks(some: Callable[..., Tensor], inputs: tuple[Tensor, Tensor], at_once: int, frozen: bool) -> Tensor:
    states, beside = inputs
    if frozen and torch.is_grad_enabled() and states.requires_grad and len(states):
        return _Ahead.apply(states, beside, some, at_once)
    parts = [
        checkpoint(some, *chunk, use_reentrant=False) if torch.is_grad_enabled() else some(*chunk)
        for chunk in zip(*(one.split(at_once) for one in inputs), strict=True)
    ]
    return torch.cat(parts)
