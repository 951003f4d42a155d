"""OPORP by what is known of it, dattri's process, and the projections case as a whole."""

import gc
from pathlib import Path

import pytest
import torch

from benchmarks import dattri_projectors
from benchmarks.cases import projections
from benchmarks.dattri_projectors import PEERS, elsewhere
from benchmarks.gradients import Layer
from benchmarks.oporp import formed, of_layers, oporp
from benchmarks.runner import Options, run_case

SEEDS = 400


@pytest.fixture(scope="module")
def layers():
    torch.manual_seed(0)
    offsets = torch.tensor([0, 3, 4, 7])
    return [Layer(name, torch.randn(7, 9), torch.randn(7, 5), offsets) for name in ("one", "two")]


@pytest.mark.parametrize("coordinates", [640, 700])  # k divides the first
def test_oporp_is_unbiased(coordinates):
    """Random gradients, alike in part: the mean Gram matrix over seeds is theirs to three standard errors."""
    torch.manual_seed(0)
    g = torch.randn(5, coordinates) + torch.randn(coordinates)
    exact = g @ g.T
    found = torch.stack([(s := oporp(g, 64, seed)) @ s.T for seed in range(SEEDS)])
    off = (found.mean(0) - exact) / (found.std(0) / SEEDS**0.5)
    assert off.abs().max() < 3
    expected = ((exact.diagonal()[:, None] * exact.diagonal() + exact**2) / 64).sqrt()  # of each entry, at most
    assert found.std(0).max() < 1.1 * expected.max()
    assert (found.std(0) / expected).max() > 0.6


def test_oporp_adds_up_whole_bins():
    x = torch.arange(1.0, 13.0)[None]
    assert (oporp(x, 12, 3).abs().sort().values == x).all()  # a coordinate a bin: a permutation with signs
    ones = torch.ones(1, 12)
    assert {int(value) for value in oporp(ones, 4, 3)[0]} <= {-3, -1, 1, 3}  # three a bin
    assert torch.equal(oporp(x, 4, 3), oporp(x, 4, 3))
    assert not torch.equal(oporp(x, 4, 3), oporp(x, 4, 4))
    assert not torch.equal(oporp(x, 4, 3), oporp(x, 4, 3, "another layer"))


def test_layers_are_projected_apart(layers):
    found = of_layers(layers, 16, 2)
    assert found.shape == (2, 3, 16)
    g = formed(layers[1].a, layers[1].d, layers[1].offsets)
    torch.testing.assert_close(g[1], torch.outer(layers[1].d[3], layers[1].a[3]).flatten())
    torch.testing.assert_close(found[1], oporp(g, 16, 2, "two"))


def test_without_dattri_the_others_are_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # of all that was imported, before each call
    monkeypatch.setattr(projections, "PEERS", tmp_path / "python")
    found = run_case(projections.CASE, Options(device=torch.device("cpu"), quick=True, repeats=1))
    rows = {row["competitor"]: row for row in found}
    assert rows["dattri normal"]["reason"] == "not installed: make peers"
    assert rows["dattri sjlt"]["reason"] == "dattri has it on CUDA alone"
    assert rows["OPORP"]["figures"]["error"] < rows["LoGra"]["figures"]["error"]
    assert {row["figures"]["bytes"] for row in found if row["status"] == "timed"} == {4 * 64 * 14}
    assert "| OPORP | 0." in "\n".join(projections.chart(found))
    assert "dattri grass: dattri has it on CUDA alone" in projections.CASE.summary(found).splitlines()


def test_a_process_that_fails_says_so(monkeypatch, tmp_path, layers):
    monkeypatch.setattr(dattri_projectors, "PEERS", Path("/bin/false"))
    with pytest.raises(RuntimeError, match="ended with 1"):
        elsewhere(layers, 16, {"normal": 1}, tmp_path)


@pytest.mark.skipif(not PEERS.is_file(), reason="not installed: make peers")
def test_dattri_projects_the_same_gradients(tmp_path, layers):
    """With as many numbers as coordinates its mask, scaled by 1, keeps all; a thousand signs nearly do."""
    exact = torch.stack([(g := formed(x.a, x.d, x.offsets)) @ g.T for x in layers])
    found = elsewhere(layers, 45, {"random_mask": 2, "rademacher": 1}, tmp_path)
    (first, second), (signs,) = (found[kind]["vectors"] for kind in ("random_mask", "rademacher"))
    assert first.shape == (2, 3, 45)
    torch.testing.assert_close(first @ first.mT, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second @ second.mT, exact, rtol=1e-4, atol=1e-4)
    assert (signs @ signs.mT - exact).norm() / exact.norm() < 0.5
    assert not list(tmp_path.glob("work.pt"))
