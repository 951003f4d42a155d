"""`grad_sketch` and its maps: golden bits, every implementation against the sketch of the formed gradient."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fpo_kernels as fk
from fpo_kernels import library
from fpo_kernels.sketch import blocked
from fpo_kernels.sketch.config import SCRATCH_BYTES
from fpo_kernels.sketch.maps import bucket_map, numbers
from fpo_kernels.testing import ragged, random_streams, sketch_budget
from tests import toolchain
from tests.fpo_kernels.rooms import BF16, F16, F32, F64, most_held, ragged_lengths

IMPLS = ["reference", "torch", toolchain.native]
impls = pytest.mark.parametrize("impl", IMPLS)


def walsh(x: Tensor) -> Tensor:
    """W of every row, by one butterfly after another."""
    k, half = x.shape[1], 1
    while half < k:
        low, high = x.reshape(-1, k // (2 * half), 2, half).unbind(2)
        x, half = torch.stack([low + high, low - high], 2).reshape(-1, k), 2 * half
    return x


def test_walsh_here_is_the_documented_matrix() -> None:
    index = torch.arange(64)
    both = index[:, None] & index
    odd = sum((both >> bit) & 1 for bit in range(6)) % 2
    assert torch.equal(walsh(torch.eye(64)), 1.0 - 2.0 * odd)


def sketch_of_formed(a: Tensor, d: Tensor, offsets: Tensor, sketch: fk.TensorSketch) -> Tensor:
    """k^(−1/2) W b of G_i = dᵀa formed in float64, b_{h_d ⊕ h_a} += s_d s_a G: nothing of the implementations'."""
    of_a, of_d = sketch.maps(torch.device("cpu"))
    bucket = (of_d.bucket[:, None] ^ of_a.bucket).flatten()
    sign = (of_d.sign[:, None] * of_a.sign).flatten().double()
    rows = []
    for begin, end in itertools.pairwise(offsets.tolist()):
        G = d[begin:end].double().T @ a[begin:end].double()
        rows.append(torch.zeros(sketch.dim, dtype=F64).index_add_(0, bucket, sign * G.flatten()))
    return walsh(torch.stack(rows)) * sketch.dim**-0.5


def check(impl: str, streams: tuple[Tensor, Tensor, Tensor], sketch: fk.TensorSketch) -> None:
    got = fk.grad_sketch(*streams, sketch, impl=impl)
    exact = sketch_of_formed(*streams, sketch)
    assert (got.dtype, got.shape) == (F64 if streams[0].dtype == F64 else F32, exact.shape)
    formed = sketch_budget(streams, sketch, F64, more=sketch.p * sketch.q)  # the truth's own rounding
    over = (got.double() - exact).norm(dim=1) - sketch_budget(streams, sketch, got.dtype) - formed
    assert over.max() <= 0, f"{impl}: {over.max()} over the budget at example {int(over.argmax())}"


@impls
@settings(max_examples=25, deadline=None)
@given(
    lengths=ragged_lengths(5),
    p=st.integers(1, 200),
    q=st.integers(1, 200),
    power=st.integers(6, 9),
    seed=st.integers(-(2**63), 2**63 - 1),
    dtype=st.sampled_from([F32, F64, BF16, F16]),
    scratch=st.sampled_from([SCRATCH_BYTES, 2**17]),
)
def test_is_the_sketch_of_the_formed_gradient(
    impl: str, lengths: list[int], p: int, q: int, power: int, seed: int, dtype: torch.dtype, scratch: int
) -> None:
    """Ragged lengths; the torch room's blocks of tokens whole, or cut across examples by a small scratch."""
    streams = random_streams(lengths, p, q, dtype, seed=seed % 1000)
    with mock.patch.object(blocked, "SCRATCH_BYTES", scratch):
        check(impl, streams, fk.TensorSketch(p, q, 2**power, seed, "layer"))


