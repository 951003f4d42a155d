"""python -m benchmarks.gpu_campaign PART | folder | table: what campaign.sh calls.

Exit codes: 0 done, 1 something failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.gpu_campaign.record import Record
from benchmarks.gpu_campaign.table import tables

# part → its module; in the order in which they run
PARTS = {
    "build": "build",
    "tests": "suite",
    "engine": "engine",
    "kernels": "kernels",
    "launches": "launches",
}
NAMED = {"packages": "others", "train": "training"}  # that run where they are named alone


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part, print the folder of results, or print and keep the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_campaign", description=__doc__)
    parser.add_argument("what", choices=[*PARTS, *NAMED, "folder", "table"])
    parser.add_argument("ended", nargs="*", metavar="part=code", help="of `table`: how the parts ended")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the results")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no usable GPU here")
    device = torch.device(arguments.device)
    folder = arguments.out or results.FOLDER / results.slug(device) / f"campaign{'-quick' if arguments.quick else ''}"
    if arguments.what == "folder":
        print(folder)
        return 0
    if arguments.what == "table":
        ended = {name: int(code) for name, _, code in (one.partition("=") for one in arguments.ended)}
        text = tables(folder, ended)
        (folder / "table.md").write_text(text + "\n")
        print(text, flush=True)
        return 0
    record = Record(folder=folder, part=arguments.what, device=device, quick=arguments.quick)
    try:
        importlib.import_module(f"benchmarks.gpu_campaign.{(PARTS | NAMED)[arguments.what]}").run(record)
    except Exception as problem:  # what was found so far is kept, and so is why no more was
        traceback.print_exc()
        record.fail(f"{type(problem).__name__}: {problem}")
    record.write()
    return int(bool(record.failures))


if __name__ == "__main__":
    sys.exit(main())
