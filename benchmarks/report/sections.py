"""What a report has, a function a section: from the device's files to Markdown, and figures by the way.

A section of one's own: a function here, and its title in SECTIONS. It is called with whatever cases there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from benchmarks import cases
from benchmarks.report.crossovers import crossovers
from benchmarks.report.device import Device, commit_of, finished_of
from benchmarks.report.drawing import Dot
from benchmarks.results import duration
from benchmarks.runner import Row

Values = Mapping[str, Mapping[str, Dot]]


class Draw(Protocol):
    """Makes a figure."""

    def __call__(self, name: str, values: Values, axis: str, line: float | None = 1.0) -> str:
        """The line of Markdown that shows `drawing.dots` of the same arguments."""


Section = Callable[[Device, Draw], list[str]]

PEERS = ("packages", "influence")
MIB = 2**20


def files(device: Device, draw: Draw) -> list[str]:
    """A row a case: what was measured, at which commits, and when."""
    lines = []
    for name, result in device.cases.items():
        rows = result["rows"]
        settings, timed = {row["setting"]["name"] for row in rows}, sum(row["status"] == "timed" for row in rows)
        rows_timed = str(timed) if timed == len(rows) else f"{timed} of {len(rows)}"
        commits = dict.fromkeys((commit_of(row, result) or "")[:7] for row in rows)
        days = sorted({(finished_of(row, result) or "")[:10] for row in rows} - {""})
        when = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else ""
        lines.append((name, result["description"], str(len(settings)), rows_timed, ", ".join(commits), when))
    return table(("case", "what it is about", "settings", "timed", "commit", "finished"), lines)


def time_beside_peers(device: Device, draw: Draw) -> list[str]:
    """Medians and ratios to the baseline, and the ratios drawn."""
    lines = []
    for case, group, rows in _groups(device):
        base = device.cases[case]["baseline"]
        lines += [
            "",
            f"**{_called(case, group)}**: medians; in brackets over `{base}`, round by round. `once`: one call.",
            "",
        ]
        lines += grid(rows, _took)
        lines += ["", draw(f"time-{case}{group and '-' + group}", _ratios(rows), f"time over that of {base}")]
    return lines


def memory_beside_peers(device: Device, draw: Draw) -> list[str]:
    """The most held beyond what was held before a call, and of a whole process where that was measured."""
    lines = []
    for case, group, rows in _groups(device):
        base = device.cases[case]["baseline"]
        lines += [
            "",
            f"**{_called(case, group)}**: MiB beyond what was held before the call; in brackets over `{base}`.",
            "",
        ]
        least = {row["setting"]["name"]: row.get("peak_bytes") for row in rows if row["competitor"] == base}
        lines += grid(rows, lambda row, least=least: _held(row, least))  # type: ignore[misc]
        drawn: dict[str, dict[str, Dot]] = {}
        for row in rows:
            if row.get("peak_bytes"):
                size = row["peak_bytes"] / MIB
                drawn.setdefault(row["competitor"], {})[row["setting"]["name"]] = Dot(size, size, size)
        lines += ["", draw(f"memory-{case}{group and '-' + group}", drawn, "MiB beyond what was held before", None)]
        if any(row.get("rss_bytes") for row in rows):
            lines += ["", "MiB of a process of its own, model and libraries included:", ""]
            lines += grid([row for row in rows if row.get("rss_bytes")], _process)
    return lines


def right_beside_peers(device: Device, draw: Draw) -> list[str]:
    """Errors, the weights that answers are over, and the bytes of a projection."""
    lines = []
    for case, group, rows in _groups(device):
        if any(row.get("error") is not None for row in rows):
            lines += ["", f"**{_called(case, group)}**: relative error to float64, in norm{_covered(rows)}.", ""]
            lines += grid(rows, _error)
    return lines


def of_the_floor(device: Device, draw: Draw) -> list[str]:
    """The least time that a question takes over what was taken, by case; and the rates that it is worked out from."""
    lines = []
    for case, result in device.cases.items():
        rows = [row for row in result["rows"] if row.get("of_floor")]
        if not rows:
            continue
        rates = result.get("rates") or {}
        lines += ["", f"**{case}**: 1 is at the floor{_rates(rates)}.", ""]
        lines += grid(rows, lambda row: f"{row['of_floor']:#.2g}")
        drawn: dict[str, dict[str, Dot]] = {row["competitor"]: {} for row in rows}
        for row in rows:
            ends = [row["floor_seconds"] / row["seconds"][end] for end in ("median", "max", "min")]
            drawn[row["competitor"]][row["setting"]["name"]] = Dot(*ends)
        lines += ["", draw(f"floor-{case}", drawn, "least time that it takes over the time taken")]
    return lines


def scaling(device: Device, draw: Draw) -> list[str]:
    """How times grow, of the case of that name."""
    rows = device.rows("scaling")
    return ["", *grid(rows, _took)] if rows else []


def crossing(device: Device, draw: Draw) -> list[str]:
    """From how many tokens forming gradients is sooner: foretold by the cost model, and of the case `ways`."""
    found = crossovers(device.rows("ways"), "cpu" if device.name.startswith("cpu") else "cuda")
    lines = []
    for one in found:
        foretold = "never" if one.predicted is None else str(one.predicted)
        outside = f"not from {one.first} to {one.last}" if one.timed is None else f"{one.timed:.0f}"
        lines.append((f"{one.pairs} of {one.examples}, {one.p} to {one.q}", foretold, outside))
    if not lines:
        return []
    head = ("products", "tokens a text, foretold", "timed")
    return [
        "",
        "From so many tokens on, forming gradients is sooner than multiplying token by token.",
        "",
        *table(head, lines),
    ]


def absent(device: Device, draw: Draw) -> list[str]:
    """Cases without a file, files without floors, and what could not run or was wrong."""
    lines = []
    missing = [name for name in cases.cases() if name not in device.cases]
    if missing:
        lines.append(f"- Not measured on this device: {', '.join(missing)}.")
    older = [name for name, result in device.cases.items() if not any(row.get("of_floor") for row in result["rows"])]
    if older:
        lines.append(f"- Without a floor, by their nature or because they are older than floors: {', '.join(older)}.")
    for name, result in device.cases.items():
        why = Counter((r["competitor"], r["status"], r["reason"]) for r in result["rows"] if r["status"] != "timed")
        for (competitor, status, reason), count in why.items():
            lines.append(f"- {name}, {competitor}: {status} in {_settings(count)}: {reason}")
    return ["", *lines] if lines else []


SECTIONS: tuple[tuple[str, Section], ...] = (
    ("What was measured", files),
    ("Time beside peers", time_beside_peers),
    ("Memory beside peers", memory_beside_peers),
    ("Errors, weights and bytes beside peers", right_beside_peers),
    ("Of the floor", of_the_floor),
    ("Scaling", scaling),
    ("Crossovers", crossing),
    ("What is absent", absent),
)
"""Title → section, in their order; one that has nothing to say is named as absent."""


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    rows = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in (head, *lines)]
    return [f"| {rows[0]} |", "|---" * len(head) + "|", *(f"| {row} |" for row in rows[1:])]


def grid(rows: Sequence[Row], cell: Callable[[Row], str]) -> list[str]:
    """A table: settings down, competitors across; those that no setting has are left out."""
    names = list(dict.fromkeys(row["competitor"] for row in rows if row["status"] == "timed"))
    found = {(row["setting"]["name"], row["competitor"]): row for row in rows}
    lines = []
    for setting in dict.fromkeys(row["setting"]["name"] for row in rows):
        here = [found.get((setting, name)) for name in names]
        lines.append([setting, *("" if row is None else cell(row) for row in here)])
    return table(["", *names], lines)


def _groups(device: Device) -> list[tuple[str, str, list[Row]]]:
    """(case, question or "", rows) of the cases with peers; a case of several questions is taken apart."""
    found: dict[tuple[str, str], list[Row]] = {}
    for case in PEERS:
        for row in device.rows(case):
            found.setdefault((case, row["setting"].get("question", "")), []).append(row)
    return [(case, group, rows) for (case, group), rows in found.items()]


def _called(case: str, group: str) -> str:
    return f"{case}, {group}" if group else case


def _took(row: Row) -> str:
    if row["status"] != "timed":
        return _not(row)
    ratio = f" ({row['ratio']['median']:.2f})" if row.get("ratio") else ""
    return f"{duration(row['seconds']['median'])}{ratio}{', once' if len(row['samples']) == 1 else ''}"


def _held(row: Row, least: Mapping[str, int | None]) -> str:
    if row["status"] != "timed" or row.get("peak_bytes") is None:
        return _not(row)
    base = least.get(row["setting"]["name"])
    return f"{row['peak_bytes'] / MIB:.0f}" + (f" ({row['peak_bytes'] / base:.2f})" if base else "")


def _process(row: Row) -> str:
    ratio = f" ({row['rss_ratio']:.2f})" if row.get("rss_ratio") else ""
    return f"{row['rss_bytes'] / MIB:.0f}{ratio}"


def _not(row: Row) -> str:
    return "wrong" if row["status"] == "failed" else "–"


def _error(row: Row) -> str:
    if row.get("error") is None:
        return _not(row)
    kept = row.get("figures", {}).get("bytes")
    wrong = ", wrong" if row["status"] == "failed" else ""
    return f"{row['error']:.1e}" + (f", {kept:,.0f} B" if kept else "") + wrong


def _covered(rows: Sequence[Row]) -> str:
    counts = sorted({row["figures"]["parameters"] for row in rows if "parameters" in row.get("figures", {})})
    words = " or ".join(f"{count:,.0f}" for count in counts)
    bytes_too = "; bytes of what is kept of a text" if any("bytes" in row.get("figures", {}) for row in rows) else ""
    return (f", over {words} weights" if counts else "") + bytes_too


def _ratios(rows: Sequence[Row]) -> Values:
    found: dict[str, dict[str, Dot]] = {}
    for row in rows:
        if row.get("ratio"):
            dot = Dot(*(row["ratio"][end] for end in ("median", "min", "max")))
            found.setdefault(row["competitor"], {})[row["setting"]["name"]] = dot
    return found


def _rates(rates: Mapping[str, Any]) -> str:
    if not rates:
        return ""
    kinds = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in rates["matmul_flops_per_second"].items()
    )
    return f"; copies move {rates['copy_bytes_per_second'] / 1e9:.1f} GB/s, matrix products run at {kinds}"


def _settings(count: int) -> str:
    return "one setting" if count == 1 else f"{count} settings"
