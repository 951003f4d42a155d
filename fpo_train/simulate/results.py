"""What is written of a controlled environment's trajectories."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from .drawing import draw_all
from .trajectories import Landscape, Trajectories

Summary = dict[str, dict[str, dict[str, dict[str, float]]]]  # environment → penalty → seed → final numbers

COLUMNS = ("signal", "noise", "utility", "proxy_reward")


def asked(penalties: Iterable[str], seeds: Iterable[int], known: Sequence[str]) -> tuple[list[str], list[int]]:
    """Penalties and seeds without repetitions; raises ValueError where there are none, or a penalty is not known."""
    names, numbers = list(dict.fromkeys(penalties)), list(dict.fromkeys(seeds))
    if not names or not numbers:
        raise ValueError(f"penalties and seeds must not be empty; got {names} and {numbers}")
    for name in names:
        if name not in known:
            raise ValueError(f"penalty must be one of {', '.join(known)}; got {name!r}")
    return names, numbers


def check_folder(out: str | Path) -> Path:
    """Returns `out` as a path; raises FileExistsError when it is a file or a folder with something in it."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out must be a new or empty folder; {out} is not")
    return out


def write_results(environment: str, trajectories: Trajectories, landscape: Landscape, out: str | Path) -> Summary:
    """Writes `summary.json`, `curves.csv` and `figures/{phase,utility,pca}.{png,pdf}` and
    `figures/{phase,utility,noise}.svg`; returns the summary.

    Raises FileExistsError, with nothing touched, when `out` is not a new or empty folder.
    """
    out = check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    summary: Summary = {
        environment: {
            penalty: {str(seed): run.final for seed, run in by_seed.items()}
            for penalty, by_seed in trajectories.items()
        }
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    with (out / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["environment", "penalty", "seed", "iteration", *COLUMNS])
        for penalty, by_seed in trajectories.items():
            for seed, run in by_seed.items():
                rows = zip(*(getattr(run, column).tolist() for column in COLUMNS), strict=True)
                writer.writerows([environment, penalty, seed, i * run.every, *row] for i, row in enumerate(rows))
    draw_all(trajectories, landscape, out / "figures")
    return summary
