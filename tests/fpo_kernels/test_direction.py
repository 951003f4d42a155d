"""grad_direction through its public door: every implementation against the float64 definition."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpo_kernels.direction import blocked, grad_direction, unchecked_direction
from fpo_kernels.testing import check_direction, random_streams
from tests.fpo_kernels.rooms import ragged_lengths

IMPLS = ["reference", "torch"]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LENGTHS = [5, 37, 0, 130, 9]


def matrix(p: int, q: int, dtype: torch.dtype = F32, seed: int = 9) -> Tensor:
    return torch.randn(q, p, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int, int, torch.dtype, int]:
    lengths = draw(ragged_lengths())
    p, q = draw(st.tuples(st.sampled_from([1, 3, 16, 33]), st.sampled_from([1, 5, 16, 47])))
    return lengths, p, q, draw(st.sampled_from([F32, F64, BF16, F16])), draw(st.integers(0, 2**31))


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_matches_the_definition(impl: str, dtype: torch.dtype, case) -> None:
    lengths, p, q, direction_dtype, seed = case
    check_direction(impl, random_streams(lengths, p, q, dtype, seed=seed), matrix(p, q, direction_dtype, seed + 1))


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_int32_offsets(impl: str) -> None:
    a, d, offsets = random_streams(LENGTHS, 12, 30)
    V = matrix(12, 30)
    spread = torch.full((len(a), 24), torch.nan)
    spread[:, ::2] = a
    got = check_direction(impl, (spread[:, ::2], d.T.contiguous().T, offsets.int()), V.T.contiguous().T)
    torch.testing.assert_close(got, grad_direction(a, d, offsets, V, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_examples_no_tokens_no_features(impl: str) -> None:
    a, d, offsets = random_streams([3, 2], 4, 5)
    V = matrix(4, 5)
    assert grad_direction(a[:0], d[:0], offsets[:1], V, impl=impl).shape == (0,)
    assert grad_direction(a[:0], d[:0], torch.zeros(3, dtype=torch.int64), V, impl=impl).tolist() == [0.0, 0.0]
    assert grad_direction(a[:, :0], d, offsets, V[:, :0], impl=impl).tolist() == [0.0, 0.0]
    assert grad_direction(a, d[:, :0], offsets, V[:0], impl=impl).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_companions_change_nothing_not_even_nan(impl: str) -> None:
    a, d, offsets = random_streams(LENGTHS, 21, 10)
    V = matrix(21, 10)
    alone = [grad_direction(a[s:e], d[s:e], torch.tensor([0, e - s]), V, impl=impl) for s, e in
             zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]  # fmt: skip
    for bad in (0, 1, 3, 4):
        rows = torch.repeat_interleave(torch.arange(5) == bad, offsets.diff())[:, None]
        got = grad_direction(a.masked_fill(rows, torch.nan), d, offsets, V, impl=impl)
        kept = torch.arange(5) != bad
        assert got[bad].isnan()
        torch.testing.assert_close(got[kept], torch.cat(alone)[kept], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_in_dirty_memory(impl: str) -> None:
    streams, V = random_streams(LENGTHS, 33, 70), matrix(33, 70)
    first = grad_direction(*streams, V, impl=impl)
    torch.use_deterministic_algorithms(True)  # torch then fills every new allocation with NaN
    try:
        assert torch.equal(grad_direction(*streams, V, impl=impl), first)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("p", "q"), [(300, 2000), (2000, 30), (700, 700)])
def test_scratch_stays_bounded_and_nothing_is_lost(
    dtype: torch.dtype, p: int, q: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bound of 1 MiB the product is cut in rows, and a 16-bit V in columns too."""
    monkeypatch.setattr(blocked, "SCRATCH_BYTES", 2**20)
    streams, V = random_streams([1500, 1, 0, 700], p, q, dtype), matrix(p, q, dtype)
    check_direction("torch", streams, V)
    with torch.profiler.profile(profile_memory=True) as profile:
        grad_direction(*streams, V, impl="torch")
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 2**18 < most <= 2**20 + 4 * 8 * 2201  # a few float64 a token beside it


