"""Per-example gradients as they are defined, where no rule serves: one forward and backward an example."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .batches import Batch, rows_of, take
from .capture import frozen
from .gradients import Vectors


def formed(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], outputs: Callable[[Batch], Tensor], batch: Batch
) -> dict[str, Vectors]:
    """g_i of each parameter for every example i, (B, weights), in fp32 or float64; zeros where none came.

    `outputs` runs the model on a batch, one scalar an example.
    """
    size = rows_of(batch)
    wide = {name: torch.float64 if p.dtype == torch.float64 else torch.float32 for name, p in parameters.items()}
    rows = {n: torch.zeros(size, p.numel(), dtype=wide[n], device=p.device) for n, p in parameters.items()}
    with frozen(model, parameters.values()), torch.enable_grad():
        for i in range(size):
            scalar = outputs(take(batch, slice(i, i + 1))).sum()
            if not scalar.requires_grad:
                continue
            gradients = torch.autograd.grad(scalar, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    rows[name][i] = gradient.flatten()
    return {name: Vectors(v) for name, v in rows.items()}
