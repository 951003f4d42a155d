"""The compiled kernels of csrc/, loaded when first asked for."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

_BUILD = "build it with `pip install --no-build-isolation -e .` or `python setup.py build_ext --inplace`"


@functools.cache
def _load() -> str | None:
    """Loads the library; None when that went well, else why it did not."""
    found = sorted(Path(__file__).resolve().parent.glob("_native*.so"))
    if not found:
        return f"the native library is not built; {_BUILD}"
    try:
        torch.ops.load_library(found[-1])
    except OSError as error:
        return f"{found[-1].name} does not load ({error}); {_BUILD}"
    return None


def why_not(operation: str, a: Tensor) -> str | None:
    """Why the library's `operation` cannot take streams like `a` here; None when it can."""
    kind = a.device.type
    if kind not in ("cpu", "cuda"):
        return f"the native library serves cpu and cuda, not {kind}"
    problem = _load()
    if problem is None and not _has(operation, kind.upper()):
        if a.is_cuda:
            return f"the native library was built without CUDA (it needs a CUDA torch and nvcc); {_BUILD}"
        return f"the native library was built before it had {operation}; {_BUILD}"
    return problem


@functools.cache
def _has(operation: str, key: str) -> bool:
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"fpo_native::{operation}", key)
    except RuntimeError:  # no such operator: an older library
        return False


def rows(x: Tensor) -> Tensor:
    """What the kernels trust to get: unit stride along the features, on a CPU no 16-bit floats."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()  # exact; copies the stream
    return x if x.stride(1) == 1 else x.contiguous()
