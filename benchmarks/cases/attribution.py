"""Whether influence finds training pairs whose labels are wrong: mislabelled ones, and such as prefer the longer reply.

Each way gives every training pair a score, the greater the more it is suspected; influence is that on the summed loss
of validation pairs that are rightly labelled. Answers are the areas under the ROC curves, (seeds,), of telling the
planted pairs from the others; what a way takes is the time from gradients, margins and embeddings that are known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.preferences import LABELS, LENGTH, Labelled, labelled, trained
from benchmarks.registry import Case, Competitor, Contest
from fpo_train.attribute.baselines import Embedder, Lexical, text_of
from fpo_train.attribute.gradients import Reader
from fpo_train.attribute.influence import State, influences, loss_gradients
from fpo_train.attribute.inputs import TrainingPair
from fpo_train.attribute.model import chosen
from fpo_train.report.verdicts import paired

PLAIN, BENT, DAMPED = "influence", "influence, curvature", "influence, curvature damped more"
COSINE, BENT_COSINE = "cosine", "cosine, curvature"
LOSS, WORDS, VECTORS, CHANCE = "own loss", "BM25", "embeddings", "chance"
DAMPING, MORE = 0.1, 10.0  # as `fpo-train attribute` has it; a hundred times that
AUDITED = (0.05, 0.10)  # shares of the training pairs, the most suspected first, of which the recall is told
ANY = 1.0  # an area under a curve is 0 to 1, and so no further from 1


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is planted, and what the reward model is.

    Attributes:
        kind: of what is planted (`preferences.labelled`). share: of the training pairs.
        adapter: LoRA factors of MiniLM's last block are trained beside the score head, and gradients over both sketched
            to `dim` numbers; else the head alone, with gradients taken whole.
    """

    name: str
    kind: str
    share: float
    adapter: bool
    seeds: int
    train: int
    valid: int = 60
    dim: int = 4096


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """Both kinds of error, each for a score head and for an adapter."""
    if quick:
        return [Setting(name="label errors, quick", kind=LABELS, share=0.1, adapter=False, seeds=2, train=40, valid=10)]
    found = []
    for kind, share in ((LABELS, 0.05), (LENGTH, 0.0656)):
        told: dict[str, Any] = {"kind": kind, "share": share, "seeds": 6}
        found.append(Setting(name=f"{kind}, head", adapter=False, train=300, **told))
        found.append(Setting(name=f"{kind}, LoRA", adapter=True, train=200, **told))
    return found


@dataclass(frozen=True)
class Trained:
    """One seed's data, and what its reward model says of it."""

    data: Labelled
    state: State
    labels: Tensor
    embeddings: Tensor
    valid_embeddings: Tensor
    right: float
    """Of the validation pairs, those that the reward model tells apart as they are labelled."""
    seed: int


def prepare(setting: Setting, device: torch.device, seed: int) -> Trained:
    """Train a reward model, and read all pairs with it.

    The state's one "reply" is the validation pairs' summed loss: its gradient is in place of a reward's.
    """
    data = labelled(setting.kind, setting.train, setting.valid, setting.share, seed)
    model, known = trained(data, setting.adapter, device, seed)
    reader = Reader(model, chosen(model, "trainable"), setting.dim if setting.adapter else 0, seed, 16)
    (u, margins) = _differences(reader, *((known, known) if not setting.adapter else _read(reader, data.train)))
    (v, valid_margins) = _differences(reader, *_read(reader, data.valid))
    slope = loss_gradients(valid_margins, torch.ones(len(v))) @ v
    embedder = Embedder(device)
    along = [
        torch.cat([embedder([text_of(*text) for text in pair.texts]) for pair in pairs]).cpu().unflatten(0, (-1, 2))
        for pairs in (data.as_labelled, data.valid)
    ]
    return Trained(
        data=data,
        state=State(replies=slope[None], margins=margins, pairs=lambda: iter([u])),
        labels=torch.tensor([pair.preference for pair in data.train]),
        embeddings=along[0][:, 0] - along[0][:, 1],
        valid_embeddings=along[1][:, 0] - along[1][:, 1],
        right=float((valid_margins > 0).float().mean()),
        seed=seed,
    )


def _read(reader: Reader, pairs: Sequence[TrainingPair]) -> tuple[Tensor, Tensor]:
    return reader.gradients([text for pair in pairs for text in pair.texts])


