"""The linear datamodelling score by hand and where the truth is known, and the gates of its case."""

import dataclasses
import gc

import pytest
import torch

from benchmarks.cases import lds
from benchmarks.ending import FINE, Ending, drawn
from benchmarks.preferences import LABELS, labelled
from benchmarks.runner import Options, check, run_case
from benchmarks.subsets import datamodelling_scores, halves, interval, spearman

CPU = torch.device("cpu")
HEAD, LORA = lds.settings(True, CPU)


@pytest.fixture(scope="module")
def head():
    return lds.prepare(dataclasses.replace(HEAD, train=120, ridge=4.0, subsets=100, left_out=10), CPU, 0)


@pytest.fixture(scope="module")
def lora():
    read = drawn(2 * 26, seed=1)
    labels = (Ending.differences(read.outer)[:20].sum(1) > 0).double()
    return Ending("LoRA", read, labels, ridge=1.0, seed=1)


def test_rank_correlations():
    x = torch.tensor([[1.0, 1.0, 3.0], [2.0, 1.0, 3.0], [9.0, 1.0, 3.0], [30.0, 5.0, 3.0]])
    y = torch.tensor([[4.0, 0.0, 1.0], [1.0, 0.0, 2.0], [2.0, 1.0, 3.0], [1e9, 7.0, 4.0]])
    # ranks 0 1 2 3 with 2 0 1 3; 1 1 1 3 with ½ ½ 2 3; all alike with anything
    expected = [1 - 6 * (4 + 1 + 1) / 60, 3 / (3 * 4.5) ** 0.5, 0.0]
    torch.testing.assert_close(spearman(x, y), torch.tensor(expected, dtype=torch.float64))


def test_scores_foretell_sums_over_the_subsets():
    subsets = halves(9, 50, seed=3)
    assert subsets.sum(1).tolist() == [4] * 50
    assert len({tuple(row) for row in subsets.tolist()}) > 30
    scores = torch.tensor([[3.0, -1, 4, 1, -5, 9, 2, -6, 5], [2.0, 7, -1, 8, -2, 8, 1, 8, 2]])
    first, second = (subsets @ scores.double().T).unbind(1)
    truth = torch.stack([first.exp(), -second], 1)  # ranks are all that counts
    torch.testing.assert_close(datamodelling_scores(scores, subsets, truth), torch.tensor([1.0, -1.0]).double())


def test_the_interval_is_that_of_a_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    mean, low, high = interval([values[:100], values[100:]])
    assert mean == pytest.approx(float(values.mean()), abs=1e-6)
    assert (high - low) / (2 * 1.96) == pytest.approx(float(values.std()) / 20, rel=0.1)
    assert low < mean < high


def test_where_the_truth_is_known(head):
    """A head's curvature is its loss's Hessian: its influence foretells leaving one out, and training on half."""
    told = {name: lds.figures(name, lds.WAYS[name], [head]) for name in (lds.CURVED, lds.CHANCE, lds.TRACIN)}
    assert told[lds.CURVED]["lds"] > 0.95
    assert told[lds.CURVED]["left_out"] > 0.99
    assert told[lds.CURVED]["lds"] > told[lds.TRACIN]["lds"] > 0.5
    assert abs(told[lds.CHANCE]["lds"]) < 0.15
    foretold = -lds.by_gradients(head, "own")[:, head.left]
    assert (foretold - head.changes).norm() < 0.3 * head.changes.norm()


def test_a_wrong_sign_is_refused():
    contest = lds.build(HEAD, CPU)
    assert set(contest.cannot) == {lds.WORDS, lds.VECTORS}
    for name in (lds.CURVED, lds.TRACIN, lds.LARGE, lds.COSINE, lds.DAMPED):
        competitor = contest.competitors[name]
        assert check(competitor, contest.expected())[1] == ""
        wrong = dataclasses.replace(competitor, run=lambda competitor=competitor: -competitor.run())
        assert "over its budget" in check(wrong, contest.expected())[1]


def test_gradients_are_those_of_autograd(lora):
    phi = lora.phi.clone().requires_grad_()
    rows = torch.stack([torch.autograd.grad(one, phi, retain_graph=True)[0] for one in lora.rewards(phi)])
    torch.testing.assert_close(lora.gradients(), Ending.differences(rows))
    exact = lora.gradients() @ lora.gradients().T
    sketched = lora.sketched(4096, seed=0)
    assert (sketched @ sketched.T - exact).norm() < 0.1 * exact.norm()


def test_training_ends_where_the_loss_is_flat(lora):
    counted = torch.ones(20)
    counted[3] = 0
    phi = lora.optimum(counted, FINE).requires_grad_()
    margins, labels = Ending.differences(lora.rewards(phi))[:20], lora.labels
    loss = torch.nn.functional.binary_cross_entropy_with_logits(margins, labels, weight=counted, reduction="sum")
    (slope,) = torch.autograd.grad(loss + lora.ridge / 2 * phi @ phi, phi)
    assert slope.abs().max() < 10 * FINE
    adapter = phi[: -len(lora.read.gain)]
    assert adapter.norm() > 0.5  # the ridge has not crushed it


def bag(device):
    """An embedder of the letters."""
    return lambda texts: torch.tensor([[float(text.lower().count(chr(97 + n))) for n in range(26)] for text in texts])


def test_likeness_has_the_sign_of_the_label(monkeypatch, head):
    """A pair that is the query itself pulls its margin up; with the other label, down."""
    monkeypatch.setattr(lds, "Embedder", bag)
    data = labelled(LABELS, 30, 5, 0.1, seed=0)
    same = [
        dataclasses.replace(pair, preference=p) for pair, p in zip(data.valid, (1.0, 0.0, 1.0, 0.0, 1.0), strict=True)
    ]
    one = dataclasses.replace(head, data=dataclasses.replace(data, train=[*data.train, *same]))
    for way in (lds.by_words, lds.by_vectors):
        scores = way(one)
        assert scores.shape == (5, 35)
        own = scores[:, 30:].diagonal() * torch.tensor([1, -1, 1, -1, 1])
        assert (own > 0).all()
        assert (own > 0.99 * scores.abs().amax(1)).sum() >= 4  # nothing is more like it


def test_a_quick_run_keeps_its_figures(monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # of all that was imported, before each call
    rows = run_case(lds.CASE, Options(device=CPU, quick=True, repeats=1, only="head"))
    lines = lds.chart(rows)
    assert len(lines) == 2 + len(lds.WAYS) - 2
    assert "| head, quick | curvature | 12 | 0." in "\n".join(lines)
    assert lds.CASE.summary(rows).splitlines() == lines
