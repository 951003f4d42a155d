"""Figures of a controlled environment: where each penalty takes the policy, and what that earns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpo_train.report import figures

from .trajectories import Array, Landscape, Trajectories, Trajectory


def draw_all(trajectories: Trajectories, landscape: Landscape, folder: Path) -> None:
    """`phase`, `utility` and `pca`, each as PNG and PDF, and the `draw_panels`."""
    with figures.style():
        for name, draw in (("phase", draw_phase), ("utility", draw_utility), ("pca", draw_pca)):
            figures.save(draw(trajectories, landscape), folder, name, pdf=True)
    draw_panels(trajectories, landscape, folder)


def draw_panels(trajectories: Trajectories, landscape: Landscape, folder: Path) -> None:
    """`phase`, `utility` and `noise` as SVG, each of the size of a page's figures."""
    with figures.style():
        phase = draw_phase(trajectories, landscape, figures.PANEL, named=False)
        figures.wrap(phase.axes[0])
        figures.save_svg(phase, folder, "phase")
        for name, draw in (("utility", _utility), ("noise", _noise)):
            figure, axes = figures.new_panel()
            draw(axes, trajectories, landscape)
            axes.set_xlabel("iteration")
            figures.wrap(axes)
            figures.panel_legend(figure, axes)
            figures.save_svg(figure, folder, name)


def draw_phase(
    trajectories: Trajectories, landscape: Landscape, size: tuple[float, float] = (7.2, 5.2), named: bool = True
) -> Figure:
    """Noise norm over signal norm on contours of utility, starts and ends marked, with `named` by their penalties;
    `size` in inches."""
    figure, (axes,) = figures.new_figure(width=size[0], height=size[1])
    runs = list(_runs(trajectories))
    right = 1.08 * max(landscape.optimum, *(float(run.signal.max()) for run in runs))
    top = 1.1 * max(1.0, *(float(run.noise.max()) for run in runs))
    signal, noise = np.meshgrid(np.linspace(-0.03 * right, right, 241), np.linspace(-0.08 * top, top, 241))
    utility = landscape.utility(signal, noise)
    levels = np.linspace(0, landscape.peak, 11)
    # vmax beyond the levels keeps the darkest grey light enough for the lines on it
    filled = axes.contourf(signal, noise, utility, levels=levels, cmap="Greys", vmin=0, vmax=2 * landscape.peak)
    axes.contour(signal, noise, utility, levels=levels, colors="white", linewidths=0.7)
    figure.colorbar(filled, ax=axes, label="utility U (oracle's score)", ticks=levels[::2])
    for penalty, by_seed in trajectories.items():
        _lines(axes, penalty, [(run.signal, run.noise) for run in by_seed.values()])
        if named and len(by_seed) == 1:  # the ends of several seeds lie too close to name each
            _name_end(axes, penalty, next(iter(by_seed.values())))
    first = runs[0]
    mark: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "black", "clip_on": False, "zorder": 6}
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
    return figure


def draw_utility(trajectories: Trajectories, landscape: Landscape) -> Figure:
    """Utility and noise norm over the iterations, side by side: a line a run; of several seeds, median and range."""
    figure, (left, right) = figures.new_figure(2, width=10, height=4.2)
    _utility(left, trajectories, landscape)
    _noise(right, trajectories, landscape)
    figures.legend_below(figure, left)
    return figure


def _utility(axes: Axes, trajectories: Trajectories, landscape: Landscape) -> None:
    for penalty, by_seed in trajectories.items():
        runs = list(by_seed.values())
        _band(axes, penalty, runs[0].iterations, np.stack([run.utility for run in runs]))
    axes.axhline(landscape.peak, color="#777777", linewidth=1, linestyle=":", label="best action")
    axes.set(
        ylim=(0, 1.05 * landscape.peak), ylabel="utility U (oracle's score)", title="Utility of the policy's action"
    )
    _over_iterations(axes)


def _noise(axes: Axes, trajectories: Trajectories, landscape: Landscape) -> None:
    for penalty, by_seed in trajectories.items():
        runs = list(by_seed.values())
        _band(axes, penalty, runs[0].iterations, np.stack([run.noise for run in runs]))
    axes.set(ylabel="noise norm (action units)", title="Drift along axes that earn no utility")
    axes.set_ylim(bottom=0)
    _over_iterations(axes)


def _over_iterations(axes: Axes) -> None:
    axes.set_xlabel("iteration (policy update, then reward-model update)")
    axes.margins(x=0.01)


def draw_pca(trajectories: Trajectories, landscape: Landscape) -> Figure:
    """The policies' paths on the two directions along which all of them together spread most."""
    figure, (axes,) = figures.new_figure(width=7.2, height=5.2)
    together = np.concatenate([run.path for run in _runs(trajectories)])
    middle = together.mean(0)
    _, spread, directions = np.linalg.svd(together - middle, full_matrices=False)
    share = spread**2 / max(float((spread**2).sum()), 1e-300)
    for penalty, by_seed in trajectories.items():
        flat = [(run.path - middle) @ directions[:2].T for run in by_seed.values()]
        _lines(axes, penalty, [(one[:, 0], one[:, 1]) for one in flat])
    best = np.zeros(together.shape[1])
    best[: landscape.signal_axes] = landscape.optimum / landscape.signal_axes**0.5
    x, y = (best - middle) @ directions[:2].T
    mark: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "black", "zorder": 6}
    axes.plot(x, y, "*", markersize=16, color="#F0E442", label="best action", **mark)
    axes.set(
        xlabel=f"first principal component ({share[0]:.0%} of the spread, action units)",
        ylabel=f"second principal component ({share[1]:.0%}, action units)",
        title=landscape.title,
    )
    figures.legend_below(figure, axes, columns=3)
    return figure


def _runs(trajectories: Trajectories) -> Iterator[Trajectory]:
    for by_seed in trajectories.values():
        yield from by_seed.values()


def _lines(axes: Axes, penalty: str, curves: list[tuple[Array, Array]]) -> None:
    """A line a seed, later seeds faint, their ends marked."""
    style = figures.penalty_style(penalty)
    seeds = f" ({len(curves)} seeds)" if len(curves) > 1 else ""
    for i, (x, y) in enumerate(curves):
        label = f"{penalty}{seeds}" if i == 0 else None
        axes.plot(x, y, **style, alpha=1.0 if i == 0 else 0.4, label=label, zorder=3)
        axes.scatter(x[-1:], y[-1:], s=75, color=style["color"], edgecolor="white", zorder=5)


def _band(axes: Axes, penalty: str, x: Array, values: Array) -> None:
    """The median over seeds and the range of all of them; values (seeds, n)."""
    style = figures.penalty_style(penalty)
    seeds = f" ({len(values)} seeds)" if len(values) > 1 else ""
    axes.plot(x, np.median(values, axis=0), **style, label=f"{penalty}{seeds}", zorder=3)
    if len(values) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)


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
