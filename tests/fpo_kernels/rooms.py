"""The implementations of grad_products that run on a CPU, each with its way, for parametrized tests; ragged lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fpo_kernels.products import blocked, formed
from fpo_kernels.testing import EDGES, PLACES
from tests import toolchain

WAYS = [
    ("reference", "form"),
    ("torch", "tokens"),
    ("torch", "form"),
    pytest.param("native", "tokens", marks=toolchain.native.marks),
]
ways = pytest.mark.parametrize(("impl", "way"), WAYS)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def all_pairs(n: int, m: int) -> Tensor:
    """(n·m, 2): every i with every j."""
    return torch.cartesian_prod(torch.arange(n), torch.arange(m))


@st.composite
def ragged_lengths(draw: st.DrawFn, most: int = 6) -> list[int]:
    """Up to `most` lengths at the edges of pieces, the shortest first, in the middle or last."""
    least, *others = sorted(draw(st.lists(st.sampled_from(EDGES), min_size=1, max_size=most)))
    others = draw(st.permutations(others))
    where = {"first": 0, "middle": len(others) // 2, "last": len(others)}[draw(st.sampled_from(PLACES))]
    return [*others[:where], least, *others[where:]]


@contextmanager
def small_pieces(wanted: bool = True) -> Iterator[None]:
    """The torch room cuts narrow layers and short examples as it does wide and long ones.

    Several examples share a batch of 9 to 200 rows each; lists of more than 5 examples, and tiles, are cut too.
    """
    cuts = {
        formed: {"FORM_BYTES": 4 * 5 * 300, "ROW_BYTES": 2**13, "LEAST_TOKENS": 8, "MOST_EXAMPLES": 5},
        blocked: {"TILE_TOKENS": 16, "FEATURE_CHUNK": 8, "SCRATCH_BYTES": 2**17},
    }
    with ExitStack() as stack:
        for module, sizes in cuts.items() if wanted else ():
            stack.enter_context(mock.patch.multiple(module, **sizes))
        yield


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
