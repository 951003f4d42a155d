"""What is kept of a run: where it ran, the file, and the table."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.floors import Rates
from benchmarks.registry import Case
from benchmarks.runner import Options, Row, seconds_ratio, spread

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"


def describe(case: Case, options: Options, rows: list[Row], rates: Rates) -> dict[str, Any]:
    """Everything that goes into the result file."""
    return {
        "case": case.name,
        "description": case.description,
        "baseline": case.baseline,
        "settings": {"device": options.device.type, "quick": options.quick, "repeats": options.repeats},
        **environment(options.device),
        "rates": rates.found(),
        "headlines": headlines(case, rows),
        "summary": case.summary(rows).splitlines() if case.summary else [],
        "rows": rows,
    }


def headlines(case: Case, rows: list[Row]) -> list[dict[str, Any]]:
    """The case's ratios for every setting, {setting, text, median, min, max}; those that have no figures are left out.

    Seconds are divided round by round as far as both were timed; one timed outside the rounds meets the other's
    median. Memory and other figures are one number each.
    """
    found: list[dict[str, Any]] = []
    for setting in dict.fromkeys(row["setting"]["name"] for row in rows):
        timed = {r["competitor"]: r for r in rows if r["setting"]["name"] == setting and r["status"] == "timed"}
        for headline in case.headlines:
            if headline.over in timed and headline.under in timed:
                over, under = timed[headline.over], timed[headline.under]
                text = headline.text
                if headline.figure == "seconds":
                    ratios = seconds_ratio(over, under)
                elif headline.figure == "memory":
                    how, ratios = _memory_ratio(over, under)
                    text = f"{text}, {how}"
                else:
                    ratios = [over["figures"][headline.figure] / under["figures"][headline.figure]]
                if ratios:
                    found.append({"setting": setting, "text": text, **spread(ratios)})
    return found


def _memory_ratio(over: Row, under: Row) -> tuple[str, list[float]]:
    for key, how in (("rss_bytes", "own processes"), ("peak_bytes", "beyond the start of the call")):
        if over.get(key) and under.get(key):
            return how, [over[key] / under[key]]
    return "", []


def lines(found: list[dict[str, Any]]) -> str:
    """The headlines, one a line below their setting: text, median (least to greatest)."""
    width = max(len(line["text"]) for line in found)
    printed: list[str] = []
    setting = None
    for line in found:
        if line["setting"] != setting:
            setting = line["setting"]
            printed.append(str(setting))
        between = f" ({line['min']:.2f} to {line['max']:.2f})" if line["min"] < line["max"] else ""
        printed.append(f"  {line['text']:<{width}}  {line['median']:.2f}{between}")
    return "\n".join(printed)


def known(case: Case, options: Options, folder: Path) -> list[Row]:
    """The rows that the file has, each with its commit, day and rates; none where all settings are asked for.

    Raises:
        ValueError: they are of another machine or other versions, and cannot stand beside new ones.
    """
    path, here = _path(case, options, folder), environment(options.device)
    if not options.only or not path.is_file():
        return []
    kept = json.loads(path.read_text(encoding="utf-8"))
    for key in ("cpu", "threads", "versions"):
        if kept[key] != here[key]:
            raise ValueError(f"{path}: its {key} is {kept[key]}, here it is {here[key]}; run all settings")
    return [_named(row, kept) for row in kept["rows"]]


def _named(row: Row, kept: dict[str, Any]) -> Row:
    """A row of an earlier run that says of itself what its file said of it."""
    found = {"commit": kept["commit"], **row}
    if found["commit"] == kept["commit"]:
        found.setdefault("finished", kept["finished"])
        if "floor" in row:
            found.setdefault("rates", kept["rates"])
    return found


def beside(case: Case, options: Options, rows: list[Row], older: list[Row]) -> list[Row]:
    """These rows, and the older ones of the settings that were not asked for, in the case's order."""
    order = [one.name for one in case.settings(options.quick, options.device)]
    others = set(order) - {row["setting"]["name"] for row in rows}
    old = [row for row in older if row["setting"]["name"] in others]
    return sorted([*rows, *old], key=lambda row: order.index(row["setting"]["name"]))


def environment(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the commit."""
    commit, dirty = revision()
    cpu = cpu_model()
    return {
        "device": slug(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "transformers")},
            "cuda": torch.version.cuda,
        },
        "commit": commit,
        "dirty": dirty,
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def slug(device: torch.device) -> str:
    """The device as a folder name: cpu-2threads, nvidia-h100-80gb-hbm3."""
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return f"{device.type}-{torch.get_num_threads()}threads"


def cpu_model() -> str:
    """As /proc/cpuinfo names it, else as Python does."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def revision() -> tuple[str | None, bool | None]:
    """The commit, and whether anything but results differs from it; None where git has no answer."""
    commit = _git("rev-parse", "--verify", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return commit, None if changes is None else bool(changes)


def write(case: Case, options: Options, result: dict[str, Any], folder: Path) -> Path:
    """Put the result at folder/<device>/<case>.json, whole or not at all; quick ones never replace full ones."""
    path = _path(case, options, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".tmp")
    half.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    half.replace(path)
    return path


def _path(case: Case, options: Options, folder: Path) -> Path:
    return folder / slug(options.device) / f"{case.name}{'-quick' if options.quick else ''}.json"


def table(rows: list[Row]) -> str:
    """Aligned columns.

    ratio is to the case's baseline; peak beyond what was held before the call; process all that a process of its
    own held at most, to base its ratio to the baseline's; of the floor the least time that the question takes over the
    median; others the CPU share that other processes took.
    """
    head = [
        "setting",
        "competitor",
        "median",
        "min",
        "max",
        "ratio",
        "min",
        "max",
        "rounds",
        "peak MiB",
        "process MiB",
        "to base",
        "of the floor",
        "error",
        "others",
        "note",
    ]
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    left = {0, 1, len(head) - 1}
    return "\n".join(
        "  ".join(
            c.ljust(w) if n in left else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cells(row: Row) -> list[str]:
    seconds, ratio, peak = (row.get(key) for key in ("seconds", "ratio", "peak_bytes"))
    error, others, rss, rss_ratio = (row.get(key) for key in ("error", "others_cpu_share", "rss_bytes", "rss_ratio"))
    of_floor = row.get("of_floor")
    keys = ("median", "min", "max")
    return [
        row["setting"]["name"],
        row["competitor"],
        *(duration(seconds[key]) if seconds else "" for key in keys),
        *(f"{ratio[key]:.2f}" if ratio else "" for key in keys),
        str(len(row["samples"])) if "samples" in row else "",
        "" if peak is None else f"{peak / 2**20:.0f}",
        "" if rss is None else f"{rss / 2**20:.0f}",
        "" if rss_ratio is None else f"{rss_ratio:.2f}",
        "" if of_floor is None else f"{of_floor:#.2g}",
        "" if error is None else f"{error:.0e}",
        f"{others:.0%}" if others is not None else "",
        row.get("rss_reason", "") if row["status"] == "timed" else f"{row['status']}: {row['reason']}",
    ]


def duration(seconds: float) -> str:
    """With its unit, three digits."""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * scale:.3g} {unit}"


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
