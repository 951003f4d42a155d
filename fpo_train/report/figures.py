"""The one style of all figures: a fixed colour and line style per penalty, PNG output, no global state.

Figures are built on `matplotlib.figure.Figure` with an Agg canvas, never through pyplot, so importing or
calling this module leaves the caller's backend, rcParams and open figures as they were.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
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

RC_PARAMS: dict[str, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
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


def inline_png(path: str | Path) -> str:
    """The PNG file as a `data:image/png;base64,…` URI, for reports that are one HTML file."""
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode("ascii")
