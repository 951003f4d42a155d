"""Trajectories of a controlled environment, and what is written of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fpo_train.simulate.drawing import draw_all

Array = NDArray[np.float64]
Summary = dict[str, dict[str, dict[str, dict[str, float]]]]  # environment → penalty → seed → final numbers

COLUMNS = ("signal", "noise", "utility", "proxy_reward")


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """One run: entry 0 is the start, entry i the state after iteration i · every; (n,) float64 each, path (n, d)."""

    path: Array  # the policy's action, or its mean
    every: int = 1  # iterations between entries
    signal: Array  # norm of the action on the axes the oracle rewards, action units
    noise: Array  # norm of the action on all other axes, action units
    utility: Array  # U(y), the oracle's score
    proxy_reward: Array  # the retrained reward model's score of the same action, in units of U
    oracle_calls: int  # actions that the oracle was asked about, for labels and for the penalty

    @property
    def iterations(self) -> Array:
        """The entries' iterations."""
        return np.arange(len(self.signal), dtype=np.float64) * self.every

    @property
    def final(self) -> dict[str, float]:
        """Last signal norm, noise norm and utility; best utility of any entry, start and end included."""
        return {
            "signal": float(self.signal[-1]),
            "noise": float(self.noise[-1]),
            "utility": float(self.utility[-1]),
            "best_utility": float(self.utility.max()),
            "oracle_calls": self.oracle_calls,
        }


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """The utility that the figures draw behind the trajectories: U = peak · exp(−rate · ‖y − best action‖²)."""

    optimum: float  # norm of the best action, which lies on the signal axes, the same on each
    peak: float  # its utility
    rate: float
    signal_axes: int  # how many axes the signal norm covers
    title: str  # the figures' title

    def utility(self, signal: Array, noise: Array) -> Array:
        """Of the actions with these two norms, that of the best one."""
        return self.peak * np.exp(-self.rate * ((signal - self.optimum) ** 2 + noise**2))


Trajectories = Mapping[str, Mapping[int, Trajectory]]  # penalty → seed → trajectory


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
    """Writes `summary.json`, `curves.csv` and `figures/{phase,utility,pca}.{png,pdf}`; returns the summary.

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


def format_table(summary: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """The summary as aligned plain text: a row a penalty and seed, numbers with 4 decimals, and medians over seeds."""
    head = ["environment", "penalty", "seed", "signal", "noise", "utility", "best utility", "oracle calls"]
    keys = ("signal", "noise", "utility", "best_utility")
    rows = []
    for environment, by_penalty in summary.items():
        for penalty, by_seed in by_penalty.items():
            for seed, final in by_seed.items():
                numbers = [f"{final[key]:.4f}" for key in keys]
                rows.append([environment, penalty, seed, *numbers, f"{final['oracle_calls']:.0f}"])
            if len(by_seed) > 1:
                middle = {key: float(np.median([final[key] for final in by_seed.values()])) for key in keys}
                rows.append([environment, penalty, "median", *(f"{middle[key]:.4f}" for key in keys), ""])
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    )
