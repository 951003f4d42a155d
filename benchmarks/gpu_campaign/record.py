"""What a part found, on disk as it comes: a part that is cut short leaves what it had."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import environment

LOG = "campaign.log"

Row = dict[str, Any]


@dataclass(kw_only=True)
class Record:
    """Rows of one part, written to <folder>/<part>.json with every row; what is said goes to the log as well.

    Attributes:
        failures: what makes the part fail in the end.
    """

    folder: Path
    part: str
    device: torch.device
    quick: bool
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._environment = environment(self.device)
        self.write()

    def add(self, said: str = "", **row: Any) -> None:
        """Keep a row, and say so where there is something to say."""
        self.rows.append(row)
        self.write()
        if said:
            self.say(said)

    def fail(self, why: str) -> None:
        """The part goes on and ends with exit code 1."""
        self.failures.append(why)
        self.write()
        self.say(f"FAILED: {why}")

    @property
    def seconds(self) -> float:
        """Since the part began."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """A line to the terminal and to the log, at once."""
        line = f"[{self.part} {self.seconds:5.1f} s] {text}"
        print(line, flush=True)
        with (self.folder / LOG).open("a") as log:
            log.write(line + "\n")

    def write(self) -> None:
        """Whole or not at all."""
        content = {
            "part": self.part,
            "quick": self.quick,
            **self._environment,
            "seconds": round(self.seconds, 1),
            "failures": self.failures,
            "rows": self.rows,
        }
        half = self.folder / f"{self.part}.tmp"
        half.write_text(json.dumps(content, indent=1) + "\n")
        half.replace(self.folder / f"{self.part}.json")
