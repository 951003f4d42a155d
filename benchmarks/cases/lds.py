"""The linear datamodelling score of influences on a reward model's margins, beside words, embeddings and chance.

A score of a training pair and a held-out pair is positive where training on the one raises the margin of the other:
influences as `fpo_train.attribute` has them, −⟨∇Δ_q, F⁻¹∇ℓ_j⟩, with the pair's σ(Δ) − p in ∇ℓ; similarities of the
texts take the sign of the label from which reply was preferred. The truth is training on half of the pairs, from the
beginning to the optimum, for each of the subsets. Gates: the influence with the loss's own curvature has to foretell
what leaving one pair out does, the other ways by gradients have to have a score above 0.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fpo_kernels as fk
from benchmarks import ending
from benchmarks.cases.exact import correlation
from benchmarks.ending import Ending
from benchmarks.preferences import LABELS, Labelled, labelled, trained
from benchmarks.registry import Case, Competitor, Contest
from benchmarks.subsets import datamodelling_scores, halves, interval
from fpo_train.attribute.baselines import Embedder, Lexical, text_of
from fpo_train.attribute.influence import State, influences

TRACIN, SMALL, LARGE, COSINE = "TracIn", "TracIn, smaller sketch", "TracIn, larger sketch", "gradient cosine"
CURVED, DAMPED, CURVED_LARGE = "curvature", "curvature, damping 0.1", "curvature, larger sketch"
WORDS, VECTORS, CHANCE = "BM25", "embeddings", "chance"
DAMPING = 0.1  # as `fpo-train attribute` has it, relative to the mean diagonal; CURVED has the ridge of the training
SHARE = 0.05  # of the training pairs with a wrong label
WHOLE, LEFT = "score", "leaving out"
ANY, POSITIVE = 2.0, 1.0  # how far a score may be from 1: it is −1 to 1
NOTHING = 1.0  # the relative error of foretelling no change when a pair is left out; a wrong sign is worse


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, and on how much.

    Attributes:
        kind: "head" or "LoRA" (`ending.Ending`). ridge: λ; None: what `reward_model.fit_ridge` has by default.
        texts: SmolLM2's replies as MiniLM reads them, else random numbers.
        train, queries: pairs. subsets: M. left_out: pairs that are left out one at a time. dims: of the two sketches.
    """

    name: str
    kind: str
    ridge: float | None
    texts: bool = True
    train: int = 200
    queries: int = 60
    subsets: int = 100
    left_out: int = 8
    dims: tuple[int, int] = (64, 256)
    seeds: int = 3


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """The head as it is trained by default and with more ridge, and LoRA factors of the last block beside it."""
    if quick:
        sizes: dict[str, Any] = {"train": 40, "queries": 12, "subsets": 30, "left_out": 4, "seeds": 2, "texts": False}
        return [Setting(name=f"{kind}, quick", kind=kind, ridge=1.0, **sizes) for kind in ("head", "LoRA")]
    return [
        Setting(name="head", kind="head", ridge=None, seeds=5),
        Setting(name="head, ridge 1", kind="head", ridge=1.0, seeds=5),
        Setting(name="LoRA, ridge 1", kind="LoRA", ridge=1.0, dims=(256, 4096)),
    ]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """One seed's reward model, and what came of training it on less.

    Attributes:
        data: its texts, if it has any. subsets: (M, n). margins: (M, queries) after training on each.
        left: which pairs were left out. changes: (queries, left) of the margins when they were.
    """

    model: Ending
    data: Labelled | None
    subsets: Tensor
    margins: Tensor
    left: Tensor
    changes: Tensor
    dims: tuple[int, int]
    seed: int

    @property
    def trained(self) -> int:
        """n."""
        return len(self.model.labels)


def prepare(setting: Setting, device: torch.device, seed: int) -> Truth:
    """Train on all pairs, on each subset, and on all but one."""
    data = labelled(LABELS, setting.train, setting.queries, SHARE, seed) if setting.texts else None
    if data is not None:
        body, _ = trained(data, False, device, seed)
        read = ending.seen(body, [text for pair in [*data.train, *data.valid] for text in pair.texts])
        labels = torch.tensor([pair.preference for pair in data.train], dtype=torch.float64)
    else:
        read = ending.drawn(2 * (setting.train + setting.queries), seed)
        labels = (ending.Ending.differences(read.outer)[: setting.train].sum(1) > 0).double()
    model = Ending(setting.kind, read, labels, setting.ridge, seed)
    subsets = halves(setting.train, setting.subsets, seed)
    left = torch.randperm(setting.train, generator=torch.Generator().manual_seed(seed))[: setting.left_out]
    without = 1 - torch.eye(setting.train)[left]
    before = model.margins()
    after = [model.margins(model.optimum(one, ending.FINE, start=model.phi)) - before for one in without]
    return Truth(
        model=model,
        data=data,
        subsets=subsets,
        margins=torch.stack([model.margins(model.optimum(one)) for one in subsets])[:, setting.train :],
        left=left,
        changes=torch.stack(after, 1)[setting.train :],
        dims=setting.dims,
        seed=seed,
    )


def by_gradients(one: Truth, damping: str = "", cosine: bool = False, sketch: int | None = None) -> Tensor:
    """Influences on the queries' margins, or their cosines, (queries, n).

    Args:
        damping: "": no curvature; "own": the ridge of the training; "usual": DAMPING. sketch: which of the two.
    """
    model, n = one.model, one.trained
    u = model.gradients() if sketch is None else model.sketched(one.dims[sketch], one.seed)
    margins = model.margins()[:n]
    relative = {"": None, "usual": DAMPING}.get(damping)
    if damping == "own":
        relative = model.ridge * u.shape[1] / float(fk.logistic_weights(margins) @ u[:n].square().sum(1))
    state = State(replies=u[n:], margins=margins, pairs=lambda: iter([u[:n]]))
    found = influences([state], model.labels, relative)
    return found.cosine if cosine else found.influence


