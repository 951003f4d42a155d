"""Times: of calls in turn, and of kernels alone by a replayed CUDA graph."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.meters import peak_bytes, seconds_per_call

Run = Callable[[], Tensor]

WARM = 2  # calls before the measured ones: looking a model over, compiling, capturing a shape seen again
ROUNDS = 5
REPEATED = 10  # calls in one graph: a single one takes less than the replay's start


def in_turn(runs: Mapping[str, Run], device: torch.device, rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """Name → {ms, least, greatest, peak_bytes}, or {cannot: why}: A B C, A B C, …, medians of `rounds`."""
    found: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        try:
            for _ in range(WARM):
                run()
            found[name] = {"peak_bytes": peak_bytes(run, device)}
        except Exception as problem:  # what does not run is told, and does not take the others down
            found[name] = {"cannot": _told(problem)}
            tidy(device)
    samples: dict[str, list[float]] = {name: [] for name, row in found.items() if "cannot" not in row}
    for _ in range(rounds):
        for name, own in samples.items():
            if "cannot" in found[name]:
                continue
            try:
                own.append(seconds_per_call(runs[name], 1, device) * 1e3)
            except Exception as problem:
                found[name] = {"cannot": _told(problem)}
    for name, own in samples.items():
        if "cannot" not in found[name]:
            found[name] |= {"ms": statistics.median(own), "least": min(own), "greatest": max(own)}
    return found


def once(run: Run, device: torch.device) -> dict[str, Any]:
    """{ms} of a single call: for what takes seconds."""
    try:
        return {"ms": seconds_per_call(run, 1, device) * 1e3}
    except Exception as problem:
        return {"cannot": _told(problem)}
    finally:
        tidy(device)


def captured(run: Run, calls: int = 1) -> Run:
    """The calls as one CUDA graph of what `run` reads now; → replays it, and returns what was captured.

    Raises: as torch does where the calls wait for the device, or copy from pageable memory.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def kernel_ms(run: Run, device: torch.device) -> tuple[float, str]:
    """ms a call and how it was timed: of the kernels alone, from a graph of ten calls, where it can be captured."""
    run()
    calls, how = 1, "call"
    if device.type == "cuda":
        try:
            run, calls, how = captured(run, REPEATED), REPEATED, "graph"
        except Exception as problem:
            how = f"call; no graph: {_told(problem)}"
    run()
    times = [seconds_per_call(run, 1, device) * 1e3 / calls for _ in range(ROUNDS)]
    return statistics.median(times), how


def tidy(device: torch.device) -> None:
    """Give back what nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _told(problem: Exception) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0][:200]}"