@impls
@pytest.mark.parametrize(("p", "q", "k"), [(576, 300, 1024), (33, 5000, 2048), (20_000, 3, 64)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_sizes_far_from_the_dim(impl: str, p: int, q: int, k: int, dtype: torch.dtype) -> None:
    check(impl, random_streams(ragged(4, 33), p, q, dtype), fk.TensorSketch(p, q, k, 5, "x"))


def test_the_largest_dim() -> None:  # W as a matrix would take 2 GB
    for impl in ("torch",) if toolchain.NO_COMPILER else ("torch", "native"):
        check(impl, random_streams([9], 40, 30), fk.TensorSketch(40, 30, 16384))


@impls
def test_layers_that_read_one_input_are_taken_together(impl: str) -> None:
    a, first, offsets = random_streams([5, 0, 9], 70, 200, F64)
    ds = [first, *(random_streams([5, 0, 9], 4, q, F64, seed=q)[1] for q in (64, 3, *range(10, 18)))]
    sketches = [fk.TensorSketch(70, x.shape[1], 128, 0, f"l.{n}", "block") for n, x in enumerate(ds)]
    together = fk.grad_sketch(a, ds, offsets, sketches, impl=impl)
    alone = sum(fk.grad_sketch(a, x, offsets, one, impl=impl) for x, one in zip(ds, sketches, strict=True))
    torch.testing.assert_close(together, alone)


@impls
def test_strides_companions_and_threads_leave_no_trace(impl: str) -> None:
    a, d, offsets = random_streams([40, 3, 129], 30, 50)
    sketch = fk.TensorSketch(30, 50, 256)
    whole = fk.grad_sketch(a, d, offsets, sketch, impl=impl)
    wide = torch.stack([a, a], 2)[..., 0], torch.cat([d, d], 1)[:, :50]
    torch.testing.assert_close(fk.grad_sketch(*wide, offsets.int(), sketch, impl=impl), whole)
    alone = fk.grad_sketch(a[43:], d[43:], torch.tensor([0, 129]), sketch, impl=impl)
    torch.testing.assert_close(alone, whole[2:])
    for bad in range(3):
        rows = torch.repeat_interleave(torch.arange(3) == bad, offsets.diff())[:, None]
        beside_nan = fk.grad_sketch(a.masked_fill(rows, torch.nan), d, offsets, sketch, impl=impl)
        assert torch.equal(beside_nan.isnan().all(1), torch.arange(3) == bad)
        assert torch.equal(beside_nan.nan_to_num(0)[torch.arange(3) != bad], whole[torch.arange(3) != bad])
    assert torch.equal(fk.grad_sketch(a, d, offsets, sketch, impl=impl), whole)
    threads = torch.get_num_threads()
    if impl == "native":  # for the others the BLAS decides
        torch.set_num_threads(1)
        try:
            assert torch.equal(fk.grad_sketch(a, d, offsets, sketch, impl=impl), whole)
        finally:
            torch.set_num_threads(threads)


def test_the_generator_is_splitmix64() -> None:
    """By Python's own integers, from the documented formula."""
    text = "fpo-sketch-1|7|model.layers.0|a|576|1024|order"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    mask = 2**64 - 1
    expected = []
    for c in range(5):
        z = (key + (c + 1) * 0x9E3779B97F4A7C15) & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        expected.append(z ^ (z >> 31))
    assert numbers(text, 5).tolist() == expected


GOLDEN = {
    (576, 1024, 0, "", "a"): "df02ea8ad7209be7",
    (1536, 1024, 7, "model.layers.3.mlp.up_proj.weight", "d"): "db0ad36521559cad",
    (3, 16384, -1, "ø", "v"): "d6650dfb309a49e6",
}


@pytest.mark.parametrize("asked", GOLDEN)
def test_maps_have_the_same_bits_everywhere(asked: tuple[int, int, int, str, str]) -> None:
    """A change here makes sketches that are stored worthless: raise maps.VERSION with it."""
    made = bucket_map(*asked)
    bits = made.bucket.numpy().astype("<i8").tobytes() + made.sign.numpy().astype("<i1").tobytes()
    bits += made.table.numpy().astype("<i4").tobytes()
    assert hashlib.sha256(bits).hexdigest()[:16] == GOLDEN[asked]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 700), power=st.integers(6, 9), seed=st.integers(0, 99))
def test_maps_are_balanced_and_their_table_says_the_same(n: int, power: int, seed: int) -> None:
    k = 2**power
    bucket, sign, table = bucket_map(n, k, seed, "x", "a")
    load = torch.bincount(bucket, minlength=k)
    assert load.max() - load.min() <= 1
    assert set(sign.tolist()) <= {1.0, -1.0}
    row, column = (table >= 0).nonzero().unbind(1)
    entry = table[row, column].long()
    assert torch.equal((entry >> 1).sort().values, torch.arange(n))
    assert torch.equal(bucket[entry >> 1], column)
    assert torch.equal(sign[entry >> 1], (1 - 2 * (entry & 1)).float())


def test_another_name_seed_or_role_is_another_map() -> None:
    base = (500, 256, 0, "x", "a")
    for other in [(500, 256, 1, "x", "a"), (500, 256, 0, "y", "a"), (500, 256, 0, "x", "d")]:
        same = (bucket_map(*base).bucket == bucket_map(*other).bucket).double().mean()
        agree = (bucket_map(*base).sign == bucket_map(*other).sign).double().mean()
        assert same < 0.05
        assert 0.35 < agree < 0.65


@impls
def test_operator_contract(impl: str) -> None:
    a, d, offsets = random_streams([4, 0, 19], 6, 5)
    torch.library.opcheck(torch.ops.fpo.grad_sketch.default, (a, [d, d[:, 1:3]], offsets, 64, 3, "f", ["x", "y"], impl))


def test_compiles_without_a_graph_break() -> None:
    a, d, offsets = random_streams([4, 0, 19], 6, 5)
    sketch = fk.TensorSketch(6, 5, 64)

    def twice_and_one(a: Tensor, d: Tensor) -> Tensor:
        return fk.grad_sketch(2 * a, d, offsets, sketch) + 1

    compiled = torch.compile(twice_and_one, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, d), twice_and_one(a, d))


