"""The implementations of grad_products that run on a CPU, each with its way, for parametrized tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fpo_kernels import library

NO_NATIVE = library.why_not("grad_products", torch.empty(0))
WAYS = [
    ("reference", "form"),
    ("torch", "tokens"),
    ("torch", "form"),
    pytest.param("native", "tokens", marks=pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))),
]
ways = pytest.mark.parametrize(("impl", "way"), WAYS)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def all_pairs(n: int, m: int) -> Tensor:
    """(n·m, 2): every i with every j."""
    return torch.cartesian_prod(torch.arange(n), torch.arange(m))


def most_held(run: Callable[[], object]) -> int:
    """The most bytes of tensors that a call held at a time, beyond those from before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
