"""Progress: a live bar on a terminal, lines in a log; a warning gets a line of its own in both.

What runs before the first iteration, and each phase of one, is named while it runs.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

from tqdm import tqdm

from .records import Row

LIVE = True  # whether a terminal is this process's alone, so that bars can be drawn on it
PATIENCE = 5.0  # seconds after which a log says what it is that lasts


@contextmanager
def stage(what: str, shown: bool = True) -> Iterator[None]:
    """Say what is going on: on a terminal for as long as it lasts, in a log by a line once it lasts long."""
    live = shown and LIVE and sys.stderr.isatty()
    words = functools.partial(print, f"{what} …", end="" if live else "\n", file=sys.stderr, flush=True)
    later = threading.Timer(PATIENCE, words)
    if live:
        words()
    elif shown:
        later.daemon = True
        later.start()
    try:
        yield
    finally:
        later.cancel()
        if live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Progress:
    """Call it with each iteration's metrics; with `shown` False (all ranks but the main one) it says nothing."""

    def __init__(self, title: str, total: int, done: int, shown: bool = True) -> None:
        self._title, self._total, self._shown = title, total, shown
        self._seconds: list[float] = []  # of the iterations so far
        live = shown and LIVE and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=title, unit="it", dynamic_ncols=True) if live else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def phase(self, name: str) -> None:
        """Name the phase that runs now; in a log the iteration's line is enough."""
        if self._bar is not None:
            self._bar.set_description_str(f"{self._title} {name:<8}")

    def __call__(self, row: Row) -> None:
        """Show one iteration, and its warning if it has one."""
        figures = (
            f"reward {number(row['reward'])}, oracle {number(row['oracle_utility'])}, "
            f"gap {number(row['proxy_gap'])}, kl {number(row['kl'], '.4f')}"
        )
        self._seconds.append(sum(row["seconds"].values()))
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
            self._bar.update()
        else:
            lasted = f"{self._seconds[-1]:.1f} s{self._left(row['iteration'])}"
            self._say(f"{self._title} {row['iteration']:>4}/{self._total}  {figures}, {lasted}")
        if row.get("warning"):
            self._say(f"{self._title} {row['iteration']:>4}/{self._total}  warning: {row['warning']}")

    def _left(self, iteration: int) -> str:
        """How long the rest takes if its iterations take what the latest ten did."""
        latest = self._seconds[-10:]
        left = (self._total - iteration) * sum(latest) / len(latest)
        return f", {timedelta(seconds=round(left))} left" if iteration < self._total else ""

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)  # above the bar
        elif self._shown:
            print(line, file=sys.stderr, flush=True)


def number(value: float | None, form: str = "+.3f") -> str:
    """A number as text; a dash where there is none."""
    return "–" if value is None else format(value, form)
