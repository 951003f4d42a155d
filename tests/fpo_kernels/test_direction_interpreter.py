"""The Triton kernel of grad_direction under the interpreter, in a process of its own.

A tl.dot of bf16 gives garbage there without an error; where bf16 meets fp32 the kernel multiplies its parts in fp32.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fpo_kernels.direction import config, grad_direction
from fpo_kernels.testing import Place, check_direction, ragged, random_streams

pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETING, reason="runs in the process that test_in_its_own_process starts")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LENGTHS = [3, 0, 1, 150, 64, 65]


@pytest.mark.skipif(INTERPRETING, reason="is the parent's")
def test_in_its_own_process() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(autouse=True)
def _dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated and not written reads as NaN."""

    def poisoned(*size: int, **kwargs) -> Tensor:
        return torch.full(size, torch.nan, **kwargs)

    monkeypatch.setattr(torch, "empty", poisoned)


def matrix(p: int, q: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(q, p, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


@inside
@pytest.mark.parametrize(
    ("dtype", "direction_dtype"), [(F32, F32), (F16, F16), (F16, F32), (F32, BF16), (BF16, F32), (BF16, F16)]
)
@pytest.mark.parametrize(("p", "q", "place"), [(1, 3, "first"), (33, 170, "middle"), (270, 16, "last")])
def test_matches_the_definition(p: int, q: int, place: Place, dtype: torch.dtype, direction_dtype: torch.dtype) -> None:
    lengths = ragged(5, 130, place=place)
    check_direction("triton", random_streams(lengths, p, q, dtype), matrix(p, q, direction_dtype))


@inside
def test_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen where there are many; here for one."""
    monkeypatch.setattr(config, "TARGET_PROGRAMS", 1)
    assert config.launch(283, 160, F16, split=False, aligned=True) == config.LARGE
    check_direction("triton", random_streams(LENGTHS, 176, 160, F16), matrix(176, 160, F16))


@inside
def test_companions_strides_and_int32_offsets() -> None:
    a, d, offsets = random_streams([70, 9, 40], 12, 30)
    V = matrix(12, 30)
    clean = grad_direction(a, d, offsets, V, impl="triton")
    a[70:79] = torch.nan
    spread = torch.full((len(a), 24), torch.nan)
    spread[:, ::2] = a
    columns = d.T.contiguous().T, offsets.int(), V.T.contiguous().T
    again = grad_direction(spread[:, ::2], *columns, impl="triton")
    assert torch.equal(clean[[0, 2]], again[[0, 2]])
    assert again[1].isnan()


@inside
def test_refuses_float64_and_takes_nothing() -> None:
    a, d, offsets = random_streams([2, 3], 4, 5)
    V = matrix(4, 5)
    with pytest.raises(RuntimeError, match="no float64"):
        grad_direction(a, d, offsets, V.double(), impl="triton")
    assert grad_direction(a[:0], d[:0], offsets[:1], V, impl="triton").shape == (0,)
    assert grad_direction(a[:0], d[:0], offsets * 0, V, impl="triton").tolist() == [0.0, 0.0]
    assert grad_direction(a[:, :0], d, offsets, V[:, :0], impl="triton").tolist() == [0.0, 0.0]
    assert grad_direction(a, d[:, :0], offsets, V[:0], impl="triton").tolist() == [0.0, 0.0]
