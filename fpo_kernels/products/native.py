"""impl="native": the compiled kernels of csrc/, loaded when first asked for."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

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


def _streams(a: Tensor, d: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels trust to get: int64 offsets, unit stride along the features, on a CPU no 16-bit floats."""
    if a.device.type == "cpu" and a.dtype in (torch.bfloat16, torch.float16):
        a, d = a.float(), d.float()  # exact; copies both streams
    a, d = (x if x.stride(1) == 1 else x.contiguous() for x in (a, d))
    return a, d, offsets.long().contiguous()


def grad_products(
    a: Tensor,  # (S, p)
    d: Tensor,  # (S, q)
    offsets: Tensor,  # (B+1,)
    pairs: Tensor,  # (n, 2)
    other: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:  # (n,)
    problem = why_not(a)
    if problem is not None:
        raise RuntimeError(f'grad_products: impl="native" cannot run: {problem}')
    left = _streams(a, d, offsets)
    right = left if other is None else _streams(*other)
    return torch.ops.fpo_native.grad_products(*left, pairs.contiguous(), *right, other is None)
