"""traker: its gradient computer and its projector as TRAKer calls them, without TRAKer's files and its inverse of XᵀX.

The attention mask is left out, for the reason that `peers.vmap_grad` gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, NoOpProjector, ProjectionType

from .work import Cannot, Run, Task, multiplied

NAME, WAYS = "traker", ("traker", "traker, tuned")
AT_ONCE, TOGETHER = 1 << 26, 4  # more numbers than that are quicker made of four texts at a time, and need not be held
DRAWN = 1 << 33  # random numbers a call that a CPU draws in two minutes
BLOCK = 1 << 28  # numbers of a projection at a time, 1 GB
SLICE = 1 << 20  # numbers of a gradient that are multiplied at a time


class Reward(AbstractModelOutput):
    """What gradients are of."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(model: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], ids: Tensor) -> Tensor:
        """Of one text."""
        inputs = {"input_ids": ids[None]}
        reward: Tensor = torch.func.functional_call(model, (weights, buffers), (), inputs).logits[0, 0]
        return reward

    def get_out_to_loss_grad(self, *batch: object) -> Tensor:
        """TRAK's weights of examples, which are no part of this."""
        raise NotImplementedError


def ready(task: Task, way: str) -> Run:
    """Of all parameters, of which the others are dropped, in one vector; tuned: of the chosen, layer by layer."""
    model, work, ids = task.model, task.work, task.batch["input_ids"]
    device, tuned = ids.device, way == WAYS[1]
    count = sum(model.get_parameter(name).numel() for name in task.names)
    if work.question == "sketch" and device.type == "cpu" and count * work.numbers > DRAWN:
        raise Cannot(
            f"in every call it draws {count * work.numbers:.0e} random numbers for its projection, 10⁹ take a CPU 15 s"
        )
    computer = FunctionalGradientComputer(model, Reward(), count, torch.float32, device, grad_wrt=task.names)
    if work.question == "sketch":
        projector = BasicProjector(
            count,
            work.numbers,
            seed=0,
            proj_type=ProjectionType.normal,  # TRAKer's on a CPU
            device=device,
            block_size=min(work.numbers, BLOCK // count) if tuned else 100,
        )
    else:
        projector = NoOpProjector(device=device)
    if tuned:
        computer.func_weights = {name: model.get_parameter(name) for name in task.names}

    def features() -> Tensor:
        return projector.project(computer.compute_per_sample_grad((ids,)), model_id=0)

    def sketched() -> Tensor:
        sketch = features()
        return sketch @ sketch.T / work.numbers  # which TRAKer's own scale leaves out

    def of(ids: Tensor) -> list[Tensor]:
        return [g.flatten(1) for g in computer.compute_per_sample_grad((ids,)).values()]

    def by_layer() -> Tensor:
        if work.question == "gram" or len(ids) * count <= AT_ONCE:
            return task.formed(of(ids))
        own, others = ids[: work.examples], ids[work.examples :]
        compared = of(others) if len(others) else []
        return torch.cat([_compared(task, of(some), compared) for some in own.split(TOGETHER)])

    if work.question == "sketch":
        return sketched
    return by_layer if tuned else lambda: task.formed(features().split(SLICE, 1))


def _compared(task: Task, own: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    if task.work.question == "norms":
        return torch.stack([(x * x).sum(1) for x in own]).sum(0)
    if task.work.question == "steering":
        return torch.stack([(x * (x - y)).sum(1) for x, y in zip(own, others, strict=True)]).sum(0)
    return torch.stack([multiplied(x, y) for x, y in zip(own, others, strict=True)]).sum(0)