def _differences(reader: Reader, hidden: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """u (n, k) and margins (n,) of pairs, from what is read of their texts, (2n, ·)."""
    rewards = reader.rewards(hidden)
    return (gradients[::2] - gradients[1::2]).cpu().double(), (rewards[::2] - rewards[1::2]).cpu()


def by_influence(one: Trained, damping: float | None, cosine: bool) -> Tensor:
    """What the pair does to the validation loss, (n,)."""
    found = influences([one.state], one.labels, damping)
    return (found.cosine if cosine else found.influence)[0]


def by_loss(one: Trained) -> Tensor:
    """The pair's own loss, through its margin."""
    return one.state.margins * (1 - 2 * one.labels)


def by_words(one: Trained) -> Tensor:
    """How much more the pair's replies are like the validation pairs' on the other side than on their own, by BM25."""
    pairs = one.data.as_labelled
    documents = Lexical([text_of(*text) for pair in pairs for text in pair.texts])
    total = torch.zeros(len(pairs), dtype=torch.float64)
    for pair in one.data.valid:
        better, worse = (documents.scores(text_of(*text)) for text in pair.texts)
        total += (better - worse)[1::2] - (better - worse)[::2]
    return total


def by_vectors(one: Trained) -> Tensor:
    """The same by the inner products of MiniLM's embeddings."""
    return -(one.embeddings @ one.valid_embeddings.sum(0))


def by_chance(one: Trained) -> Tensor:
    """Random numbers."""
    return torch.rand(len(one.labels), generator=torch.Generator().manual_seed(one.seed))


WAYS: Mapping[str, Callable[[Trained], Tensor]] = {
    PLAIN: functools.partial(by_influence, damping=None, cosine=False),
    BENT: functools.partial(by_influence, damping=DAMPING, cosine=False),
    DAMPED: functools.partial(by_influence, damping=MORE, cosine=False),
    COSINE: functools.partial(by_influence, damping=None, cosine=True),
    BENT_COSINE: functools.partial(by_influence, damping=DAMPING, cosine=True),
    LOSS: by_loss,
    WORDS: by_words,
    VECTORS: by_vectors,
    CHANCE: by_chance,
}


def build(setting: Setting, device: torch.device) -> Contest:
    """A reward model a seed."""
    found = [prepare(setting, device, seed) for seed in range(setting.seeds)]

    def areas(way: Callable[[Trained], Tensor]) -> Tensor:
        return torch.tensor([area(way(one), one.data.planted) for one in found])

    return Contest(
        competitors={
            name: Competitor(
                run=functools.partial(areas, way), budget=ANY, rounds=0, figures=functools.partial(figures, way, found)
            )
            for name, way in WAYS.items()
        },
        expected=lambda: {"product": torch.ones(setting.seeds)},
    )


def area(scores: Tensor, planted: Tensor) -> float:
    """The area under the ROC curve: how often a planted pair scores above another one, ties by halves."""
    inside, outside = scores[planted].double(), scores[~planted].double()
    above = (inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside).double()
    return float(above.mean())


def recall(scores: Tensor, planted: Tensor, share: float) -> float:
    """The part of the planted pairs among the most suspected `share` of all."""
    audited = scores.argsort(descending=True, stable=True)[: round(share * len(scores))]
    return float(planted[audited].sum() / planted.sum())


def figures(way: Callable[[Trained], Tensor], found: Sequence[Trained]) -> Mapping[str, float]:
    """Means over the seeds and their 95 % intervals by Student's distribution: AUC, recalls, and the accuracy."""
    scores = [way(one) for one in found]
    told: dict[str, list[float]] = {"AUC": [area(s, one.data.planted) for s, one in zip(scores, found, strict=True)]}
    for share in AUDITED:
        told[recalled(share)] = [recall(s, one.data.planted, share) for s, one in zip(scores, found, strict=True)]
    told["accuracy"] = [one.right for one in found]
    numbers: dict[str, float] = {}
    for name, values in told.items():
        interval = paired(values)
        numbers |= {name: interval["mean"], f"{name}, low": interval["low"], f"{name}, high": interval["high"]}
    return numbers


def recalled(share: float) -> str:
    """The name of the recall at an audited share."""
    return f"recall at {share:.0%}"


def chart(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: each way in each setting, means over the seeds with their 95 % intervals."""
    names = ("AUC", *map(recalled, AUDITED))
    lines = [f"| planted, trained | ranked by | {' | '.join(names)} |", "|---|---|---|---|---|"]
    for row in rows:
        if "figures" in row:
            told = row["figures"]
            cells = [f"{told[name]:.2f} [{told[f'{name}, low']:.2f}, {told[f'{name}, high']:.2f}]" for name in names]
            lines.append(f"| {row['setting']['name']} | {row['competitor']} | {' | '.join(cells)} |")
    return lines


CASE = Case(
    name="attribution",
    description="training pairs with wrong labels, found by their influence on a few pairs with right ones",
    competitors=tuple(WAYS),
    baseline=PLAIN,
    settings=settings,
    build=build,
    summary=lambda rows: "\n".join(chart(rows)),
)
