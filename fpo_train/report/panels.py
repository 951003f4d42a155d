"""The figures of a run's metrics: curves over iterations, a line a penalty, and where the time goes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from . import figures

Rows = list[dict[str, Any]]
Runs = dict[str, Rows]  # penalty → metrics rows

# figure → panels: key in metrics.jsonl, title, axis label with unit ({utility} and {gap}: those of the run's oracle)
PANELS = {
    "reward": [
        ("reward", "The proxy: reward model's score", "mean reward of candidates (log-odds)"),
        ("oracle_utility", "The oracle", "{utility}"),
    ],
    "overconfidence": [
        ("proxy_gap", "Gap between proxy and oracle", "{gap}"),
        ("overconfidence", "Overconfidence", "c = σ(r − r_ref) − p*\nof the best reply (probability)"),
    ],
    "steering": [
        ("steering", "Steering that is left", "c·⟨ḡ, u⟩ of the best reply\n(squared norm of ∇r)"),
        ("penalty_to_reward_std", "Weight of the penalty", "spread of the raw penalty\n÷ spread of the reward"),
    ],
    "movement": [
        ("kl", "Policy's distance from the base model", "KL(policy ‖ base) (nats/token)"),
        ("reward_model_drift", "Reward model's drift", "‖φ − φ₀‖ ÷ ‖φ₀‖"),
    ],
    "replies": [
        ("reply_tokens", "Length of replies", "mean length of candidates (tokens)"),
        ("repetition", "Repetition", "repeated 3-grams of a reply (share)"),
    ],
}
CAPTIONS = {
    "reward": "Left: what the reward model says of all candidates. Right: what the oracle says of the reply that "
    "was learnt. Collapse is a left panel that rises while the right one falls; a dotted line is a warning of it.",
    "overconfidence": "How far the reward model's preference for the learnt reply runs ahead of the oracle's.",
    "steering": "Left: what retraining on a learnt reply takes off the mean reward of all candidates, per unit of "
    "learning rate; a foresighted policy keeps it small. Right: γ has no meaning without this ratio.",
    "movement": "How far the policy and the reward model have moved from where they began.",
    "replies": "How long the candidates are, and how much of them repeats itself.",
    "seconds": "Wall-clock time of an iteration by phase, mean over the run.",
}
UNITS = {"base": "nats/token", "gold": "log-odds", "function": "its own units"}
PHASES = {"generate": "#999999", "score": "#56B4E9", "update": "#E69F00", "retrain": "#009E73"}


def draw(runs: Runs, folder: Path, oracle: str) -> list[str]:
    """Draw every figure that the runs have numbers for into `folder`; returns the names, those of `CAPTIONS`.

    Args:
        oracle: `oracle.kind`, which gives the utility its unit.
    """
    preference = any(row.get("oracle_scale") == "preference" for rows in runs.values() for row in rows)
    unit = UNITS.get(oracle, "its own units")
    labels = {
        "utility": "p* of the best reply\nagainst the base model's"
        if preference
        else f"utility of the best reply ({unit})",
        "gap": "σ(r − r_ref) − p*\nof the best reply (probability)"
        if preference
        else "(r − r_ref) − (U − U_ref)\nof the best reply (log-odds)",
    }
    drawn = [name for name in PANELS if _curves(runs, folder, name, labels)]
    if any(row.get("seconds") for rows in runs.values() for row in rows):
        _seconds(runs, folder)
        drawn.append("seconds")
    return drawn


def _curves(runs: Runs, folder: Path, name: str, labels: dict[str, str]) -> bool:
    """One figure of `PANELS`; False where no run has a number for any of its panels."""
    keys = [key for key, _, _ in PANELS[name]]
    if not any(row.get(key) is not None for rows in runs.values() for row in rows for key in keys):
        return False
    with figures.style():
        figure, axes = figures.new_figure(len(keys), width=10, height=4)
        for panel, (key, title, label) in zip(axes, PANELS[name], strict=True):
            for kind, rows in runs.items():
                _line(panel, kind, rows, key)
                if name == "reward":
                    for row in rows:
                        if row.get("warning"):
                            colour = figures.penalty_style(kind)["color"]
                            panel.axvline(row["iteration"], color=colour, linestyle=":", linewidth=1.2)
            if not panel.get_legend_handles_labels()[0]:
                panel.text(0.5, 0.5, "not measured in this run", ha="center", transform=panel.transAxes)
            panel.set(title=title, xlabel="iteration", ylabel=label.format(**labels))
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        figures.legend_below(figure, max(axes, key=lambda panel: len(panel.get_legend_handles_labels()[0])))
        figures.save(figure, folder, name)
    return True


def _line(panel: Axes, kind: str, rows: Rows, key: str) -> None:
    """A penalty's curve, with a hole where there is no number; nothing without any."""
    y = [float("nan") if row.get(key) is None else row[key] for row in rows]
    if any(value == value for value in y):
        x = [row["iteration"] for row in rows]
        panel.plot(x, y, label=kind, marker="o", markersize=3, **figures.penalty_style(kind))


def _seconds(runs: Runs, folder: Path) -> None:
    """Stacked bars: seconds of an iteration by phase, a bar a penalty."""
    with figures.style():
        figure, (panel,) = figures.new_figure(1, width=7, height=1.4 + 0.5 * len(runs))
        left = dict.fromkeys(runs, 0.0)
        for phase, colour in PHASES.items():
            spent = {kind: mean(row.get("seconds", {}).get(phase) for row in rows) for kind, rows in runs.items()}
            length = {kind: value or 0.0 for kind, value in spent.items()}
            panel.barh(list(runs), list(length.values()), left=list(left.values()), color=colour, label=phase)
            left = {kind: left[kind] + length[kind] for kind in runs}
        panel.set(title="Where the time goes", xlabel="seconds an iteration", ylabel="penalty")
        panel.invert_yaxis()
        figures.legend_below(figure, panel)
        figures.save(figure, folder, "seconds")


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the numbers among the values; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
