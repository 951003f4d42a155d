"""Figures of a study: what the reward model says, what is true, and the gap, over iterations, with bands over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fpo_train.report import figures

SMOOTH = 5  # iterations that a curve's points are means over: an iteration has few prompts

TITLES = {
    "gold": ("True utility of the policy's replies", "gold utility of candidates"),
    "proxy": ("What the reward model says of them", "reward since the start (log-odds)"),
    "gap": ("Gap between the two", "(r − r_ref) − (U − U_ref), best reply"),
}
SINCE_START = {"proxy"}  # less its first value: a seed's first reward model has a level of its own, which says nothing


def draw(table: Mapping[str, Mapping[int, list[dict[str, Any]]]], folder: Path, keys: Mapping[str, str]) -> Path:
    """`study.png` and `study.pdf`: a panel a quantity; a penalty's line is the mean over seeds, its band ± one standard
    error."""
    with figures.style():
        figure, axes = figures.new_figure(len(keys), width=5 * len(keys), height=4.2)
        for panel, (name, key) in zip(axes, keys.items(), strict=True):
            for kind, by_seed in table.items():
                _band(panel, kind, by_seed, key, name in SINCE_START)
            title, label = TITLES[name]
            panel.set(title=title, xlabel="iteration", ylabel=label)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        figures.legend_below(figure, axes[0], columns=6)
        return figures.save(figure, folder, "study", pdf=True)


def _band(panel: Axes, kind: str, by_seed: Mapping[int, list[dict[str, Any]]], key: str, since_start: bool) -> None:
    curves = np.array([[np.nan if row.get(key) is None else row[key] for row in rows] for rows in by_seed.values()])
    if not curves.size or np.isnan(curves).all():
        return
    smooth = np.stack([_running(curve) for curve in curves])
    if since_start:
        firsts = [curve[~np.isnan(curve)][:1] for curve in smooth]
        smooth = np.stack([curve - (first if first.size else 0) for curve, first in zip(smooth, firsts, strict=True)])
    x, mean = np.arange(1, smooth.shape[1] + 1), np.nanmean(smooth, axis=0)
    style = figures.penalty_style(kind)
    panel.plot(x, mean, label=kind, **style)
    if len(smooth) > 1:
        error = np.nanstd(smooth, axis=0, ddof=1) / (~np.isnan(smooth)).sum(axis=0) ** 0.5
        panel.fill_between(x, mean - error, mean + error, color=style["color"], alpha=0.15, linewidth=0)


def _running(curve: np.ndarray) -> np.ndarray:
    """Means over the last `SMOOTH` points, or as many as there are."""
    return np.array([np.nanmean(curve[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(curve))])
