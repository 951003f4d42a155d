"""Norms, Gram matrices, steering and projections of all Linear weights, by every package that has a way to them."""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.packages.processes import Failed, package
from benchmarks.packages.work import OTHERS, Question, Task, Work, made, write
from benchmarks.peers import hooked_backward
from benchmarks.registry import TOLERANCE, Case, Competitor, Contest, Floor

OURS = "fpo_kernels"
WAYS: dict[str, tuple[str, ...]] = {
    "ours": (OURS,),
    "hooks": ("torch hooks", "torch hooks, formed"),
    "dattri_llm": ("dattri-LLM", "dattri-LLM, tuned"),
    "opacus": ("Opacus", "Opacus, tuned"),
    "bergson": ("Bergson", "Bergson, tuned"),
    "kronfluence": ("kronfluence", "kronfluence, tuned"),
    "trak": ("traker", "traker, tuned"),
}
"""Module of benchmarks.packages → its ways."""
EXACT: tuple[Question, ...] = ("norms", "gram", "cross", "steering")
SIZES = tuple(itertools.product((8, 32), (64, 256)))  # examples, tokens
ROUNDS = 3
ONCE_ABOVE = 2.0  # what takes longer than so many times ours is not asked again: a run has to end
# A projection's inner products are an estimate; how good a one is what `sketch` is about.
ESTIMATE = 2.0


def settings(quick: bool, device: torch.device) -> Sequence[Work]:
    """SmolLM2's blocks, six of them, at 8 and 32 texts of 64 and 256 tokens; unequal ones; a projection.

    Of the largest two blocks: seven processes that held as much as six of them take would not fit into 24 GB.
    """
    if quick:
        return [
            _work(question, "tiny", 2, 5, 12, full=False, numbers=512 if question == "sketch" else 0)
            for question in get_args(Question)
        ]
    found = [
        _work(question, "smollm2-135m", 2 if (n, tokens) == SIZES[-1] else 6, n, tokens)
        for question in EXACT
        for n, tokens in SIZES
    ]
    found.append(_work("steering", "smollm2-135m", 6, 8, 256, full=False))
    found.append(_work("steering", "smollm2-135m", 30, 8, 64))
    found += [_work("sketch", "smollm2-135m", 6, 32, 64, numbers=numbers) for numbers in (4096, 16384)]
    return found


def _work(question: Question, shape: str, layers: int, examples: int, tokens: int, **more: Any) -> Work:
    length = f"{tokens}" if more.get("full", True) else f"1-{tokens}"
    projected = f" of {more['numbers']} numbers" if more.get("numbers") else ""
    name = f"{question}{projected}, {layers} layers, {examples} of {length}"
    return Work(name=name, question=question, shape=shape, layers=layers, examples=examples, tokens=tokens, **more)


def build(work: Work, device: torch.device) -> Contest:
    """The same inputs for every package's process, by file."""
    task = made(work, device)
    folder = Path(tempfile.mkdtemp(prefix="fpo-work-"))
    write(task, folder)
    competitors: dict[str, Competitor] = {}
    cannot: dict[str, str] = {}
    budget = ESTIMATE if work.question == "sketch" else TOLERANCE[torch.float32]
    for name, ways in WAYS.items():
        try:
            process = package(name, device)
            began = process.ask(do="begin", folder=str(folder))
        except Failed as why:
            cannot |= dict.fromkeys(ways, str(why))
            continue
        cannot |= began["cannot"]
        for way in began["ways"]:
            competitors[way] = Competitor(
                run=functools.partial(process.run, way),
                budget=budget,
                rounds=ROUNDS,
                figures=functools.partial(_kept, task, began["kept"]),
            )
    (folder / "inputs.pt").unlink()
    return Contest(
        competitors=competitors,
        expected=functools.partial(expected, task),
        cannot=cannot,
        floors={"product": least(task)},
        once_above=ONCE_ABOVE,
    )


def _kept(task: Task, numbers: int) -> dict[str, float]:
    """parameters: weights that the answer is over, which the gate has seen. bytes: of a text's projection."""
    covered = sum(task.model.get_parameter(name).numel() for name in task.names)
    return {"parameters": covered, **({"bytes": 4 * numbers} if numbers else {})}


def least(task: Task) -> Floor:
    """A forward, a backward and the products; of a projection the two alone: its numbers are bought with accuracy."""
    work = task.work
    pairs = [] if work.question == "sketch" else floors.listed(work.examples, work.question, OTHERS)
    return floors.whole(task.model, floors.lengths_of(task.batch), pairs=pairs)


def expected(task: Task) -> Mapping[str, Tensor]:
    """In float64, by plain torch: every layer's gradients formed in its hook, multiplied, forgotten."""
    double = copy.deepcopy(task.model).double()
    parts: list[Tensor] = []

    def note(a: Tensor, d: Tensor) -> None:
        parts.append(task.formed([torch.bmm(d.mT, a) if a.ndim == 3 else d[:, :, None] * a[:, None]]))

    hooked_backward(double, task.batch, note)
    return {"product": torch.stack(parts).sum(0)}


def chart(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown, a setting a row: seconds over ours, and in brackets memory over ours."""
    names = [way for ways in WAYS.values() for way in ways]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for setting in dict.fromkeys(row["setting"]["name"] for row in rows):
        found = {row["competitor"]: row for row in rows if row["setting"]["name"] == setting}
        ours = found[OURS]
        cells = []
        for name in names:
            row = found[name]
            if row["status"] != "timed" or ours["status"] != "timed":
                off = f"off by {row['error']:.0e}" if row.get("error") else "fails"
                cells.append("–" if row["status"] == "cannot run" else off)
                continue
            memory = f" ({row['peak_bytes'] / max(1, ours['peak_bytes']):.1f})" if row["peak_bytes"] is not None else ""
            cells.append(f"{row['ratio']['median']:.2f}{memory}")
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return lines


CASE = Case(
    name="packages",
    description="norms, Gram, cross Gram, steering and projections of all Linear weights, beside other packages",
    competitors=tuple(way for ways in WAYS.values() for way in ways),
    baseline=OURS,
    settings=settings,
    build=build,
    summary=lambda rows: "\n".join(chart(rows)),
    rounds=ROUNDS,
)
