"""What plain autograd says where no rule serves: gradients one example at a time, and what is used at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from .batches import Batch, rows_of, take
from .gradients import Vectors
from .layers import Site
from .tapping import frozen


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


def used_after_all(
    model: nn.Module, sites: Sequence[Site], untaped: Set[nn.Module], outputs: Callable[[], Tensor]
) -> list[str]:
    """Those of the sites, whose modules were not called, that the outputs depend on all the same: no tap sees how.

    Under no_grad a module is called, and runs again with a gradient where that is a checkpoint of the model's own;
    which needs a tape that reaches it, so that every parameter learns then.
    """
    parameters = [site.parameter for site in sites]
    learning = parameters
    if any(module in untaped for site in sites for module in site.rules):
        learning = [p for p in model.parameters() if p.is_floating_point()]
    with frozen(model, learning), torch.enable_grad():
        scalars = outputs()
        if not scalars.requires_grad:
            return []
        got = torch.autograd.grad(scalars.sum(), parameters, allow_unused=True)
    return [site.name for site, gradient in zip(sites, got, strict=True) if gradient is not None]
