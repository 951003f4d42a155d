"""A package's process: it makes ways ready and runs them, one at a time, as lines of JSON on its stdin say.

python -m benchmarks.packages.worker <package> [device]

Each line gets one in answer; `why` in it says that something went wrong, and how.

    {"do": "begin", "folder": …}             read the work that lies there
        → {"ways": […], "cannot": {…}, "version": …, "kept": numbers of a text's projection}
    {"do": "run", "way": …, "answer": path}  run it, the answer into a file
        → {"seconds": …, "peak_bytes": …}

The process ends with its input.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.meters import peak_bytes, release, seconds_per_call
from benchmarks.packages.work import Cannot, Run, Task, read


class Worker:
    """What a package's process knows: the ways of the work that was begun last."""

    def __init__(self, package: str, device: torch.device) -> None:
        self.module: Any = importlib.import_module(f"benchmarks.packages.{package}")
        self.device = device
        self.ways: Mapping[str, Run] = {}

    def begin(self, folder: str) -> dict[str, Any]:
        """Forget the work before and make this one's ways ready, each on a model of its own."""
        self.ways = {}
        gc.unfreeze()
        release()
        ready: dict[str, Run] = {}
        cannot: dict[str, str] = {}
        kept = 0
        for way in self.module.WAYS:
            task = read(Path(folder), self.device)
            kept = getattr(self.module, "kept", _all)(task)
            try:
                ready[way] = self.module.ready(task, way)
            except Cannot as reason:
                cannot[way] = str(reason)
        self.ways = ready
        gc.freeze()  # looking through all that was imported, again and again, would take longer than small work
        return {"ways": list(ready), "cannot": cannot, "version": _version(self.module.NAME), "kept": kept}

    def run(self, way: str, answer: str) -> dict[str, Any]:
        """Once, timed, with the most that was held beyond what was held before."""
        answers: list[Tensor] = []
        took: list[float] = []

        def timed() -> None:
            took.append(seconds_per_call(lambda: answers.append(self.ways[way]()), 1, self.device))

        peak = peak_bytes(timed, self.device)
        torch.save(answers[0].detach().cpu(), answer)
        answers.clear()
        release()  # which the next run would do first, and other processes need the room
        return {"seconds": took[0], "peak_bytes": peak}


def _all(task: Task) -> int:
    return task.work.numbers


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "a checkout"


def main(package: str, device: torch.device) -> None:
    """Answer stdin, line by line, until its end."""
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # packages print as they like
    worker: Worker | None = None
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        try:
            worker = worker or Worker(package, device)
            found = getattr(worker, asked.pop("do"))(**asked)
        except Exception as problem:  # a package that fails must not take the others down; the reason is reported
            found = {"why": f"{type(problem).__name__}: {problem}"}
        said.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], torch.device(sys.argv[2] if len(sys.argv) > 2 else "cpu"))
