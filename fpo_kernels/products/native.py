"""impl="native": the compiled kernels of csrc/, loaded when first asked for."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from fpo_kernels.products.config import MOST_LAYERS

_BUILD = "build it with `pip install --no-build-isolation -e .` or `python setup.py build_ext --inplace`"


@functools.cache
def _load() -> str | None:
    """Loads the library; None when that went well, else why it did not."""
    found = sorted(Path(__file__).resolve().parent.parent.glob("_native*.so"))
    if not found:
        return f"the native library is not built; {_BUILD}"
    try:
        torch.ops.load_library(found[-1])
    except OSError as error:
        return f"{found[-1].name} does not load ({error}); {_BUILD}"
    return None


def why_not(a: Tensor) -> str | None:
    """Why streams like `a` cannot be taken here; None when they can."""
    if a.device.type not in ("cpu", "cuda"):
        return f"the native library serves cpu and cuda, not {a.device.type}"
    problem = _load()
    if problem is None and a.is_cuda and not _has_cuda():
        return f"the native library was built without CUDA (it needs a CUDA torch and nvcc); {_BUILD}"
    return problem


@functools.cache
def _has_cuda() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("fpo_native::grad_products", "CUDA")


def _stream(x: Tensor) -> Tensor:
    """What the kernels trust to get: unit stride along the features, on a CPU no 16-bit floats."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()  # exact; copies the stream
    return x if x.stride(1) == 1 else x.contiguous()


def grad_products(
    a: Tensor,  # (S, p)
    ds: tuple[Tensor, ...],  # (S, q_k)
    offsets: Tensor,  # (B+1,)
    pairs: Tensor,  # (n, 2)
    other: tuple[Tensor, tuple[Tensor, ...], Tensor] | None,
) -> Tensor:  # (n,)
    problem = why_not(a)
    if problem is not None:
        raise RuntimeError(f'grad_products: impl="native" cannot run: {problem}')
    x, outputs, cut = _stream(a), [_stream(d) for d in ds], offsets.long().contiguous()
    x2, outputs2, cut2 = x, outputs, cut
    if other is not None:
        x2, outputs2, cut2 = _stream(other[0]), [_stream(d) for d in other[1]], other[2].long().contiguous()
    products = None
    for first in range(0, len(ds), MOST_LAYERS):
        some = slice(first, first + MOST_LAYERS)
        part = torch.ops.fpo_native.grad_products(
            x, outputs[some], cut, pairs.contiguous(), x2, outputs2[some], cut2, other is None
        )
        products = part if products is None else products.add_(part)
    assert products is not None
    return products
