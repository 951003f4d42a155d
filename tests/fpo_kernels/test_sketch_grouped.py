"""Many layers' sketches in one launch, under Triton's interpreter in a process of its own, and what it reads.

A tl.dot of bf16 gives garbage there without an error: the kernel multiplies its bf16 parts in fp32, and streams are
fp32 and fp16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpo_kernels.sketch import TensorSketch
from fpo_kernels.sketch import config_triton as config
from fpo_kernels.sketch.grouped import Member, grouped_sketch
from fpo_kernels.sketch.maps import bucket_map
from fpo_kernels.sketch.plan import Streams, pieces, plan
from fpo_kernels.sketch.reference import hadamard
from fpo_kernels.testing import random_streams
from tests.fpo_kernels.interpreted import dirty_memory, inside, outside, passes_apart
from tests.fpo_kernels.sketches import definition

pytest.importorskip("triton")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DIMS = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
# None, one token, a pair, odd ones; more than a chunk where the test makes chunks short.
LENGTHS = [0, 0, 1, 1, 2, 3, 5]
# Narrower and wider than sketches, aligned and not; more than a span.
WIDTHS = [1, 3, 8, 64, 70, 96, 300, 1100, 4095, 4104]


class Layer(NamedTuple):
    """A layer with its siblings: widths, and where its examples lie."""

    p: int
    qs: tuple[int, ...]
    lengths: list[int]
    width: int  # rows of an example in a padded batch, 0 for packed
    left: bool  # padding comes first
    slot: int


class Problem(NamedTuple):
    dim: int
    dtype: torch.dtype
    slots: int
    layers: list[Layer]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """At most 7 tokens of all layers together, for the interpreter's sake."""
    examples, slots = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layers, budget = [], 7
    for _ in range(draw(st.integers(1, 3))):
        lengths = []
        for length in draw(st.lists(st.sampled_from(LENGTHS), min_size=examples, max_size=examples)):
            lengths.append(min(length, budget))
            budget -= lengths[-1]
        width = draw(st.sampled_from([0, 0, max(lengths), max(lengths) + 3]))
        qs = tuple(draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=3)))
        where = draw(st.booleans()), draw(st.integers(0, slots - 1))
        layers.append(Layer(draw(st.sampled_from(WIDTHS)), qs, lengths, width, *where))
    return Problem(draw(st.sampled_from(DIMS)), draw(st.sampled_from([F32, F16])), slots, layers)


def placed(x: Tensor, layer: Layer) -> Tensor:
    """x (S, n) packed, as it lies in the layer's batch: NaN where no example's token is."""
    if not layer.width:
        return x
    batch = x.new_full((len(layer.lengths), layer.width, x.shape[1]), torch.nan)
    for row, tokens in zip(batch, x.split(layer.lengths), strict=True):
        first = layer.width - len(tokens) if layer.left else 0
        row[first : first + len(tokens)] = tokens
    return batch.flatten(0, 1)


def member(layer: Layer, dim: int, dtype: torch.dtype, seed: int) -> tuple[Member, Tensor, Tensor]:
    """It; and its sketches in float64 with the error allowed, both (B, dim)."""
    a, _, offsets = random_streams(layer.lengths, layer.p, 1, dtype, seed=seed)
    ds = tuple(random_streams(layer.lengths, 1, q, dtype, seed=seed + n)[1] for n, q in enumerate(layer.qs, 1))
    sketches = [TensorSketch(layer.p, q, dim, seed, f"layer {seed}.{n}", "block") for n, q in enumerate(layer.qs)]
    lengths = torch.tensor(layer.lengths)
    starts = offsets[:-1]
    if layer.width:
        starts = torch.arange(len(lengths)) * layer.width + (layer.width - lengths if layer.left else 0)
    streams = placed(a, layer), tuple(placed(d, layer) for d in ds)
    made = Member(*streams, starts, lengths, max(layer.lengths), sketches, layer.slot)
    return made, *definition(a, ds, offsets, sketches)


