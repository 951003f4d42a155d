"""Opacus: its norms by ghost clipping, the rest by its per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import Tensor, nn

from benchmarks.peers import forward_and_backward, rewards

from .work import Cannot, Run, Task

NAME, WAYS = "opacus", ("Opacus", "Opacus, tuned")
PIECE = 1 << 15  # numbers of a gradient that one product may sum; over 10^6 of them, fp32 errs by 1e-4


def ready(task: Task, way: str) -> Run:
    """Norms from the one class, other answers from gradients that the other one forms; only Linear weights train.

    Tuned, backward goes to the embeddings and not to the weights: its hooks see every layer all the same, and no
    gradient of the batch's sum is formed beside those of the texts.
    """
    if task.work.question == "sketch":
        raise Cannot("it has no projection")
    tuned = way == WAYS[1]
    for name in task.names:
        task.model.get_parameter(name).requires_grad_(True)
    task.model.train()  # its hooks do nothing otherwise
    return _norms(task, tuned) if task.work.question == "norms" else _gradients(task, tuned)


def _norms(task: Task, tuned: bool) -> Run:
    """Ghost clipping; tuned, fast gradient clipping where that multiplies less."""
    ghost = not tuned or _ghost_is_cheaper(task)
    module = GradSampleModuleFastGradientClipping(task.model, loss_reduction="sum", use_ghost_clipping=ghost)
    backward = _backward(task, module, tuned)

    def run() -> Tensor:
        backward()
        norms: Tensor = module.get_norm_sample()
        return norms.square()

    return run


def _gradients(task: Task, tuned: bool) -> Run:
    """All texts' gradients of all layers at once; tuned, a layer's in a hook behind Opacus's own, and no longer."""
    module = GradSampleModule(task.model, loss_reduction="sum")
    backward = _backward(task, module, tuned)
    parts: list[Tensor] = []

    def take(weight: Any) -> None:
        parts.append(task.formed(weight.grad_sample.flatten(1).split(PIECE, 1)))
        weight.grad_sample = None

    if tuned:
        for layer in _layers(task):
            layer.register_full_backward_hook(lambda layer, inner, outer: take(layer.weight))

    def run() -> Tensor:
        backward()
        if not tuned:
            for layer in _layers(task):
                take(layer.weight)
        found = torch.stack(parts).sum(0)
        parts.clear()
        return found

    return run


def _backward(task: Task, module: nn.Module, tuned: bool) -> Callable[[], None]:
    def whole() -> None:
        rewards(module, task.batch).sum().backward()
        for layer in _layers(task):
            layer.weight.grad = None

    def activations_only() -> None:
        forward_and_backward(module, task.batch)

    return activations_only if tuned else whole


def _ghost_is_cheaper(task: Task) -> bool:
    """T²(p + q) multiplications against T·p·q a text, over all layers."""
    shapes, tokens = [layer.weight.shape for layer in _layers(task)], task.work.tokens
    return sum(tokens * (p + q) for q, p in shapes) < sum(p * q for q, p in shapes)


def _layers(task: Task) -> list[nn.Linear]:
    return [module for module in task.model.modules() if isinstance(module, nn.Linear)]
