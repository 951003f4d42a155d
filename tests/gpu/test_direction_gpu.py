"""grad_direction on a GPU against the float64 reference on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fpo_kernels.direction import grad_direction, unchecked_direction
from fpo_kernels.testing import PLACES, Place, check_direction, ragged, random_streams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
IMPLS = ["torch"]
# streams and direction
MIXED = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16), (BF16, F16)]
CASES = [*((impl, *dtypes) for impl in IMPLS for dtypes in MIXED), ("torch", F64, F64), ("torch", BF16, F64)]
LENGTHS = ragged(7, 200)


def matrix(p: int, q: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(q, p, generator=torch.Generator().manual_seed(9), dtype=F64).to("cuda", dtype)


@pytest.mark.parametrize(("impl", "dtype", "direction_dtype"), CASES)
@pytest.mark.parametrize(("p", "q"), [(1, 3), (33, 70), (576, 192), (577, 1535), (576, 1), (576, 8), (4, 1000)])
def test_matches_the_definition(impl: str, dtype: torch.dtype, direction_dtype: torch.dtype, p: int, q: int) -> None:
    streams = random_streams(ragged(7, 200, place="middle"), p, q, dtype, "cuda")
    check_direction(impl, streams, matrix(p, q, direction_dtype))


@pytest.mark.parametrize(("impl", "dtype", "direction_dtype"), CASES)
def test_a_wide_layer(impl: str, dtype: torch.dtype, direction_dtype: torch.dtype) -> None:
    """Few tokens: float64 on the CPU would take seconds for many."""
    check_direction(impl, random_streams([66, 0, 31], 2048, 4096, dtype, "cuda"), matrix(2048, 4096, direction_dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("place", PLACES)
def test_wherever_the_shortest_stands(impl: str, place: Place) -> None:
    """A matter of offsets alone: one dtype tells."""
    for p, q in ((33, 70), (576, 1)):
        check_direction(impl, random_streams(ragged(7, 200, place=place), p, q, F32, "cuda"), matrix(p, q))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strides(impl: str, dtype: torch.dtype) -> None:
    a, d, offsets = random_streams(LENGTHS, 96, 160, dtype, "cuda")
    spread = torch.full((len(a), 192), torch.nan, dtype=dtype, device="cuda")
    spread[:, ::2] = a
    check_direction(impl, (spread[:, ::2], d.T.contiguous().T, offsets.int()), matrix(160, 96, dtype).T)


@pytest.mark.parametrize(("impl", "dtype", "direction_dtype"), CASES)
def test_same_bits_every_time(impl: str, dtype: torch.dtype, direction_dtype: torch.dtype) -> None:
    streams, V = random_streams([700, 64, 64, 1, 33], 96, 130, dtype, "cuda"), matrix(96, 130, direction_dtype)
    first = grad_direction(*streams, V, impl=impl)
    torch.use_deterministic_algorithms(True, warn_only=True)  # every new allocation is NaN then
    try:
        for _ in range(20):
            assert torch.equal(grad_direction(*streams, V, impl=impl), first)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("impl", IMPLS)
def test_operator_contract(impl: str) -> None:
    streams = random_streams([4, 0, 19], 6, 5, device="cuda")
    torch.library.opcheck(torch.ops.fpo.grad_direction.default, (*streams, matrix(6, 5), impl))


def test_unchecked_waits_for_nothing() -> None:
    """In a CUDA graph any synchronisation is an error."""
    for dtype in (F32, F64, BF16):
        streams, V = random_streams(LENGTHS, 96, 40, dtype, "cuda"), matrix(96, 40)
        expected = unchecked_direction(*streams, V)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = unchecked_direction(*streams, V)
        graph.replay()
        assert torch.equal(got, expected)
