"""dattri-LLM: its hooks' gradients compared as its README has it, and by a callback of its as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dattri_llm import REGISTER_ALL, HookManager, HookManagerConfig
from dattri_llm.gradient import ops
from dattri_llm.gradient.callbacks import HookManagerCallback
from torch import Tensor

from benchmarks.models import Batch
from benchmarks.peers import forward_and_backward, rewards

from .work import Run, Task, kept_of_layers, width_of_layers

NAME, WAYS = "dattri-llm", ("dattri-LLM", "dattri-LLM, tuned")
kept = kept_of_layers
Layer = dict[str, Any] | None
Product = Callable[[Tensor, Tensor, str, Layer], Tensor]
PIECE = 1 << 15  # numbers of a gradient that one product may sum; over 10^6 of them, fp32 errs by 1e-4


def ready(task: Task, way: str) -> Run:
    """A pass each for the texts and those they are compared with, or one for all of them with all weights frozen."""
    if way == WAYS[0]:
        return _documented(task)
    return _projected(task) if task.work.question == "sketch" else _streamed(task)


def _documented(task: Task) -> Run:
    """Its quick start: trainable weights, factors of all layers kept until the step's end, similarities of those."""
    model, question = task.model, task.work.question
    for name in task.names:
        model.get_parameter(name).requires_grad_(True)
    projected = {"capture_style": "auto", "projection_kwargs": {"__default__": _logra(task)}}
    config = HookManagerConfig(linear_io=REGISTER_ALL, **(projected if question == "sketch" else {}))
    manager = HookManager(model, config=config)

    def gradient(batch: Batch) -> Any:
        rewards(model, batch).sum().backward()
        model.zero_grad()
        return manager.get_gradient()

    def run() -> Tensor:
        norms = cross = None
        with manager.collect():
            own = gradient(task.own)
            if question in ("norms", "steering"):
                parts = [ops.grad_norm_sq(data, own.layer_types[name]) for name, data in own.data.items()]
                norms = torch.stack(parts).sum(0)
            if question != "norms":
                other = gradient(task.others) if question in ("cross", "steering") else own
                cross = own.similarity(other, reduce="all")
        _forget(manager)
        return task.from_parts(norms, cross)

    return run


def _streamed(task: Task) -> Run:
    """Every layer's factors in its callback, which gets them before the manager does.

    The manager itself would keep them all until the step's end. Told to keep one number of each gradient, it lets go
    of a layer's factors in the layer's own backward.
    """
    callback = _Products(_product(task))
    manager = _frozen(task, [callback], {name: {"style": "mask", "proj_dim": 1} for name in _layers(task)})

    def run() -> Tensor:
        with manager.collect():
            forward_and_backward(task.model, task.batch)
        _forget(manager)
        found = torch.stack(callback.parts).sum(0)
        callback.parts.clear()
        return found

    return run


def _projected(task: Task) -> Run:
    """Random matrices of its own for every layer; by default equally wide ones share theirs, and their errors."""
    projections = {name: {**_logra(task), "proj_seed": 2 * i} for i, name in enumerate(_layers(task))}
    manager = _frozen(task, [], projections)

    def run() -> Tensor:
        with manager.collect():
            forward_and_backward(task.model, task.batch)
            found = manager.get_gradient()
        _forget(manager)
        product: Tensor = ops.layerwise_cross_dot(found, found)  # which `similarity` computes twice
        return product

    return run


def _product(task: Task) -> Product:
    """What a layer adds to the answer, by formed gradients where its own rules call for them, each formed once."""
    question, n = task.work.question, task.work.examples
    own, others = slice(0, n), slice(n, None)

    def product(a: Tensor, d: Tensor, kind: str, layer: Layer) -> Tensor:
        texts, tokens, p = a.shape
        if question in ("norms", "steering"):
            formed = ops.maybe_use_materialized_norm(tokens, p, d.shape[-1])
        else:
            formed = ops.maybe_use_materialized_gram(n, texts - n or n, tokens, p, d.shape[-1])
        if formed:
            return task.formed(ops.materialize_factors(a, d, kind, layer).split(PIECE, 1))
        norms = cross = None
        if question in ("norms", "steering"):
            norms = ops.grad_norm_sq_factors(a[own], d[own], kind, layer, mode="factorized")
        if question == "gram":
            cross = ops.pairwise_dot_factors(a, d, kind, layer, mode="factorized")
        elif question != "norms":
            pair = (a[own], d[own], a[others], d[others])
            cross = ops.cross_dot_factors(*pair, kind, layer, layer, mode="factorized")
        return task.from_parts(norms, cross)

    return product


class _Products(HookManagerCallback):
    """Products of each layer's factors, in the layer's backward."""

    def __init__(self, product: Product) -> None:
        self.product, self.parts = product, list[Tensor]()
        self.inputs: dict[str, Tensor] = {}

    def on_layer_forward(self, layer_name: str, activation: Tensor, layer_type: str, module_kwargs: Layer) -> None:
        self.inputs[layer_name] = activation

    def on_layer_backward(self, layer_name: str, grad_output: Tensor, layer_type: str, module_kwargs: Layer) -> None:
        self.parts.append(self.product(self.inputs.pop(layer_name), grad_output, layer_type, module_kwargs))


def _frozen(task: Task, callbacks: list[HookManagerCallback], projections: dict[str, dict[str, Any]]) -> HookManager:
    config = HookManagerConfig(
        hook_types=dict.fromkeys(_layers(task), "linear_io"),
        include_frozen=True,
        capture_style="auto",
        projection_kwargs=projections,
    )
    return HookManager(task.model, config=config, callbacks=callbacks)


def _logra(task: Task) -> dict[str, Any]:
    """Both sides of every layer's gradient projected to a width whose square times the layers is what is allowed."""
    return {"style": "logra", "proj_dim": width_of_layers(task), "proj_max_batch_size": 8, "proj_type": "rademacher"}


def _forget(manager: HookManager) -> None:
    """Drop the gradient that it would keep until its next step."""
    with manager.collect():
        pass


def _layers(task: Task) -> list[str]:
    return [name.removesuffix(".weight") for name in task.names]
