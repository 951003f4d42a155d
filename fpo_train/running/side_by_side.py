"""Runs of a comparison at the same time, each in a process of its own with its part of the cores.

Each begins as it would alone: what they share by turns (loading, the first fit) each does for itself, to the same
numbers. An end that is asked for is passed on, and no run outlives the process that began it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fpo_train.config import RunConfig
from fpo_train.data.adapters import base_model
from fpo_train.errors import RunError
from fpo_train.memory.architecture import architecture
from fpo_train.memory.plan import USUAL_PROMPT, make_plan
from fpo_train.report import progress, records
from fpo_train.report.records import CHECKPOINTS, ENVIRONMENT

from .stopping import Request, Stopped

AFRESH = 0.2  # seconds between two looks at whether an end was asked for
LEFT_FREE = 0.2  # of the memory that the machine has available
# What an iteration takes with half the threads, of what it takes with all: products of few rows gain little by a second
# one (SmolLM2 as in demo.yaml, two threads against one: 1.53).
HALF_THE_THREADS = 1.55
LOCAL = ("base", "gold", "file")  # oracles that no other run is asked beside


class _Ended(NamedTuple):
    """How a run ended: "done", "stopped" after an iteration, or "failed" with a message."""

    how: str
    said: Any = None


def at_once(config: RunConfig, runs: int, available: int | None = None) -> int:
    """How many of a comparison's runs go on at a time: `memory.runs_at_once`, or as many as is quickest and fits.

    Several processes of one run, a GPU, a memory budget and an oracle elsewhere are each one run's alone.

    Args:
        available: bytes of memory; None: what the machine has to give.

    Raises:
        RunError: several are asked for where they cannot be.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) > 1 or torch.cuda.is_available()
    asked = min(config.memory.runs_at_once, runs)
    if alone and asked > 1:
        raise RunError(f"memory.runs_at_once {asked}: runs go on side by side on a CPU, one process each; wanted 1")
    if asked or alone or config.memory.budget or config.oracle.kind not in LOCAL:
        return max(1, asked)
    threads = torch.get_num_threads()
    best = min(range(1, min(runs, threads) + 1), key=lambda n: _iterations(config, runs, n, threads))
    available = _available() if available is None else available
    try:
        peak = _peak(config)
    except RunError:  # a model that cannot be counted
        return 1
    return max(1, min(best, int(available * (1 - LEFT_FREE) // peak)))


def _iterations(config: RunConfig, runs: int, n: int, threads: int) -> float:
    """What all runs take, n at a time, in iterations of one that has all threads; by turns they share the first fit."""
    fit = 2 * config.reward_model.fit_pairs / (config.rollout.prompts * (config.rollout.candidates + 1))
    if n == 1:
        return fit + runs * config.iterations
    halvings = (threads // (threads // n)).bit_length() - 1
    return -(-runs // n) * (fit + config.iterations) * HALF_THE_THREADS**halvings


def _peak(config: RunConfig) -> int:
    model = architecture(base_model(config.policy.model))
    room = max(1, model.context - config.rollout.max_new_tokens - 1)
    plan = make_plan(config, model, min(config.data.max_tokens or USUAL_PROMPT, room))
    return max(phase.total for phase in plan.phases.values())


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0  # where that cannot be known, nothing is held twice


class _Child:
    """A run in a process of its own."""

    def __init__(self, run: Callable[[RunConfig], Any], config: RunConfig, threads: int) -> None:
        spawning = get_context("spawn")
        self.config = config
        self._ends, self._stopped = spawning.Pipe(duplex=False), False
        self.process = spawning.Process(target=_work, args=(run, config, threads, self._ends[1]))
        self.process.start()
        self._ends[1].close()

    def stop(self) -> None:
        """Ask it to finish its iteration; asked again, it would not wait."""
        if not self._stopped:
            self.process.terminate()
        self._stopped = True

    def end(self) -> _Ended:
        """How it ended, once it has."""
        self.process.join()
        try:
            return _Ended(*self._ends[0].recv())
        except EOFError:
            if self._stopped:  # before it could listen
                return _Ended("stopped", 0)
            kind, code = self.config.penalty.kind, self.process.exitcode
            return _Ended("failed", f"{kind}: its process ended with exit code {code}; what it printed says more")


def run_side_by_side(
    run: Callable[[RunConfig], Any],
    configs: Sequence[RunConfig],
    n: int,
    request: Request,
    begun: Callable[[Path], None] = lambda out: None,
) -> None:
    """Run configurations, n at a time, in their order; those that are finished stay as they are.

    Args:
        run: what runs one; a module's own function.
        request: an end asked for there is passed on, and every run finishes the iteration that it is in.
        begun: called with the folder of the first that has described itself, once.

    Raises:
        RunError: one failed; the others have stopped, ready to be resumed.
        Stopped: an end was asked for.
    """
    waiting = deque(config for config in configs if not records.finished(Path(config.out), config.iterations))
    running: list[_Child] = []
    ended: list[_Ended] = []
    threads, told = max(1, torch.get_num_threads() // n), False
    try:
        with request.finishing():
            while running or waiting:
                if request.made or any(one.how != "done" for one in ended):
                    waiting.clear()
                    for child in running:
                        child.stop()
                while waiting and len(running) < n:
                    running.append(_Child(run, waiting.popleft(), threads))
                connection.wait([child.process.sentinel for child in running], AFRESH)
                written = [one.out for one in configs if (Path(one.out) / ENVIRONMENT).is_file()]
                if written and not told:
                    told = True
                    begun(Path(written[0]))
                for child in [child for child in running if not child.process.is_alive()]:
                    running.remove(child)
                    ended.append(child.end())
    finally:
        for child in running:
            child.process.kill()
    failed = [one.said for one in ended if one.how == "failed"]
    if failed:
        raise RunError(failed[0])
    if request.made or any(one.how == "stopped" for one in ended):
        raise Stopped(min(records.latest(Path(one.out) / CHECKPOINTS) for one in configs))


def _work(run: Callable[[RunConfig], Any], config: RunConfig, threads: int, pipe: connection.Connection) -> None:
    os.setsid()  # Ctrl-C at the terminal reaches the process that began it, and is passed on once
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    progress.LIVE, progress.WHO = False, f"{config.penalty.kind}: "  # bars of several runs would write over each other
    try:
        run(config)
        pipe.send(("done", None))
    except Stopped as leaving:
        pipe.send(("stopped", leaving.iteration))
    except KeyboardInterrupt:
        pipe.send(("stopped", 0))
    except (RunError, OSError) as error:
        pipe.send(("failed", f"{config.penalty.kind}: {error}"))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)
