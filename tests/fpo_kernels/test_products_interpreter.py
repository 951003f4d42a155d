"""Both Triton ways under the interpreter, in a process of its own: interpreter and compiler exclude each other.

fp32 and fp16 only: there a tl.dot of bf16 gives garbage without an error.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from fpo_kernels.products import config_triton as config
from fpo_kernels.products import grad_products
from fpo_kernels.testing import Place, check_products, ragged, random_streams
from tests.fpo_kernels.interpreted import dirty_memory, inside, outside, passes_apart

triton = pytest.importorskip("triton")
# triton 3.6 compiles a range whose bounds are read from memory, but with numpy 2.4 it cannot interpret one
NUMPY = tuple(int(part) for part in np.__version__.split(".")[:2])
clash = triton.__version__.startswith("3.6.") and NUMPY >= (2, 4)
counts = pytest.mark.skipif(clash, reason="triton 3.6 cannot interpret this kernel with numpy 2.4")
form = pytest.param("form", marks=counts)
both_ways = pytest.mark.parametrize("way", ["tokens", form])
DTYPES = [torch.float32, torch.float16]
# Lengths that no tile divides, empty examples, more examples than a block holds on either side.
RAGGED = [3, 0, 1, 70, 33, 8, 2, 2, 5, 1, 9, 0, 4, 2, 1, 6, 40, 17, 3]


@outside
def test_in_its_own_process() -> None:
    passes_apart(__file__)


@pytest.fixture(autouse=True)
def _dirty_memory() -> Iterator[None]:
    with dirty_memory():
        yield


def all_pairs(n: int, m: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(n), torch.arange(m))


def steering(candidates: int) -> Tensor:
    """(z, z) and (z, ref), the reference last."""
    own = torch.arange(candidates)
    return torch.cat([torch.stack([own, own], 1), torch.stack([own, torch.full_like(own, candidates)], 1)])


def layers(q: int, lengths: list[int], dtype: torch.dtype, p: int, seed: int = 0) -> tuple:
    """Four layers that read one a; one of them strided."""
    a, d, offsets = random_streams(lengths, p, q, dtype, seed=seed)
    more = [random_streams(lengths, p, width, dtype, seed=seed + width)[1] for width in (2, 67, q)]
    return a, (d, more[0], more[1].T.contiguous().T, more[2]), offsets


@inside
@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "q", "place"), [(1, 3, "first"), (33, 70, "middle"), (130, 8, "last")])
def test_matches_the_definition(way: str, p: int, q: int, place: Place, dtype: torch.dtype) -> None:
    streams = random_streams(ragged(5, 70, place=place), p, q, dtype)
    check_products("triton", streams, all_pairs(5, 5), way=way)
    other = random_streams(ragged(3, 70, place=place), p, q, dtype, seed=1)
    check_products("triton", streams, all_pairs(5, 3), other, way=way)


@inside
@both_ways
@pytest.mark.parametrize(
    "pairs",
    [
        all_pairs(19, 19)[::3],
        steering(18),
        torch.tensor([[0, z] for z in range(19)] + [[z, z] for z in range(19)]),  # the shared partner first
        torch.tensor([[z, z] for z in (18, 3, 3, 4)]),
        torch.tensor([[17, 2]]),
        torch.tensor([[4, 5], [5, 4], [4, 7], [4, 4], [7, 16], [3, 3]]),  # within a block, and across
    ],
    ids=["gram", "steering", "hub-first", "norms", "one", "few"],
)
def test_any_list_of_pairs(way: str, pairs: Tensor) -> None:
    check_products("triton", random_streams(RAGGED, 20, 9), pairs, way=way)


@inside
@both_ways
def test_layers_that_share_their_inputs(way: str) -> None:
    streams = layers(5, RAGGED[:9], torch.float32, 30)
    check_products("triton", streams, steering(8), way=way)
    other = layers(5, [4, 0, 9], torch.float32, 30, seed=50)
    check_products("triton", streams, all_pairs(9, 3), other, way=way)


@inside
@pytest.mark.parametrize("pairs", [1, 40])
def test_any_number_of_pairs(pairs: int) -> None:
    """One pair, and pairs many times over."""
    streams = random_streams([130, 5], 9, 17)
    listed = torch.tensor([[0, 0], [0, 1], [1, 1]]).repeat(pairs, 1)[:pairs]
    check_products("triton", streams, listed, way="tokens")


@inside
@counts
def test_sums_written_in_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile a launch: a whole gradient's tiles have to add up all the same."""
    streams = random_streams([5, 17, 40], 150, 70)
    whole = check_products("triton", streams, all_pairs(3, 3), way="form")
    monkeypatch.setattr(config, "SUM_BYTES", 1)
    assert torch.equal(check_products("triton", streams, all_pairs(3, 3), way="form"), whole)


@inside
@both_ways
def test_companions_strides_and_int32_offsets(way: str) -> None:
    a, d, offsets = random_streams([70, 9, 40], 12, 5)
    pairs = torch.tensor([[0, 0], [2, 2], [0, 2], [2, 0]])
    clean = grad_products(a, d, offsets, pairs, impl="triton", way=way)
    assert clean[2] == clean[3]
    a[70:79] = torch.nan
    spread = torch.full((len(a), 24), torch.nan)
    spread[:, ::2] = a
    again = grad_products(spread[:, ::2], d.T.contiguous().T, offsets.int(), pairs, impl="triton", way=way)
    assert torch.equal(clean, again)


@inside
@both_ways
def test_rows_far_apart_are_copied(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places within a tile are counted in 32 bits."""
    streams = random_streams([3, 4], 6, 5)
    expected = grad_products(*streams, all_pairs(2, 2), impl="triton", way=way)
    wide = torch.full((7, 100), torch.nan)
    wide[:, :6] = streams[0]
    monkeypatch.setattr(config, "MOST_STRIDE", 50)
    got = grad_products(wide[:, :6], *streams[1:], all_pairs(2, 2), impl="triton", way=way)
    assert torch.equal(got, expected)


@inside
@both_ways
def test_refuses_float64_and_takes_nothing(way: str) -> None:
    streams = random_streams([2, 3], 4, 5, torch.float64)
    with pytest.raises(RuntimeError, match="no float64"):
        grad_products(*streams, all_pairs(2, 2), impl="triton", way=way)
    a, d, offsets = random_streams([2, 0], 4, 5)
    assert grad_products(a, d, offsets, all_pairs(0, 0), impl="triton", way=way).shape == (0,)
    assert grad_products(a[:, :0], d, offsets, all_pairs(2, 2), impl="triton", way=way).tolist() == [0.0] * 4
    assert grad_products(a[:0], d[:0], offsets * 0, all_pairs(2, 2), impl="triton", way=way).tolist() == [0.0] * 4
