"""grad_sketch on a GPU against the float64 definition on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fpo_kernels.sketch import grad_sketch
from fpo_kernels.sketch.checked import cut_off
from fpo_kernels.sketch.grouped import Member, grouped_sketch
from fpo_kernels.streams import counted_tables, tables_apart
from fpo_kernels.testing import PLACES, Place, ragged, random_streams
from tests import toolchain
from tests.fpo_kernels.sketches import check_room, definition, siblings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
IMPLS = ["triton", "native", "torch"]
CASES = [*((impl, dtype) for impl in IMPLS for dtype in (F32, BF16, F16)), ("native", F64), ("torch", F64)]
LENGTHS = ragged(7, 200)
DIMS = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
room = pytest.mark.parametrize("impl", IMPLS)
case = pytest.mark.parametrize(("impl", "dtype"), CASES)


@pytest.fixture(autouse=True)
def _can_run(request: pytest.FixtureRequest) -> None:
    impl = getattr(request.node, "callspec", None) and request.node.callspec.params.get("impl")
    if impl == "triton":
        pytest.importorskip("triton")
    if impl == "native" and (why := toolchain.no_cuda_build()):
        pytest.skip(why)


def lengths(dim: int) -> list[int]:
    """Fewer tokens where dim is large: the float64 definition takes the time, seconds a test past 4096."""
    return ragged(7, 200 if dim <= 2048 else 70, place="middle")


def check(impl: str, streams: tuple, dim: int) -> Tensor:
    a, d, offsets = streams
    ds = (d,) if isinstance(d, Tensor) else d
    sketches = siblings(a.shape[1], [x.shape[1] for x in ds], dim)
    got = grad_sketch(a, ds, offsets, sketches, impl=impl)
    assert got.device == a.device
    if a.dtype == F64:
        exact, allowed = definition(a, ds, offsets, sketches)
        assert ((got.cpu() - exact).abs() <= allowed * torch.finfo(F64).eps / torch.finfo(F32).eps).all()
    else:
        check_room(got, (a, ds, offsets), sketches, impl)
    return got


@case
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("p", "q"), [(1, 3), (33, 70), (577, 192), (4097, 1535)])
def test_matches_the_definition(impl: str, dtype: torch.dtype, dim: int, p: int, q: int) -> None:
    check(impl, random_streams(lengths(dim), p, q, dtype, "cuda"), dim)


@room
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dim", [64, 2048, 4096])
def test_wherever_the_shortest_stands(impl: str, place: Place, dim: int) -> None:
    """A matter of offsets alone: one dtype tells."""
    check(impl, random_streams(ragged(7, 200, place=place), 33, 70, F32, "cuda"), dim)


@case
def test_rows_that_no_shared_memory_holds(impl: str, dtype: torch.dtype) -> None:
    check(impl, random_streams([2, 70, 1], 20000, 9001, dtype, "cuda"), 4096)


@case
@pytest.mark.parametrize("dim", [64, 1024, 4096, 8192])
def test_layers_that_share_their_inputs(impl: str, dtype: torch.dtype, dim: int) -> None:
    """Nine are more than a native launch takes."""
    for widths in ([96, 32], [96, 32, 5000], [96, 32, 33, 7, 96, 1, 2, 3, 200]):
        a, _, offsets = random_streams(lengths(dim), 96, 1, dtype, "cuda")
        ds = [random_streams(lengths(dim), 1, q, dtype, "cuda", seed=n)[1] for n, q in enumerate(widths)]
        ds[0] = ds[0].T.contiguous().T
        ds[1] = torch.cat([ds[1], torch.full_like(ds[1], torch.nan)], 1)[:, :32]
        check(impl, (a, tuple(ds), offsets.int()), dim)


@case
def test_many_and_long_examples(impl: str, dtype: torch.dtype) -> None:
    check(impl, random_streams([7, 1, 30, 0, 64] * 60, 130, 48, dtype, "cuda"), 512)
    check(impl, random_streams([4096, 1, 2500], 40, 24, dtype, "cuda"), 1024)


@case
@pytest.mark.parametrize("dim", [256, 4096])
def test_same_bits_every_time(impl: str, dtype: torch.dtype, dim: int) -> None:
    streams, sketches = random_streams([700, 64, 64, 1, 33], 96, 130, dtype, "cuda"), siblings(96, [130], dim)
    first = grad_sketch(*streams, sketches[0], impl=impl)
    torch.use_deterministic_algorithms(True, warn_only=True)  # every new allocation is NaN then
    try:
        for _ in range(20):
            assert torch.equal(grad_sketch(*streams, sketches[0], impl=impl), first)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("impl", ["triton", "native"])
@pytest.mark.parametrize("dim", [64, 512, 2048, 8192])
def test_company_leaves_no_trace(impl: str, dim: int) -> None:
    """Not a bit: neither what others hold, nor how many they are, nor where an example lies."""
    a, d, offsets = random_streams([1, 70, 9, 140, 5], 96, 300, device="cuda")
    sketch = siblings(96, [300], dim)[0]
    together = grad_sketch(a, d, offsets, sketch, impl=impl)
    alone = grad_sketch(a[80:220], d[80:220], torch.tensor([0, 140], device="cuda"), sketch, impl=impl)
    assert torch.equal(alone[0], together[3])
    a[71:80] = torch.nan
    beside_nan = grad_sketch(a, d, offsets, sketch, impl=impl)
    assert beside_nan[2].isnan().all()
    assert torch.equal(beside_nan[[0, 1, 3, 4]], together[[0, 1, 3, 4]])


@room
def test_operator_contract(impl: str) -> None:
    a, d, offsets = random_streams([4, 0, 19], 6, 5, device="cuda")
    arguments = (a, [d, d], offsets, 64, 0, "one input", ["first", "second"], impl)
    torch.library.opcheck(torch.ops.fpo.grad_sketch.default, arguments)


@pytest.mark.parametrize("impl", ["triton", "native"])
def test_waits_for_nothing(impl: str) -> None:
    """In a CUDA graph any synchronisation is an error; the checks that read values are left out there."""
    streams, sketch = random_streams(LENGTHS, 96, 40, device="cuda"), siblings(96, [40], 1024)[0]
    expected = grad_sketch(*streams, sketch, impl=impl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = grad_sketch(*streams, sketch, impl=impl)
    _others = [torch.full((n,), -1, dtype=torch.int64).pin_memory() for n in (16, 64, 256, 1024) for _ in range(8)]
    for _ in range(3):  # what a graph of somebody else's reads on the host is still there
        graph.replay()
        assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", ["triton", "native"])
def test_rows_past_two_to_the_31(impl: str) -> None:
    """Row · stride overflows 32 bits: the last example lies beyond element 2³¹ of a bf16 stream."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    rows, width = 2**20 + 70, 2048
    a = torch.zeros(rows, width, dtype=BF16, device="cuda")
    a[-70:] = torch.randn(70, width, device="cuda").to(BF16)
    d = torch.randn(rows, 3, device="cuda").to(BF16)
    offsets, cut = torch.tensor([0, rows - 70, rows], device="cuda"), torch.tensor([0, 70], device="cuda")
    sketch = siblings(width, [3], 1024)[0]
    alone = grad_sketch(a[-70:], d[-70:], cut, sketch, impl=impl)
    assert torch.equal(grad_sketch(a, d, offsets, sketch, impl=impl)[1:], alone)


