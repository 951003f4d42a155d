"""The linear datamodelling score: do scores of training pairs foretell what training on some of them gives?

A score s(q, j) says what pair j of the training set does to a number that is read off the trained model, here the
margin of a held-out pair q: above 0, training on j raises it. Of a subset S it foretells Σ_{j∈S} s(q, j); the model is
trained anew on each of M subsets, and the score is Spearman's correlation over the subsets of what is foretold with
what came of it, query by query.

Source: Park et al. 2023, "TRAK: Attributing model behavior at scale", arXiv 2303.14186, definition 2.3; subsets of one
half, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 2000  # of the bootstrap


class Interval(NamedTuple):
    """A mean, and the 2.5th and 97.5th percentile of it over draws of the queries."""

    mean: float
    low: float
    high: float


def halves(pairs: int, subsets: int, seed: int) -> Tensor:
    """Which pairs are in, (subsets, pairs) float64 of 0 and 1: ⌊pairs/2⌋ of them, drawn anew for each subset."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(subsets, pairs, generator=generator).argsort(1)[:, : pairs // 2]
    return torch.zeros(subsets, pairs, dtype=torch.float64).scatter_(1, chosen, 1.0)


def datamodelling_scores(scores: Tensor, subsets: Tensor, truth: Tensor) -> Tensor:
    """Spearman's correlation of every query, (queries,).

    Args:
        scores: (queries, pairs). subsets: (M, pairs) of 0 and 1. truth: (M, queries), what training on each gave.
    """
    return spearman(subsets @ scores.double().T, truth.double())


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Rank correlation of each column of (M, n) and (M, n); equal values share their mean rank, 0 for all equal."""
    a, b = (_ranks(one) - (len(one) - 1) / 2 for one in (x, y))
    norms = a.norm(dim=0) * b.norm(dim=0)
    return torch.where(norms > 0, (a * b).sum(0) / norms.clamp_min(1e-300), 0.0)


def _ranks(x: Tensor) -> Tensor:
    columns = x.T.contiguous()
    rising = columns.sort(1).values
    first, last = (torch.searchsorted(rising, columns, right=right) for right in (False, True))
    return ((first + last - 1) / 2.0).T.double()


def interval(values: Sequence[Tensor], draws: int = DRAWS) -> Interval:
    """The mean over all queries, and its 95 % interval by the bootstrap over the queries.

    Args:
        values: one tensor a model, (queries,): as many are drawn of each model as it has.
    """
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(draws, dtype=torch.float64)
    for one in values:
        total += one.double()[torch.randint(len(one), (draws, len(one)), generator=generator)].sum(1)
    count = sum(map(len, values))
    low, high = torch.quantile(total / count, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(torch.cat(list(values)).double().mean()), low, high)
