"""How times grow: with tokens, texts, widths, checkpoints, numbers a sketch, and rows of a store."""

from __future__ import annotations

import functools
import math
import shutil
import statistics
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fpo_kernels as fk
from benchmarks import peers
from benchmarks.models import block_weights, reward_model, rows, token_batch
from benchmarks.registry import Case, Competitor, Contest

PLAIN, OURS = "without", "fpo_kernels"
BUDGET = 3e-5  # of two fp32 results over thousands of tokens
DIM, QUERIES, COUNT, BATCH = 64, 16, 10, 8192  # of the store
AXES = {
    "tokens": "tokens a text; 4 texts and a reference, steering",
    "texts": "texts of 64 tokens, and a reference, steering",
    "width": "weights of one block and head, 8 texts and a reference of 64 tokens, steering",
    "checkpoints": "checkpoints of a score head, TracIn of 4 texts by 4",
    "sketch": "numbers a sketch, 9 texts of 64 tokens",
    "store": f"rows of {DIM} numbers, the {COUNT} best of each of {QUERIES} queries",
}
BESIDE = {
    **dict.fromkeys(("tokens", "texts", "width", "sketch"), "forward and activation-only backward"),
    "checkpoints": "scoring both batches once",
    "store": "the rows whole in memory, one product",
}
"""What PLAIN is, an axis."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of an axis; `value`: where on it.

    Attributes:
        shape: of models.SHAPES. layers: its blocks. texts, tokens: of the batch, references not counted.
    """

    name: str
    axis: str
    value: int
    shape: str = "smollm2-135m"
    layers: int = 2
    texts: int = 4
    tokens: int = 64


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """Each axis, from where fixed costs are all there is to where a CPU takes some seconds a call."""
    axes: dict[str, tuple[int, ...]]
    small: dict[str, Any] = {}
    if quick:
        axes = {"tokens": (8, 32), "texts": (1, 4), "checkpoints": (1, 4), "sketch": (256, 1024), "store": (1000, 4000)}
        small = {"shape": "tiny"}
    else:
        axes = {
            "tokens": (16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
            "texts": (1, 2, 4, 8, 16, 32, 64, 128),
            "checkpoints": (1, 2, 4, 8, 16, 32),
            "sketch": (256, 512, 1024, 2048, 4096, 8192, 16384),
            "store": (10_000, 100_000, 1_000_000, 10_000_000),
        }
    found = []
    for axis, values in axes.items():
        for value in values:
            own: dict[str, Any] = {"tokens": {"tokens": value}, "texts": {"texts": value}, "sketch": {"texts": 9}}.get(
                axis, {}
            )
            found.append(Setting(name=f"{axis} {value}", axis=axis, value=value, **(small | own)))
    for shape in () if quick else ("smollm2-135m", "llama3.2-1b", "llama3.2-3b", "llama3.1-8b"):
        weights = sum(p.numel() for p in _weights(reward_model(shape, 1, torch.float32, torch.device("meta"))))
        found.append(Setting(name=f"width {shape}", axis="width", value=weights, shape=shape, layers=1, texts=8))
    return found


def build(setting: Setting, device: torch.device) -> Contest:
    """The axis's own."""
    made = {"checkpoints": _checkpoints, "store": _store, "sketch": _sketch}.get(setting.axis, _steering)
    return made(setting, device)


def _weights(model: torch.nn.Module) -> Iterator[Tensor]:
    return (model.get_parameter(name) for name in block_weights(model))


def _steering(setting: Setting, device: torch.device) -> Contest:
    model = reward_model(setting.shape, setting.layers, torch.float32, device)
    batch = token_batch(setting.texts + 1, setting.tokens, device, full=True)
    own, reference = rows(batch, slice(0, -1)), rows(batch, slice(-1, None))
    engine = fk.Influence(model, parameters=block_weights(model))

    def formed() -> Tensor:
        parts: list[Tensor] = []

        def note(a: Tensor, d: Tensor) -> None:
            G = torch.bmm(d.mT, a) if a.ndim == 3 else d[:, :, None] * a[:, None]
            parts.append((G[:-1] * (G[:-1] - G[-1])).sum((1, 2)))

        peers.hooked_backward(model, batch, note)
        return torch.stack(parts).double().sum(0)

    runs: dict[str, Callable[[], Tensor]] = {
        PLAIN: functools.partial(peers.forward_and_backward, model, batch),
        OURS: lambda: engine.steering(own, reference).product,
    }
    return _contest(runs, {PLAIN: runs[PLAIN], OURS: formed})


def _sketch(setting: Setting, device: torch.device) -> Contest:
    model = reward_model(setting.shape, setting.layers, torch.float32, device)
    batch = token_batch(setting.texts, setting.tokens, device, full=True)
    engine = fk.Influence(model, parameters=block_weights(model))
    runs: dict[str, Callable[[], Tensor]] = {
        PLAIN: functools.partial(peers.forward_and_backward, model, batch),
        OURS: functools.partial(engine.sketch, batch, setting.value),
    }
    layered = functools.partial(engine.sketch, batch, setting.value, per_layer=True)
    return _contest(runs, {PLAIN: runs[PLAIN], OURS: lambda: torch.stack(list(layered().values())).double().sum(0)})


def _checkpoints(setting: Setting, device: torch.device) -> Contest:
    model = reward_model(setting.shape, setting.layers, torch.float32, device)
    joined = token_batch(2 * setting.texts, setting.tokens, device, full=True)
    batch, other = rows(joined, slice(0, setting.texts)), rows(joined, slice(setting.texts, None))
    head, folder = model.get_parameter("score.weight"), tempfile.mkdtemp(prefix="fpo-checkpoints-")
    store, generator = fk.CheckpointStore(folder), torch.Generator().manual_seed(1)
    head.requires_grad_(True)
    for step in range(setting.value):
        with torch.no_grad():
            head.copy_(torch.randn(head.shape, generator=generator) / head.shape[1] ** 0.5)
        store.save(model, step=step, learning_rate=1e-3 / (1 + step))
    head.requires_grad_(False)
    engine = fk.Influence(model, parameters="head")
    runs: dict[str, Callable[[], Tensor]] = {
        PLAIN: torch.no_grad()(functools.partial(peers.rewards, model, joined)),
        OURS: functools.partial(fk.tracin, engine, store, batch, other),
    }
    closed = functools.partial(peers.head_tracin, model, list(store), batch, other)
    contest = _contest(runs, {PLAIN: runs[PLAIN], OURS: closed})
    weakref.finalize(contest, shutil.rmtree, folder)
    return contest


def _store(setting: Setting, device: torch.device) -> Contest:
    folder = Path(tempfile.mkdtemp(prefix="fpo-rows-"))
    generator = torch.Generator().manual_seed(0)
    store = fk.SketchStore(folder / "store", fk.SketchSpace(dim=DIM, seed=0, layers=("all",), model="none"))
    kept = torch.empty(setting.value, DIM)
    for first in range(0, setting.value, BATCH):
        some = torch.randn(min(BATCH, setting.value - first), DIM, generator=generator)
        kept[first : first + len(some)] = some
        store.append(some, [str(row) for row in range(first, first + len(some))])
    queries = torch.randn(QUERIES, DIM, generator=generator)
    whole = functools.partial(_best, queries, kept)
    runs: dict[str, Callable[[], Tensor]] = {PLAIN: whole, OURS: lambda: store.top(queries, COUNT).scores}
    contest = _contest(runs, {PLAIN: whole, OURS: whole})
    weakref.finalize(contest, shutil.rmtree, folder)
    return contest


def _best(queries: Tensor, kept: Tensor) -> Tensor:
    return (queries @ kept.T).topk(COUNT).values


def _contest(runs: dict[str, Callable[[], Tensor]], answers: dict[str, Callable[[], Tensor]]) -> Contest:
    return Contest(
        competitors={name: Competitor(run=run, budget=BUDGET, answers=name) for name, run in runs.items()},
        expected=lambda: {name: answer() for name, answer in answers.items()},
    )


@dataclass(frozen=True)
class Growth:
    """Seconds ∝ value^exponent over the upper half of an axis, by least squares of logarithms."""

    axis: str
    competitor: str
    exponent: float
    points: int


def growths(rows: list[dict[str, Any]]) -> list[Growth]:
    """Every axis and competitor with three points or more in its upper half, fixed costs being what the lower shows."""
    found = []
    for axis in AXES:
        for competitor in (PLAIN, OURS):
            points = sorted(
                (row["setting"]["value"], row["seconds"]["median"])
                for row in rows
                if (row["setting"]["axis"], row["competitor"], row["status"]) == (axis, competitor, "timed")
            )
            upper = points[(len(points) - 1) // 2 :]
            if len(upper) >= 3:
                line = statistics.linear_regression(*zip(*((math.log(x), math.log(y)) for x, y in upper), strict=True))
                found.append(Growth(axis, competitor, line.slope, len(upper)))
    return found


def chart(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown, an axis a table: seconds of both and their ratio at each point, and how both grow."""
    exponents = {(one.axis, one.competitor): one for one in growths(rows)}
    lines: list[str] = []
    for axis, told in AXES.items():
        points: dict[str, dict[str, dict[str, Any]]] = {}
        for row in rows:
            if row["setting"]["axis"] == axis and row["status"] == "timed":
                points.setdefault(row["setting"]["name"].removeprefix(f"{axis} "), {})[row["competitor"]] = row
        if not points:
            continue
        lines += ["", f"{told}; beside it {BESIDE[axis]}", "", f"| {axis} | {' | '.join(points)} |"]
        lines.append("|---" * (len(points) + 1) + "|")
        for competitor in (PLAIN, OURS):
            of_one = [point.get(competitor) for point in points.values()]
            cells = [f"{1e3 * row['seconds']['median']:.3g}" if row else "–" for row in of_one]
            lines.append(f"| {competitor}, ms | {' | '.join(cells)} |")
        ratio = [f"{point[OURS]['ratio']['median']:.2f}" if OURS in point else "–" for point in points.values()]
        lines.append(f"| ratio | {' | '.join(ratio)} |")
        grown = [f"{name} as {axis}^{one.exponent:.2f}" for (a, name), one in exponents.items() if a == axis]
        if grown:
            lines += ["", f"Over the upper half: {', '.join(grown)}."]
    return lines


CASE = Case(
    name="scaling",
    description="how times grow with tokens, texts, widths, checkpoints, sketches and rows",
    competitors=(PLAIN, OURS),
    baseline=PLAIN,
    settings=settings,
    build=build,
    summary=lambda rows: "\n".join(chart(rows)),
    rounds=5,
)