def layers(dtype: torch.dtype, dim: int, lengths: list[int], padded: int) -> tuple[list[Member], Tensor, Tensor]:
    """Narrow, wide and odd layers on a GPU, siblings among them, two slots; the truth and the error allowed."""
    members, exact, allowed = [], *torch.zeros(2, 2, len(lengths), dim, dtype=F64)
    for n, (p, widths) in enumerate([(128, [64, 4096]), (9000, [256]), (33, [70, 5, 300]), (64, [14336])]):
        a, _, offsets = random_streams(lengths, p, 1, dtype, seed=n)
        ds = [random_streams(lengths, 1, q, dtype, seed=10 * n + m)[1] for m, q in enumerate(widths, 1)]
        sketches = siblings(p, widths, dim, seed=n % 2)
        truth, band = definition(a, tuple(ds), offsets, sketches, cut_off("triton", torch.device("cuda"), dim))
        exact[n % 2] += truth
        allowed[n % 2] += band
        count = offsets.diff()
        starts = torch.arange(len(lengths)) * padded + padded - count if padded else offsets[:-1]
        if padded:
            a, *ds = (left_padded(x, lengths, padded) for x in (a, *ds))
        where = starts.cuda(), count.cuda(), max(lengths)
        members.append(Member(a.cuda(), tuple(d.cuda() for d in ds), *where, sketches, n % 2))
    return members, exact, allowed


def left_padded(x: Tensor, lengths: list[int], width: int) -> Tensor:
    batch = x.new_full((len(lengths), width, x.shape[1]), torch.nan)
    for row, tokens in zip(batch, x.split(lengths), strict=True):
        row[width - len(tokens) :] = tokens
    return batch.flatten(0, 1)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dim", DIMS)
def test_many_layers_in_one_launch(dtype: torch.dtype, dim: int) -> None:
    pytest.importorskip("triton")
    for lengths, padded in ((ragged(7, 70), 0), ([9, 0, 1, 16], 20), ([1], 0)):
        members, exact, allowed = layers(dtype, dim, lengths, padded)
        got = grouped_sketch(members, 2).cpu()
        over = (got - exact).abs() - allowed
        assert over.max() <= 0, f"{over.max()} over the budget at {over.argmax()}"


def test_many_layers_wait_for_nothing_and_replay() -> None:
    """One graph serves other streams of the same places, and other lengths."""
    pytest.importorskip("triton")
    lengths = [16, 3, 9]
    members, _, _ = layers(BF16, 1024, lengths, 20)
    grouped_sketch(members, 2)  # brings the maps over
    torch.cuda.set_sync_debug_mode("error")
    try:
        with counted_tables() as room:
            first = grouped_sketch(members, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with tables_apart(room) as tables, torch.cuda.graph(graph):
        got = grouped_sketch(members, 2)
    tables.fill()
    graph.replay()
    assert torch.equal(got, first)
    for member in members:
        member.starts.add_(1)
        member.lengths.sub_(1).clamp_(min=0)
    graph.replay()
    assert torch.equal(got, grouped_sketch(members, 2))
    assert not torch.equal(got, first)
