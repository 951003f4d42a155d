"""The native libraries, built in place from this checkout."""

from __future__ import annotations

import subprocess
import sys

import torch

from benchmarks.gpu_campaign.record import LOG, Record
from benchmarks.results import ROOT
from fpo_kernels import library


def run(record: Record) -> None:
    """One row: the build's exit code. A library that is not there, or lacks the device's kernels, fails the part."""
    with (record.folder / LOG).open("a") as log:
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
    record.add(f"setup.py build_ext: exit code {done.returncode}", what="build_ext", exit_code=done.returncode)
    if done.returncode:
        record.fail(f"the native build failed; {record.folder / LOG} has its words")
    for operation in ("grad_products", "grad_sketch"):
        why = library.why_not(operation, torch.empty(0, device=record.device))
        record.add(f"{operation}: {why or 'there'}", what=operation, why_not=why)
        if why:
            record.fail(f"{operation}: {why}")
