"""What lies in a device's result files, as one CSV and as a page with figures; nothing is timed.

Whoever measures something of its own adds a section: a function in `sections.py`, and its title in SECTIONS there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.report import page, table
from benchmarks.report.device import Device

__all__ = ["Device", "add_parser", "main", "render"]


def add_parser(commands: Any) -> None:
    """`report` beside the other commands."""
    parser = commands.add_parser("report", help="figures.csv and a page with figures, from the result files")
    parser.add_argument(
        "--device", help="a folder below benchmarks/results, or the path of one; every one that has results unless told"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the CSV and the page, in place of <device>/ and <device>/report/"
    )


def main(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Write and say where; SystemExit(2) where there is nothing to report of."""
    asked = [results.FOLDER / arguments.device] if arguments.device else sorted(results.FOLDER.iterdir())
    devices = [device for device in map(Device.read, asked) if device.cases]
    if not devices:
        parser.error(f"--device {arguments.device}: no result files of cases in {asked[0]}")
    if arguments.out and len(devices) > 1:
        parser.error(f"--out wants one --device of {', '.join(device.name for device in devices)}")
    for device in devices:
        for path in render(device, arguments.out):
            print(path)
    return 0


def render(device: Device, out: Path | None = None) -> list[Path]:
    """Write figures.csv, report.md and its figures; → the first two paths.

    Args:
        out: where all of them go; else the CSV into the device's folder and the rest into report/ there.
    """
    numbers, folder = out or device.folder, out or device.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    csv = numbers / "figures.csv"
    csv.write_text(table.text(device), encoding="utf-8")
    return [csv, page.write(device, folder, csv)]