def check(problem: Problem) -> Tensor:
    members, exact, allowed = [], *torch.zeros(2, problem.slots, len(problem.layers[0].lengths), problem.dim).double()
    for n, layer in enumerate(problem.layers):
        one, truth, band = member(layer, problem.dim, problem.dtype, 10 * n)
        members.append(one)
        exact[layer.slot] += truth
        allowed[layer.slot] += band
    got = grouped_sketch(members, problem.slots)
    assert (got.dtype, got.shape) == (F32, exact.shape)
    over = (got - exact).abs() - allowed
    assert over.max() <= 0, f"{over.max()} over the budget at {over.argmax()}"
    return got


@outside
@pytest.mark.timeout(900)
@pytest.mark.parametrize("which", ["any_layers", "not any_layers"])
def test_in_its_own_process(which: str) -> None:
    passes_apart(__file__, "-k", which)


@pytest.fixture(autouse=True, scope="module")
def _dirty_memory() -> Iterator[None]:
    with dirty_memory():
        yield


@inside
@pytest.mark.timeout(900)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems())
def test_any_layers_in_one_launch(problem: Problem) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(config, "CHUNK", 4)
        check(problem)


@inside
@pytest.mark.parametrize("dim", DIMS)
def test_one_example_one_token_one_layer(dim: int) -> None:
    for dtype in (F32, F16):
        check(Problem(dim, dtype, 1, [Layer(40, (24,), [1], 0, False, 0)]))


