"""One self-contained `report.html` for a run, or for several penalties side by side, from the files on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from fpo_train.config.units import show_bytes
from fpo_train.errors import RunError

from . import figures, panels, records
from .panels import Rows, Runs, mean
from .progress import number
from .records import CHECKPOINTS
from .tables import format_table

SHOWN = 12  # prompts whose replies are printed, so that a page of a large run can still be opened

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
    """Draw the figures of the run (or runs) in `out` and write `report.html`; returns its path.

    Rows that lack a number, as those of older runs do, leave a hole in its curve or a dash in its table.
    """
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    folders = _run_folders(out, config)
    runs: Runs = {kind: records.read_run(folder) for kind, folder in folders.items()}
    drawn = panels.draw(runs, out / "figures", config.get("oracle", {}).get("kind", "base"))
    sections = [
        _summary(runs),
        *_began(out),
        _warnings(runs),
        *[_figure(out / "figures" / f"{name}.png", panels.CAPTIONS[name]) for name in drawn],
        *_memory(runs),
        *_oracle(folders),
        *_said(folders, config.get("logging", {}).get("checkpoint_every", 1)),
        *_controlled(out),
        "<h2>How it was run</h2>",
        _details("config.yaml", (out / "config.yaml").read_text(encoding="utf-8")),
        _details("environment.json", (out / "environment.json").read_text(encoding="utf-8")),
    ]
    title = escape("Foresighted Policy Optimization: " + " / ".join(runs))
    page = (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _run_folders(out: Path, config: dict[str, Any]) -> dict[str, Path]:
    kinds = [kind.strip() for kind in config.get("compare", "").split(",") if kind.strip()]
    return {kind: out / kind for kind in kinds} or {config["penalty"]["kind"]: out}


def _summary(runs: Runs) -> str:
    head = (
        "penalty",
        "iterations",
        "reward, first → last quarter",
        "oracle utility, first → last quarter",
        "last KL (nats/token)",
        "penalty ÷ reward spread",
        "oracle calls (failed)",
        "warnings",
        "s / iteration",
        "peak memory",
    )
    body = []
    for kind, rows in runs.items():
        if not rows:
            continue
        seconds = mean(sum(row["seconds"].values()) for row in rows if row.get("seconds"))
        calls, failures = (sum(row.get(key) or 0 for row in rows) for key in ("oracle_calls", "oracle_failures"))
        body.append(
            (
                kind,
                str(len(rows)),
                _change(rows, "reward"),
                _change(rows, "oracle_utility"),
                number(rows[-1].get("kl"), ".4f"),
                number(mean(row.get("penalty_to_reward_std") for row in rows), ".3g"),
                f"{calls} ({failures})",
                str(sum(bool(row.get("warning")) for row in rows)),
                number(seconds, ".1f"),
                show_bytes(max(row.get("peak_memory_bytes") or 0 for row in rows)),
            )
        )
    return "<h2>At a glance</h2>" + _table(head, body)


def _began(out: Path) -> list[str]:
    """What the policy and the score head were before the first iteration; runs of earlier versions do not say."""
    facts = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    said = {
        "begins_on": "The policy began on",
        "score_head": "The reward model's score head before the first iteration:",
    }
    return [f"<p>{words} {escape(facts[key])}.</p>" for key, words in said.items() if facts.get(key)]


def _change(rows: Rows, key: str) -> str:
    quarter = max(1, len(rows) // 4)
    first, last = (mean(row.get(key) for row in some) for some in (rows[:quarter], rows[-quarter:]))
    return f"{number(first)} → {number(last)}"


def _warnings(runs: Runs) -> str:
    found = [
        (kind, str(row["iteration"]), row["warning"])
        for kind, rows in runs.items()
        for row in rows
        if row.get("warning")
    ]
    body = _table(("penalty", "iteration", "warning"), found, css="text") if found else "<p>None.</p>"
    return "<h2>Warnings of collapse</h2>" + body


def _memory(runs: Runs) -> list[str]:
    """The plan's peak of each phase beside the largest that was measured, for runs that have either."""
    head = ("penalty", "phase", "planned peak", "measured peak", "measured ÷ planned")
    body = []
    for kind, rows in runs.items():
        planned: dict[str, int] = next(
            (row["memory_planned"] for row in reversed(rows) if row.get("memory_planned")), {}
        )
        seen = [row["memory_measured"] for row in rows if row.get("memory_measured")]
        for phase in panels.PHASES:
            most = max((one.get(phase) or 0 for one in seen), default=0)
            plan = planned.get(phase) or 0
            if most or plan:
                sizes = (show_bytes(size) if size else "–" for size in (plan, most))
                body.append((kind, phase, *sizes, number(most / plan if most and plan else None, ".2f")))
    told = (
        "<p>Measured is on CUDA the most that live tensors took, on a CPU the process's resident set, Python and the "
        "libraries included; planned is what tensors take.</p>"
    )
    return ["<h2>Memory</h2>" + _table(head, body) + told] if body else []


def _oracle(folders: dict[str, Path]) -> list[str]:
    """What became of the questions put to the oracle, failures by cause and repetitions with them."""
    body = []
    for kind, folder in folders.items():
        counted = records.counts(folder / CHECKPOINTS)
        if counted:
            body.append((kind, ", ".join(f"{name} {count}" for name, count in sorted(counted.items()))))
    return ["<h2>The oracle</h2>" + _table(("penalty", "counted"), body, css="text")] if body else []


def _said(folders: dict[str, Path], every: int) -> list[str]:
    """Samples of the last iteration, and before them those of the first checkpoint where that was earlier."""
    samples = {kind: records.read(folder / records.SAMPLES) for kind, folder in folders.items()}
    last = max((row["iteration"] for rows in samples.values() for row in rows), default=0)
    places = [("At the first checkpoint", every)] if every < last else []
    parts = ["<h2>What the policies say</h2>"]
    for title, iteration in [*places, ("At the end", last)]:
        chosen = {kind: [r for r in rows if r["iteration"] == iteration] for kind, rows in samples.items()}
        if any(chosen.values()):
            parts += [f"<h3>{title}: iteration {iteration}</h3>", *_side_by_side(chosen)]
    return parts


def _side_by_side(samples: Runs) -> list[str]:
    """A table a prompt: the base model's reply, what each policy learnt, what its reward model would have learnt."""
    prompts: dict[str, dict[str, dict[str, Any]]] = {}  # prompt id → penalty → sample
    for kind, rows in samples.items():
        for row in rows:
            prompts.setdefault(row["id"], {})[kind] = row
    parts = []
    for alike in list(prompts.values())[:SHOWN]:
        first = next(iter(alike.values()))
        body = [("base model", first["reference"])]
        for kind, row in alike.items():
            body.append((kind, row["reply"]))
            if row.get("unpenalised_reply") is not None:
                body.append((f"{kind}, by reward alone", row["unpenalised_reply"]))
        parts.append(f"<h4>{escape(first['prompt'])}</h4>" + _table((), body, css="text"))
    if len(prompts) > SHOWN:
        parts.append(f"<p>{SHOWN} of {len(prompts)} prompts; {records.SAMPLES} has them all.</p>")
    return parts


def _controlled(out: Path) -> list[str]:
    folder = out / "simulate"
    if not (folder / "summary.json").is_file():
        return []
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{folder / 'summary.json'} is damaged; delete {folder}, it will be made again") from error
    return [
        "<h2>The paper's linear environment</h2>",
        f"<pre>{escape(format_table(summary))}</pre>",
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
