"""Many layers, pairs and tiles in one launch against float64, under the interpreter, in a process of its own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpo_kernels.products import config_triton as config
from fpo_kernels.products import grad_products
from fpo_kernels.streams import Extents
from fpo_kernels.testing import budget, reach
from tests.fpo_kernels.interpreted import inside, outside, passes_apart

pytest.importorskip("triton")
SMALL = config.Tokens(tokens=16, features=16, warps=4, stages=1)


@outside
def test_in_its_own_process() -> None:
    passes_apart(__file__)


class Layer(NamedTuple):
    """A layer's features, its siblings' and their dtype; p = 0 stands for ids, one-hot inputs."""

    p: int
    qs: tuple[int, ...]
    dtype: torch.dtype


class Batch(NamedTuple):
    """Examples in `width` rows each (None: packed), of which some count, on the right or the left."""

    lengths: tuple[int, ...]
    width: int | None
    left: bool

    def extents(self) -> Extents:
        lengths = np.array(self.lengths, dtype=np.int64)
        if self.width is None:
            return Extents.packed(lengths)
        begin, rows = np.arange(len(lengths)) * self.width, np.full_like(lengths, self.width)
        return Extents(np.stack([begin, rows, (self.width - lengths) * self.left, lengths], 1))

    def kept(self) -> Tensor:
        host = self.extents().host
        return torch.cat([torch.arange(first, first + count) + begin for begin, _, first, count in host.tolist()])

    def rows(self) -> int:
        return int(self.extents().host[:, 1].sum())


class Problem(NamedTuple):
    """Layers over one batch or two, and pairs of their examples."""

    layers: tuple[Layer, ...]
    batches: tuple[Batch, ...]
    pairs: Tensor
    seed: int
    bound: int  # bytes kept before a launch
    small: bool


widths = st.sampled_from([1, 3, 8, 16, 24, 33])
layer = st.builds(
    Layer,
    st.sampled_from([0, 1, 5, 8, 16, 31, 40]),
    st.lists(widths, min_size=1, max_size=2).map(tuple),
    st.sampled_from([torch.float32, torch.float16]),
)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 7, 15, 16, 17, 33]), min_size=1, max_size=3).map(tuple))
    width = draw(st.sampled_from([None, max(lengths) + 0, max(lengths) + 3]))
    return Batch(lengths, width, draw(st.booleans()))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    own = draw(st.lists(batches(), min_size=1, max_size=2).map(tuple))
    sizes = len(own[0].lengths), len(own[-1].lengths)
    pair = st.tuples(*(st.integers(0, n - 1) for n in sizes))
    pairs = torch.tensor(draw(st.lists(pair, min_size=1, max_size=3)))
    layers = draw(st.lists(layer, min_size=1, max_size=3).map(tuple))
    bound = draw(st.sampled_from([1, 2000, 2**40]))
    return Problem(layers, own, pairs, draw(st.integers(0, 2**31)), bound, draw(st.integers(0, 9)) > 0)


def streams(problem: Problem, dirt: float = 0.0) -> list[list[tuple[Tensor, tuple[Tensor, ...]]]]:
    """For each layer and batch a and its d's; d is `dirt` in rows that do not count, a anything but NaN's friend."""
    generator = torch.Generator().manual_seed(problem.seed)

    def drawn(rows: int, features: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, features, generator=generator).to(dtype)

    made = []
    for p, qs, dtype in problem.layers:
        sides = []
        for batch in problem.batches:
            rows, out = batch.rows(), torch.ones(batch.rows(), dtype=torch.bool)
            out[batch.kept()] = False
            a = drawn(rows, p, dtype) if p else torch.randint(0, 4, (rows,), generator=generator)
            if p:
                a[out] = torch.nan
            ds = tuple(drawn(rows, q, dtype) for q in qs)
            for d in ds:
                d[out] = dirt
            sides.append((a, ds))
        made.append(sides)
    return made


def expected(problem: Problem, made: list[list[tuple[Tensor, tuple[Tensor, ...]]]]) -> tuple[Tensor, Tensor]:
    """The sum over layers in float64, and the error allowed: fp32 accumulation over p + q and T_i·T_j terms."""
    exact = torch.zeros(len(problem.pairs), dtype=torch.float64)
    allowed = torch.zeros_like(exact)
    for (p, qs, _), sides in zip(problem.layers, made, strict=True):
        wide = []
        for batch, (a, ds) in zip(problem.batches, sides, strict=True):
            kept = batch.kept()
            hot = a[kept].double() if p else torch.nn.functional.one_hot(a[kept], 4).double()
            offsets = torch.tensor([0, *batch.lengths]).cumsum(0)
            wide.append((hot, tuple(d[kept].double() for d in ds), offsets))
        other = wide[1] if len(wide) == 2 else None
        exact += grad_products(*wide[0], problem.pairs, other=other, impl="reference")
        i, j = problem.pairs.unbind(1)
        scale = reach(wide[0])[i] * reach(wide[-1])[j]
        rows = wide[0][2].diff()[i] * wide[-1][2].diff()[j]
        allowed += budget(torch.zeros_like(scale), scale, max(p, 4) + sum(qs) + rows, torch.float32)
    return exact, allowed


def noted(problem: Problem, made: list[list[tuple[Tensor, tuple[Tensor, ...]]]], patch: pytest.MonkeyPatch):
    from fpo_kernels.products.grouped import Ledger

    patch.setattr(config, "KEPT_BYTES", problem.bound)
    if problem.small:
        patch.setattr(config, "tokens", lambda *_: SMALL)
    ledger = Ledger(problem.pairs.numpy())
    extents = [batch.extents() for batch in problem.batches]
    for sides in made:
        other = (*sides[1], extents[1]) if len(sides) == 2 else None
        ledger.note(*sides[0], extents[0], 0.0, other)
    return ledger


@inside
@settings(max_examples=300, deadline=None)
@given(problems())
def test_many_layers_equal_float64(problem: Problem) -> None:
    """Ragged, empty and one-token examples; siblings, widths and dtypes; one stream or two; padding; any flushing."""
    made = streams(problem)
    with pytest.MonkeyPatch.context() as patch:
        got, leak = noted(problem, made, patch).result()
    exact, allowed = expected(problem, made)
    assert got is not None
    assert leak is not None
    assert not leak
    over = (got - exact).abs() - allowed
    assert over.max() <= 0, over.max()


@inside
@settings(max_examples=30, deadline=None)
@given(problems())
def test_a_gradient_in_rows_that_do_not_count_is_told(problem: Problem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        leak = noted(problem, streams(problem, dirt=1e-6), patch).result()[1]
    assert bool(leak) == any(len(batch.kept()) < batch.rows() for batch in problem.batches)


@inside
def test_same_bits_whatever_lies_beyond_an_examples_end() -> None:
    """Items for tiles that no example has change nothing: one list serves every length up to its own."""
    from fpo_kernels.products.grouped import Lists, items_of, launch, member

    problem = Problem(
        (Layer(8, (16,), torch.float32),), (Batch((5, 40, 17), 64, False),), torch.tensor([[0, 0]]), 3, 1, True
    )
    ((a, ds),) = streams(problem)[0]
    extents = problem.batches[0].extents().host
    longest = extents.copy()
    longest[:, 3] = 64
    pairs = np.array([[0, 0], [1, 2], [1, 1]])
    totals = []
    for lengths in (extents, longest):
        items, counts = items_of(lengths, None, pairs, 16)
        lists = Lists(torch.from_numpy(items), torch.from_numpy(extents), torch.from_numpy(counts))
        sums = launch([member(a, ds, None)[0]], lists, SMALL, 1, torch.zeros(1, dtype=torch.int32))
        totals.append(
            torch.segment_reduce(sums.sum(1, dtype=torch.float64), "sum", lengths=lists.counts, initial=0)[:3]
        )
    assert torch.equal(*totals)


@inside
def test_a_norm_s_output_is_made_again_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel that a GPU takes; one token, rows in steps, more features than a program takes.

    In float16: the interpreter cuts a float32 to bfloat16 where everything else rounds.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from fpo_kernels import remake
    from fpo_kernels.layers import some_rows

    monkeypatch.setattr(remake, "_has_kernel", lambda device: True)
    for shape in ((2, 9, 33), (1, 1, 8), (3, 2, 1500)):
        norm = LlamaRMSNorm(shape[-1]).half().requires_grad_(False)
        torch.nn.init.normal_(norm.weight)
        made = norm(torch.randn(shape).half().requires_grad_())
        maker = remake.maker_of(made)
        assert remake._norm(maker, lambda factor: factor) is not None
        assert torch.equal(remake.remade(maker), made)
        assert torch.equal(remake.remade(maker, some_rows), some_rows(made))
