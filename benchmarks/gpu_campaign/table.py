"""The campaign's tables, from what its parts left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_campaign.engine import BACKWARD, CAPTURED, CAPTURED_BACKWARD, FORWARD, HOOKS, LOOP, STEERING

Part = dict[str, Any]

# what is printed, over, under, and of which figure
WANTED = (
    ("steering ÷ backward (≤ 1.10 at T ≥ 256)", STEERING, BACKWARD, "ms"),
    ("captured steering ÷ captured backward (≤ 1.10)", CAPTURED, CAPTURED_BACKWARD, "ms"),
    ("captured steering ÷ eager backward (< 1 at T = 64)", CAPTURED, BACKWARD, "ms"),
    ("steering ÷ torch hooks (≤ 1)", STEERING, HOOKS, "ms"),
    ("sketch 1024 ÷ backward (≤ 1.08 at T ≥ 256)", "sketch 1024", BACKWARD, "ms"),
    ("sketch 4096 ÷ backward (≤ 1.15 at T ≥ 256)", "sketch 4096", BACKWARD, "ms"),
    ("autograd call each ÷ steering (≥ 20)", LOOP, STEERING, "ms"),
    ("memory, steering ÷ backward (≤ 1.10)", STEERING, BACKWARD, "peak_bytes"),
)

HUNGRY = (FORWARD, BACKWARD, STEERING, HOOKS, "sketch 4096", "steering, all parameters")

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
        lines += [
            "",
            "Engine: ms (÷ forward + backward), error (to hooks; sketch: norms; captured: eager)",
            "",
        ]
        lines += _grid(engine, _timed)
        lines += ["", "Beside what is wanted", "", *_grid(_wanted(engine), lambda row: f"{row['value']:.2f}")]
        lines += ["", "Memory: peak MiB beyond what was held before the call", ""]
        held = [row for row in engine if row["run"] in HUNGRY and row.get("peak_bytes") is not None]
        lines += _grid(held, lambda row: f"{row['peak_bytes'] / 2**20:.0f}")
    kernels = parts.get("kernels", {}).get("rows", [])
    for rate in (row for row in kernels if "what" in row):
        unit = "TB/s, read + written" if rate["what"] == "copy" else "TFLOP/s"
        lines += ["", f"{rate['what']}: {rate['per_second'] / 1e12:.2f} {unit}"]
    if shapes := [row for row in kernels if "run" in row]:
        turned = [{**row, "setting": row["run"], "run": row["setting"]} for row in shapes]
        lines += ["", "Kernels: ms (× floor)", ""]
        lines += _grid(turned, lambda row: f"{row['ms']:.3f} (× {row['ratio']:.1f})")
    if launches := parts.get("launches", {}).get("rows", []):
        lines += ["", "One warm call: launches of ours / all kernels (ms of kernels), waits, pageable copies", ""]
        lines += _grid(launches, _launched)
    if packages := [row for row in parts.get("packages", {}).get("rows", []) if "ms" in row]:
        lines += ["", "Beside other packages: ms (÷ fpo_kernels), MiB", ""]
        turned = [{**row, "setting": row["run"], "run": row["setting"]} for row in packages]
        lines += _grid(turned, _beside)
    if training := parts.get("train", {}).get("rows", []):
        lines += ["", "An iteration: ms (predicted); GiB at the peak (planned)", "", *_grid(training, _trained)]
    return "\n".join(lines)


def chart(rows: Sequence[Part]) -> list[str]:
    """The README's table of an engine part: ratios to forward + backward by length, and of memory at the longest."""
    named = {
        BACKWARD: "forward + activation-only backward",
        STEERING: "`fk.Influence.steering`",
        HOOKS: "token products by plain torch hooks",
        LOOP: "one autograd call a candidate",
        "norms": "`norms`",
        "sketch 1024": "`sketch(dim=1024)`",
        "sketch 4096": "`sketch(dim=4096)`",
        "direction": "`direction`",
        "steering, all parameters": "`steering` over all parameters",
        "steering, head": "`steering` over the score head",
    }
    found = {(row["setting"], row["run"]): row for row in rows if "ms" in row}
    settings = sorted({one for one, run in found if run == "norms"}, key=lambda one: int(one.rpartition(" ")[2]))
    last = settings[-1]
    lines = [f"| | {' | '.join(settings)} | memory, {last} |", "|---|" + "---|" * (len(settings) + 1)]
    for run, name in named.items():
        ratios = [f"{found[one, run]['ratio']:.2f}" if (one, run) in found else "" for one in settings]
        memory = (
            f"{found[last, run]['peak_bytes'] / found[last, BACKWARD]['peak_bytes']:.2f}"
            if (last, run) in found
            else ""
        )
        lines.append(f"| {name} | {' | '.join(ratios)} | {memory} |")
    return lines


def _wanted(rows: Sequence[Part]) -> list[Part]:
    """WANTED's ratios in every setting that has both."""
    found = {(row["setting"], row["run"]): row for row in rows}
    ratios = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        for text, over, under, figure in WANTED:
            above, below = (found.get((setting, name), {}).get(figure) for name in (over, under))
            if above and below:
                ratios.append({"setting": setting, "run": text, "value": above / below})
    return ratios


def _timed(row: Part) -> str:
    if "cannot" in row:
        return "does not fit" if "OutOfMemory" in row["cannot"] else "–"
    ratio = f" ({row['ratio']:.2f})" if row.get("ratio") else ""
    ratio += ", not captured" if row.get("runs_eagerly") else ""
    error = f", {row['error']:.0e}" if "error" in row else ""
    return f"{row['ms']:.2f}{ratio}{error}"


def _beside(row: Part) -> str:
    held = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**20:.0f}"
    return f"{row['ms']:.1f} ({row['ratio']:.2f}){held}"


def _launched(row: Part) -> str:
    kernels = "" if row["kernels"] is None else f" / {row['kernels']} ({row['kernel_ms']:.1f} ms)"
    return f"{row['launches']}{kernels}, {row['synchronises']} waits, {row['copies_pageable']} copies"


def _trained(row: Part) -> str:
    predicted = f" ({row['predicted_ms']:.0f})" if row.get("predicted_ms") else ""
    if not row.get("peak_bytes"):
        return f"{row['ms']:.0f}{predicted}"
    peak, planned = (row[f"{kind}_bytes"] / 2**30 for kind in ("peak", "planned"))
    return f"{row['ms']:.0f}{predicted}; {peak:.2f} ({planned:.2f})"


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
