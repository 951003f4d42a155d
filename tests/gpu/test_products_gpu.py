"""grad_products on a GPU against the float64 reference on the CPU."""

from __future__ import annotations

import pytest
import torch

from fpo_kernels.products import grad_products
from fpo_kernels.testing import PLACES, Place, check_products, ragged, random_streams
from tests import toolchain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ROOMS = [("triton", "tokens"), ("triton", "form"), ("native", "tokens"), ("torch", "tokens"), ("torch", "form")]
CASES = [
    *((impl, way, dtype) for impl, way in ROOMS for dtype in (F32, BF16, F16)),
    *((impl, way, F64) for impl, way in ROOMS if impl != "triton"),
]
room = pytest.mark.parametrize(("impl", "way"), ROOMS)
case = pytest.mark.parametrize(("impl", "way", "dtype"), CASES)


@pytest.fixture(autouse=True)
def _can_run(request: pytest.FixtureRequest) -> None:
    impl = getattr(request.node, "callspec", None) and request.node.callspec.params.get("impl")
    if impl == "triton":
        pytest.importorskip("triton")
    if impl == "native" and (why := toolchain.no_cuda_build()):
        pytest.skip(why)


def all_pairs(n: int, m: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(n), torch.arange(m)).cuda()


def steering(candidates: int) -> torch.Tensor:
    """(z, z) and (z, ref), the reference last."""
    own = torch.arange(candidates)
    return torch.cat([torch.stack([own, own], 1), torch.stack([own, torch.full_like(own, candidates)], 1)]).cuda()


@case
@pytest.mark.parametrize(("p", "q"), [(1, 3), (33, 70), (576, 192), (577, 1535), (576, 8), (576, 1), (4, 1000)])
def test_matches_the_definition(impl: str, way: str, dtype: torch.dtype, p: int, q: int) -> None:
    streams = random_streams(ragged(7, 200, place="middle"), p, q, dtype, "cuda")
    other = random_streams(ragged(3, 70, place="middle"), p, q, dtype, "cuda", seed=1)
    check_products(impl, streams, all_pairs(7, 7), way=way)
    check_products(impl, streams, all_pairs(7, 3), other, way=way)


@room
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("p", "q"), [(33, 70), (576, 1)])
def test_wherever_the_shortest_stands(impl: str, way: str, place: Place, p: int, q: int) -> None:
    """A matter of offsets alone: one dtype tells."""
    streams = random_streams(ragged(7, 200, place=place), p, q, F32, "cuda")
    other = random_streams(ragged(3, 70, place=place), p, q, F32, "cuda", seed=1)
    check_products(impl, streams, all_pairs(7, 7), way=way)
    check_products(impl, streams, all_pairs(7, 3), other, way=way)


