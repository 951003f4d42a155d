"""A study's runs, a process each: some at a time, ended together, and what went wrong with those that failed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import yaml

from fpo_train.config import RunConfig
from fpo_train.report import records
from fpo_train.report.progress import Steps
from fpo_train.running.folder import plain
from fpo_train.running.stopping import Request
from fpo_train.whole import write_text

AFRESH = 0.2  # seconds between two looks at what has ended
# `fpo-train` that does not outlive the study: when its process is gone, this one's standard input has come to its end
COMMAND = (
    "import os, runpy, threading; "
    "threading.Thread(target=lambda: os.read(0, 1) or os.kill(os.getpid(), 9), daemon=True).start(); "
    "runpy.run_module('fpo_train.cli', run_name='__main__')"
)


def run_all(configs: Sequence[RunConfig], jobs: int, request: Request) -> list[str]:
    """Run what is not finished, `jobs` at a time; what went wrong with those that failed.

    Raises:
        KeyboardInterrupt: an end was asked for, and every run has ended.
    """
    waiting = deque(one for one in configs if not records.finished(Path(one.out), one.iterations))
    total, done = sum(one.iterations for one in configs), _iterations(configs)
    running: list[_Process] = []
    failed: list[str] = []
    try:
        with request.finishing(), Steps("study", total, "iterations", done, each=False) as steps:
            while running or waiting:
                if request.made:
                    waiting.clear()
                    for process in running:
                        process.stop()
                while waiting and len(running) < jobs:
                    running.append(_Process(waiting.popleft(), jobs))
                time.sleep(AFRESH)
                now = _iterations(configs)
                if now > done:  # a run that goes on first drops the rows after its checkpoint
                    steps(now - done)
                    done = now
                for process in [one for one in running if one.ended]:
                    running.remove(process)
                    failed += (fault := process.failure())
                    ended = len(configs) - len(running) - len(waiting)
                    told = "failed" if fault else "stopped" if request.made else "done"
                    steps.note(f"{process.named}: {told}; {ended} of {len(configs)} runs")
    finally:
        for process in running:
            process.kill()
    if request.made:
        raise KeyboardInterrupt
    return failed


def _iterations(configs: Sequence[RunConfig]) -> int:
    """How many have been done by now."""
    paths = [Path(one.out) / records.METRICS for one in configs]
    return sum(path.read_bytes().count(b"\n") for path in paths if path.is_file())


class _Process:
    """One run in a process of its own, with its part of the cores; Ctrl-C at the terminal is passed on once."""

    def __init__(self, config: RunConfig, jobs: int) -> None:
        self.named, self._stopped = f"{config.penalty.kind}, seed {config.seed}", False
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as the run goes on
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        settings = out.with_name(out.name + ".yaml")
        write_text(settings, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "run", "--config", str(settings)],
            env={**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            start_new_session=True,
        )

    @property
    def ended(self) -> bool:
        """Whether it has, however it did."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """Ask it to finish its iteration; asked again, it would not wait."""
        if not self._stopped:
            self._process.terminate()
        self._stopped = True

    def kill(self) -> None:
        """End it at once; what it has saved is there."""
        self._process.kill()
        self._process.wait()

    def failure(self) -> list[str]:
        """What went wrong, in a line; nothing where it is done or was stopped."""
        self._said.seek(0)
        told = self._said.read().decode(errors="replace").strip().splitlines() or ["no message"]
        self._said.close()
        if self._process.stdin:
            self._process.stdin.close()
        if self._stopped:
            return []
        return [f"{self.named}: {told[-1]}"] if self._process.returncode else []