def by_words(one: Truth) -> Tensor:
    """How much more the pair's replies are like the query's on their own side than on the other, by BM25."""
    assert one.data is not None
    documents = Lexical([text_of(*text) for pair in one.data.as_labelled for text in pair.texts])
    rows = []
    for query in one.data.valid:
        better, worse = (documents.scores(text_of(*text)) for text in query.texts)
        rows.append((better - worse)[::2] - (better - worse)[1::2])
    return torch.stack(rows)


def by_vectors(one: Truth) -> Tensor:
    """The same by the inner products of MiniLM's embeddings."""
    assert one.data is not None
    embedder = Embedder(torch.device("cpu"))

    def differences(pairs: Sequence[Any]) -> Tensor:
        found = torch.cat([embedder([text_of(*text) for text in pair.texts]) for pair in pairs])
        return Ending.differences(found)

    return differences(one.data.valid) @ differences(one.data.as_labelled).T


def by_chance(one: Truth) -> Tensor:
    """Random numbers."""
    shape = one.margins.shape[1], one.trained
    return torch.randn(*shape, generator=torch.Generator().manual_seed(one.seed))


WAYS: Mapping[str, Callable[[Truth], Tensor]] = {
    TRACIN: by_gradients,
    SMALL: functools.partial(by_gradients, sketch=0),
    LARGE: functools.partial(by_gradients, sketch=1),
    COSINE: functools.partial(by_gradients, cosine=True),
    CURVED: functools.partial(by_gradients, damping="own"),
    DAMPED: functools.partial(by_gradients, damping="usual"),
    CURVED_LARGE: functools.partial(by_gradients, damping="own", sketch=1),
    WORDS: by_words,
    VECTORS: by_vectors,
    CHANCE: by_chance,
}
SKETCHES = {SMALL: 0, LARGE: 1, CURVED_LARGE: 1}


def build(setting: Setting, device: torch.device) -> Contest:
    """A reward model a seed, trained over and over; in float64, always on the CPU but for the encoder."""
    found = [prepare(setting, device, seed) for seed in range(setting.seeds)]
    cannot = {} if setting.texts else dict.fromkeys((WORDS, VECTORS), "random numbers stand for its texts")

    def means(way: Callable[[Truth], Tensor]) -> Tensor:
        return torch.stack([datamodelling_scores(way(one), one.subsets, one.margins).mean() for one in found])

    def foretold(way: Callable[[Truth], Tensor]) -> Tensor:
        return torch.stack([-way(one)[:, one.left] for one in found])

    competitors = {}
    for name, way in WAYS.items():
        if name in cannot:
            continue
        exact = name == CURVED
        budget = NOTHING if exact else ANY if name in (WORDS, VECTORS, CHANCE) else POSITIVE
        competitors[name] = Competitor(
            run=functools.partial(foretold if exact else means, way),
            budget=budget,
            answers=LEFT if exact else WHOLE,
            rounds=0,
            figures=functools.partial(figures, name, way, found),
        )
    expected = {WHOLE: torch.ones(setting.seeds), LEFT: torch.stack([one.changes for one in found])}
    return Contest(competitors=competitors, expected=lambda: expected, cannot=cannot)


def figures(name: str, way: Callable[[Truth], Tensor], found: Sequence[Truth]) -> Mapping[str, float]:
    """The score with its interval over the queries of all seeds, and the least and the greatest of a seed.

    left_out: the correlation with what leaving single pairs out does to all queries, mean over the seeds.
    numbers: a gradient or its sketch has. accuracy: of the model, on the queries.
    """
    scores = [way(one).double() for one in found]
    each = [datamodelling_scores(s, one.subsets, one.margins) for s, one in zip(scores, found, strict=True)]
    total, seeds = interval(each), [float(one.mean()) for one in each]
    left = [correlation(-s[:, x.left].flatten(), x.changes.flatten()) for s, x in zip(scores, found, strict=True)]
    told = {
        "lds": total.mean,
        "low": total.low,
        "high": total.high,
        "least_seed": min(seeds),
        "greatest_seed": max(seeds),
        "left_out": statistics.mean(left),
        "queries": sum(map(len, each)),
        "accuracy": statistics.mean(float((x.model.margins()[x.trained :] > 0).double().mean()) for x in found),
    }
    if name not in (WORDS, VECTORS, CHANCE):
        whole = len(found[0].model.phi)
        told["numbers"] = found[0].dims[SKETCHES[name]] if name in SKETCHES else whole
    return told


def chart(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: each way in each setting, with what a gradient's vector has of numbers."""
    lines = ["| trained | scored by | numbers | score | of a seed | leaving one out |", "|---" * 6 + "|"]
    for row in rows:
        if "figures" in row:
            told = row["figures"]
            numbers = f"{told['numbers']:,}" if "numbers" in told else ""
            score = f"{told['lds']:.2f} [{told['low']:.2f}, {told['high']:.2f}]"
            seeds = f"{told['least_seed']:.2f} to {told['greatest_seed']:.2f}"
            name = row["setting"]["name"]
            lines.append(f"| {name} | {row['competitor']} | {numbers} | {score} | {seeds} | {told['left_out']:.2f} |")
    return lines


CASE = Case(
    name="lds",
    description="scores of training pairs against training on half of them: the linear datamodelling score",
    competitors=tuple(WAYS),
    baseline=TRACIN,
    settings=settings,
    build=build,
    summary=lambda rows: "\n".join(chart(rows)),
    rounds=1,
)
