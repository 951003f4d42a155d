"""Norms, Gram matrices, steering and projections of all Linear weights, by every package that has a way to them."""

from __future__ import annotations

import contextlib
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
QUESTIONS = {"norms": "norms", "gram": "Gram", "cross": "cross Gram", "steering": "steering", "sketch": "projection"}
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
    found += [_work("sketch", "smollm2-135m", 6, 32, 64, numbers=numbers) for numbers in (512, 2048, 4096, 16384)]
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
    for name in WAYS:
        with contextlib.suppress(Failed):
            package(name, device)  # all start together; what they import takes some of them a minute
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


NAMES = {
    "hooks": "plain torch hooks",
    "dattri_llm": "dattri-LLM",
    "opacus": "Opacus",
    "bergson": "Bergson",
    "kronfluence": "kronfluence",
    "trak": "traker",
}
"""Module → what pages call it."""


def beside(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown, a package a row, a question a column: time over ours, least and greatest; in brackets memory.

    Of a package's two ways the quicker one at each setting, and the memory of that one. In the last column projections
    that err alike, `no_closer`.
    """
    heads = [*QUESTIONS.values(), "projection as close"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for module, name in NAMES.items():
        cells = []
        for question in QUESTIONS:
            cells.append(_ranges([told[1:] for told in quicker(rows, question, WAYS[module])]))
        cells.append(_ranges(no_closer(rows, WAYS[module])))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def quicker(rows: list[dict[str, Any]], question: str, ways: Sequence[str]) -> list[tuple[str, float, float]]:
    """(setting, time, memory) over ours, of the quicker of these ways, for every setting where one was timed."""
    found = []
    timed = [row for row in rows if row["status"] == "timed" and row["setting"]["question"] == question]
    for setting in dict.fromkeys(row["setting"]["name"] for row in timed):
        here = {row["competitor"]: row for row in timed if row["setting"]["name"] == setting}
        own, theirs = here.get(OURS), [here[way] for way in ways if way in here]
        if own and theirs:
            best = min(theirs, key=lambda row: row["ratio"]["median"])
            found.append((setting, best["ratio"]["median"], best["peak_bytes"] / max(1, own["peak_bytes"])))
    return found


def no_closer(rows: list[dict[str, Any]], ways: Sequence[str]) -> list[tuple[float, float]]:
    """(time, memory) over ours of the quicker of these ways' projections, each beside our quickest that errs no more.

    Medians of two settings of one run.
    """
    timed = [row for row in rows if row["status"] == "timed" and row["setting"]["question"] == "sketch"]
    found = []
    for setting in dict.fromkeys(row["setting"]["name"] for row in timed):
        theirs = [row for row in timed if row["competitor"] in ways and row["setting"]["name"] == setting]
        if theirs:
            best = min(theirs, key=lambda row: row["seconds"]["median"])
            close = [row for row in timed if row["competitor"] == OURS and row["error"] <= best["error"]]
            own = min(close, key=lambda row: row["seconds"]["median"])
            found.append(tuple(best_of / own_of for best_of, own_of in zip(_taken(best), _taken(own), strict=True)))
    return [(time, memory) for time, memory in found]


def _taken(row: dict[str, Any]) -> tuple[float, int]:
    return row["seconds"]["median"], max(1, row["peak_bytes"])


def projected(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence a setting of projections: how far each package's inner products are off, by its better way."""
    lines = []
    sketches = [row for row in rows if row["status"] == "timed" and row["setting"]["question"] == "sketch"]
    for numbers in dict.fromkeys(row["setting"]["numbers"] for row in sketches):
        here = {row["competitor"]: row["error"] for row in sketches if row["setting"]["numbers"] == numbers}
        off = {
            name: min(here[way] for way in WAYS[module] if way in here)
            for module, name in {"ours": "ours", **NAMES}.items()
            if here.keys() & set(WAYS[module])
        }
        lines.append(
            f"with {numbers} numbers " + ", ".join(f"{name} {100 * error:.0f} %" for name, error in off.items())
        )
    return lines


def _ranges(found: Sequence[tuple[float, float]]) -> str:
    """Times, and in brackets memory."""
    return f"{_range([time for time, _ in found])} ({_range([memory for _, memory in found])})" if found else "–"


def _range(values: Sequence[float]) -> str:
    ends = [f"{end:.2f}" for end in (min(values), max(values))]
    return " to ".join(dict.fromkeys(ends))


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
