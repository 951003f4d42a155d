"""Whether `exact` steering is true: the change of the mean reward that it foretells, against retraining.

One pair at a time is counted ε times more and the reward model retrained to its new optimum. Answers are changes of
the mean reward per ε, (pairs,); the gate is the relative error to retraining at the smallest ε.
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
from benchmarks.registry import Case, Competitor, Contest
from benchmarks.retraining import PairedModel

FORMED, HESSIAN, FIRST = "formed gradients", "formed, whole Hessian", "formed, first order"
SKETCHES = {f"sketch, k = {k}": k for k in (256, 1024, 4096)}
SEEDS = 5
TRUE = 0.05  # the most that an answer may be off where the Hessian is the true one
NOTHING = 1.0  # the same elsewhere: foretelling no change at all is no worse
COLUMNS = ("correlation", "rank correlation", "error")
STEPS, SOLVED = 200, 1e-6  # of conjugate gradients: the most, and the residual that will do


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A reward model and its pairs.

    Attributes:
        kind: "head" (its loss's Hessian is the Gauss–Newton matrix) or "lora". ridge: λ, beside the summed loss.
        layers, tokens: of the model, of a sequence. trained: pairs it is trained on. new: pairs it is not, whose
            z's the mean reward is over.
        judged: how many pairs are counted more, each by every one of `epsilons`: all new ones, and trained ones.
    """

    name: str
    kind: str
    ridge: float
    epsilons: tuple[float, ...]
    layers: int = 2
    tokens: int = 12
    trained: int = 64
    new: int = 20
    judged: int = 32


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """The head, whose Hessian is exact; and LoRA of every Linear layer unless quick."""
    epsilons = (1e-2, 1e-3)
    head = Setting(name="head", kind="head", ridge=1.0, epsilons=epsilons)
    return [head] if quick else [head, Setting(name="LoRA", kind="lora", ridge=5.0, epsilons=epsilons)]


def build(setting: Setting, device: torch.device) -> Contest:
    """A reward model trained to its optimum; always on the CPU, in float64."""
    sizes = {"layers": setting.layers, "trained": setting.trained, "new": setting.new, "tokens": setting.tokens}
    model = PairedModel(setting.kind, ridge=setting.ridge, **sizes)
    model.train()
    judged = torch.arange(model.pairs - setting.judged, model.pairs)
    engine = fk.Influence(model.model, parameters=model.names)
    measured = functools.cache(lambda: retrain(model, judged, setting.epsilons))
    runs: dict[str, Callable[[int], Tensor]] = {
        FORMED: lambda seed: foretold(model, judged, model.gradients()),
        HESSIAN: lambda seed: by_whole_hessian(model, judged, model.gradients()),
        FIRST: lambda seed: first_order(model, judged, model.gradients(), measured()[least]),
        **{name: functools.partial(by_sketch, model, judged, engine, k) for name, k in SKETCHES.items()},
    }
    least = label(min(setting.epsilons))
    true = (FORMED, HESSIAN) if setting.kind == "head" else (HESSIAN,)
    return Contest(
        competitors={
            name: Competitor(
                run=functools.partial(run, 0),
                budget=TRUE if name in true else NOTHING,
                answers=least,
                rounds=0,
                figures=functools.partial(figures, run, measured, SEEDS if name in SKETCHES else 1),
            )
            for name, run in runs.items()
        },
        expected=measured,
    )


def label(epsilon: float) -> str:
    """The name of retraining's answer at an ε."""
    return f"ε = {epsilon:g}"


def retrain(model: PairedModel, judged: Tensor, epsilons: Sequence[float]) -> Mapping[str, Tensor]:
    """The change of the mean reward per ε, (pairs,), for each ε."""
    before = model.mean_reward(model.phi)
    changes = {}
    for epsilon in epsilons:
        after = [model.mean_reward(model.retrained(pair, epsilon)) for pair in judged.tolist()]
        changes[label(epsilon)] = (torch.tensor(after, dtype=torch.float64) - before) / epsilon
    return changes


def curvature_of(model: PairedModel, u: Tensor) -> fk.Curvature:
    """Of the trained pairs, with their u of every pair (N, k) and the ridge they were trained with."""
    curvature = fk.Curvature(u.shape[1], model.ridge, relative=False)
    curvature.update(u[: model.trained], fk.logistic_weights(model.margins()[: model.trained]))
    return curvature


