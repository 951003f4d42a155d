"""One self-contained `report.html` for a run, or for several penalties side by side, from the files on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from matplotlib.ticker import MaxNLocator

from . import figures, metrics

Runs = dict[str, list[dict[str, Any]]]  # penalty → metrics rows

# key in metrics.jsonl → (panel title, axis label with unit)
PANELS = {
    "reward": [
        ("reward", "Reward model's score", "mean reward of candidates (log-odds)"),
        ("oracle_utility", "Oracle's utility", "utility of the best reply (nats/token)"),
    ],
    "overconfidence": [
        ("proxy_gap", "Proxy gap", "(r − r_ref) − (U − U_ref)\nof the best reply (nats)"),
        ("overconfidence", "Overconfidence", "σ(r − r_ref) − p*\nof the best reply (probability)"),
    ],
    "policy": [
        ("kl", "Distance from the base model", "KL(policy ‖ base) (nats/token)"),
        ("reply_tokens", "Length of replies", "mean length of candidates (tokens)"),
    ],
}
CAPTIONS = {
    "reward": "Left: what the reward model says of all candidates. Right: what the oracle says of the reply that "
    "was learnt. Collapse is a left panel that rises while the right one falls.",
    "overconfidence": "How far the reward model's preference for the learnt reply runs ahead of the oracle's.",
    "policy": "How far the policy has moved, and how long its replies are.",
    "seconds": "Wall-clock time of an iteration by phase, mean over the run.",
}
PHASES = {"generate": "#999999", "score": "#56B4E9", "update": "#E69F00", "retrain": "#009E73"}

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.7rem}h2{font-size:1.25rem;margin-top:2.2rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.3rem .7rem;border-bottom:1px solid #e3e3e3;text-align:right;vertical-align:top}
th:first-child,td:first-child,.text td{text-align:left}.text td:first-child{white-space:nowrap;color:#555}
figure{margin:1rem 0}img{max-width:100%}figcaption{color:#555;font-size:.9rem}
pre{background:#f6f6f6;padding:.8rem;overflow:auto;font-size:.8rem}
"""


