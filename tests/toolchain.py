"""The compilers at hand. What they can build must be there: its tests skip for want of a compiler alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

COMPILER = os.environ.get("CXX", "c++").split()[0]
NO_COMPILER = None if shutil.which(COMPILER) else f"no C++ compiler: {COMPILER} is not on PATH"
# on a CPU; without a library a named "native" raises, and the test fails
native = pytest.param("native", marks=pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER)))


def nvcc() -> str | None:
    """Where CUDA's compiler is, looked for as setup.py does."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    named = [str(Path(home, "bin", "nvcc")) for home in [*homes, "/usr/local/cuda"]]
    return shutil.which("nvcc") or next((path for path in named if os.access(path, os.X_OK)), None)


def no_cuda_build() -> str | None:
    """Why the CUDA library cannot be built here; None where it must be there."""
    if not torch.version.cuda:
        return f"torch {torch.__version__} was built without CUDA"
    return NO_COMPILER or (None if nvcc() else "nvcc is not at hand")