@inside
@pytest.mark.parametrize("dtype", [F32, F16])
def test_runs_end_and_wide_streams_are_cut(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer a run of its own, narrow, wide and odd ones launched apart, several windows of a stream."""
    monkeypatch.setattr(config, "RUN_WORK", 1)
    monkeypatch.setattr(config, "SPAN", 64)
    monkeypatch.setattr(config, "WIDE_SPAN", 128)
    monkeypatch.setattr(config, "WIDE_SPAN_16", 128)
    layers = [
        Layer(64, (32, 64), [2, 0, 9], 0, False, 1),
        Layer(300, (70,), [1, 1, 2], 5, True, 1),
        Layer(64, (128,), [1, 0, 3], 0, False, 1),
        Layer(32, (8,), [0, 2, 1], 0, False, 2),
    ]
    got = check(Problem(256, dtype, 4, layers))
    assert not got[[0, 3]].any()
    assert not got[2, 0].any()


@inside
def test_dtypes_meet_in_one_sum() -> None:
    layer = Layer(40, (24,), [2, 1], 0, False, 0)
    wide, exact, allowed = member(layer, 64, F32, 0)
    narrow, more, band = member(layer, 64, F16, 10)
    got = grouped_sketch([wide, narrow], 1)[0]
    assert ((got - exact - more).abs() <= allowed + band).all()


@inside
@pytest.mark.parametrize("dim", [64, 2048])
def test_company_leaves_no_trace(dim: int) -> None:
    """Not a bit: neither what others hold, nor how many they are, nor how long, nor where an example lies."""
    layers = [Layer(40, (90, 8), [1, 9, 3, 10], 0, False, 0), Layer(16, (24,), [1, 9, 3, 10], 12, True, 0)]
    members = [member(layer, dim, F16, n)[0] for n, layer in enumerate(layers)]
    together = grouped_sketch(members, 1)[0]
    alone = [one._replace(starts=one.starts[1:2], lengths=one.lengths[1:2], longest=9) for one in members]
    assert torch.equal(grouped_sketch(alone, 1)[0, 0], together[1])
    for one in members:
        first = one.starts[3]
        one.a[first : first + 10] = torch.nan
    beside_nan = grouped_sketch(members, 1)[0]
    assert beside_nan[3].isnan().all()
    assert torch.equal(beside_nan[:3], together[:3])


@inside
def test_nothing_gives_nothing() -> None:
    one = member(Layer(8, (5,), [0, 0], 0, False, 0), 64, F32, 0)[0]
    assert not grouped_sketch([one], 2).any()
    none = one._replace(starts=one.starts[:0], lengths=one.lengths[:0])
    assert grouped_sketch([none], 3).shape == (3, 0, 64)


@inside
def test_refusals() -> None:
    one = member(Layer(8, (5,), [2, 1], 0, False, 0), 64, F32, 0)[0]
    other = member(Layer(8, (5,), [2, 1], 0, False, 0), 128, F32, 0)[0]
    with pytest.raises(ValueError, match="slot must be in 0 to 0, got 1"):
        grouped_sketch([one._replace(slot=1)], 1)
    with pytest.raises(ValueError, match=r"of B and dim \(2, 64\), got \(2, 2, 128\)"):
        grouped_sketch([one, other], 1)
    with pytest.raises(RuntimeError, match="takes no float64"):
        grouped_sketch([one._replace(a=one.a.double(), ds=(one.ds[0].double(),))], 1)


@outside
def test_refuses_what_no_kernel_reaches() -> None:
    one = member(Layer(8, (5,), [2, 1], 0, False, 0), 64, F32, 0)[0]
    with pytest.raises(RuntimeError, match="needs CUDA tensors"):
        grouped_sketch([one], 1)


@outside
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("width", "span"), [(1, 64), (63, 64), (150, 64), (5000, 512), (20000, 8192)])
def test_pieces_hold_the_map(width: int, span: int, dim: int) -> None:
    """Every coordinate once, in its bucket, with its sign; a round of one block, a bucket's entries adjacent."""
    made = bucket_map(width, dim, 0, "layer", "d")
    bucket, sign = torch.full((width,), -1), torch.zeros(width)
    blocks, buckets = config.sides(dim).blocks, config.sides(dim).buckets
    for piece in pieces(made.table, width, span):
        assert piece.width <= span
        assert piece.first % 8 == 0
        assert piece.entries.dtype == torch.int16
        entries = piece.entries.long().view(-1, blocks, config.ENTRIES // buckets * buckets)
        entries = entries.view(len(entries), blocks, buckets, -1)
        assert piece.entries.numel() % (piece.gathers * config.ENTRIES) == 0
        feature = entries & 0x3FFF
        # where an entry stands for no feature the span is zero
        assert feature.max() < span
        found = (feature < piece.width).nonzero()
        entry = entries[tuple(found.T)]
        feature = piece.first + (entry & 0x3FFF)
        assert (bucket[feature] == -1).all()
        bucket[feature] = found[:, 1] * buckets + found[:, 2]
        sign[feature] = 1.0 - 2 * (entry >> 15 & 1)
    assert torch.equal(bucket, made.bucket)
    assert torch.equal(sign, made.sign)


@outside
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_parts_are_all_of_a_bucket(dtype: torch.dtype, dim: int) -> None:
    """Of a block, whose bucket adds up those of every block with W_c's signs, and of siblings."""
    sides, tokens = config.sides(dim), torch.zeros(1, dtype=torch.int64)
    for widths in ([dim], [dim + 8], [8, 16]):
        maps = [bucket_map(width, dim, 0, f"layer {n}", "d") for n, width in enumerate(widths)]
        xs = [torch.randn(1, width).to(dtype) for width in widths]
        side = [(x, own.table) for x, own in zip(xs, maps, strict=True)]
        parts = plan([Streams((side, side), tokens, tokens + 1, 1, 0)], dim, 9)[0].streams[0].parts
        buckets = torch.zeros(dim)
        for x, own in zip(xs, maps, strict=True):
            buckets.index_add_(0, own.bucket, x[0].float() * own.sign)
        rest = hadamard(sides.blocks, F32, torch.device("cpu")) @ buckets.view(sides.blocks, -1)
        for _ in range(parts[1]):
            rest = rest - rest.bfloat16().float()
        assert parts[0] == parts[1]
        assert not rest.any()
