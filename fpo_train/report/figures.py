"""The one style of all figures: a fixed colour and line style per penalty, one size of type, no global state.

Figures are built on `matplotlib.figure.Figure` with an Agg canvas, never through pyplot, so importing or
calling this module leaves the caller's backend, rcParams and open figures as they were.
"""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe & Ito (2008), the colours that stay apart under the common colour-vision deficiencies. The dash
# pattern says the same again for a print in grey.
PENALTY_STYLES: dict[str, dict[str, Any]] = {
    "none": {"color": "#D55E00", "linestyle": "-"},
    "practical": {"color": "#CC79A7", "linestyle": (0, (5, 1.5))},
    "relaxed": {"color": "#0072B2", "linestyle": (0, (5, 1.2, 1.2, 1.2))},
    "tracin": {"color": "#56B4E9", "linestyle": (0, (1.2, 1.2))},
    "exact": {"color": "#000000", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
    "residual": {"color": "#009E73", "linestyle": (0, (8, 2))},
}

INK, FAINT = "#222222", "#d8d8d8"  # of text and lines; an inline figure takes the page's own for them
PANEL = 4.2, 3.5  # inches of a page's figures: all alike, so that their type is of one size

RC_PARAMS: dict[str, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.2,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "savefig.dpi": 160,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults with `RC_PARAMS` on top, restored on leaving; the user's rc file has no say."""
    with matplotlib.style.context(["default", RC_PARAMS]):
        yield


def penalty_style(penalty: str) -> dict[str, Any]:
    """Keyword arguments (`color`, `linestyle`) every line of this penalty is drawn with.

    Raises ValueError for a name without a style.
    """
    if penalty not in PENALTY_STYLES:
        raise ValueError(f"penalty must be one of {', '.join(PENALTY_STYLES)}; got {penalty!r}")
    return dict(PENALTY_STYLES[penalty])


def new_figure(columns: int = 1, *, width: float = 6.4, height: float = 4.8) -> tuple[Figure, list[Axes]]:
    """A figure of `columns` panels side by side, `width` × `height` inches; call it inside `style()`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def new_panel() -> tuple[Figure, Axes]:
    """A figure of `PANEL`'s size whose axes leave room for labels of two lines and a legend of two rows; call it inside
    `style()`. Nothing is laid out: that would take most of the time."""
    figure = Figure(figsize=PANEL)
    return figure, figure.add_axes((0.28, 0.32, 0.68, 0.57))


def panel_legend(figure: Figure, axes: Axes) -> None:
    """One legend for a `new_panel`, along rows of three."""
    entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    if entries:
        handles, labels = zip(*(entry for first in range(3) for entry in entries[first::3]), strict=True)
        figure.legend(handles, labels, loc="lower center", ncols=3, handlelength=2.4, columnspacing=1.2)


def wrap(axes: Axes) -> None:
    """Break title and axis labels into lines that fit a figure of `PANEL`."""
    axes.set_title("\n".join(textwrap.wrap(axes.get_title(), 42)))
    axes.set_xlabel("\n".join(textwrap.wrap(axes.get_xlabel(), 42)))
    axes.set_ylabel("\n".join(textwrap.wrap(axes.get_ylabel(), 24)))


def legend_below(figure: Figure, axes: Axes, *, columns: int = 5) -> None:
    """One legend for the figure, of the entries of `axes`, under the panels where it covers no data.

    Entries run along rows of at most `columns`, and of as few as the figure is wide enough for; matplotlib alone would
    run them down the columns, and over the figure's edges.
    """
    entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    for few in range(min(columns, len(entries)), 0, -1):
        by_rows = [entry for first in range(few) for entry in entries[first::few]]
        handles, labels = zip(*by_rows, strict=True)
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=few)
        figure.draw_without_rendering()
        if legend.get_window_extent().width <= figure.bbox.width or few == 1:
            return
        legend.remove()


def save(figure: Figure, folder: str | Path, name: str, pdf: bool = False) -> Path:
    """Writes `folder/name.png` (the folder is made when missing) and returns its path; with `pdf` a `name.pdf` too.

    Version stamps and dates are left out of the files, so the same figure gives the same bytes.
    """
    path = Path(folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with style():
        figure.savefig(path, format="png", metadata={"Software": None})
        if pdf:
            stamps = dict.fromkeys(("Creator", "Producer", "CreationDate"))
            figure.savefig(path.with_suffix(".pdf"), format="pdf", metadata=stamps)
    return path


def save_svg(figure: Figure, folder: str | Path, name: str) -> Path:
    """Writes `folder/name.svg` and returns its path: see-through, its text as text; the same figure, the same bytes.

    Ink, and the black of a line, are the variables `--ink` and `--line` of the page that it is put in, and by itself
    what they are here.
    """
    path = Path(folder) / f"{name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn, stamps = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with style(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", metadata=stamps, transparent=True)
    text = re.sub(f"{INK}|#000000", "var(--ink,\\g<0>)", drawn.getvalue())
    path.write_text(text.replace(FAINT, f"var(--line,{FAINT})"), encoding="utf-8")
    return path


def inline_svg(path: str | Path, name: str) -> str:
    """The SVG file as an element of a page, said to be `name`; its ids are its own."""
    text = Path(path).read_text(encoding="utf-8")
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])  # HTML knows them
    wanted = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in wanted else "", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)


def inline_png(path: str | Path) -> str:
    """The PNG file as a `data:image/png;base64,…` URI, for reports that are one HTML file."""
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode("ascii")
