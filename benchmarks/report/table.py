"""figures.csv: one row a case, setting and competitor, as the device's result files have them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from benchmarks.report.device import Device, Result, commit_of, finished_of
from benchmarks.runner import Row

COLUMNS = (
    "case",
    "setting",
    "competitor",
    "status",
    "p20_seconds",
    "p50_seconds",
    "p80_seconds",
    "samples",
    "ratio",
    "peak_bytes",
    "process_bytes",
    "error",
    "of_floor",
    "threads",
    "device",
    "cpu",
    "torch",
    "triton",
    "transformers",
    "commit",
    "finished",
)


def text(device: Device) -> str:
    """The whole file; empty cells are what a row has not, numbers have six digits."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in device.cases.values():
        for row in result["rows"]:
            writer.writerow({key: _cell(value) for key, value in cells(row, result).items()})
    return out.getvalue()


def cells(row: Row, result: Result) -> dict[str, Any]:
    """Column → value; None for none."""
    samples = row.get("samples")
    versions = result["versions"]
    return {
        "case": result["case"],
        "setting": row["setting"]["name"],
        "competitor": row["competitor"],
        "status": row["status"],
        **{f"p{percent}_seconds": percentile(samples, percent) if samples else None for percent in (20, 50, 80)},
        "samples": len(samples) if samples else None,
        "ratio": (row.get("ratio") or {}).get("median"),
        "peak_bytes": row.get("peak_bytes"),
        "process_bytes": row.get("rss_bytes"),
        "error": row.get("error"),
        "of_floor": row.get("of_floor"),
        "threads": result["threads"],
        "device": result["device_name"],
        "cpu": result["cpu"],
        **{name: versions.get(name) for name in ("torch", "triton", "transformers")},
        "commit": commit_of(row, result),
        "finished": finished_of(row, result),
    }


def percentile(samples: Sequence[float], percent: float) -> float:
    """Of the samples, straight lines between them in order: 50 is their median."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
