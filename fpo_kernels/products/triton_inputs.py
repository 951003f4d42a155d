"""What the Triton kernels of both ways trust to get."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fpo_kernels.products import config_triton as config


def refuse(a: Tensor) -> None:
    """RuntimeError where the kernels cannot run on streams like `a`."""
    if a.dtype == torch.float64:
        raise RuntimeError('grad_products: impl="triton" takes no float64; use "native", "torch" or "reference"')
    if not (a.is_cuda or triton.knobs.runtime.interpret):
        raise RuntimeError(f'grad_products: impl="triton" cannot run: it needs CUDA tensors, these are on {a.device}')


def readable(x: Tensor) -> Tensor:
    """x (S, f), copied unless its features are adjacent and 32 bits can count the places within a tile."""
    adjacent = x.stride(1) == 1 or x.shape[1] == 1
    return x if adjacent and x.stride(0) <= config.MOST_STRIDE else x.contiguous()
