"""grad_products through its public door: every implementation against the float64 definition."""

from __future__ import annotations

import itertools
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpo_kernels.products import grad_products
from fpo_kernels.products.config import SCRATCH_BYTES
from fpo_kernels.testing import PLACES, Place, Streams, check_products, outputs, ragged, random_streams
from tests.fpo_kernels.rooms import (
    BF16,
    F16,
    F32,
    F64,
    WAYS,
    all_pairs,
    most_held,
    ragged_lengths,
    small_pieces,
    ways,
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[int], int, int, list[tuple[int, int]], int, bool]:
    lengths, others = draw(ragged_lengths()), draw(ragged_lengths(4))
    p, q = draw(st.tuples(st.sampled_from([1, 3, 8, 16, 33]), st.sampled_from([1, 5, 16, 47])))
    pair = st.tuples(st.integers(0, len(lengths) - 1), st.integers(0, 1000))
    pairs = draw(st.lists(pair, max_size=12))
    return lengths, others, p, q, pairs, draw(st.integers(0, 2**31)), draw(st.booleans())


def poisoned(streams: Streams, listed: Tensor) -> Streams:
    """The streams with NaN in every row of an example that is not listed."""
    a, d, offsets = streams
    bad = torch.ones(len(offsets) - 1, dtype=torch.bool).index_fill_(0, listed.flatten(), False)
    rows = bad.repeat_interleave(offsets.diff())[:, None]
    ds = tuple(x.masked_fill(rows, torch.nan) for x in outputs(d))
    return a.masked_fill(rows, torch.nan), ds, offsets


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@ways
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_matches_the_definition(impl: str, way: str, dtype: torch.dtype, case) -> None:
    """Ragged lengths, whole and cut small; what no pair lists is poison."""
    lengths, others, p, q, drawn, seed, small = case
    streams, other = random_streams(lengths, p, q, dtype, seed=seed), random_streams(others, p, q, dtype, seed=seed + 1)
    with small_pieces(small and impl == "torch"):
        pairs = torch.tensor([(i, j % len(lengths)) for i, j in drawn], dtype=torch.int64).view(-1, 2)
        check_products(impl, poisoned(streams, pairs), pairs, way=way)
        pairs = torch.tensor([(i, j % len(others)) for i, j in drawn], dtype=torch.int64).view(-1, 2)
        left, right = poisoned(streams, pairs[:, 0]), poisoned(other, pairs[:, 1])
        check_products(impl, left, pairs, right, way=way)


# Sizes that the pieces' bounds cut where no test makes them smaller: a score head, LoRA factors.
NARROW = [(9, 256, 576, 1), (3, 257, 4096, 1), (16, 129, 576, 16), (4, 300, 64, 8)]


