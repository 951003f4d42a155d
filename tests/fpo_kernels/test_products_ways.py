"""Layers that share their inputs, the choice of the way, and the door for callers who check nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpo_kernels.cost import Work
from fpo_kernels.products import formed, grad_products, ops, unchecked_products
from fpo_kernels.products.config import SCRATCH_BYTES
from fpo_kernels.testing import check_products, ragged, random_streams
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


def split(d: Tensor, *widths: int) -> tuple[Tensor, ...]:
    return d.split([*widths, d.shape[1] - sum(widths)], 1)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@ways
@settings(max_examples=10, deadline=None)
@given(
    lengths=ragged_lengths(5),
    others=ragged_lengths(3),
    widths=st.lists(st.sampled_from([1, 5, 16, 33, 150]), min_size=1, max_size=9),
    p=st.sampled_from([1, 7, 16, 33]),
    small=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_layers_that_share_their_inputs(
    impl: str,
    way: str,
    dtype: torch.dtype,
    lengths: list[int],
    others: list[int],
    widths: list[int],
    p: int,
    small: bool,
    seed: int,
) -> None:
    """Within budget, the d's side by side and the sum of single calls; d's far narrower and wider than a."""
    a, d, offsets = random_streams(lengths, p, sum(widths), dtype, seed=seed)
    a2, d2, offsets2 = random_streams(others, p, sum(widths), dtype, seed=seed + 1)
    ds, ds2 = d.split(widths, 1), d2.split(widths, 1)
    with small_pieces(small and impl == "torch"):
        got = check_products(impl, (a, ds, offsets), all_pairs(len(lengths), len(lengths)), way=way)
        check_products(impl, (a, ds, offsets), all_pairs(len(lengths), len(others)), (a2, ds2, offsets2), way=way)
    beside = grad_products(a, d, offsets, all_pairs(len(lengths), len(lengths)), impl=impl, way=way)
    single = sum(grad_products(a, x, offsets, all_pairs(len(lengths), len(lengths)), impl=impl, way=way) for x in ds)
    scale = max(float(got.abs().max()), 1e-30)
    torch.testing.assert_close(got, beside, rtol=0, atol=2e-6 * scale)
    torch.testing.assert_close(got, single, rtol=0, atol=2e-6 * scale)


def test_way_form_keeps_inputs_for_layers_of_other_widths_and_strides() -> None:
    """Rows of a narrow a are gathered once for all layers that read it: every layer has to cut them alike."""
    lengths = ragged(9, 300, place="middle")
    a, d, offsets = random_streams(lengths, 2, 1010)
    ds = d[:, :4], d[:, 4:1004], d[:, 1004:].T.contiguous().T
    check_products("torch", (a, ds, offsets), all_pairs(9, 9), way="form")
    even = random_streams([64] * 9, 2, 1010)
    check_products("torch", (even[0], (ds[2][: 9 * 64], even[1]), even[2]), all_pairs(9, 9), way="form")


@ways
def test_a_user_s_autocast_changes_no_bits(impl: str, way: str) -> None:
    """`torch.autocast` makes bf16 of what an `@` is given; the rooms say fp32."""
    lengths = ragged(3, 64, 3)
    (a, d, offsets), pairs = random_streams(lengths, 40, 33), all_pairs(3, 3)
    plain = grad_products(a, d, offsets, pairs, impl=impl, way=way)
    work = Work.of(lengths, pairs.numpy())
    with torch.autocast("cpu", dtype=BF16):
        assert (a @ a.T).dtype == BF16
        assert torch.equal(grad_products(a, d, offsets, pairs, impl=impl, way=way), plain)
        assert torch.equal(unchecked_products(a, (d,), offsets, pairs, None, work, impl, way), plain)


@pytest.mark.parametrize(("impl", "way"), [*WAYS, ("auto", "auto"), ("auto", "tokens"), ("auto", "form")])
def test_the_unchecked_door_gives_the_same_bits(impl: str, way: str) -> None:
    lengths, others = [5, 0, 40], [3, 70]
    a, d, offsets = random_streams(lengths, 33, 48)
    a2, d2, offsets2 = random_streams(others, 33, 48, seed=1)
    ds, ds2 = split(d, 16, 3), split(d2, 16, 3)
    a.requires_grad_()
    pairs = all_pairs(3, 2)
    got = unchecked_products(a, ds, offsets, pairs[:, :1].repeat(1, 2), None, Work.of(lengths, [(0, 0)]), impl, way)
    assert torch.equal(got, grad_products(a, ds, offsets, pairs[:, :1].repeat(1, 2), impl=impl, way=way))
    assert not got.requires_grad
    crossed = unchecked_products(
        a, ds, offsets, pairs, (a2, ds2, offsets2), Work.of(lengths, pairs.numpy(), others), impl, way
    )
    assert torch.equal(crossed, grad_products(a, ds, offsets, pairs, other=(a2, ds2, offsets2), impl=impl, way=way))


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_auto_takes_the_way_of_the_cost_model(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through both doors, with the work of exactly this call and the widths of all layers."""
    asked = []

    def choose_way(work: Work, p: int, qs: tuple[int, ...], *rest: object) -> str:
        asked.append((work, p, qs))
        return "form"

    monkeypatch.setattr(ops, "choose_way", choose_way)
    (a, d, offsets), pairs = random_streams([7, 0, 20], 5, 9), torch.tensor([[0, 0], [0, 2]])
    ds = split(d, 2)
    formed = grad_products(a, ds, offsets, pairs, impl="torch", way="form")
    assert torch.equal(grad_products(a, ds, offsets.int(), pairs, impl=impl), formed)
    work = Work.of([7, 0, 20], [(0, 0), (0, 2)])
    assert torch.equal(unchecked_products(a, ds, offsets, pairs, None, work, impl), formed)
    assert asked == [(work, 5, (2, 7))] * 2
    other = random_streams([3, 4, 5], 5, 9)
    grad_products(a, d, offsets, pairs, other=other, impl=impl)
    assert asked[2] == (Work.of([7, 0, 20], [(0, 0), (0, 2)], [3, 4, 5]), 5, (9,))


