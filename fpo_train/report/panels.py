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

# figure, a key in metrics.jsonl → title, axis label with unit ({utility} and {gap}: those of the run's oracle), caption
PANELS = {
    "audit_gain": (
        "The oracle, of all candidates",
        "{gain}",
        "What the oracle says of all that the policy says, over what it says of the base model's replies to the same "
        "questions: the same for every penalty. Higher is better. A dotted line is a warning of collapse.",
    ),
    "reward": (
        "The proxy: reward model's score",
        "mean reward of candidates (log-odds)",
        "What the reward model says of all candidates. No way is good by itself: collapse is a score that rises while "
        "the oracle's utility falls. A dotted line is a warning of it.",
    ),
    "oracle_utility": (
        "The oracle, of the learnt reply",
        "{utility}",
        "What the oracle says of the reply that was learnt. Higher is better, but the penalty chose that reply, some "
        "penalties with the oracle's help: penalties are not compared by it.",
    ),
    "proxy_gap": (
        "Gap between proxy and oracle",
        "{gap}",
        "How far the reward model's preference for the learnt reply runs ahead of the oracle's. Nearer to 0 is better.",
    ),
    "overconfidence": (
        "Overconfidence",
        "σ(r − r_ref) − p* of the best (probability)",
        "The same as a probability. Nearer to 0 is better.",
    ),
    "steering": (
        "Steering that is left",
        "c·⟨ḡ, u⟩ of the best (squared norm of ∇r)",
        "What retraining on a learnt reply takes off the mean reward of all candidates, per unit of its learning "
        "rate: it matters where, times that rate, it nears the spread of rewards. A foresighted policy keeps it small.",
    ),
    "penalty_to_reward_std": (
        "Weight of the raw penalty",
        "its spread ÷ the reward's (ratio)",
        "Before it is scaled. A raw γ has no meaning without this ratio.",
    ),
    "scaled_penalty_to_reward_std": (
        "Weight of the penalty in use",
        "γ · its spread ÷ the reward's (ratio)",
        "As it is taken off the reward, within an iteration's prompts: about γ where gamma_units is reward_std.",
    ),
    "kl": (
        "Policy's distance from the base",
        "KL(policy ‖ base) (nats/token)",
        "How far the policy is from the base model. Smaller is nearer.",
    ),
    "reward_model_drift": (
        "Reward model's drift",
        "‖φ − φ₀‖ ÷ ‖φ₀‖ (ratio)",
        "How far the reward model has moved from where it began.",
    ),
    "reply_tokens": ("Length of replies", "mean length of candidates (tokens)", "How long the candidates are."),
    "repetition": (
        "Repetition",
        "repeated 3-grams of a reply (share)",
        "How much of a candidate repeats itself. Lower is better.",
    ),
}
SECONDS = "Wall-clock time of an iteration by phase, mean over the run; audit is what the report alone asks for."
CAPTIONS = {**{key: caption for key, (_, _, caption) in PANELS.items()}, "seconds": SECONDS}
WARNED = ("audit_gain", "reward", "oracle_utility")  # figures that mark the warnings
UNITS = {"base": "nats/token", "gold": "log-odds", "function": "units of its own"}
PHASES = {"generate": "#999999", "score": "#56B4E9", "update": "#E69F00", "retrain": "#009E73", "audit": "#CC79A7"}


def unit_of(oracle: str, preference: bool) -> str:
    """The unit of what the oracle says, by `oracle.kind`; `preference`: it has no utilities."""
    return "probability" if preference else UNITS.get(oracle, "units of its own")


def is_preference(runs: Runs) -> bool:
    """Whether the oracle of these runs says p* alone."""
    return any(row.get("oracle_scale") == "preference" for rows in runs.values() for row in rows)


def draw(runs: Runs, folder: Path, oracle: str) -> list[str]:
    """Draw every figure that the runs have numbers for into `folder`; returns the names, those of `CAPTIONS`.

    Args:
        oracle: `oracle.kind`, which gives the utility its unit.
    """
    preference = is_preference(runs)
    unit = unit_of(oracle, preference)
    labels = {
        "gain": "p* − ½ of candidates (probability)" if preference else f"U − U_ref of candidates ({unit})",
        "utility": "p* of the best reply (probability)" if preference else f"utility of the best reply ({unit})",
        "gap": "σ(r − r_ref) − p* of the best (probability)" if preference else "(r − r_ref) − (U − U_ref) (log-odds)",
    }
    drawn = [name for name in PANELS if _curves(runs, folder, name, labels)]
    if any(row.get("seconds") for rows in runs.values() for row in rows):
        _seconds(runs, folder)
        drawn.append("seconds")
    return drawn


def _curves(runs: Runs, folder: Path, key: str, labels: dict[str, str]) -> bool:
    """One figure of `PANELS`; False where no run has a number for it."""
    if not any(row.get(key) is not None for rows in runs.values() for row in rows):
        return False
    title, label, _ = PANELS[key]
    with figures.style():
        figure, panel = figures.new_panel()
        for kind, rows in runs.items():
            _line(panel, kind, rows, key)
            for row in rows if key in WARNED else ():
                if row.get("warning"):
                    colour = figures.penalty_style(kind)["color"]
                    panel.axvline(row["iteration"], color=colour, linestyle=":", linewidth=1.2)
        panel.set(title=title, xlabel="iteration", ylabel=label.format(**labels))
        figures.wrap(panel)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        figures.panel_legend(figure, panel)
        figures.save_svg(figure, folder, key)
    return True


def _line(panel: Axes, kind: str, rows: Rows, key: str) -> None:
    """A penalty's curve, with a hole where there is no number; nothing without any."""
    y = [float("nan") if row.get(key) is None else row[key] for row in rows]
    if any(value == value for value in y):
        x = [row["iteration"] for row in rows]
        marker = "o" if len(x) <= 20 else None  # more would cover the dashes
        panel.plot(x, y, label=kind, marker=marker, markersize=3, **figures.penalty_style(kind))


def _seconds(runs: Runs, folder: Path) -> None:
    """Stacked bars: seconds of an iteration by phase, a bar a penalty."""
    with figures.style():
        figure, panel = figures.new_panel()
        left = dict.fromkeys(runs, 0.0)
        seen = {phase for rows in runs.values() for row in rows for phase in row.get("seconds", {})}
        for phase, colour in ((phase, colour) for phase, colour in PHASES.items() if phase in seen):
            spent = {kind: mean(row.get("seconds", {}).get(phase) for row in rows) for kind, rows in runs.items()}
            length = {kind: value or 0.0 for kind, value in spent.items()}
            panel.barh(list(runs), list(length.values()), left=list(left.values()), color=colour, label=phase)
            left = {kind: left[kind] + length[kind] for kind in runs}
        panel.set(title="Where the time goes", xlabel="time of an iteration (seconds)")
        panel.invert_yaxis()
        figures.panel_legend(figure, panel)
        figures.save_svg(figure, folder, "seconds")


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the numbers among the values; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
