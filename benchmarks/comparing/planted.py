"""Whether `compare` tells a slowdown from noise, and noise from a slowdown, on this machine as it is now.

python -m benchmarks.comparing.planted [--times 20] [--slower 20]

The working tree is compared with itself, so many times with a slowdown planted in the head (the timing process works
on, after every call, for a share of the CPU time of that call) and so many times without, by turns. Right is "slower"
with it and "no change" without it; undecided is wrong. Written to benchmarks/results/<device>/compare.json. Ends with 0
where all were told right, else with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, results
from benchmarks.comparing.measuring import Options, Pairs, Row, measure
from benchmarks.comparing.trees import tree
from benchmarks.comparing.verdict import ERROR, LOOKS
from benchmarks.registry import Case

CASE, SETTING = "products", "gram ragged 0-257, 576 to 1"  # ten milliseconds a call
TOGETHER = 5  # so many comparisons of each kind by the same processes; then new ones


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.comparing.planted", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--times", type=int, default=20, help="comparisons with and without (%(default)s)")
    parser.add_argument("--slower", type=float, default=20.0, help="the planted slowdown in percent (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=results.FOLDER, help="folder of results; <device>/compare.json below"
    )
    arguments = parser.parse_args(argv)
    options = Options(device=torch.device("cpu"))
    begun, loads = time.monotonic(), [os.getloadavg()[0]]
    rows: list[Row] = []
    for first in range(0, arguments.times, TOGETHER):
        for row in batch(min(TOGETHER, arguments.times - first), arguments.slower / 100, cases.cases()[CASE], options):
            rows.append(row)
            loads.append(os.getloadavg()[0])
            told = "right" if row["right"] else "WRONG"
            planted = f"{arguments.slower:.0f} % planted" if row["planted"] else "nothing planted"
            effort = f"{row.get('rounds', 0):>4} rounds {row.get('seconds', 0.0):>4.0f} s"
            print(f"{len(rows):>3}  {planted:<16} {effort}  {told}: {row['text']}", flush=True)
    right = {kind: sum(row["right"] for row in rows if row["planted"] == kind) for kind in (True, False)}
    lines = [
        f"a slowdown of {arguments.slower:.0f} % was told in {right[True]} of {arguments.times} comparisons",
        f"no change was told in {right[False]} of {arguments.times} comparisons",
    ]
    print("\n".join(lines))
    path = arguments.out / results.slug(options.device) / "compare.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        **results.environment(options.device),
        "timed": f"{CASE}: {SETTING}",
        "slower": arguments.slower / 100,
        "margin": options.margin,
        "error": ERROR,
        "looks": LOOKS,
        "comparisons": arguments.times,
        "told_with": right[True],
        "told_without": right[False],
        "load_average": {"least": min(loads), "mean": sum(loads) / len(loads), "most": max(loads)},
        "cores": os.cpu_count(),
        "seconds": time.monotonic() - begun,
        "summary": lines,
        "rows": [{key: value for key, value in row.items() if key != "samples"} for row in rows],
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return int(sum(right.values()) < 2 * arguments.times)


def batch(times: int, slower: float, case: Case, options: Options) -> Iterator[Row]:
    """So many comparisons with and without, by turns, each way with processes of its own."""
    with contextlib.ExitStack() as stack:
        scratch = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="fpo-planted-", ignore_cleanup_errors=True))
        )
        here = stack.enter_context(tree(str(results.ROOT), scratch / "unused"))
        pairs = {
            planted: stack.enter_context(
                Pairs(here, here, options.device, scratch / str(planted), slower if planted else 0.0)
            )
            for planted in (True, False)
        }
        for _ in range(times):
            for planted in (True, False):
                row = measure(pairs[planted], case, SETTING, options)
                yield {**row, "planted": planted, "right": row["verdict"] == ("slower" if planted else "no change")}


if __name__ == "__main__":
    sys.exit(main())
