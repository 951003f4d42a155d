"""Packages' processes from outside: started once, asked in turn, ended with the run."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.registry import Told

ROOT = Path(__file__).resolve().parent.parent.parent
PEERS = ROOT / ".peers" / "bin" / "python"
CARRIED = ROOT / ".peers" / "carried"


class Failed(Exception):  # noqa: N818 (named for what has happened)
    """A package's process cannot do what was asked; the message is what it said."""


@dataclasses.dataclass
class Package:
    """One package's process."""

    process: subprocess.Popen[str]
    folder: Path

    @classmethod
    def start(cls, name: str, python: Path, device: torch.device, *folders: Path) -> Package:
        """Its interpreter, in the root of the tree, which is all of the tree that it needs; `folders`: of modules."""
        paths = os.pathsep.join(map(str, (ROOT, *folders)))
        environment = {**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(
            [str(python), "-m", "benchmarks.packages.worker", name, device.type],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        atexit.register(process.kill)
        return cls(process, Path(tempfile.mkdtemp(prefix=f"fpo-{name}-")))

    def ask(self, **what: Any) -> dict[str, Any]:
        """Say a line, hear one.

        Raises:
            Failed: it says why it cannot, or it has ended.
        """
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"its process has ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        if "why" in found:
            raise Failed(found["why"])
        return found

    def run(self, way: str) -> Told:
        """Once: the answer, the time that it took there, and the memory."""
        path = self.folder / "answer.pt"
        found = self.ask(do="run", way=way, answer=str(path))
        return Told(torch.load(path, weights_only=True), found["seconds"], found["peak_bytes"])


_running: dict[tuple[str, torch.device], Package] = {}


def package(name: str, device: torch.device) -> Package:
    """The process of a package, started where there is none yet, or where it has ended.

    Raises:
        Failed: there is no environment that has it.
    """
    found = _running.get((name, device))
    if found is None or found.process.poll() is not None:
        found = _running[name, device] = _start(name, device)
    return found


def forget() -> None:
    """End all processes."""
    while _running:
        _running.popitem()[1].process.kill()


def _start(name: str, device: torch.device) -> Package:
    """Ours and plain torch with this interpreter, others with that of `make peers`.

    Where there is none, with this interpreter and what `make carried` has put into a folder.
    """
    if name in ("ours", "hooks"):
        return Package.start(name, Path(sys.executable), device)
    if PEERS.is_file():
        return Package.start(name, PEERS, device)
    if CARRIED.is_dir():
        return Package.start(name, Path(sys.executable), device, CARRIED)
    raise Failed("not installed: make peers")
