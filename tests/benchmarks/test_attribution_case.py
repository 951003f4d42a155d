"""The planted labels of the attribution case, and its figures, by hand."""

import pytest
import torch

from benchmarks.cases.attribution import area, chart, recall, settings
from benchmarks.preferences import LABELS, LENGTH, labelled, replies


def test_areas_and_recalls():
    planted = torch.tensor([True, False, True, False, False])
    scores = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.0])
    assert area(scores, planted) == pytest.approx((3 + 0 + 0.5 + 1) / 6)
    assert area(-scores, planted) == pytest.approx(1 - area(scores, planted))
    assert (recall(scores, planted, 0.2), recall(scores, planted, 0.6)) == (0.5, 1.0)


@pytest.mark.parametrize("kind", [LABELS, LENGTH])
def test_what_is_planted(kind):
    data = labelled(kind, 100, 20, 0.05, seed=3)
    known = replies()
    assert (len(data.train), len(data.valid), int(data.planted.sum())) == (100, 20, 5)
    assert [pair.preference == 0 for pair in data.train] == data.planted.tolist()
    for pair in [*data.train, *data.valid]:
        assert any(pair.chosen.startswith(text) for text in known[pair.prompt])
        assert not any(pair.rejected.startswith(text) for text in known[pair.prompt])
    written = data.as_labelled
    assert all((a.chosen == b.chosen) != wrong for a, b, wrong in zip(written, data.train, data.planted, strict=True))
    good = [pair.chosen for pair in [*data.train, *data.valid]]
    assert len({text[:40] for text in good}) > 100  # no better reply comes twice, but for its beginning
    if kind == LENGTH:  # a reply that goes on with a short one can still be the shorter
        longer = [len(pair.chosen) > len(pair.rejected) for pair in written]
        assert sum(one for one, wrong in zip(longer, data.planted, strict=True) if wrong) >= 4
        assert 30 < sum(longer) < 70
        assert sum(len(pair.chosen) < len(pair.rejected) for pair in data.valid) >= 19
    assert labelled(kind, 100, 20, 0.05, seed=3).train == data.train != labelled(kind, 100, 20, 0.05, seed=4).train


def test_the_chart_has_a_row_a_way_and_setting():
    (one,) = settings(True, torch.device("cpu"))
    told = {f"{name}{end}": 0.5 for name in ("AUC", "recall at 5%", "recall at 10%") for end in ("", ", low", ", high")}
    lines = chart([{"setting": {"name": one.name}, "competitor": "BM25", "figures": told}])
    assert lines[2:] == [f"| {one.name} | BM25 | {' | '.join(['0.50 [0.50, 0.50]'] * 3)} |"]
