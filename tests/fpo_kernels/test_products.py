"""grad_products through its public door: every implementation against the float64 definition."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpo_kernels.products import grad_products, native
from fpo_kernels.products.config import SCRATCH_BYTES
from fpo_kernels.testing import check_products, random_streams

NO_NATIVE = native.why_not(torch.empty(0))
CPU_IMPLS = [
    "reference",
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))),
]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def all_pairs(n: int, m: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(n), torch.arange(m))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[int], int, int, list[tuple[int, int]], int]:
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 16, 17, 31, 70, 140]), min_size=1, max_size=6))
    others = draw(st.lists(st.sampled_from([0, 1, 4, 33, 130]), min_size=1, max_size=4))
    p, q = draw(st.tuples(st.sampled_from([1, 3, 7, 16, 33]), st.sampled_from([1, 5, 16, 47])))
    pair = st.tuples(st.integers(0, len(lengths) - 1), st.integers(0, 1000))
    return lengths, others, p, q, draw(st.lists(pair, max_size=12)), draw(st.integers(0, 2**31))


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("impl", CPU_IMPLS)
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_matches_the_definition(impl: str, dtype: torch.dtype, case) -> None:
    lengths, others, p, q, drawn, seed = case
    streams = random_streams(lengths, p, q, dtype, seed=seed)
    pairs = torch.tensor([(i, j % len(lengths)) for i, j in drawn], dtype=torch.int64).view(-1, 2)
    check_products(impl, streams, pairs)
    pairs = torch.tensor([(i, j % len(others)) for i, j in drawn], dtype=torch.int64).view(-1, 2)
    check_products(impl, streams, pairs, random_streams(others, p, q, dtype, seed=seed + 1))


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_long_wide_and_dense(impl: str) -> None:
    """Several tiles a pair, features past one chunk, whole Gram matrices, even and uneven lengths."""
    check_products(impl, random_streams([700, 130, 64], 40, 33), all_pairs(3, 3))
    check_products(impl, random_streams([150, 3], 2100, 4111), all_pairs(2, 2))
    check_products(
        impl, random_streams([64] * 9, 24, 48), torch.tensor([*((z, z) for z in range(8)), *((z, 8) for z in range(8))])
    )
    check_products(impl, random_streams([5, 64, 33, 64, 20], 24, 48), all_pairs(5, 5))


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_strided_streams_and_int32_offsets(impl: str) -> None:
    a, d, offsets = random_streams([9, 40, 1], 33, 18)
    wide = torch.full((50, 70), torch.nan)
    wide[:, ::2][:, :33] = a
    tall = d.T.contiguous().T
    got = check_products(impl, (wide[:, ::2][:, :33], tall, offsets.int()), all_pairs(3, 3))
    assert torch.allclose(got, grad_products(a, d, offsets, all_pairs(3, 3), impl=impl))


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_no_pairs_no_examples_no_features(impl: str) -> None:
    a, d, offsets = random_streams([3, 2], 4, 5)
    none = torch.empty(0, 2, dtype=torch.int64)
    assert grad_products(a, d, offsets, none, impl=impl).shape == (0,)
    assert grad_products(a[:0], d[:0], offsets[:1], none, impl=impl).shape == (0,)
    assert grad_products(a[:, :0], d, offsets, all_pairs(2, 2), impl=impl).tolist() == [0.0] * 4
    assert (
        grad_products(a[:0], d[:0], torch.zeros(3, dtype=torch.int64), all_pairs(2, 2), impl=impl).tolist() == [0.0] * 4
    )


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_companions_change_nothing_not_even_nan(impl: str) -> None:
    """An example's result is its own, whatever its neighbours in the stream hold."""
    a, d, offsets = random_streams([5, 37, 5, 130, 9], 21, 10)
    alone = [grad_products(a[s:e], d[s:e], torch.tensor([0, e - s]), torch.tensor([[0, 0]]), impl=impl) for s, e in
             zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]  # fmt: skip
    for x in (a, d):
        x[offsets[2] : offsets[3]] = torch.nan
    got = grad_products(a, d, offsets, torch.tensor([[z, z] for z in range(5)]), impl=impl)
    torch.testing.assert_close(got[[0, 1, 3, 4]], torch.cat(alone)[[0, 1, 3, 4]], rtol=1e-5, atol=0)
    assert got[2].isnan()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_same_bits_for_any_thread_count_and_dirty_memory(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams, pairs = random_streams([70, 0, 300, 64, 1], 33, 70), all_pairs(5, 5)
    first = grad_products(*streams, pairs, impl=impl)
    # with this setting torch fills every new allocation with NaN
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(grad_products(*streams, pairs, impl=impl), first)
    finally:
        torch.use_deterministic_algorithms(False)
    threads = torch.get_num_threads()
    if impl == "native":  # for the others the BLAS decides
        torch.set_num_threads(1)
        try:
            assert torch.equal(grad_products(*streams, pairs, impl=impl), first)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("impl", CPU_IMPLS[1:])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("lengths", "p", "q"), [([6000], 8, 8), ([2000, 666], 5000, 300)])