@pytest.mark.parametrize(("impl", "way"), [*WAYS[1:], ("auto", "auto")])
@pytest.mark.parametrize("place", PLACES)
def test_ragged_examples_of_narrow_layers(impl: str, way: str, place: Place) -> None:
    """Norms, Gram and cross Gram matrices, steering with one reference each, of sides that end short."""
    for examples, longest, p, q in NARROW:
        streams = random_streams(ragged(examples, longest, place=place), p, q)
        other = random_streams(ragged(examples, longest // 2, place=place), p, q, seed=1)
        own = torch.arange(examples)[:, None].repeat(1, 2)
        check_products(impl, streams, own, way=way)
        check_products(impl, streams, own, other, way=way)
        check_products(impl, streams, all_pairs(examples, examples), other, way=way)
        # a of the few, d of the many
        flipped = streams[1], streams[0], streams[2]
        check_products(impl, flipped, own, way=way)


@ways
def test_nan_of_a_listed_example_is_its_own(impl: str, way: str) -> None:
    """Nor does the stand-in for a short example's missing rows carry a neighbour's."""
    for place, bad in itertools.product(PLACES, range(4)):
        a, d, offsets = random_streams(ragged(4, 40, 3, place), 8, 5)
        expected = grad_products(a, d, offsets, all_pairs(4, 4), impl=impl, way=way).view(4, 4)
        for x in (a, d):
            x[offsets[bad] : offsets[bad + 1]] = torch.nan
        with small_pieces(impl == "torch"):
            got = grad_products(a, d, offsets, all_pairs(4, 4), impl=impl, way=way).view(4, 4)
        kept = torch.arange(4) != bad
        assert got[bad].isnan().all()
        assert got[:, bad].isnan().all()
        torch.testing.assert_close(got[kept][:, kept], expected[kept][:, kept], rtol=1e-5, atol=1e-3)


@ways
def test_long_wide_and_dense(impl: str, way: str) -> None:
    """Several tiles a pair, features past one chunk, whole Gram matrices, even and uneven lengths."""
    check_products(impl, random_streams([700, 130, 64], 40, 33), all_pairs(3, 3), way=way)
    check_products(impl, random_streams([150, 3], 2100, 4111), all_pairs(2, 2), way=way)
    check_products(
        impl, random_streams([64] * 9, 24, 48), torch.tensor([*((z, z) for z in range(8)), *((z, 8) for z in range(8))])
    )
    check_products(impl, random_streams([5, 64, 33, 64, 20], 24, 48), all_pairs(5, 5), way=way)


@ways
def test_strided_streams_and_int32_offsets(impl: str, way: str) -> None:
    a, d, offsets = random_streams([9, 40, 1], 33, 18)
    wide = torch.full((50, 70), torch.nan)
    wide[:, ::2][:, :33] = a
    tall = d.T.contiguous().T
    got = check_products(impl, (wide[:, ::2][:, :33], tall, offsets.int()), all_pairs(3, 3), way=way)
    assert torch.allclose(got, grad_products(a, d, offsets, all_pairs(3, 3), impl=impl, way=way))


@ways
def test_no_pairs_no_examples_no_features(impl: str, way: str) -> None:
    a, d, offsets = random_streams([3, 2], 4, 5)
    none = torch.empty(0, 2, dtype=torch.int64)
    assert grad_products(a, d, offsets, none, impl=impl, way=way).shape == (0,)
    assert grad_products(a[:0], d[:0], offsets[:1], none, impl=impl, way=way).shape == (0,)
    assert grad_products(a[:, :0], d, offsets, all_pairs(2, 2), impl=impl, way=way).tolist() == [0.0] * 4
    empty = (a[:0], d[:0], torch.zeros(3, dtype=torch.int64))
    assert grad_products(*empty, all_pairs(2, 2), impl=impl, way=way).tolist() == [0.0] * 4
    assert grad_products(a, [d[:, :0], d, d[:, :0]], offsets, all_pairs(2, 2), impl=impl, way=way).all()


@ways
def test_companions_change_nothing_not_even_nan(impl: str, way: str) -> None:
    """An example's result is its own, whatever its neighbours in the stream hold."""
    a, d, offsets = random_streams([5, 37, 5, 130, 9], 21, 10)
    alone = [
        grad_products(a[s:e], d[s:e], torch.tensor([0, e - s]), torch.tensor([[0, 0]]), impl=impl, way=way)
        for s, e in pairwise(offsets.tolist())
    ]
    for x in (a, d):
        x[offsets[2] : offsets[3]] = torch.nan
    got = grad_products(a, d, offsets, torch.tensor([[z, z] for z in range(5)]), impl=impl, way=way)
    torch.testing.assert_close(got[[0, 1, 3, 4]], torch.cat(alone)[[0, 1, 3, 4]], rtol=1e-5, atol=0)
    assert got[2].isnan()
    others = torch.tensor([[z, y] for z in (4, 0, 1, 3) for y in (0, 1, 3, 4)])  # rows outside every listed example
    assert grad_products(a, d, offsets, others, impl=impl, way=way).isfinite().all()


@ways
def test_same_bits_for_any_thread_count_and_dirty_memory(impl: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams, pairs = random_streams([70, 0, 300, 64, 1], 33, 70), all_pairs(5, 5)
    first = grad_products(*streams, pairs, impl=impl, way=way)
    # with this setting torch fills every new allocation with NaN
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(grad_products(*streams, pairs, impl=impl, way=way), first)
    finally:
        torch.use_deterministic_algorithms(False)
    threads = torch.get_num_threads()
    if impl == "native":  # for the others the BLAS decides
        torch.set_num_threads(1)
        try:
            assert torch.equal(grad_products(*streams, pairs, impl=impl, way=way), first)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize(("impl", "way"), WAYS[1:])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("lengths", "p", "q"), [([6000], 8, 8), ([2000, 666], 5000, 300)])
def test_scratch_stays_bounded(impl: str, way: str, lengths: list[int], p: int, q: int, dtype: torch.dtype) -> None:
    """Token products of 6000 tokens would take 144 MB each, gathered rows of 5000 features more."""
    if impl == "native" and dtype == BF16:
        pytest.skip("native copies 16-bit streams to fp32 on a CPU, as its README says")
    streams = random_streams(lengths, p, q, dtype)
    last = len(lengths) - 1
    pairs = torch.tensor([[0, last], [last, 0], [0, 0], [last, last]])
    most = most_held(lambda: grad_products(*streams, pairs, impl=impl, way=way))
    assert 0 < most <= SCRATCH_BYTES
    check_products(impl, streams, pairs, way=way)  # the pieces of a cut pair are all there


@ways
def test_operator_contract(impl: str, way: str) -> None:
    (a, d, offsets), pairs = random_streams([4, 0, 19], 6, 5), all_pairs(3, 3)
    streams = (a, [d, d[:, 1:3]], offsets)
    torch.library.opcheck(torch.ops.fpo.grad_products.default, (*streams, pairs, None, [], None, impl, way))
    torch.library.opcheck(torch.ops.fpo.grad_products.default, (*streams, pairs, *streams, impl, way))


def test_compiles_without_a_graph_break() -> None:
    (a, d, offsets), pairs = random_streams([4, 0, 19], 6, 5), all_pairs(3, 3)
    other = (a, [d, d[:, :3]], offsets)

    def twice_and_one(a: Tensor, d: Tensor) -> Tensor:
        one = grad_products(2 * a, d, offsets, pairs)
        return one + grad_products(a, [d, d[:, :3]], offsets, pairs, other=other) + 1

    compiled = torch.compile(twice_and_one, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, d), twice_and_one(a, d))


def test_result_carries_no_graph() -> None:
    a, d, offsets = random_streams([4], 6, 5)
    assert not grad_products(a.requires_grad_(), d, offsets, torch.tensor([[0, 0]])).requires_grad


def test_import_loads_neither_triton_nor_the_compiler() -> None:
    code = (
        "import sys, torch; from fpo_kernels.products import grad_products as g;"
        "x = torch.ones(2, 3); g(x, x, torch.tensor([0, 2]), torch.tensor([[0, 0]]));"
        "unwanted = ('triton', 'torch._dynamo', 'torch._inductor');"
        "bad = [m for m in sys.modules if m.startswith(unwanted)];"
        "assert not bad, bad[:5]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
