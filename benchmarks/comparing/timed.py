"""The process that times one tree, whichever revision that is: this file is run by its path, and imports nothing from
the tree that it lies in.

python timed.py <tree> <device> [share of the time of each call that is burnt after it]

It answers lines of JSON on stdin, one each; `why` in an answer says that something went wrong, and how.

    {"do": "begin"}                                       a fresh process, where it can     → {"cases": [...], paths}
    {"do": "settings", "case": …, "quick": …}             the names of a case's settings    → {"settings": [...]}
    {"do": "build", "case": …, "setting": …, "quick": …}  its competitors                   → {"competitors": [...], …}
    {"do": "answer", "competitor": …, "path": …}          called once, its answer to a file → {"seconds": …}
    {"do": "sample", "competitor": …, "calls": …, "blocks": …}      timed                   → {"seconds": …}
    {"do": "end"}                                         the fresh process ends            → {}

Where things lie in memory moves the time of one and the same code by ten per cent, for as long as they lie there. So
every round has a process forked off from this one, which has imported everything and computed nothing, and in it a
heap with holes of many sizes: what is luck in one round is noise over many.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    sys.path[0] = sys.argv[1]  # before this file's own folder, or anything that is installed

import torch

Run = Callable[[], Any]
HELD, LEAST, MOST = 400, 6, 21  # blocks of 64 bytes to 2 MiB, half of which are freed again


class Timer:
    """Answers what it is asked, about one tree."""

    def __init__(self, device: torch.device, burnt: float = 0.0) -> None:
        from benchmarks import cases  # the tree's

        self.cases: Any = cases.cases()
        self.device, self.burnt = device, burnt
        self.runs: dict[str, Run] = {}
        self.held: list[torch.Tensor] = []

    def begin(self) -> dict[str, Any]:
        """What is here, and that it is the tree's."""
        found = {name: getattr(sys.modules.get(name), "__file__", None) for name in ("benchmarks", "fpo_kernels")}
        return {"cases": list(self.cases), "files": {name: path for name, path in found.items() if path}}

    def settings(self, case: str, quick: bool) -> dict[str, Any]:
        """The names of a case's settings."""
        return {"settings": [setting.name for setting in self.cases[case].settings(quick, self.device)]}

    def build(self, case: str, setting: str, quick: bool) -> dict[str, Any]:
        """Make a setting's inputs and competitors, in place of those before."""
        self.runs = {}
        _release()
        self.held = scattered(random.Random(os.urandom(8)))
        torch.manual_seed(0)
        one = {one.name: one for one in self.cases[case].settings(quick, self.device)}[setting]
        contest = self.cases[case].build(one, self.device)
        self.runs = {name: self._slowed(competitor.run) for name, competitor in contest.competitors.items()}
        return {
            "competitors": list(self.runs),
            "cannot": dict(contest.cannot),
            "setting": dataclasses.asdict(one),
            "threads": torch.get_num_threads(),
        }

    def answer(self, competitor: str, path: str) -> dict[str, Any]:
        """Call it once, for what it returns; the time of a second call, for how long a sample has to be."""
        run = self.runs[competitor]
        torch.save(run().detach().cpu(), path)
        return {"seconds": least(run, 1, 2, self.device)}

    def sample(self, competitor: str, calls: int, blocks: int) -> dict[str, Any]:
        """The least time of a call over some blocks of calls."""
        return {"seconds": least(self.runs[competitor], calls, blocks, self.device)}

    def end(self) -> dict[str, Any]:
        """Let go of what was built."""
        self.runs, self.held = {}, []
        _release()
        return {}

    def _slowed(self, run: Run) -> Run:
        return burning(run, self.burnt) if self.burnt else run


def least(run: Run, calls: int, blocks: int, device: torch.device) -> float:
    """Seconds a call in the quickest block, of so many blocks of so many calls each.

    Others who want the CPU lengthen a block, and never shorten it. On a CPU the time that this thread was ready and
    had to wait for a core is left out, where Linux tells it; that is seen late now and then, so that a block never
    counts less than the CPU time that it took.
    """
    best = float("inf")
    for _ in range(blocks):
        _synchronize(device)
        waited, worked, begun = _waited(), time.thread_time(), time.perf_counter()
        for _ in range(calls):
            run()
        _synchronize(device)
        wall, worked, waited = time.perf_counter() - begun, time.thread_time() - worked, _waited() - waited
        best = min(best, wall if device.type == "cuda" else min(wall, max(wall - waited, worked)))
    return best / calls


def burning(run: Run, share: float) -> Run:
    """The same with so much more work of the CPU, as a share of the CPU time of each call."""

    def burnt() -> Any:
        begun = time.thread_time()
        found = run()
        now = time.thread_time()
        until = now + share * (now - begun)
        while time.thread_time() < until:
            pass
        return found

    return burnt


def scattered(chance: random.Random) -> list[torch.Tensor]:
    """Blocks of memory between holes of many sizes, never written; to be held as long as things shall lie there."""
    blocks = [torch.empty(int(2 ** chance.uniform(LEAST, MOST)), dtype=torch.uint8) for _ in range(HELD)]
    chance.shuffle(blocks)
    del blocks[HELD // 2 :]
    return blocks


def _waited() -> float:
    """Seconds that this thread has been ready and waiting for a core; 0 where the system does not say."""
    with contextlib.suppress(OSError, IndexError, ValueError), open("/proc/thread-self/schedstat", "rb", 0) as file:
        return int(file.read(100).split()[1]) * 1e-9
    return 0.0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _forks(device: torch.device) -> bool:
    """Whether each round can have a process of its own; a GPU's driver does not outlive a fork."""
    return sys.platform == "linux" and device.type == "cpu"


def main(device: torch.device, burnt: float) -> None:
    """Answer stdin, line by line, until its end."""
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # cases print as they like
    timer: Timer | None = None
    parent, folder = True, ""
    gc.collect()
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        do = asked.pop("do")
        try:
            timer = timer or Timer(device, burnt)
            if do == "begin" and _forks(device):
                gc.freeze()  # so that the fork's collector does not write to, and so copy, all that was imported
                child = os.fork()
                if child:
                    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    if status:
                        how = signal.Signals(-status).name if status < 0 else str(status)
                        said.write(json.dumps({"why": f"its process ended with {how}"}) + "\n")
                    continue
                parent, folder = False, tempfile.mkdtemp()
                tempfile.tempdir = folder
            found = getattr(timer, do)(**asked)
        except Exception as problem:  # what fails in one revision must not end the comparison; the reason is reported
            found = {"why": f"{type(problem).__name__}: {problem}"}
        said.write(json.dumps(found, default=str) + "\n")
        if do == "end" and not parent:
            break
    if not parent:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)  # what the imports wanted done at the end is the parent's to do


if __name__ == "__main__":
    main(torch.device(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