@case
@pytest.mark.parametrize(("examples", "longest", "p", "q"), [(9, 256, 576, 1), (3, 257, 4096, 1), (16, 129, 576, 16)])
def test_ragged_examples_of_narrow_layers(
    impl: str, way: str, dtype: torch.dtype, examples: int, longest: int, p: int, q: int
) -> None:
    """Past what a piece holds: a score head, LoRA factors."""
    own = torch.arange(examples)[:, None].repeat(1, 2).cuda()
    streams = random_streams(ragged(examples, longest, place="middle"), p, q, dtype, "cuda")
    other = random_streams(ragged(examples, longest // 2, place="middle"), p, q, dtype, "cuda", seed=1)
    check_products(impl, streams, own, way=way)
    check_products(impl, streams, own, other, way=way)
    check_products(impl, streams, all_pairs(examples, examples), other, way=way)


@case
def test_layers_that_share_their_inputs(impl: str, way: str, dtype: torch.dtype) -> None:
    lengths = ragged(5, 90)
    a, d, offsets = random_streams(lengths, 96, 96, dtype, "cuda")
    more = tuple(random_streams(lengths, 96, q, dtype, "cuda", seed=q)[1] for q in (32, 33, 7))
    for ds in ((d, more[0], more[0]), (d, *more)):
        check_products(impl, (a, ds, offsets), steering(4), way=way)
        check_products(impl, (a, ds, offsets), all_pairs(5, 5), (a, ds, offsets), way=way)


@case
def test_many_examples(impl: str, way: str, dtype: torch.dtype) -> None:
    """More than a block of either side, whole Gram matrices, a shared partner, a few pairs."""
    streams = random_streams([7, 1, 30, 0, 64] * 9, 130, 48, dtype, "cuda")
    check_products(impl, streams, all_pairs(45, 45), way=way)
    check_products(impl, streams, steering(44), way=way)
    check_products(impl, streams, torch.tensor([[44, 2], [0, 0], [17, 17], [16, 19]]).cuda(), way=way)


@case
def test_long_examples(impl: str, way: str, dtype: torch.dtype) -> None:
    check_products(impl, random_streams([4096, 1, 2500], 40, 24, dtype, "cuda"), all_pairs(3, 3), way=way)


@case
def test_same_bits_every_time(impl: str, way: str, dtype: torch.dtype) -> None:
    streams, pairs = random_streams([700, 64, 64, 1, 33], 96, 130, dtype, "cuda"), all_pairs(5, 5)
    first = grad_products(*streams, pairs, impl=impl, way=way)
    for _ in range(20):
        assert torch.equal(grad_products(*streams, pairs, impl=impl, way=way), first)


@room
def test_same_bits_in_dirty_memory_and_beside_nan(impl: str, way: str) -> None:
    a, d, offsets = random_streams([70, 9, 40, 5, 1], 96, 40, device="cuda")
    pairs = torch.tensor([[0, 0], [2, 2], [0, 2], [3, 4]]).cuda()
    first = grad_products(a, d, offsets, pairs, impl=impl, way=way)
    a[70:79] = torch.nan
    torch.use_deterministic_algorithms(True, warn_only=True)  # every new allocation is NaN then
    try:
        again = grad_products(a, d, offsets, pairs, impl=impl, way=way)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(again, first)


@room
def test_operator_contract(impl: str, way: str) -> None:
    a, d, offsets = random_streams([4, 0, 19], 6, 5, device="cuda")
    arguments = (a, [d], offsets, all_pairs(3, 3))
    torch.library.opcheck(torch.ops.fpo.grad_products.default, (*arguments, None, [], None, impl, way))
    torch.library.opcheck(torch.ops.fpo.grad_products.default, (*arguments, a, [d], offsets, impl, way))


@pytest.mark.parametrize("way", ["tokens", "form"])
def test_triton_waits_for_nothing(way: str) -> None:
    """In a CUDA graph any synchronisation is an error; the checks that read values are left out there."""
    pytest.importorskip("triton")
    streams, pairs = random_streams(20, 96, 40, device="cuda"), steering(19)
    expected = grad_products(*streams, pairs, impl="triton", way=way)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = grad_products(*streams, pairs, impl="triton", way=way)
    graph.replay()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("way", ["tokens", "form"])
def test_rows_past_two_to_the_31(way: str) -> None:
    """Row · stride overflows 32 bits: the last example lies beyond element 2³¹ of a bf16 stream."""
    pytest.importorskip("triton")
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    rows, width = 2**20 + 70, 2048
    a = torch.zeros(rows, width, dtype=BF16, device="cuda")
    a[-70:] = torch.randn(70, width, device="cuda").to(BF16)
    d = torch.randn(rows, 3, device="cuda").to(BF16)
    offsets = torch.tensor([0, rows - 70, rows], device="cuda")
    last = torch.tensor([[1, 1]], device="cuda")
    cut = torch.tensor([0, 70], device="cuda")
    alone = grad_products(a[-70:], d[-70:], cut, last - 1, impl="triton", way=way)
    assert torch.equal(grad_products(a, d, offsets, last, impl="triton", way=way), alone)
