"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts below bounds, and a sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str = "") -> list[str]:
        """Its samples; `labels` as `route="/score"`, or empty."""
        found, total, comma = [], 0, "," if labels else ""
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            found.append(f'{name}_bucket{{{labels}{comma}le="{bound}"}} {total}')
        outside = f"{{{labels}}}" if labels else ""
        return [*found, f"{name}_sum{outside} {self._sum}", f"{name}_count{outside} {total}"]


class Metrics:
    """Counters for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: dict[str, Histogram] = {}
        self._batches, self._texts = Histogram(SIZES), Histogram(SIZES)
        self._updates = self._warnings = 0
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        """Name → what it is, and how it is read when it is asked for."""

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request has its answer."""
        with self._lock:
            self._requests[route, status] += 1
            self._seconds.setdefault(route, Histogram(SECONDS)).add(seconds)

    def passed(self, requests: int, texts: int) -> None:
        """The model has answered so many requests in one pass, with so many completions between them."""
        with self._lock:
            self._batches.add(requests)
            self._texts.add(texts)

    def updated(self) -> None:
        """The reward model was trained."""
        with self._lock:
            self._updates += 1

    def warned(self) -> None:
        """A run that is watched looks like collapse."""
        with self._lock:
            self._warnings += 1

    def text(self) -> str:
        """All of it."""
        lines: list[str] = []

        def told(name: str, kind: str, what: str, samples: list[str]) -> None:
            lines.extend([f"# HELP {name} {what}", f"# TYPE {name} {kind}", *samples])

        with self._lock:
            counts = sorted(self._requests.items())
            name = "fpo_requests_total"
            samples = [f'{name}{{route="{route}",status="{status}"}} {n}' for (route, status), n in counts]
            told(name, "counter", "Requests answered.", samples)
            name = "fpo_request_seconds"
            every = sorted(self._seconds.items())
            samples = [line for route, one in every for line in one.lines(name, f'route="{route}"')]
            told(name, "histogram", "Seconds from a request's arrival to its answer.", samples)
            told("fpo_pass_requests", "histogram", "Requests a pass.", self._batches.lines("fpo_pass_requests"))
            told("fpo_pass_texts", "histogram", "Completions a pass.", self._texts.lines("fpo_pass_texts"))
            name = "fpo_updates_total"
            told(name, "counter", "Trainings of the reward model.", [f"{name} {self._updates}"])
            name = "fpo_collapse_warnings_total"
            told(name, "counter", "Warnings of collapse in a run that is watched.", [f"{name} {self._warnings}"])
        for name, (what, read) in self.gauges.items():
            told(name, "gauge", what, [f"{name} {read()}"])
        return "\n".join(lines) + "\n"
