"""Peak resident memory of one competitor in a process of its own, with everything that a process has: the
interpreter, its libraries, the model and the inputs.

python -m benchmarks.isolated benchmarks.cases.influence '30 layers, 8+1 of 64 float32' 'torch hooks'

The child builds the contest, runs the competitor CALLS times and writes one line of JSON; it never computes the
right answers, which take more memory than any competitor. The C library's allocator is left as it is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.meters import high_water_bytes
from benchmarks.registry import Case

ROOT = Path(__file__).resolve().parent.parent
# The allocator's luck moved a first call's high-water mark by 15% from process to process, two calls' by 4%.
CALLS = 2
WAIT_SECONDS = 600


def measure(case: Case, setting: str, competitor: str, quick: bool = False) -> dict[str, Any]:
    """Run a competitor on the CPU in a fresh process with this one's environment.

    Args:
        case: its `build` lives in the module that has it as CASE. setting: the name of one of its settings.
        competitor: a name that `build` gives. quick: which settings to look the name up in.

    Returns:
        rss_bytes: the high-water mark of the resident set (VmHWM) at the child's end, None where it cannot be read.
        rss_built_bytes: the same before the first run. If both are equal, the figure is that of building.
        rss_reason: why there is no figure, "" if there is.
    """
    if high_water_bytes() is None:
        return _nothing("no /proc/self/status here")
    command = [sys.executable, "-m", "benchmarks.isolated", case.build.__module__, setting, competitor]
    try:
        done = subprocess.run(
            [*command, *(["--quick"] if quick else [])], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        return _nothing(f"own process: {problem}")
    said = done.stdout.strip().splitlines()
    if done.returncode or not said:
        complaint = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return _nothing(f"own process: exit code {done.returncode}: {complaint}")
    found: dict[str, Any] = json.loads(said[-1])
    return {**found, "rss_reason": ""}


def _nothing(reason: str) -> dict[str, Any]:
    return {"rss_bytes": None, "rss_built_bytes": None, "rss_reason": reason}


def main(argv: Sequence[str] | None = None) -> int:
    """The child: exit 0 and a line of JSON, or 1 and the reason on the last line of stderr."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.isolated", description=__doc__)
    parser.add_argument("module", help="module with the case as CASE")
    parser.add_argument("setting")
    parser.add_argument("competitor")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args(argv)
    case: Case = importlib.import_module(arguments.module).CASE
    device = torch.device("cpu")
    setting = {setting.name: setting for setting in case.settings(arguments.quick, device)}[arguments.setting]
    contest = case.build(setting, device)
    if arguments.competitor in contest.cannot:
        print(contest.cannot[arguments.competitor], file=sys.stderr)
        return 1
    run = contest.competitors[arguments.competitor].run
    built = high_water_bytes()
    for _ in range(CALLS):
        run()
    print(json.dumps({"rss_bytes": high_water_bytes(), "rss_built_bytes": built}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
