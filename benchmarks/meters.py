"""Clock and memory."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

Run = Callable[[], object]
STATUS = Path("/proc/self/status")


def synchronize(device: torch.device) -> None:
    """Wait for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(
    run: Run, calls: int, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Mean time of `calls` calls in a row: `clock` on a CPU, CUDA events on a GPU (gaps between kernels count)."""
    synchronize(device)
    if device.type != "cuda":
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """The most memory that one call held beyond what was held before it; None where it cannot be read.

    On a GPU: torch's allocator. On Linux: the resident set's high-water mark, reset before the call, so pages
    that the C library kept from earlier calls do not count.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _reset_high_water():
        run()
        return None
    before = _kilobytes("VmRSS")
    run()
    return max(0, _kilobytes("VmHWM") - before) * 1024


def high_water_bytes() -> int | None:
    """The most memory that this process ever had resident (VmHWM); None where it cannot be read."""
    return _kilobytes("VmHWM") * 1024 if STATUS.exists() else None


def release() -> None:
    """Collect what nothing refers to any more and give its pages back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)


class Bystanders:
    """How busy other processes than this one and its children keep the CPU, from now on.

    Timings next to busy neighbours mean little.
    """

    def __init__(self) -> None:
        self._start = self._clocks()

    def share(self) -> float | None:
        """Their part of all cores' time since the start, 0 to 1; None where it cannot be read."""
        then, now = self._start, self._clocks()
        if then is None or now is None:
            return None
        wall, busy, own = (after - before for before, after in zip(then, now, strict=True))
        return min(1.0, max(0.0, (busy - own) / (wall * (os.cpu_count() or 1))))

    @staticmethod
    def _clocks() -> tuple[float, float, float] | None:
        try:  # cpu user nice system idle iowait irq softirq steal …
            ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, _own_seconds()


def _own_seconds() -> float:
    """CPU time of this process, of its children, and of theirs that have ended."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()  # state, parent, …
            if int(fields[1]) == os.getpid():
                total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def available_bytes(device: torch.device) -> int | None:
    """Memory that a new allocation may count on; None where it cannot be read."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _reset_high_water() -> bool:
    try:
        libc = ctypes.CDLL(ctypes.util.find_library("c"))
        libc.malloc_trim(0)  # give kept pages back, so that reusing them shows
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return STATUS.exists()


def _kilobytes(key: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(key + ":"))