def test_way_form_does_many_examples_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As do tiles cut along both sides, tokens cut into several products, and pairs multiplied a few at a time."""
    monkeypatch.setattr(formed, "MOST_EXAMPLES", 5)
    monkeypatch.setattr(formed, "FORM_BYTES", 4 * 5 * 300)
    monkeypatch.setattr(formed, "ROW_BYTES", 2000)
    monkeypatch.setattr(formed, "LEAST_TOKENS", 8)
    streams = random_streams([9, 0, 1, 40, 12, 33, 9, 2, 20], 40, 37)
    check_products("torch", streams, all_pairs(9, 9), way="form")
    sparse = torch.tensor([[z, z] for z in range(9)] + [[z, 3] for z in range(9)] + [[8, 0], [8, 0], [0, 8]])
    check_products("torch", streams, sparse, way="form")
    check_products("torch", streams, all_pairs(9, 2), random_streams([30, 4], 40, 37, seed=1), way="form")


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_scratch_of_many_examples_stays_bounded(dtype: torch.dtype) -> None:
    """2600 gradients of 100 by 300 would take 312 MB, a block of 1024 over 120; ragged: rows are copied."""
    lengths = [2, 1, 3, 1] * 650
    streams = random_streams(lengths, 100, 300, dtype)
    own = torch.arange(len(lengths))
    pairs = torch.cat([torch.stack([own, own], 1), torch.stack([own, own[:1].expand_as(own)], 1)])
    most = most_held(lambda: grad_products(*streams, pairs, impl="torch", way="form"))
    assert 0 < most <= SCRATCH_BYTES
    check_products("torch", streams, pairs, way="form")


def test_blocks_hold_no_more_examples_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formed, "MOST_EXAMPLES", 6)
    i, j = all_pairs(20, 15).numpy().T
    for mirrored in (True, False):
        blocks = list(formed._blocks(i, j, np.arange(0, 300, 2), mirrored))
        assert sorted(np.concatenate(blocks)) == list(range(0, 300, 2))
        assert all(len(set(i[b])) + len(set(j[b])) <= 6 for b in blocks)
