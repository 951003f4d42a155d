"""Progress: a live bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm

from .metrics import Row


class Progress:
    """Call it with each iteration's metrics."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self._title, self._total = title, total
        live = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=title, unit="it", dynamic_ncols=True) if live else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, row: Row) -> None:
        """Show one iteration."""
        figures = (
            f"reward {row['reward']:+.3f}, oracle {row['oracle_utility']:+.3f} nats/token, "
            f"gap {row['proxy_gap']:+.3f}, kl {row['kl']:.4f}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
            self._bar.update()
        else:
            seconds = sum(row["seconds"].values())
            line = f"{self._title} {row['iteration']:>4}/{self._total}  {figures}, {seconds:.1f} s"
            print(line, file=sys.stderr, flush=True)
