"""fk.SketchStore against plain files: appending sketches, and finding the rows most like some queries."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import fpo_kernels as fk
from benchmarks.registry import TOLERANCE, Case, Competitor, Contest, Headline

OURS, PLAIN, WHOLE = "fk.SketchStore", "plain file", "whole in memory"
WAYS = (OURS, PLAIN, WHOLE)
DIM = 1024
BATCH = 1024  # rows an append
POOL = 8 * BATCH  # distinct rows that are appended over and over where only the writing is measured
QUERIES, COUNT = 16, 10
SAMPLE = 64  # rows read back to see that what was appended is there


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A store of `rows` fp32 sketches of `dim`.

    Attributes:
        does: "append" writes all of it anew, `batch` rows an append; "top" asks `queries` for their `count` best rows.
        rounds: the most that it is timed in.
    """

    name: str
    does: Literal["append", "top"]
    rows: int
    dim: int = DIM
    batch: int = BATCH
    queries: int = QUERIES
    count: int = COUNT
    rounds: int | None = None


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """200,000 sketches of 1024, or 20,000 if quick."""
    rows = 20_000 if quick else 200_000
    return [
        Setting(name=f"append {rows} x {DIM} by {BATCH}", does="append", rows=rows, rounds=3),
        Setting(name=f"top {COUNT} of {rows} x {DIM}, {QUERIES} queries", does="top", rows=rows),
    ]


def build(setting: Setting, device: torch.device) -> Contest:
    """In a folder of its own below the system's temporary one, removed with the contest. On a CPU wherever it runs."""
    folder = Path(tempfile.mkdtemp(prefix="fpo-store-"))
    try:
        contest = (_appends if setting.does == "append" else _searches)(setting, folder)
    except BaseException:
        shutil.rmtree(folder)
        raise
    weakref.finalize(contest, shutil.rmtree, folder)
    return contest


def _appends(setting: Setting, folder: Path) -> Contest:
    """Each begins with removing what it wrote before, and ends with what must be on the disk being there.

    The plain file has every batch on the disk before the next, like the store, and nothing to tell an unfinished one
    by; it keeps no ids. The last way gathers all rows in memory and saves them once.
    """
    pool = torch.randn(POOL, setting.dim, generator=torch.Generator().manual_seed(0))
    sample = torch.linspace(0, setting.rows - 1, SAMPLE).long()

    def batches() -> Iterator[tuple[int, Tensor]]:
        for first in range(0, setting.rows, setting.batch):
            yield first, pool[first % POOL :][: min(setting.batch, setting.rows - first)]

    def ours() -> Tensor:
        shutil.rmtree(folder / "store", ignore_errors=True)
        with fk.SketchStore(folder / "store", _space(setting)) as store:
            for first, rows in batches():
                store.append(rows, [f"example-{row}" for row in range(first, first + len(rows))])
        return store[sample]

    def plain() -> Tensor:
        path = folder / "plain.bin"
        path.unlink(missing_ok=True)
        with open(path, "wb", buffering=0) as file:
            for _, rows in batches():
                file.write(rows.numpy().data)
                os.fsync(file.fileno())
        return _mapped(path, setting)[sample]

    def saved() -> Tensor:
        path = folder / "sketches.pt"
        path.unlink(missing_ok=True)
        with open(path, "wb") as file:
            torch.save(torch.cat([rows for _, rows in batches()]), file)
            file.flush()
            os.fsync(file.fileno())
        return torch.load(path, mmap=True)[sample]

    return _contest({OURS: ours, PLAIN: plain, WHOLE: saved}, lambda: pool[sample % POOL], 0.0, setting.rounds)


def _searches(setting: Setting, folder: Path) -> Contest:
    """One store, whose file of rows the plain way maps and the last way reads whole, all from the page cache."""
    generator = torch.Generator().manual_seed(0)
    store = fk.SketchStore(folder / "store", _space(setting))
    for first in range(0, setting.rows, setting.batch):
        size = min(setting.batch, setting.rows - first)
        rows = torch.randn(size, setting.dim, generator=generator)
        store.append(rows, [f"example-{row}" for row in range(first, first + size)])
    store.close()
    queries = torch.randn(setting.queries, setting.dim, generator=generator)
    kept = store.folder / "rows.bin"

    def exact() -> Tensor:
        best = torch.empty(setting.queries, 0, dtype=torch.float64)
        for rows in _mapped(kept, setting).split(setting.batch):
            best = torch.cat([best, queries.double() @ rows.double().T], 1).topk(setting.count).values
        return best

    runs: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: store.top(queries, setting.count).scores,
        PLAIN: lambda: (queries @ _mapped(kept, setting).T).topk(setting.count).values,
        WHOLE: lambda: (queries @ _loaded(kept, setting).T).topk(setting.count).values,
    }
    return _contest(runs, exact, TOLERANCE[torch.float32], setting.rounds)


def _contest(
    runs: dict[str, Callable[[], Tensor]], exact: Callable[[], Tensor], budget: float, rounds: int | None
) -> Contest:
    return Contest(
        competitors={name: Competitor(run=run, budget=budget, rounds=rounds) for name, run in runs.items()},
        expected=lambda: {"product": exact()},
    )


def _space(setting: Setting) -> fk.SketchSpace:
    return fk.SketchSpace(dim=setting.dim, seed=0, layers=("all",), model="none")


def _mapped(path: Path, setting: Setting) -> Tensor:
    # "c": torch wants to be allowed to write; nothing does.
    return torch.from_numpy(np.memmap(path, np.float32, "c", shape=(setting.rows, setting.dim)))


def _loaded(path: Path, setting: Setting) -> Tensor:
    return torch.from_numpy(np.fromfile(path, np.float32)).view(setting.rows, setting.dim)


def summary(rows: list[dict[str, Any]]) -> str:
    """Rates of appending and reading, and what a process that searches has resident."""
    lines = []
    for row in rows:
        if row["status"] != "timed":
            continue
        setting, seconds = row["setting"], row["seconds"]["median"]
        mebibytes = setting["rows"] * setting["dim"] * 4 / 2**20
        line = f"{setting['name']}, {row['competitor']}: {setting['rows'] / seconds:,.0f} rows/s"
        line += f", {mebibytes / seconds:,.0f} MiB/s"
        if row.get("rss_bytes"):
            searching = (row["rss_bytes"] - row["rss_built_bytes"]) / 2**20
            line += f"; resident {row['rss_bytes'] / 2**20:,.0f} MiB, {searching:,.0f} of them by this"
        lines.append(f"{line} (the rows are {mebibytes:,.0f} MiB)")
    return "\n".join(lines) or "nothing was timed"


CASE = Case(
    name="store",
    description="fk.SketchStore, appending and searching, against a plain file (the baseline) and whole in memory",
    competitors=WAYS,
    baseline=PLAIN,
    ours=(OURS,),
    settings=settings,
    build=build,
    headlines=(Headline(text="the store / a plain file", over=OURS, under=PLAIN),),
    isolated=lambda setting: WAYS if setting.does == "top" else (),
    summary=summary,
)
