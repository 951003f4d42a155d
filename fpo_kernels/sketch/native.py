"""impl="native": the compiled kernels of csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from fpo_kernels import library
from fpo_kernels.sketch.config import MOST_LAYERS


def grad_sketch(
    a: Tensor,  # (S, p)
    table_a: Tensor,  # (⌈p/k⌉, k)
    ds: tuple[Tensor, ...],  # (S, q_l), of layers that read the same a
    tables_d: tuple[Tensor, ...],
    offsets: Tensor,  # (B+1,)
) -> Tensor:  # (B, k)
    problem = library.why_not("grad_sketch", a)
    if problem is not None:
        raise RuntimeError(f'grad_sketch: impl="native" cannot run: {problem}')
    x, outputs, cut = library.rows(a), [library.rows(d) for d in ds], offsets.long().contiguous()
    sketches = None
    for first in range(0, len(ds), MOST_LAYERS):
        some = slice(first, first + MOST_LAYERS)
        tables = list(tables_d[some])
        part = torch.ops.fpo_native.grad_sketch(x, table_a, outputs[some], tables, cut, table_a.shape[1])
        sketches = part if sketches is None else sketches.add_(part)
    assert sketches is not None
    return sketches
