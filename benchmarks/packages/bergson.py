"""Bergson: gradients that its GradientCollector keeps, then a collector that multiplies each layer's in its hook.

Its page on gradient collection names both: `skip_index=True` and what lies in `mod_grads` afterwards as the simplest
way, a `backward_hook` of one's own as the one that holds no batch of gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from bergson import GradientCollector, GradientProcessor, IndexConfig
from bergson.collector.collector import HookCollectorBase
from datasets import Dataset
from torch import Tensor, nn

from benchmarks.peers import forward_and_backward, rewards

from .work import Run, Task, kept_of_layers, width_of_layers

NAME, WAYS = "bergson", ("Bergson", "Bergson, tuned")
kept = kept_of_layers


@dataclass(kw_only=True)
class Products(HookCollectorBase):
    """Every layer's per-example gradients, multiplied as soon as there, then forgotten."""

    multiply: Callable[[list[Tensor]], Tensor]
    parts: list[Tensor] = field(default_factory=list)

    def setup(self) -> None:
        """Nothing: GradientCollector's would refuse a model without trainable weights."""

    def teardown(self) -> None:
        """Nothing either."""

    def process_batch(self, indices: list[int], **more: object) -> None:
        """Nothing is left to do after a batch."""

    def backward_hook(self, module: nn.Module, g: Tensor) -> None:
        """Of one layer; `_compute_gradient` would also clamp all of them to fp32's range."""
        self.parts.append(self.multiply([self._module_gradient(module, g).materialize()]))


def ready(task: Task, way: str) -> Run:
    """Projections are its own of every layer from both sides, to as many numbers as a square for each lets in.

    Its other one, of all layers to one vector, is a much better estimate (13% off where these are 35%), but draws its
    matrix anew in every call: for six layers of SmolLM2 and 4096 numbers a CPU would take half an hour.
    """
    model: Any = task.model
    processor = GradientProcessor(projection_dim=width_of_layers(task) or None)
    if way == WAYS[1]:
        return _multiplied(task, processor)
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # as its own loader does it: backward hooks are called
    collector = GradientCollector(
        model=model,
        data=Dataset.from_dict({"input_ids": task.batch["input_ids"].tolist()}),
        cfg=IndexConfig(run_path="unused"),
        processor=processor,
        skip_index=True,
    )

    def run() -> Tensor:
        with collector:
            rewards(model, task.batch).sum().backward()
            model.zero_grad()
        answer = task.formed([collector.mod_grads[name.removesuffix(".weight")] for name in task.names])
        collector.mod_grads.clear()
        return answer

    return run


def _multiplied(task: Task, processor: GradientProcessor) -> Run:
    """With all weights frozen, in one pass."""
    collector = Products(model=task.model, processor=processor, multiply=task.formed)

    def run() -> Tensor:
        with collector:
            forward_and_backward(task.model, task.batch)
        answer = torch.stack(collector.parts).sum(0)
        collector.parts.clear()
        return answer

    return run