def write_report(out: Path) -> Path:
    """Draw the figures of the run (or runs) in `out` and write `report.html`; returns its path."""
    folders = _run_folders(out)
    runs: Runs = {kind: metrics.read(folder / metrics.METRICS) for kind, folder in folders.items()}
    for name in PANELS:
        draw_curves(runs, out / "figures", name)
    draw_seconds(runs, out / "figures")
    sections = [
        _summary(runs),
        *[_figure(out / "figures" / f"{name}.png", CAPTIONS[name]) for name in CAPTIONS],
        "<h2>What the policies say</h2>",
        _samples(folders),
        *_controlled(out),
        "<h2>How it was run</h2>",
        _details("config.yaml", (out / "config.yaml").read_text(encoding="utf-8")),
        _details("environment.json", (out / "environment.json").read_text(encoding="utf-8")),
    ]
    title = "Foresighted Policy Optimization: " + " / ".join(runs)
    page = (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _run_folders(out: Path) -> dict[str, Path]:
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    kinds = [kind.strip() for kind in config["compare"].split(",") if kind.strip()]
    return {kind: out / kind for kind in kinds} or {config["penalty"]["kind"]: out}


def draw_curves(runs: Runs, folder: Path, name: str) -> None:
    """One figure of `PANELS`: a panel a metric over iterations, a line a penalty."""
    with figures.style():
        figure, axes = figures.new_figure(2, width=10, height=4)
        for panel, (key, title, label) in zip(axes, PANELS[name], strict=True):
            for kind, rows in runs.items():
                x, y = [row["iteration"] for row in rows], [row[key] for row in rows]
                panel.plot(x, y, label=kind, marker="o", markersize=3, **figures.penalty_style(kind))
            panel.set(title=title, xlabel="iteration", ylabel=label)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        figures.legend_below(figure, axes[0])
        figures.save(figure, folder, name)


def draw_seconds(runs: Runs, folder: Path) -> None:
    """Stacked bars: seconds of an iteration by phase, a bar a penalty."""
    with figures.style():
        figure, (panel,) = figures.new_figure(1, width=7, height=1.4 + 0.5 * len(runs))
        left = dict.fromkeys(runs, 0.0)
        for phase, colour in PHASES.items():
            mean = {kind: _mean(row["seconds"][phase] for row in rows) for kind, rows in runs.items()}
            panel.barh(list(runs), list(mean.values()), left=list(left.values()), color=colour, label=phase)
            left = {kind: left[kind] + mean[kind] for kind in runs}
        panel.set(title="Where the time goes", xlabel="seconds an iteration", ylabel="penalty")
        panel.invert_yaxis()
        figures.legend_below(figure, panel)
        figures.save(figure, folder, "seconds")


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def _summary(runs: Runs) -> str:
    head = (
        "penalty",
        "iterations",
        "reward, first → last quarter",
        "oracle utility, first → last quarter (nats/token)",
        "last KL (nats/token)",
        "penalty ÷ reward spread",
        "oracle calls",
        "s / iteration",
        "peak memory (GB)",
    )
    body = []
    for kind, rows in runs.items():
        if not rows:
            continue
        quarter = max(1, len(rows) // 4)
        change = [
            f"{_mean(r[key] for r in rows[:quarter]):+.3f} → {_mean(r[key] for r in rows[-quarter:]):+.3f}"
            for key in ("reward", "oracle_utility")
        ]
        body.append(
            (
                kind,
                str(len(rows)),
                *change,
                f"{rows[-1]['kl']:.4f}",
                f"{_mean(r['penalty_to_reward_std'] for r in rows):.1f}",
                str(sum(r["oracle_calls"] for r in rows)),
                f"{_mean(sum(r['seconds'].values()) for r in rows):.1f}",
                f"{max(r['peak_memory_bytes'] for r in rows) / 1e9:.2f}",
            )
        )
    return "<h2>At a glance</h2>" + _table(head, body)


def _samples(folders: dict[str, Path]) -> str:
    """The last iteration's prompts: the reply each policy learnt, beside the base model's."""
    last: dict[str, list[dict[str, Any]]] = {}
    for kind, folder in folders.items():
        rows = metrics.read(folder / metrics.SAMPLES)
        newest = max((row["iteration"] for row in rows), default=0)
        last[kind] = [row for row in rows if row["iteration"] == newest]
    parts = []
    for place, first in enumerate(next(iter(last.values()), [])):
        body = [("base model", first["reference"])]
        alike = {kind: rows[place] for kind, rows in last.items() if len(rows) > place}
        body += [(kind, row["reply"]) for kind, row in alike.items() if row["id"] == first["id"]]
        parts.append(f"<h3>{escape(first['prompt'])}</h3>" + _table((), body, css="text"))
    return "\n".join(parts)


def _controlled(out: Path) -> list[str]:
    folder = out / "simulate"
    if not (folder / "summary.json").is_file():
        return []
    from .simulate import linear

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return [
        "<h2>The paper's linear environment</h2>",
        f"<pre>{escape(linear.format_table(summary))}</pre>",
        _figure(
            folder / "figures" / "phase.png",
            "Actions over iterations, by their norm on the axes that matter "
            "and on those that do not, over the contours of the true utility.",
        ),
        _figure(folder / "figures" / "utility.png", "True utility and noise over iterations."),
    ]


def _figure(path: Path, caption: str) -> str:
    source = figures.inline_png(path)
    return f"<figure><img src='{source}' alt='{escape(path.stem)}'><figcaption>{escape(caption)}</figcaption></figure>"


def _table(head: tuple[str, ...], body: Sequence[tuple[str, ...]], css: str = "") -> str:
    top = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table class='{css}'>{top}{rows}</table>"


def _details(name: str, text: str) -> str:
    return f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
