"""How well projections of per-example gradients keep inner products at equal bytes: ours beside OPORP and dattri's.

The layers, texts and errors are those of `sketch`, whose own comparison goes further in k and looks for a bias.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import dattri_projectors, oporp
from benchmarks.cases import sketch
from benchmarks.cases.sketch import DENSE, TENSOR
from benchmarks.cases.sketch import KINDS as OURS
from benchmarks.dattri_projectors import KINDS, MASK, NOT_HERE
from benchmarks.packages.processes import PEERS
from benchmarks.registry import Case, Competitor, Contest, Headline, Told

OPORP = "OPORP"
DATTRI = {f"dattri {kind.replace('_', ' ')}": kind for kind in (*KINDS, *NOT_HERE)}
MEASURED = (*OURS, OPORP, *(name for name, kind in DATTRI.items() if kind in KINDS))


@dataclass(frozen=True)
class Setting:
    """k numbers for each layer's gradient of each text.

    Attributes:
        dim: k. model: "smollm2" on real texts, or "tiny".
        seeds: over which errors are averaged. slow_seeds: of those that draw k numbers a coordinate, 0 where
            that takes too long.
    """

    name: str
    dim: int
    model: str
    seeds: int
    slow_seeds: int


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """k from 64 to 4096."""
    if quick:
        return [Setting("k=64", 64, "tiny", 2, 2)]
    return [Setting(f"k={dim}", dim, "smollm2", 20, slow) for dim, slow in ((64, 6), (256, 3), (1024, 0), (4096, 0))]


def build(setting: Setting, device: torch.device) -> Contest:
    """Every layer's gradients projected; the answers are the layers' Gram matrices (layers, examples, examples)."""
    layers, exact = sketch.measured(setting.model, device)
    seeds = {name: setting.slow_seeds if _is_dense(name) else setting.seeds for name in MEASURED}
    cannot = {name: NOT_HERE[kind] for name, kind in DATTRI.items() if kind in NOT_HERE}
    if not setting.slow_seeds:
        drawn = sum(x.a.shape[1] * x.d.shape[1] for x in layers) * setting.dim
        why = f"not measured: {drawn:.1e} numbers drawn a seed"
        cannot |= {name: why for name in MEASURED if _is_dense(name)}
    if not PEERS.is_file():
        cannot |= {name: "not installed: make peers" for name in DATTRI if name not in cannot}
    theirs = _Theirs(layers, setting.dim, {DATTRI[n]: seeds[n] for n in DATTRI if n not in cannot})
    sketchers: dict[str, Callable[[int], Tensor]] = {
        **{name: functools.partial(sketch.projected, kind, layers, setting.dim) for name, kind in OURS.items()},
        OPORP: functools.partial(oporp.of_layers, layers, setting.dim),
        **{name: functools.partial(theirs.vectors, kind) for name, kind in DATTRI.items()},
    }
    competitors = {
        name: Competitor(
            run=functools.partial(theirs.run, DATTRI[name])
            if name in DATTRI
            else functools.partial(sketch.gram_matrices, sketcher, 0),
            budget=_budget(name, setting.dim, layers, exact),
            answers="gram",
            rounds=0,
            figures=functools.partial(sketch.figures, sketcher, exact, seeds[name], 0),
        )
        for name, sketcher in sketchers.items()
        if name not in cannot
    }
    return Contest(competitors=competitors, expected=lambda: {"gram": exact}, cannot=cannot)


class _Theirs:
    """dattri's projections, all kinds and seeds by one process that is started when the first is asked for."""

    def __init__(self, layers: Sequence[Any], dim: int, seeds: dict[str, int]) -> None:
        self._work = layers, dim, seeds

    @functools.cached_property
    def _answers(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="fpo-dattri-") as folder:
            return dattri_projectors.elsewhere(*self._work, Path(folder))

    def vectors(self, kind: str, seed: int) -> Tensor:
        """(layers, examples, k)."""
        found: Tensor = self._answers[kind]["vectors"][seed]
        return found

    def run(self, kind: str) -> Told:
        """The first seed's Gram matrices, and its time there."""
        vectors = self.vectors(kind, 0)
        return Told(vectors @ vectors.mT, self._answers[kind]["seconds"], None)


def _is_dense(name: str) -> bool:
    return name == DENSE or DATTRI.get(name) in ("normal", "rademacher")


def _budget(name: str, dim: int, layers: Sequence[Any], exact: Tensor) -> float:
    """Twice what the relative error is at most in the root mean square; a mask's variance is up to D/k, not 2/k."""
    most = 2 * sketch.bound(name, dim, exact)
    if DATTRI.get(name) == MASK:
        most *= math.sqrt(max(x.a.shape[1] * x.d.shape[1] for x in layers) / 2)
    return most


def chart(rows: list[dict[str, Any]], figure: str = "error") -> list[str]:
    """Markdown, a projection a row, k a column: "error" (each layer apart) or "sum_error" (all added up into one)."""
    found = {(row["competitor"], row["setting"]["dim"]): row["figures"] for row in rows if row["status"] == "timed"}
    dims = sorted({dim for _, dim in found})
    kept = {dim: next(f for (_, k), f in found.items() if k == dim) for dim in dims}
    size = "sum_bytes" if figure == "sum_error" else "bytes"
    heads = [f"k = {dim}, {kept[dim][size]:,} bytes" for dim in dims]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(dims) + 1) + "|"]
    for name in MEASURED:
        cells = [
            f"{found[name, dim][figure]:.3f} ± {found[name, dim][f'{figure}_deviation']:.3f}"
            if (name, dim) in found
            else "–"
            for dim in dims
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def summary(rows: list[dict[str, Any]]) -> str:
    """Both tables, and why some could not run."""
    reasons = {row["competitor"]: row["reason"] for row in rows if row["status"] == "cannot run"}
    return "\n".join(
        [
            "relative error of the Gram matrix, each layer apart, mean over layers and seeds ± its standard error:",
            *chart(rows, "error"),
            "the same, all layers added up into one:",
            *chart(rows, "sum_error"),
            *(f"{name}: {why}" for name, why in reasons.items()),
        ]
    )


CASE = Case(
    name="projections",
    description="error of inner products of gradients after projection, beside OPORP and dattri's, at equal bytes",
    competitors=(*OURS, OPORP, *DATTRI),
    baseline=TENSOR,
    settings=settings,
    build=build,
    headlines=tuple(
        Headline(text=f"error a layer, {TENSOR} / {other}", over=TENSOR, under=other, figure="error")
        for other in MEASURED[1:]
    ),
    summary=summary,
    rounds=1,
)
