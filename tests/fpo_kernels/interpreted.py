"""Tests under Triton's interpreter, in processes of their own: interpreter and compiler exclude each other in one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETING, reason="runs in the process that test_in_its_own_process starts")
outside = pytest.mark.skipif(INTERPRETING, reason="is the parent's")


def passes_apart(file: str, *options: str) -> None:
    """Runs a file's tests in an interpreting process and asserts that they pass."""
    command = [sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider", "-q", *options]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def dirty_memory() -> Iterator[None]:
    """What is allocated and not written reads as NaN, or as a number no kernel expects."""

    def poisoned(*size: int | tuple[int, ...], dtype: torch.dtype = torch.float32, **kwargs) -> Tensor:
        shape = size[0] if size and not isinstance(size[0], int) else size
        bad = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
        return torch.full(shape, bad, dtype=dtype, **kwargs)

    with mock.patch.object(torch, "empty", poisoned):
        yield
