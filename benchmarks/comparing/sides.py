"""The two processes from outside: each times one tree and waits while the other does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.comparing.trees import Tree

SCRIPT = Path(__file__).with_name("timed.py")


class SideError(Exception):
    """A process cannot do what was asked; the message begins with which revision, and is what was said."""


class Side:
    """One tree's process; a context manager that ends it with all that it has started."""

    def __init__(self, tree: Tree, device: torch.device, scratch: Path, burnt: float = 0.0) -> None:
        """Start it.

        Args:
            tree: what it times, first on its sys.path. device: where. scratch: a folder for what it writes.
            burnt: work added to every call, as a share of the call's own; for `comparing.planted`.
        """
        self.tree = tree
        self.answers = scratch / "answer.pt"
        scratch.mkdir(parents=True, exist_ok=True)
        self._errors = scratch / "stderr.txt"
        settings = {
            "PYTHONPATH": str(tree.path),
            "PYTHONHASHSEED": "0",
            "TOKENIZERS_PARALLELISM": "false",
            "TMPDIR": str(scratch),
        }
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(tree.path), device.type, str(burnt)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=tree.path,
                env={**os.environ, **settings},
                start_new_session=True,
            )

    def say(self, do: str, **what: Any) -> None:
        """Ask for something without waiting for it."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The answer to what was said.

        Raises:
            SideError: it says why it cannot, or it has ended.
        """
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            told = (self._errors.read_text().strip().splitlines() or ["it said nothing"])[-1]
            raise SideError(f"{self.tree.given}: its process has ended with {code}: {told}")
        found: dict[str, Any] = json.loads(line)
        if "why" in found:
            raise SideError(f"{self.tree.given}: {found['why']}")
        return found

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """Say and hear."""
        self.say(do, **what)
        return self.hear()

    def begin(self) -> dict[str, Any]:
        """Begin a round, in a fresh process where there can be one.

        Raises:
            SideError: also where what it has imported is not the tree's.
        """
        found = self.ask("begin")
        for name, path in found["files"].items():
            if not Path(path).resolve().is_relative_to(self.tree.path):
                raise SideError(f"{self.tree.given}: {name} was imported from {path}, wanted from {self.tree.path}")
        return found

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its session: what it forked too
        self._process.wait()
