"""Progress: a live bar on a terminal, lines in a log; a warning gets a line of its own in both."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm

from .records import Row


class Progress:
    """Call it with each iteration's metrics; with `shown` False (all ranks but the main one) it says nothing."""

    def __init__(self, title: str, total: int, done: int, shown: bool = True) -> None:
        self._title, self._total, self._shown = title, total, shown
        live = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=title, unit="it", dynamic_ncols=True) if live else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, row: Row) -> None:
        """Show one iteration, and its warning if it has one."""
        figures = (
            f"reward {number(row['reward'])}, oracle {number(row['oracle_utility'])}, "
            f"gap {number(row['proxy_gap'])}, kl {number(row['kl'], '.4f')}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
            self._bar.update()
        else:
            seconds = sum(row["seconds"].values())
            self._say(f"{self._title} {row['iteration']:>4}/{self._total}  {figures}, {seconds:.1f} s")
        if row.get("warning"):
            self._say(f"{self._title} {row['iteration']:>4}/{self._total}  warning: {row['warning']}")

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)  # above the bar
        elif self._shown:
            print(line, file=sys.stderr, flush=True)


def number(value: float | None, form: str = "+.3f") -> str:
    """A number as text; a dash where there is none."""
    return "–" if value is None else format(value, form)
