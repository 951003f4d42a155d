"""Figures of a report: a dot a setting and competitor on a logarithmic axis, in the style of all figures.

They are as wide as a telephone shows them at their own size, and bring the colours of light and dark along.
"""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fpo_train.report import figures
from fpo_train.report.markup import STYLE

WIDTH = figures.PANEL[0]  # inches, 403 pixels
LABEL, AXIS = 22, 28  # letters in a line of a competitor's name, and of what the axis is
ACROSS = 22  # letters on a whole axis
STEPS = ((1, 1.2, 1.5, 2, 3, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,))  # of a decade's ticks
# Okabe & Ito (2008), as in figures.py; the forms say the same again in grey.
DOTS = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#000000", "P"),
)


@dataclass(frozen=True)
class Dot:
    """A value, and the least and greatest that were seen."""

    value: float
    least: float
    greatest: float


def dots(folder: Path, name: str, values: Mapping[str, Mapping[str, Dot]], axis: str, line: float | None = 1.0) -> Path:
    """Write `folder/name.svg`: a line a competitor, a dot a setting; the path.

    Args:
        values: competitor → setting → what was measured, above 0. More settings than DOTS has are not told apart.
        axis: what the values are. line: where a line across stands.
    """
    settings = list(dict.fromkeys(setting for found in values.values() for setting in found))
    told_apart = len(settings) <= len(DOTS)
    labels = ["\n".join(textwrap.wrap(competitor, LABEL, break_on_hyphens=False)) for competitor in values]
    entries = [textwrap.shorten(one, 46) for one in short(settings)] if told_apart and len(settings) > 1 else []
    height = (
        0.9
        + 0.19 * (len(axis) // AXIS)
        + 0.17 * len(values)
        + 0.19 * sum(label.count("\n") + 1 for label in labels)
        + 0.21 * len(entries)
    )
    with figures.style():
        figure, (axes,) = figures.new_figure(width=WIDTH, height=height)
        if line is not None:
            axes.axvline(line, color=figures.INK, linewidth=1)
        spread = 0.5 / max(1, len(settings) - 1) if told_apart else 0.0
        for place, found in enumerate(values.values()):
            for setting, dot in found.items():
                n = settings.index(setting)
                color, marker = DOTS[n] if told_apart else DOTS[0]
                y = place + (spread * (n - (len(settings) - 1) / 2) if told_apart else 0.0)
                axes.plot([dot.least, dot.greatest], [y, y], color=color, linewidth=1.2, alpha=0.6)
                axes.plot([dot.value], [y], color=color, marker=marker, markersize=5, alpha=1 if told_apart else 0.5)
        axes.set_xscale("log")
        ends = [end for found in values.values() for dot in found.values() for end in (dot.least, dot.greatest)]
        _ticks(axes, ends if line is None else [*ends, line])
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(textwrap.fill(axis, AXIS))
        if entries:
            handles = [
                Line2D([], [], linestyle="", color=color, marker=marker, label=entry)
                for entry, (color, marker) in zip(entries, DOTS, strict=False)
            ]
            figure.legend(handles=handles, loc="outside lower left", handlelength=1.0, borderaxespad=0.0)
        path = figures.save_svg(figure, folder, name)
    path.write_text(_by_itself(path.read_text(encoding="utf-8")), encoding="utf-8")
    return path


def short(names: Sequence[str]) -> list[str]:
    """What tells names of settings apart: without the parts that all of them begin with, and their one dtype."""
    ends = {name.rpartition(" ")[2] for name in names}
    if len(ends) == 1 and hasattr(torch, *ends):
        names = [name.rpartition(" ")[0] for name in names]
    parts = [name.split(", ") for name in names]
    most = min(map(len, parts)) - 1
    same = next((n for n in range(most) if len({one[n] for one in parts}) > 1), most)
    return [", ".join(one[same:]) for one in parts]


def _ticks(axes: Axes, ends: Sequence[float]) -> None:
    """Round numbers, written out, as many as have room; the axis reaches over all of the ends."""
    low, high = min(ends) / 1.15, max(ends) * 1.15
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    letters = ACROSS / math.log10(high / low)  # that stand in a decade
    for steps in STEPS:
        ticks = [tick for decade in decades for step in steps if low <= (tick := step * 10.0**decade) <= high]
        room = [letters * math.log10(right / left) for left, right in itertools.pairwise(ticks)]
        taken = [(len(_plain(left)) + len(_plain(right))) / 2 + 0.75 for left, right in itertools.pairwise(ticks)]
        if all(one <= other for one, other in zip(taken, room, strict=True)):
            break
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))


def _plain(value: float) -> str:
    return f"{value:,.10g}"


def _by_itself(text: str) -> str:
    """An SVG with the colours of the pages, light and dark, and paper beneath."""
    colours = STYLE.partition("*{")[0].strip()
    paper = '<rect width="100%" height="100%" style="fill:var(--paper,#ffffff)"/>'
    return re.sub(r"(<svg[^>]*>)", lambda found: f"{found[1]}\n <style>{colours}</style>\n {paper}", text, count=1)