def mean_of(model: PairedModel, vectors: Tensor) -> Tensor:
    """ḡ (k,) over the policy's candidates, of vectors of every sequence (2N, k)."""
    return vectors[model.trained : model.pairs].mean(0)


def foretold(model: PairedModel, judged: Tensor, vectors: Tensor) -> Tensor:
    """−`exact` steering of the judged pairs, (pairs,), in the space of every sequence's vector (2N, k)."""
    u, residual = model.differences(vectors), model.residuals()
    return -fk.exact_steering(curvature_of(model, u), mean_of(model, vectors), u[judged], residual[judged])


def by_sketch(model: PairedModel, judged: Tensor, engine: fk.Influence, k: int, seed: int) -> Tensor:
    """`foretold` in the space of the gradients' sketches."""
    return foretold(model, judged, engine.sketch(model.batch, dim=k, seed=seed))


def first_order(model: PairedModel, judged: Tensor, vectors: Tensor, measured: Tensor) -> Tensor:
    """−c⟨ḡ, u⟩ of the judged pairs, (pairs,), times the number that brings it closest to what is measured."""
    products = model.residuals()[judged] * (model.differences(vectors)[judged] @ mean_of(model, vectors))
    return products * (products @ measured) / (products @ products)


def by_whole_hessian(model: PairedModel, judged: Tensor, vectors: Tensor) -> Tensor:
    """−c⟨H⁻¹ḡ, u⟩ with all of the Hessian, by conjugate gradients preconditioned by Gauss–Newton."""
    u, mean = model.differences(vectors), mean_of(model, vectors)
    curvature = curvature_of(model, u)
    x, rest = torch.zeros_like(mean), mean
    direction = scaled = curvature.solve(rest)
    for _ in range(STEPS):
        bent = model.hessian_product(direction)
        step = (rest @ scaled) / (direction @ bent)
        x, shorter = x + step * direction, rest - step * bent
        if shorter.norm() <= SOLVED * mean.norm():
            break
        next_scaled = curvature.solve(shorter)
        direction = next_scaled + (shorter @ next_scaled) / (rest @ scaled) * direction
        rest, scaled = shorter, next_scaled
    return -model.residuals()[judged] * (u[judged] @ x)


def figures(
    run: Callable[[int], Tensor], measured: Callable[[], Mapping[str, Tensor]], seeds: int
) -> Mapping[str, float]:
    """At each ε: correlation, rank correlation and relative error; medians over the seeds, and the worst rank."""
    answers = [run(seed) for seed in range(seeds)]
    found: dict[str, float] = {}
    for name, truth in measured().items():
        rank = [correlation(ranks(answer), ranks(truth)) for answer in answers]
        found |= {
            f"correlation, {name}": statistics.median(correlation(answer, truth) for answer in answers),
            f"rank correlation, {name}": statistics.median(rank),
            f"least rank correlation, {name}": min(rank),
            f"error, {name}": statistics.median(float((a - truth).norm() / truth.norm()) for a in answers),
        }
    return found


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def ranks(x: Tensor) -> Tensor:
    """0 for the least, and so on."""
    return x.argsort().argsort().to(x.dtype)


def chart(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: how closely each way foretells retraining, setting by setting."""
    lines = [
        "| trained | ε | foretold with | correlation | rank correlation | relative error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for epsilon in row["setting"]["epsilons"]:
            if "figures" in row:
                at = {key: row["figures"][f"{key}, {label(epsilon)}"] for key in COLUMNS}
                cells = " | ".join(f"{at[key]:.4f}" if key != "error" else f"{at[key]:.2g}" for key in COLUMNS)
                lines.append(f"| {row['setting']['name']} | {epsilon:g} | {row['competitor']} | {cells} |")
    return lines


CASE = Case(
    name="exact",
    description="the change of the mean reward that exact steering foretells, against retraining the reward model",
    competitors=(FORMED, HESSIAN, FIRST, *SKETCHES),
    baseline=FORMED,
    settings=settings,
    build=build,
    summary=lambda rows: "\n".join(chart(rows)),
)