def test_scratch_stays_bounded(impl: str, lengths: list[int], p: int, q: int, dtype: torch.dtype) -> None:
    """Token products of 6000 tokens would take 144 MB each, gathered rows of 5000 features more."""
    if impl == "native" and dtype == BF16:
        pytest.skip("native copies 16-bit streams to fp32 on a CPU, as its README says")
    streams = random_streams(lengths, p, q, dtype)
    last = len(lengths) - 1
    pairs = torch.tensor([[0, last], [last, 0], [0, 0], [last, last]])
    with torch.profiler.profile(profile_memory=True) as profile:
        grad_products(*streams, pairs, impl=impl)
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 0 < most <= SCRATCH_BYTES
    check_products(impl, streams, pairs)  # the pieces of a cut pair are all there


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_operator_contract(impl: str) -> None:
    streams, pairs = random_streams([4, 0, 19], 6, 5), all_pairs(3, 3)
    torch.library.opcheck(torch.ops.fpo.grad_products.default, (*streams, pairs, None, None, None, impl))
    torch.library.opcheck(torch.ops.fpo.grad_products.default, (*streams, pairs, *streams, impl))


def test_compiles_without_a_graph_break() -> None:
    streams, pairs = random_streams([4, 0, 19], 6, 5), all_pairs(3, 3)
    compiled = torch.compile(
        lambda a, d: grad_products(2 * a, d, streams[2], pairs) + 1, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*streams[:2]), 4 * grad_products(*streams, pairs) + 1)


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


GOOD = (*random_streams([3, 4], 5, 6), torch.tensor([[0, 1]]))


def _offsets(*values: int) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, torch.ones(7), ValueError, "a and d must be"),
        (1, torch.ones(6, 6), ValueError, "same S"),
        (0, torch.ones(7, 5, dtype=torch.int32), TypeError, "a must be float32"),
        (1, torch.ones(7, 6, dtype=F64), TypeError, "d must have the dtype of a"),
        (1, torch.ones(7, 6, device="meta"), ValueError, "device of a"),
        (2, torch.tensor([[0, 3, 7]]), ValueError, r"offsets must be \(B\+1,\)"),
        (2, torch.tensor([0.0, 3, 7]), TypeError, "int32 or int64"),
        (2, _offsets(), TypeError, "int32 or int64"),
        (2, _offsets(1, 3, 7), ValueError, "start at 0"),
        (2, _offsets(0, 3, 6), ValueError, "end at the number of rows, 7"),
        (2, _offsets(0, 8, 7), ValueError, "must not fall"),
        (3, torch.tensor([0, 1]), ValueError, r"pairs must be \(n, 2\)"),
        (3, torch.tensor([[0, 1]], dtype=torch.int32), TypeError, "pairs must be int64"),
        (3, torch.tensor([[0, 1]], device="meta"), ValueError, "pairs must be on the device"),
        (3, torch.tensor([[0, 2]]), ValueError, "not there"),
        (3, torch.tensor([[-1, 0]]), ValueError, "not there"),
    ],
)
def test_bad_input_is_named(place: int, value: Tensor, error: type[Exception], message: str) -> None:
    given_ = [*GOOD]
    if place == 2 and value.numel() == 0:
        value, error, message = torch.empty(0, dtype=torch.int64), ValueError, "offsets must be"
    given_[place] = value
    with pytest.raises(error, match=message):
        grad_products(*given_)


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (random_streams([2], 4, 6), ValueError, "widths of a and d"),
        (random_streams([2], 5, 6, F64), TypeError, "other must have the dtype"),
        (random_streams([2], 5, 6)[:2], ValueError, "other must be"),
        ((torch.ones(2, 5), torch.ones(3, 6), _offsets(0, 2)), ValueError, "other's a and d"),
        ((torch.ones(2, 5), torch.ones(2, 6), _offsets(0, 1)), ValueError, "other's offsets must end"),
        (tuple(x.to("meta") for x in random_streams([2, 1], 5, 6)), ValueError, "other must be on the device"),
        (random_streams([2], 5, 6), ValueError, "not there"),  # pairs name example 1 of one
    ],
)
def test_bad_other_is_named(other, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grad_products(*GOOD, other=other)


def test_an_implementation_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="impl must be one of"):
        grad_products(*GOOD, impl="cuda")
    with pytest.raises(RuntimeError, match=r"triton.*cannot run"):
        grad_products(*GOOD, impl="triton")
    monkeypatch.setattr(native, "_load", lambda: "the native library is not built; build it with …")
    with pytest.raises(RuntimeError, match=r"native.*cannot run.*not built"):
        grad_products(*GOOD, impl="native")
    assert torch.equal(grad_products(*GOOD), grad_products(*GOOD, impl="torch"))  # auto does without it


def test_the_library_is_there_where_it_can_be_built():
    """An installation with a compiler at hand has built it: the native tests above must not skip in silence."""
    installed = any(dist.name == "fpo-kernels" for dist in metadata.distributions())
    if not installed or shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("a plain checkout, or no C++ compiler")
    assert native.why_not(torch.zeros(1, 1)) is None
