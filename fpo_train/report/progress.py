"""Progress: a live bar on a terminal, lines in a log; a warning gets a line of its own in both.

What runs before the first iteration, and each phase of one, is named while it runs. All of it goes to stderr. A log's
lines begin with the time, end with what is left, and hold no control codes.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

from tqdm import tqdm

from .records import Row

LIVE = True  # whether a terminal is this process's alone, so that bars can be drawn on it
WHO = ""  # what a log's lines say is going on where several processes write into it
PATIENCE = 5.0  # seconds after which a log says what it is that lasts, and again how far it is
SILENT = 20.0  # seconds after which a silent log names the phase that an iteration is in
SLOW = 1.0  # seconds from which on each step is worth a line


def on_terminal(shown: bool = True) -> bool:
    """Whether bars are drawn."""
    return shown and LIVE and sys.stderr.isatty()


def say(line: str) -> None:
    """A line of a log, with the time before it."""
    print(f"{time.strftime('%H:%M:%S')}  {WHO}{line}", file=sys.stderr, flush=True)


@contextmanager
def stage(what: str, shown: bool = True) -> Iterator[None]:
    """Say what is going on: on a terminal for as long as it lasts, in a log by a line once it lasts long."""
    live = on_terminal(shown)
    later = threading.Timer(PATIENCE, say, [f"{what} …"])
    if live:
        print(f"{what} …", end="", file=sys.stderr, flush=True)
    elif shown:
        later.daemon = True
        later.start()
    try:
        yield
    finally:
        later.cancel()
        if live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Steps:
    """How far a piece of work is: a bar on a terminal; in a log a line a step, of quick ones a line every few seconds.

    Work that is done before there was anything to say leaves no line; a first step that lasts is told of meanwhile.

    Args:
        what: the work. unit: of its steps, in the plural. done: of `total` before it began.
        shown: False: nothing is said (all ranks but the main one).
        each: False: a log's lines come from `note` alone. even: False: steps take unlike times, and none is foretold.
    """

    def __init__(
        self, what: str, total: int, unit: str, done: int = 0, shown: bool = True, each: bool = True, even: bool = True
    ) -> None:
        self._what, self._total, self._unit, self._done, self._began = what, total, unit, done, done
        self._first = self._said = self._last = time.monotonic()
        self._even = even
        self._shown, self._lines = shown, shown and each and not on_terminal()
        self._meanwhile = threading.Timer(PATIENCE, self.note)
        self._meanwhile.daemon = True
        if self._lines:
            self._meanwhile.start()
        self._bar = None
        if on_terminal(shown):
            self._bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", dynamic_ncols=True, leave=False)

    def __enter__(self) -> Steps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        self._meanwhile.cancel()

    def __call__(self, steps: int = 1, more: str = "") -> None:
        """So many more are done; `more` is said behind them in a log."""
        self._meanwhile.cancel()
        self._done += steps
        if self._bar is not None:
            self._bar.update(steps)
        now = time.monotonic()
        if self._lines and (now - self._last >= SLOW or now - self._said >= PATIENCE):
            self.note(more)
        self._last = now

    def note(self, more: str = "") -> None:
        """A line of its own, with `more` behind how far it is."""
        line = f"{self._what}: {self._done} of {self._total} {self._unit}{self._left()}{more and f' ({more})'}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self._shown:
            say(line)
        self._said = time.monotonic()

    def _left(self) -> str:
        done, rest = self._done - self._began, self._total - self._done
        foretold = self._even and done and rest > 0
        return f", {duration((time.monotonic() - self._first) / done * rest)} left" if foretold else ""


class Progress:
    """Call it with each iteration's metrics; with `shown` False (all ranks but the main one) it says nothing."""

    def __init__(self, title: str, total: int, done: int, shown: bool = True) -> None:
        self._title, self._total, self._shown = title, total, shown
        self._done, self._said = done, time.monotonic()
        self._seconds: list[float] = []  # of the iterations so far
        live = on_terminal(shown)
        self._bar = tqdm(total=total, initial=done, desc=title, unit="it", dynamic_ncols=True) if live else None
        self._lines = shown and not live
        self._later: threading.Timer | None = None
        self._turn = threading.Lock()  # of the timer and who stops it

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._quiet()
        if self._bar is not None:
            self._bar.close()

    def phase(self, name: str) -> None:
        """Name the phase that runs now; in a log, each time that nothing has been said for a while."""
        self._quiet()
        if self._bar is not None:
            self._bar.set_description_str(f"{self._title} {name:<8}")
        elif self._lines:
            self._wait(name)

    def _wait(self, name: str) -> None:
        """Name a phase once the log has been silent for long enough."""
        self._later = threading.Timer(max(0.0, self._said + SILENT - time.monotonic()), self._lasts, [name])
        self._later.daemon = True
        self._later.start()

    def _lasts(self, name: str) -> None:
        with self._turn:
            if threading.current_thread() is self._later:  # it has not been stopped meanwhile
                self._say(f"{self._title} {self._done + 1:>4}/{self._total}  {name} …")
                self._wait(name)

    def _quiet(self) -> None:
        with self._turn:
            if self._later is not None:
                self._later.cancel()
            self._later = None

    def __call__(self, row: Row) -> None:
        """Show one iteration, and its warning if it has one."""
        figures = (
            f"reward {number(row['reward'])}, oracle {number(row['oracle_utility'])}, "
            f"gap {number(row['proxy_gap'])}, kl {number(row['kl'], '.4f')}"
        )
        self._quiet()
        self._done = row["iteration"]
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
        return f", {duration(left)} left" if iteration < self._total else ""

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)  # above the bar
        elif self._shown:
            print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time as text: 40 s, or 0:12:30."""
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else str(timedelta(seconds=whole))


def number(value: float | None, form: str = "+.3f") -> str:
    """A number as text; a dash where there is none."""
    if value is None:
        return "–"
    text = format(value, form)
    return format(0.0, form) if float(text) == 0 else text  # a zero has no sign
