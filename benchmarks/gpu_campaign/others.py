"""Other people's packages beside ours: what `python -m benchmarks run packages` measures, of those that run here.

They are those of `make peers`, or of `make carried`, which a checkout can bring to a machine without a network.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cases.packages import CASE
from benchmarks.gpu_campaign.record import Record
from benchmarks.results import duration
from benchmarks.runner import Options, Row, chosen, run_case

ONLY = {False: ("8 of 64", "32 of 256"), True: ("norms, 2 layers", "gram, 2 layers")}
"""Parts of the names of settings, in full and if quick, of which six layers and two are run."""


def run(record: Record) -> None:
    """One row a setting and way; a wrong answer fails the part, a package that is not here does not."""
    options = Options(device=record.device, quick=record.quick, repeats=3)
    for setting in chosen(CASE, options):
        if not any(part in setting.name for part in ONLY[record.quick]) or setting.layers > 6:
            continue
        for row in run_case(CASE, replace(options, only=setting.name)):
            _keep(record, setting.name, row)


def _keep(record: Record, setting: str, row: Row) -> None:
    way, status = row["competitor"], row["status"]
    if status != "timed":
        record.add("", setting=setting, run=way, status=status, reason=row["reason"])
        if status == "failed":
            record.fail(f"{setting}: {way}: {row['reason']}")
        return
    ms, ratio = 1e3 * row["seconds"]["median"], row["ratio"] and row["ratio"]["median"]
    said = f"{setting}: {way}: {duration(ms / 1e3)}, {ratio or 0:.2f} of ours, off by {row['error']:.0e}"
    record.add(
        said,
        setting=setting,
        run=way,
        ms=ms,
        ratio=ratio,
        samples=row["samples"],
        peak_bytes=row["peak_bytes"],
        error=row["error"],
    )
