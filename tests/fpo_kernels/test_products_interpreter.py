"""The Triton kernel under its interpreter, in a process of its own: interpreter and compiler exclude each other.

fp32 and fp16 only: there a tl.dot of bf16 gives garbage without an error.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fpo_kernels.products import grad_products
from fpo_kernels.testing import check_products, random_streams

pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETING, reason="runs in the process that test_in_its_own_process starts")
DTYPES = [torch.float32, torch.float16]


@pytest.mark.skipif(INTERPRETING, reason="is the parent's")
def test_in_its_own_process() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def all_pairs(n: int, m: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(n), torch.arange(m))


@inside
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "q"), [(1, 3), (33, 70), (64, 32)])
def test_matches_the_definition(p: int, q: int, dtype: torch.dtype) -> None:
    streams = random_streams([3, 0, 1, 150, 64, 65], p, q, dtype)
    check_products("triton", streams, all_pairs(6, 6), way="tokens")
    check_products("triton", streams, all_pairs(6, 3), random_streams([0, 70, 1], p, q, dtype, seed=1), way="tokens")


@inside
@pytest.mark.parametrize("pairs", [1, 300])
def test_any_split_of_a_pair(pairs: int) -> None:
    """One pair is shared by 16 programs, 300 pairs are not shared."""
    streams = random_streams([200, 5], 9, 17)
    check_products("triton", streams, torch.tensor([[0, 0], [0, 1], [1, 1]]).repeat(pairs, 1)[:pairs], way="tokens")


@inside
def test_companions_strides_and_int32_offsets() -> None:
    a, d, offsets = random_streams([70, 9, 40], 12, 5)
    pairs = torch.tensor([[0, 0], [2, 2], [0, 2]])
    clean = grad_products(a, d, offsets, pairs, impl="triton", way="tokens")
    a[70:79] = torch.nan
    spread = torch.full((len(a), 24), torch.nan)
    spread[:, ::2] = a
    again = grad_products(spread[:, ::2], d.T.contiguous().T, offsets.int(), pairs, impl="triton", way="tokens")
    assert torch.equal(clean, again)


@inside
def test_refuses_float64_and_takes_no_pairs() -> None:
    streams = random_streams([2, 3], 4, 5, torch.float64)
    with pytest.raises(RuntimeError, match="no float64"):
        grad_products(*streams, all_pairs(2, 2), impl="triton", way="tokens")
    assert grad_products(*random_streams([2], 4, 5), all_pairs(0, 0), impl="triton", way="tokens").shape == (0,)