def test_scratch_of_torch_stays_bounded() -> None:
    streams = random_streams([4000, 30], 700, 900)
    sketch = fk.TensorSketch(700, 900, 4096)
    fk.grad_sketch(*streams, sketch, impl="torch")  # the maps and the Hadamard matrices are kept
    assert 0 < most_held(lambda: fk.grad_sketch(*streams, sketch, impl="torch")) <= 1.1 * SCRATCH_BYTES


def test_autocast_and_autograd_leave_no_trace() -> None:
    a, d, offsets = random_streams([4, 7], 30, 20)
    sketch = fk.TensorSketch(30, 20, 64)
    for impl in ("reference", "torch"):
        with torch.autocast("cpu", dtype=BF16):
            got = fk.grad_sketch(a.requires_grad_(), d, offsets, sketch, impl=impl)
        assert not got.requires_grad
        assert torch.equal(got, fk.grad_sketch(a.detach(), d, offsets, sketch, impl=impl))


def test_import_loads_neither_triton_nor_the_compiler() -> None:
    code = (
        "import sys, torch, fpo_kernels as fk; x = torch.ones(2, 3);"
        "fk.grad_sketch(x, x, torch.tensor([0, 2]), fk.TensorSketch(3, 3, 64));"
        "bad = [m for m in sys.modules if m.startswith(('triton', 'torch._dynamo', 'torch._inductor'))];"
        "assert not bad, bad[:5]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_library_auto_does_and_native_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    a, d, offsets = random_streams([4, 7], 30, 20)
    sketch = fk.TensorSketch(30, 20, 64)
    monkeypatch.setattr(library, "_load", lambda kind: "the native library is not built; build it with …")
    with pytest.raises(RuntimeError, match=r"grad_sketch: impl=\"native\" cannot run: .*not built"):
        fk.grad_sketch(a, d, offsets, sketch, impl="native")
    assert torch.equal(fk.grad_sketch(a, d, offsets, sketch), fk.grad_sketch(a, d, offsets, sketch, impl="torch"))


GOOD = dict(zip(("a", "d", "offsets"), random_streams([3, 4], 6, 5), strict=True))
GOOD |= {"sketch": fk.TensorSketch(6, 5, 64), "impl": "auto"}
ELSEWHERE = torch.zeros(7, 5, device="meta")
BAD = [
    ({"sketch": fk.TensorSketch(5, 6, 64)}, ValueError, r"\(6, 5\), got \(5, 6\)"),
    ({"sketch": 3}, TypeError, "got int"),
    ({"sketch": [GOOD["sketch"]] * 2}, ValueError, "got 1 and 2"),
    ({"d": [], "sketch": []}, ValueError, "at least one, got 0 and 0"),
    ({"d": [GOOD["d"]] * 2, "sketch": [GOOD["sketch"], fk.TensorSketch(6, 5, 64, 1)]}, ValueError, "must share"),
    ({"d": [GOOD["d"]] * 2, "sketch": [GOOD["sketch"], fk.TensorSketch(6, 5, 64, name="y")]}, ValueError, "share"),
    ({"d": GOOD["d"][1:]}, ValueError, r"same S, got \(7, 6\) and \(6, 5\)"),
    ({"d": GOOD["d"].double()}, TypeError, "dtype of a, torch.float32, got torch.float64"),
    ({"d": ELSEWHERE}, ValueError, "device of a, cpu, got meta"),
    ({"a": GOOD["a"].int(), "d": GOOD["d"].int()}, TypeError, "got torch.int32"),
    ({"offsets": torch.tensor([0, 3, 8])}, ValueError, "end at the number of rows, 7"),
    ({"offsets": torch.tensor([0, 5, 3, 7])}, ValueError, "must not fall"),
    ({"offsets": torch.tensor([1, 7])}, ValueError, "must start at 0"),
    ({"offsets": torch.tensor([0.0, 7.0])}, TypeError, "int32 or int64, got torch.float32"),
    ({"impl": "cuda"}, ValueError, "impl must be one of auto, .*, got 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    given = {**GOOD, **change}
    with pytest.raises(error, match=message):
        fk.grad_sketch(given["a"], given["d"], given["offsets"], given["sketch"], impl=given["impl"])


@pytest.mark.parametrize("dim", [0, 32, 100, 32768, 64.0, True])
def test_a_dim_that_is_none(dim: object) -> None:
    with pytest.raises(ValueError, match="power of two from 64 to 16384, got"):
        fk.TensorSketch(3, 3, dim)  # type: ignore[arg-type]


def test_sizes_and_seeds_that_are_none() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0 and 3"):
        fk.TensorSketch(0, 3)
    with pytest.raises(ValueError, match="64 bits, got"):
        fk.TensorSketch(3, 3, seed=2**63)
