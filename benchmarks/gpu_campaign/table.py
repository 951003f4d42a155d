"""The campaign's tables, from what its parts left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Part = dict[str, Any]

ENDS = {0: "done", 1: "failed", 124: "out of time", 137: "out of time, killed"}


def tables(folder: Path, ended: Mapping[str, int]) -> str:
    """Markdown: how each part ended, what failed, then engine, kernels and launches.

    Args:
        folder: with <part>.json. ended: part → exit code, as `timeout` gives it.
    """
    parts = {name: _read(folder / f"{name}.json") for name in ended}
    some = next((part for part in parts.values() if part), {})
    versions = ", ".join(f"{name} {value}" for name, value in some.get("versions", {}).items() if value)
    lines = [f"{some.get('device_name', '?')}; {versions}; commit {some.get('commit')}", ""]
    for name, code in ended.items():
        part = parts[name]
        lines.append(f"- {name}: {ENDS.get(code, f'exit code {code}')}, {part.get('seconds', '?')} s")
        lines += [f"    - {why}" for why in part.get("failures", ())]
    if rows := parts.get("tests", {}).get("rows"):
        counts = rows[0]["counts"]
        lines += ["", "tests/gpu: " + (", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or "none ran")]
    engine = parts.get("engine", {}).get("rows", [])
    if engine:
        lines += ["", "Engine: ms (÷ forward + backward), error to the hooks' or the norms'", ""]
        lines += _grid(engine, _timed)
        lines += ["", "Memory: peak MiB beyond what was held before the call", ""]
        lines += _grid(engine, lambda row: f"{row['peak_bytes'] / 2**20:.0f}" if row.get("peak_bytes") else "–")
    kernels = parts.get("kernels", {}).get("rows", [])
    for rate in (row for row in kernels if "what" in row):
        unit = "TB/s, read + written" if rate["what"] == "copy" else "TFLOP/s"
        lines += ["", f"{rate['what']}: {rate['per_second'] / 1e12:.2f} {unit}"]
    if shapes := [row for row in kernels if "run" in row]:
        lines += [
            "",
            "Kernels: ms (× floor)",
            "",
            *_grid(shapes, lambda row: f"{row['ms']:.3f} (× {row['ratio']:.1f})"),
        ]
    if launches := parts.get("launches", {}).get("rows", []):
        lines += ["", "One warm call: launches of ours / all kernels (ms of kernels), waits, pageable copies", ""]
        lines += _grid(launches, _launched)
    return "\n".join(lines)


def _timed(row: Part) -> str:
    if "cannot" in row:
        return "does not fit" if "OutOfMemory" in row["cannot"] else "–"
    ratio = f" ({row['ratio']:.2f})" if row.get("ratio") else ""
    error = f", {row['error']:.0e}" if "error" in row else ""
    return f"{row['ms']:.2f}{ratio}{error}"


def _launched(row: Part) -> str:
    kernels = "" if row["kernels"] is None else f" / {row['kernels']} ({row['kernel_ms']:.1f} ms)"
    return f"{row['launches']}{kernels}, {row['synchronises']} waits, {row['copies_pageable']} copies"


def _grid(rows: Sequence[Part], cell: Any) -> list[str]:
    """Runs down, settings across."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    found = {(row["setting"], row["run"]): cell(row) for row in rows}
    head = ["", *settings]
    body = [[name, *(found.get((s, name), "") for s in settings)] for name in dict.fromkeys(row["run"] for row in rows)]
    widths = [max(len(line[n]) for line in [head, *body]) for n in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return [line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, body)]


def _read(path: Path) -> Part:
    try:
        part: Part = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return part
