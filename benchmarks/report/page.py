"""report.md and the figures beside it."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.report import drawing
from benchmarks.report.device import Device
from benchmarks.report.sections import SECTIONS, Draw, Values
from benchmarks.results import ROOT

MEANING = ROOT / "docs" / "benchmarks.md"


def write(device: Device, folder: Path, csv: Path) -> Path:
    """Write the page and its figures into a folder that is there; the page's path.

    Args:
        csv: the file with all numbers, which the page leads to.
    """

    def draw(name: str, values: Values, axis: str, line: float | None = 1.0) -> str:
        if values:
            drawing.dots(folder, name, values, axis, line)
        return shown(name, values, axis, line)

    path = folder / "report.md"
    path.write_text(text(device, folder, csv, draw), encoding="utf-8")
    return path


def shown(name: str, values: Values, axis: str, line: float | None = 1.0) -> str:
    """The line of Markdown that shows a figure, which is not drawn."""
    return f"![{axis}]({name}.svg)" if values else "Nothing to draw."


def text(device: Device, folder: Path, csv: Path, draw: Draw = shown) -> str:
    """The page as it stands in a folder."""

    def link(path: Path) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    some = next(iter(device.cases.values()))
    versions = {tuple(result["versions"].items()) for result in device.cases.values()}
    each = [", ".join(f"{name} {value}" for name, value in one if value) for one in sorted(versions, key=str)]
    lines = [
        f"# Benchmarks: {device.name}",
        "",
        f"{some['device_name']}, {some['threads']} threads; {' or '.join(each)}.",
        "",
        "Written by `python -m benchmarks report` from the result files, and to be written again when they change.",
        f"[All numbers]({link(csv)}), a row a setting and competitor; [how they were found]({link(MEANING)}).",
    ]
    for title, section in SECTIONS:
        found = section(device, draw) or ["Nothing yet: no result file of this device has it."]
        lines += ["", f"## {title}", *([""] if found[0] else []), *found]
    return "\n".join(lines) + "\n"
