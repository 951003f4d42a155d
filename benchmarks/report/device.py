"""The result files of one device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runner import Row

Result = dict[str, Any]


@dataclass(frozen=True)
class Device:
    """A folder of results.

    Attributes:
        folder: benchmarks/results/<device>. cases: case → its result file, by name; quick runs are left out.
    """

    folder: Path
    cases: dict[str, Result]

    @classmethod
    def read(cls, folder: Path) -> Device:
        """Every <case>.json of a folder, whatever its age; other files are no results of a case."""
        found = {}
        for path in sorted(folder.glob("*.json")):
            if not path.stem.endswith("-quick"):
                result = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(result, dict) and {"case", "rows", "versions"} <= result.keys():
                    found[result["case"]] = result
        return cls(folder, found)

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.name

    def rows(self, case: str) -> list[Row]:
        """Of a case; [] where it has no file."""
        rows: list[Row] = self.cases[case]["rows"] if case in self.cases else []
        return rows


def commit_of(row: Row, result: Result) -> str | None:
    """That a row was measured at: its own where it names one."""
    commit: str | None = row.get("commit", result["commit"])
    return commit


def finished_of(row: Row, result: Result) -> str | None:
    """When: a row that was kept from an earlier run says so itself, or nothing is known."""
    if "finished" in row or commit_of(row, result) == result["commit"]:
        when: str | None = row.get("finished", result["finished"])
        return when
    return None