@pytest.mark.parametrize(("dtype", "direction_dtype"), [(BF16, BF16), (F16, F16), (BF16, F32), (BF16, F16)])
@pytest.mark.parametrize(("p", "q"), [(300, 70), (70, 300), (1, 3)])
@pytest.mark.parametrize("scratch", [2**26, 2**16])
def test_matrix_units(
    p: int, q: int, dtype: torch.dtype, direction_dtype: torch.dtype, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with a stand-in for its product of 16-bit matrices: V is multiplied as it is or in parts."""
    met = []

    def product(x: Tensor, V: Tensor) -> Tensor:
        met.append((x.dtype, V.dtype, V.shape))
        return x.float() @ V.float().T

    monkeypatch.setattr(blocked, "_has_wide_product", lambda x: True)
    monkeypatch.setattr(blocked, "_wide_product", product)
    monkeypatch.setattr(blocked, "SCRATCH_BYTES", scratch)
    check_direction("torch", random_streams(LENGTHS, p, q, dtype), matrix(p, q, direction_dtype))
    assert {(x, V) for x, V, _ in met} == {(dtype, dtype)}
    parts = 1 if dtype == direction_dtype else 3
    assert all(shape[0] % parts == 0 for *_, shape in met)
    if scratch == 2**26:
        assert [shape for *_, shape in met] == [(parts * min(p, q), max(p, q))]


def test_three_parts_are_the_whole() -> None:
    V = matrix(40, 30)
    parts = blocked._split(V, 3).view(3, *V.shape)
    assert torch.equal(parts[0].float() + (parts[1].float() + parts[2].float()), V)
    assert not torch.equal(parts[0].float() + parts[1].float(), V)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_autocast_does_not_reach_inside(dtype: torch.dtype) -> None:
    streams, V = random_streams(LENGTHS, 64, 48, dtype), matrix(64, 48)
    plain = grad_direction(*streams, V)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(grad_direction(*streams, V), plain)
        assert torch.equal(unchecked_direction(*streams, V), plain)


def test_unchecked_is_the_same_and_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, d, offsets = random_streams(LENGTHS, 6, 5)
    V = matrix(6, 5)
    expected = grad_direction(a, d, offsets, V)
    monkeypatch.setattr(torch.Tensor, "tolist", None)  # nor reads a value
    got = unchecked_direction(a.requires_grad_(), d, offsets, V.requires_grad_())
    assert torch.equal(got, expected)
    assert not got.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_operator_contract(impl: str) -> None:
    streams, V = random_streams([4, 0, 19], 6, 5), matrix(6, 5)
    torch.library.opcheck(torch.ops.fpo.grad_direction.default, (*streams, V, impl))
    torch.library.opcheck(torch.ops.fpo.grad_direction.default, (*streams, V.double(), impl))


def test_compiles_without_a_graph_break() -> None:
    a, d, offsets = random_streams([4, 0, 19], 6, 5)
    V = matrix(6, 5)
    compiled = torch.compile(
        lambda a, d, V: grad_direction(2 * a, d, offsets, V) + 1, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(a, d, V), 2 * grad_direction(a, d, offsets, V) + 1)


def test_result_carries_no_graph() -> None:
    a, d, offsets = random_streams([4], 6, 5)
    assert not grad_direction(a.requires_grad_(), d, offsets, matrix(6, 5).requires_grad_()).requires_grad


def test_call_loads_neither_triton_nor_the_compiler() -> None:
    code = (
        "import sys, torch; from fpo_kernels.direction import grad_direction as g;"
        "x = torch.ones(2, 3); g(x, x, torch.tensor([0, 2]), torch.ones(3, 3));"
        "unwanted = ('triton', 'torch._dynamo', 'torch._inductor');"
        "bad = [m for m in sys.modules if m.startswith(unwanted)];"
        "assert not bad, bad[:5]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


GOOD = (*random_streams([3, 4], 5, 6), matrix(5, 6))


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, torch.ones(7), ValueError, "a and d must be"),
        (1, torch.ones(6, 6), ValueError, "same S"),
        (0, torch.ones(7, 5, dtype=torch.int32), TypeError, "a must be float32"),
        (1, torch.ones(7, 6, dtype=F64), TypeError, "d must have the dtype of a"),
        (1, torch.ones(7, 6, device="meta"), ValueError, "device of a"),
        (2, torch.tensor([[0, 3, 7]]), ValueError, r"offsets must be \(B\+1,\)"),
        (2, torch.empty(0, dtype=torch.int64), ValueError, r"offsets must be \(B\+1,\)"),
        (2, torch.tensor([0.0, 3, 7]), TypeError, "int32 or int64"),
        (2, torch.tensor([1, 3, 7]), ValueError, "start at 0; got offsets"),
        (2, torch.tensor([0, 3, 6]), ValueError, "end at the number of rows, 7"),
        (2, torch.tensor([0, 8, 7]), ValueError, "must not fall"),
        (3, matrix(6, 5), ValueError, r"direction must be \(q, p\) = \(6, 5\), got \(5, 6\)"),
        (3, torch.ones(6, 5, dtype=torch.int64), TypeError, "direction must be float32"),
        (3, torch.ones(6, 5, device="meta"), ValueError, "direction must be on the device"),
    ],
)
def test_bad_input_is_named(place: int, value: Tensor, error: type[Exception], message: str) -> None:
    given_ = [*GOOD]
    given_[place] = value
    with pytest.raises(error, match=message):
        grad_direction(*given_)


def test_an_implementation_that_cannot_run_says_why() -> None:
    with pytest.raises(ValueError, match="impl must be one of"):
        grad_direction(*GOOD, impl="cuda")
    with pytest.raises(RuntimeError, match=r"triton.*cannot run"):
        grad_direction(*GOOD, impl="triton")
    with pytest.raises(RuntimeError, match=r"native.*cannot run.*no native kernel"):
        grad_direction(*GOOD, impl="native")
    assert torch.equal(grad_direction(*GOOD), grad_direction(*GOOD, impl="torch"))
