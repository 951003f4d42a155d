"""tests/gpu in parallel, with what failed and what took long."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from typing import Any

import pytest

from benchmarks.gpu_campaign.record import Record
from benchmarks.results import ROOT

SLOWEST = 10
SAVED_EVERY = 50  # tests
# pyproject's options ask for plugins (pytest-benchmark) that a machine for kernels may lack
OPTIONS = "addopts=--strict-markers --import-mode=importlib"
# of each operation the definition at one shape, what engines rest on, and the contract
QUICK = "(definition and 577) or contract or nothing or company"


class Watch:
    """A pytest plugin that keeps counts, failures and the slowest tests as they come."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.counts: Counter[str] = Counter()
        self.slow: list[tuple[float, str]] = []
        self.skips: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            self.slow = sorted([*self.slow, (report.duration, report.nodeid)], reverse=True)[:SLOWEST]
            if report.failed:
                self.failures.append({"test": report.nodeid, "end": report.longreprtext[-800:]})
                self.record.say(f"FAILED {report.nodeid}: {report.longreprtext.strip().splitlines()[-1][:200]}")
            elif report.skipped and isinstance(report.longrepr, tuple):
                self.skips[report.longrepr[2]] += 1
            if sum(self.counts.values()) % SAVED_EVERY == 0:
                self.save()

    def save(self, **more: Any) -> None:
        row = {
            "counts": dict(self.counts),
            "skips": dict(self.skips),
            "failures": self.failures,
            "slowest": [{"seconds": round(seconds, 2), "test": test} for seconds, test in self.slow],
            **more,
        }
        self.record.rows[:] = [row]
        self.record.write()


def run(record: Record) -> None:
    """One row: counts, failures, skips by reason, the slowest. Any failure fails the part; so does, on a GPU, a skip
    for want of a library."""
    watch = Watch(record)
    cuda = record.device.type == "cuda"
    command = [str(ROOT / "tests" / "gpu"), "-q", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    command += ["-o", OPTIONS]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(14, (os.cpu_count() or 2) - 2))), "--dist", "worksteal"]
    else:
        record.say("pytest-xdist is not installed: one process")
    if record.quick and cuda:
        command += ["-k", QUICK]
    code = int(pytest.main(command, plugins=[watch]))
    watch.save(exit_code=code)
    record.say(", ".join(f"{count} {outcome}" for outcome, count in watch.counts.items()) or "no tests ran")
    if code != pytest.ExitCode.OK and not (code == pytest.ExitCode.NO_TESTS_COLLECTED and not cuda):
        record.fail(f"tests/gpu: exit code {code}, {watch.counts['failed']} failed")
    for reason, count in watch.skips.items():
        record.say(f"{count} skipped: {reason}")
        if cuda and "memory" not in reason and "free" not in reason:
            record.fail(f"{count} skipped: {reason}")
