"""The Triton kernels of grad_sketch under the interpreter, in a process of its own.

A tl.dot of bf16 gives garbage there without an error: the kernel multiplies its bf16 parts in fp32, and streams are
fp32 and fp16.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fpo_kernels.sketch import TensorSketch, grad_sketch
from fpo_kernels.testing import PLACES, ragged, random_streams
from tests.fpo_kernels.interpreted import dirty_memory, inside, outside, passes_apart
from tests.fpo_kernels.sketches import check_room, siblings, walsh

pytest.importorskip("triton")
F32, F16 = torch.float32, torch.float16
# Lengths that no tile divides, empty examples, one of several chunks.
RAGGED = [3, 0, 1, 17, 0, 24, 2]
DIMS = [64, 128, 256, 512, 1024, 2048, 4096, 8192]


@outside
def test_in_its_own_process() -> None:
    passes_apart(__file__)


@pytest.fixture(autouse=True)
def _dirty_memory() -> Iterator[None]:
    with dirty_memory():
        yield


def sketched(streams: tuple, sketches: tuple[TensorSketch, ...]) -> Tensor:
    a, d, offsets = streams
    return grad_sketch(a, (d,) if isinstance(d, Tensor) else d, offsets, sketches, impl="triton")


def check(streams: tuple, sketches: tuple[TensorSketch, ...]) -> Tensor:
    got = sketched(streams, sketches)
    check_room(got, streams, sketches)
    return got


def test_the_truth_has_natural_order() -> None:
    k = torch.arange(64)
    common = (k[:, None] & k)[..., None] >> torch.arange(6) & 1
    assert torch.equal(walsh(torch.eye(64)), 1.0 - 2 * (common.sum(-1) % 2))


@inside
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [F32, F16])
def test_matches_the_definition(dim: int, dtype: torch.dtype) -> None:
    """p and q below and above the buckets, so that tables have one row and several."""
    place = PLACES[dim.bit_length() % 3]
    lengths = ragged(4, 17, place=place) if dim < 2048 else ragged(3, 5, place=place)
    for p, q in ((1, 3), (150, 70)) if dim < 4096 else ((5000, 70),):
        check(random_streams(lengths, p, q, dtype, seed=dim), siblings(p, [q], dim))


@inside
@pytest.mark.parametrize("dim", DIMS)
def test_one_example_of_one_token(dim: int) -> None:
    for dtype in (F32, F16):
        check(random_streams([1], 96, 64, dtype), siblings(96, [64], dim))


@inside
def test_the_largest() -> None:
    check(random_streams([1, 1], 9, 20), siblings(9, [20], 16384))


@inside
@pytest.mark.parametrize("dtype", [F32, F16])
def test_layers_that_share_their_inputs(dtype: torch.dtype) -> None:
    """Four; one has more features than buckets, one lies across, one is a slice."""
    widths = [5, 290, 67, 30]
    a, _, offsets = random_streams(RAGGED, 33, 1, dtype)
    d = [random_streams(RAGGED, 1, q, dtype, seed=q)[1] for q in widths]
    d[2] = d[2].T.contiguous().T
    d[3] = torch.cat([d[3], torch.full_like(d[3], torch.nan)], 1)[:, :30]
    check((a, tuple(d), offsets.int()), siblings(33, widths, 256))


@inside
@pytest.mark.parametrize("dim", [64, 512])
def test_company_leaves_no_trace(dim: int) -> None:
    """Not a bit: neither what others hold, nor how many they are, nor where an example lies."""
    a, d, offsets = random_streams([1, 11, 9, 21, 5], 40, 90)
    sketches = siblings(40, [90], dim)
    together = check((a, d, offsets), sketches)
    a[12:21] = torch.nan
    beside_nan = sketched((a, d, offsets), sketches)
    assert beside_nan[2].isnan().all()
    assert torch.equal(beside_nan[[0, 1, 3, 4]], together[[0, 1, 3, 4]])
    alone = sketched((a[21:42], d[21:42], torch.tensor([0, 21])), sketches)
    assert torch.equal(alone[0], together[3])


@inside
def test_refuses_float64_and_takes_nothing() -> None:
    sketches = siblings(4, [5], 64)
    a, d, offsets = random_streams([2, 3], 4, 5)
    with pytest.raises(RuntimeError, match="no float64"):
        sketched((a.double(), d.double(), offsets), sketches)
    assert sketched((a[:0], d[:0], offsets[:1]), sketches).shape == (0, 64)
    assert not sketched((a[:0], d[:0], offsets * 0), sketches).any()
