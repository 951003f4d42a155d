"""How often the engine launches, waits and copies on its way through a large model: counted, nothing multiplied."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import fpo_kernels as fk
from benchmarks.counting import Counted
from benchmarks.models import block_weights, reward_model, rows, token_batch
from fpo_kernels import passes, totals
from fpo_kernels.streams import Extents

pytest.importorskip("triton")
BLOCK = [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))]  # Llama-3.1-8B's


class Launches:
    """Stands for the kernel: what it would have been launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, int]] = []

    def __getitem__(self, grid: tuple[int, int]):
        self.grids.append(grid)
        return lambda *arguments, **constants: None


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    from fpo_kernels.products import grouped

    counted = Launches()
    monkeypatch.setattr(grouped, "grouped_products_kernel", counted)
    for module in (passes, totals):
        monkeypatch.setattr(module, "are_grouped", lambda d: d.dtype != torch.float64)
    return counted


@pytest.mark.parametrize(("tokens", "most"), [(64, 10), (256, 40)])
def test_a_pass_waits_for_nothing(launches: Launches, tokens: int, most: int) -> None:
    """Steering over the 225 Linear weights of 32 narrow blocks, 8 candidates and a reference, a kind that was met."""
    model = reward_model("narrow", 32, torch.float32, torch.device("cpu"))
    batch = token_batch(9, tokens, torch.device("cpu"))
    candidates, reference = rows(batch, slice(0, 8)), rows(batch, slice(8, 9))
    engine = fk.Influence(model, block_weights(model), capture="never", check="never")
    engine.steering(candidates, reference)
    launches.grids.clear()
    with Counted(model, candidates, reference) as counts:
        engine.steering(candidates, reference)
    assert 0 < len(launches.grids) <= most
    assert sum(layers for _, layers in launches.grids) == 4 * 32 + 1  # siblings are one
    ours = [event for event in counts.synchronisations if "fpo_kernels" in event.where]
    before = [event for event in ours if "gather.py" in event.where]  # the mask's lengths, before the forward
    assert len(before) <= 1
    assert [event for event in ours if event not in before] == []
    # all that goes over does so by `fill`, which pins it where there is a GPU
    copies = [event for event in counts.pageable_copies if "fpo_kernels" in event.where]
    assert [event for event in copies if "streams.py" not in event.where] == []


@pytest.mark.parametrize(("tokens", "most"), [(64, 10), (256, 40)])
def test_launches_at_the_width_of_an_8b_model(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, tokens: int, most: int
) -> None:
    """Streams of a Llama-3.1-8B that take no memory: launched when there is enough to do, or to keep."""
    from fpo_kernels.products import grouped

    made: list[int] = []

    def launch(members: list, lists: object, tile: object, unit: int, leak: Tensor) -> Tensor:
        made.append(len(members))
        return torch.zeros(len(lists.items), len(members))  # type: ignore[attr-defined]

    monkeypatch.setattr(grouped, "launch", launch)
    own = np.arange(8)
    pairs = np.concatenate([np.stack([own, own], 1), np.stack([own, np.full(8, 8)], 1)])
    ledger = grouped.Ledger(pairs)
    extents = Extents.packed(np.full(9, tokens))
    flops = 2 * (8 * tokens**2 / 2 + 8 * tokens**2)

    def stream(width: int) -> Tensor:
        return torch.empty(1, dtype=torch.bfloat16).expand(9 * tokens, width)

    monkeypatch.setattr(grouped, "_readable", lambda a, ds: (a, *ds))
    for _ in range(32):
        for p, qs in BLOCK:
            ledger.note(stream(p), [stream(q) for q in qs], extents, flops * (p + sum(qs)))
    ledger.note(stream(4096), [stream(1)], extents, flops * 4097)
    ledger.flush()
    assert sum(made) == 4 * 32 + 1
    assert len(made) <= most
