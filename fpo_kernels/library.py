"""The compiled kernels of csrc/: two libraries, each loaded when first asked for.

`_native` holds the operators' schemas and their CPU kernels, `_native_cuda` the CUDA kernels. The second is opened when
streams on a GPU ask for it, and costs a CPU nothing where it is absent or does not load.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

_FOLDER = Path(__file__).resolve().parent
_STEMS = {"cpu": "_native", "cuda": "_native_cuda"}
_NAMES = {"cpu": "the native library", "cuda": "the native CUDA library"}
_BUILD = "build it with `pip install --no-build-isolation -e .` or `python setup.py build_ext --inplace`"


def native_libraries() -> dict[str, str]:
    """Whether the compiled kernels load, by device type ("cpu", "cuda"): "loads", else why they do not."""
    return {kind: _load(kind) or "loads" for kind in _STEMS}


@functools.cache
def _load(kind: str) -> str | None:
    """Loads a device type's library; None when that went well, else why it did not."""
    if kind == "cuda":
        if not torch.version.cuda:
            return f"torch {torch.__version__} was built without CUDA"
        if (problem := _load("cpu")) is not None:  # which has the schemas
            return problem
    found = sorted(_FOLDER.glob(f"{_STEMS[kind]}.*so"))
    if not found:
        return f"{_NAMES[kind]} is not built ({_why_not_built(kind)}); {_BUILD}"
    try:
        torch.ops.load_library(found[-1])
    except OSError as error:
        return f"{found[-1].name} does not load ({error}); {_BUILD}"
    return None


def _why_not_built(kind: str) -> str:
    """What the last build noted, else what a build would want."""
    try:
        noted = json.loads((_FOLDER / "_native_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        noted = {}
    if _STEMS[kind] in noted:
        return noted[_STEMS[kind]]
    compiler = os.environ.get("CXX", "c++").split()[0]
    return "no build was tried" if shutil.which(compiler) else f"no C++ compiler: {compiler} is not on PATH"


def why_not(operation: str, a: Tensor) -> str | None:
    """Why the library's `operation` cannot take streams like `a` here; None when it can."""
    kind = a.device.type
    if kind not in _STEMS:
        return f"the native library serves cpu and cuda, not {kind}"
    problem = _load(kind)
    if problem is None and not _has(operation, kind.upper()):
        return f"{_NAMES[kind]} was built before it had {operation}; {_BUILD}"
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
