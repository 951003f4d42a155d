"""grad_products on a GPU against the float64 reference on the CPU."""

from __future__ import annotations

import pytest
import torch

from fpo_kernels.products import grad_products, native
from fpo_kernels.testing import check_products, random_streams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
CASES = [
    *((impl, dtype) for impl in ("triton", "native", "torch") for dtype in (F32, BF16, F16)),
    ("native", F64),
    ("torch", F64),
]


@pytest.fixture(autouse=True)
def _can_run(request: pytest.FixtureRequest) -> None:
    impl = getattr(request.node, "callspec", None) and request.node.callspec.params.get("impl")
    if impl == "triton":
        pytest.importorskip("triton")
    if impl == "native" and (why := native.why_not(torch.empty(0, device="cuda"))):
        pytest.skip(why)


def all_pairs(n: int, m: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(n), torch.arange(m)).cuda()


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize(("p", "q"), [(1, 3), (33, 70), (576, 192), (577, 1535)])
def test_matches_the_definition(impl: str, dtype: torch.dtype, p: int, q: int) -> None:
    streams = random_streams([3, 0, 1, 150, 64, 65, 200], p, q, dtype, "cuda")
    check_products(impl, streams, all_pairs(7, 7), way="tokens")
    check_products(
        impl, streams, all_pairs(7, 3), random_streams([0, 70, 1], p, q, dtype, "cuda", seed=1), way="tokens"
    )


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_long_examples(impl: str, dtype: torch.dtype) -> None:
    check_products(impl, random_streams([4096, 1, 2500], 40, 24, dtype, "cuda"), all_pairs(3, 3), way="tokens")


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_same_bits_every_time(impl: str, dtype: torch.dtype) -> None:
    streams, pairs = random_streams([700, 64, 64, 1, 33], 96, 130, dtype, "cuda"), all_pairs(5, 5)
    first = grad_products(*streams, pairs, impl=impl, way="tokens")
    for _ in range(20):
        assert torch.equal(grad_products(*streams, pairs, impl=impl, way="tokens"), first)


@pytest.mark.parametrize("impl", ["triton", "native", "torch"])
def test_operator_contract(impl: str) -> None:
    streams = random_streams([4, 0, 19], 6, 5, device="cuda")
    streams = (streams[0], [streams[1], streams[1][:, 1:3]], streams[2])
    arguments = (*streams, all_pairs(3, 3))
    torch.library.opcheck(torch.ops.fpo.grad_products.default, (*arguments, None, [], None, impl, "tokens"))
    torch.library.opcheck(torch.ops.fpo.grad_products.default, (*arguments, *streams, impl, "tokens"))


def test_rows_past_two_to_the_31() -> None:
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
    alone = grad_products(a[-70:], d[-70:], torch.tensor([0, 70], device="cuda"), last - 1, impl="triton", way="tokens")
    assert torch.equal(grad_products(a, d, offsets, last, impl="triton", way="tokens"), alone)
