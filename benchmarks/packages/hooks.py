"""No package: plain torch hooks, token products where a matrix of gradients would be larger, else formed gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers import hooked_backward, hooked_token_products, wide

from .work import Cannot, Run, Task

NAME, WAYS = "torch", ("torch hooks", "torch hooks, formed")


def ready(task: Task, way: str) -> Run:
    """From tokens, or by forming a layer's gradients, all of them, in its hook."""
    work, n = task.work, task.work.examples
    if work.question == "sketch":
        raise Cannot("a projection is what the packages are for")

    def formed() -> Tensor:
        parts: list[Tensor] = []

        def note(a: Tensor, d: Tensor) -> None:
            parts.append(task.formed([torch.bmm(d.mT, a) if a.ndim == 3 else d[:, :, None] * a[:, None]]))

        hooked_backward(task.model, task.batch, note)
        return torch.stack(parts).sum(0)

    def tokens() -> Tensor:
        parts: list[Tensor] = []

        def note(a: Tensor, d: Tensor) -> None:
            if work.question == "norms":
                parts.append((wide(a @ a.mT) * wide(d @ d.mT)).sum((1, 2)))
                return
            left, right = (slice(0, n), slice(n, None)) if work.question == "cross" else (slice(None), slice(None))
            products = torch.einsum("itp,jsp->itjs", a[left], a[right]).mul_(
                torch.einsum("itq,jsq->itjs", d[left], d[right])
            )
            parts.append(products.sum((1, 3)))

        if work.question == "steering":
            return hooked_token_products(task.model, task.batch)
        hooked_backward(task.model, task.batch, note)
        return torch.stack(parts).sum(0)

    return formed if way == WAYS[1] else tokens
