"""The controlled environments of the paper (arXiv 2605.04266): trajectories, results on disk, the table.

An environment (linear.py, neural.py) makes one `Trajectory` per penalty and seed; `write_results` turns them
into `summary.json`, `curves.csv` and the two figures.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from fpo_train import figures

Array = NDArray[np.float64]
Summary = dict[str, dict[str, dict[str, dict[str, float]]]]  # environment → penalty → seed → final numbers

COLUMNS = ("signal", "noise", "utility", "proxy_reward")


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """One run: entry 0 is the start, entry i the state after iteration i; each (iterations + 1,) float64."""

    signal: Array  # norm of the action on the axes the oracle rewards, action units
    noise: Array  # norm of the action on all other axes, action units
    utility: Array  # U(y), the oracle's score
    proxy_reward: Array  # the retrained reward model's score of the same action, in units of U

    @property
    def final(self) -> dict[str, float]:
        """Last signal norm, noise norm and utility; best utility of any iterate, start and end included."""
        return {
            "signal": float(self.signal[-1]),
            "noise": float(self.noise[-1]),
            "utility": float(self.utility[-1]),
            "best_utility": float(self.utility.max()),
        }


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """What the phase portrait draws behind the trajectories."""

    utility: Callable[[Array, Array], Array]  # (signal norm, noise norm) → utility of the best such action
    optimum: float  # signal norm of the best action, whose noise norm is 0
    peak: float  # its utility
    signal_axes: int  # how many axes the signal norm covers
    title: str  # the figure's title


Trajectories = Mapping[str, Mapping[int, Trajectory]]  # penalty → seed → trajectory


def check_folder(out: str | Path) -> Path:
    """Returns `out` as a path; raises FileExistsError when it is a file or a folder with something in it."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out must be a new or empty folder; {out} is not")
    return out


def write_results(environment: str, trajectories: Trajectories, landscape: Landscape, out: str | Path) -> Summary:
    """Writes `summary.json`, `curves.csv`, `figures/{phase,utility}.png`; returns the summary.

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
                writer.writerows([environment, penalty, seed, i, *row] for i, row in enumerate(rows))
    draw_phase(trajectories, landscape, out / "figures")
    draw_utility(trajectories, landscape, out / "figures")
    return summary


def format_table(summary: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """The summary as aligned plain text: a row per environment, penalty and seed, numbers with 4 decimals."""
    head = ["environment", "penalty", "seed", "signal", "noise", "utility", "best utility"]
    keys = ("signal", "noise", "utility", "best_utility")
    rows = [
        [environment, penalty, seed, *(f"{final[key]:.4f}" for key in keys)]
        for environment, by_penalty in summary.items()
        for penalty, by_seed in by_penalty.items()
        for seed, final in by_seed.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    )


def _draw_lines(axes: Axes, trajectories: Trajectories, x: str | None, y: str) -> None:
    """A line per penalty and seed: column `y` over column `x` or the iteration; later seeds are faint."""
    for penalty, by_seed in trajectories.items():
        for i, run in enumerate(by_seed.values()):
            values = getattr(run, y)
            across = np.arange(len(values)) if x is None else getattr(run, x)
            seeds = f" ({len(by_seed)} seeds)" if len(by_seed) > 1 else ""
            axes.plot(
                across,
                values,
                **figures.penalty_style(penalty),
                alpha=1.0 if i == 0 else 0.4,
                label=f"{penalty}{seeds}" if i == 0 else None,
                zorder=3,
            )


def _name_end(axes: Axes, penalty: str, run: Trajectory) -> None:
    """Penalty and final utility beside the trajectory's end, on the side its line did not come from."""
    rising = run.noise[-1] > 0.9 * run.noise.max()
    axes.annotate(
        f"{penalty}: U = {run.utility[-1]:.2f}",
        (float(run.signal[-1]), float(run.noise[-1])),
        xytext=(-9, 5 if rising else -5),
        textcoords="offset points",
        ha="right",
        va="bottom" if rising else "top",
        zorder=6,
    )


def draw_phase(trajectories: Trajectories, landscape: Landscape, folder: Path) -> Path:
    """`phase.png`: noise norm over signal norm on contours of utility, starts and ends marked."""
    with figures.style():
        figure, (axes,) = figures.new_figure(width=7.2, height=5.2)
        runs = [run for by_seed in trajectories.values() for run in by_seed.values()]
        right = 1.08 * max(landscape.optimum, *(float(run.signal.max()) for run in runs))
        top = 1.1 * max(1.0, *(float(run.noise.max()) for run in runs))
        signal, noise = np.meshgrid(np.linspace(-0.03 * right, right, 241), np.linspace(-0.08 * top, top, 241))
        utility = landscape.utility(signal, noise)
        levels = np.linspace(0, landscape.peak, 11)
        # vmax beyond the levels keeps the darkest grey light enough for the lines on it
        filled = axes.contourf(signal, noise, utility, levels=levels, cmap="Greys", vmin=0, vmax=2 * landscape.peak)
        axes.contour(signal, noise, utility, levels=levels, colors="white", linewidths=0.7)
        figure.colorbar(filled, ax=axes, label="utility U (oracle's score)", ticks=levels[::2])
        _draw_lines(axes, trajectories, "signal", "noise")
        for penalty, by_seed in trajectories.items():
            ends = np.array([(run.signal[-1], run.noise[-1]) for run in by_seed.values()])
            color = figures.penalty_style(penalty)["color"]
            axes.scatter(ends[:, 0], ends[:, 1], s=75, color=color, edgecolor="white", zorder=5)
            if len(by_seed) == 1:  # the ends of several seeds lie too close to name each
                _name_end(axes, penalty, next(iter(by_seed.values())))
        first = runs[0]
        mark: dict[str, Any] = {
            "linestyle": "none",
            "markeredgecolor": "black",
            "clip_on": False,
            "zorder": 6,
        }
        axes.plot(first.signal[0], first.noise[0], "o", markersize=9, color="white", label="start", **mark)
        axes.plot([], [], "o", markersize=9, color="#777777", label="end", linestyle="none")
        axes.plot(landscape.optimum, 0, "*", markersize=16, color="#F0E442", label="best action", **mark)
        axes.set(
            xlim=(-0.03 * right, right),
            ylim=(-0.08 * top, top),
            xlabel=f"signal: norm on the {landscape.signal_axes} rewarded axes (action units)",
            ylabel="noise: norm on all other axes (action units)",
            title=landscape.title,
        )
        axes.grid(False)
        figures.legend_below(figure, axes, columns=3)
        return figures.save(figure, folder, "phase")


def draw_utility(trajectories: Trajectories, landscape: Landscape, folder: Path) -> Path:
    """`utility.png`: utility and noise norm over the iterations, side by side."""
    with figures.style():
        figure, (left, right) = figures.new_figure(2, width=10, height=4.2)
        _draw_lines(left, trajectories, None, "utility")
        _draw_lines(right, trajectories, None, "noise")
        left.axhline(landscape.peak, color="#777777", linewidth=1, linestyle=":", label="best action")
        left.set(
            ylim=(0, 1.05 * landscape.peak),
            ylabel="utility U (oracle's score)",
            title="Utility of the policy's action",
        )
        right.set(ylabel="noise norm (action units)", title="Drift along axes that earn no utility")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xlabel("iteration (policy update, then reward-model update)")
            axes.margins(x=0.01)
        figures.legend_below(figure, left)
        return figures.save(figure, folder, "utility")
