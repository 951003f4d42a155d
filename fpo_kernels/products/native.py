"""impl="native": the compiled kernels of csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from fpo_kernels import library
from fpo_kernels.products.config import MOST_LAYERS


def grad_products(
    a: Tensor,  # (S, p)
    ds: tuple[Tensor, ...],  # (S, q_k)
    offsets: Tensor,  # (B+1,)
    pairs: Tensor,  # (n, 2)
    other: tuple[Tensor, tuple[Tensor, ...], Tensor] | None,
    longest: int,
) -> Tensor:  # (n,)
    problem = library.why_not("grad_products", a)
    if problem is not None:
        raise RuntimeError(f'grad_products: impl="native" cannot run: {problem}')
    x, outputs, cut = library.rows(a), [library.rows(d) for d in ds], offsets.long().contiguous()
    x2, outputs2, cut2 = x, outputs, cut
    if other is not None:
        x2, outputs2, cut2 = library.rows(other[0]), [library.rows(d) for d in other[1]], other[2].long().contiguous()
    products = None
    for first in range(0, len(ds), MOST_LAYERS):
        some = slice(first, first + MOST_LAYERS)
        part = torch.ops.fpo_native.grad_products(
            x, outputs[some], cut, pairs.contiguous(), x2, outputs2[some], cut2, other is None
        )
        products = part if products is None else products.add_(part)
    assert products is not None
    return products
