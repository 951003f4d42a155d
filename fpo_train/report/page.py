"""One self-contained `report.html` for a run, or for several penalties side by side, from the files on disk.

A page of several leads to each run's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fpo_train.config import LoggingConfig
from fpo_train.config.oracle import TOLD
from fpo_train.config.units import show_bytes
from fpo_train.errors import RunError

from . import figures, panels, records, verdicts
from .markup import STYLE, Html, Prose, details, figure, items, named, table
from .panels import Rows, Runs, mean
from .progress import number
from .records import CHECKPOINTS
from .tables import format_table
from .watch import could_warn

SHOWN = 12  # prompts whose replies are printed, so that a page of a large run can still be opened
BASELINE = "none"
INTERVALS = (
    "Changes are from the mean over the first quarter of a run's iterations to that over the last, with 95 % intervals "
    "by Welch's t over the iterations' values; two penalties are compared over the last quarter, an iteration less the "
    "same iteration on the same questions, by Student's t. Each iteration has questions and draws of its own, so what "
    "differs within a quarter is chance, and the policy's drift, which widens the interval. A quarter of fewer than "
    f"{verdicts.LEAST} iterations gives none. Intervals speak of this run, not of another seed (fpo-train study does), "
    "and are not widened for their number."
)


class Oracle(NamedTuple):
    """How the page speaks of the oracle's answers."""

    unit: str
    headline: str | None
    """See `verdicts.headline`."""
    told: str
    """Who it is, as a paragraph."""


def write_report(out: Path) -> Path:
    """Draw the figures of the run (or runs) in `out` and write `report.html`; returns its path.

    Rows that lack a number, as those of older runs do, leave a hole in its curve or a dash in its table.
    """
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    folders = _run_folders(out, config)
    runs: Runs = {kind: records.read_run(folder) for kind, folder in folders.items()}
    kind = config.get("oracle", {}).get("kind", "base")
    names = {key: config.get("oracle", {}).get(key, "") for key in ("model", "function", "file")}
    who = escape(TOLD[kind].format_map(names))
    told = f"<p>The oracle, which stands for the truth here, is {who}.</p>"
    oracle = Oracle(panels.unit_of(kind, panels.is_preference(runs)), verdicts.headline(runs), told)
    watched = {kind: records.read(folder / records.WATCHED) for kind, folder in folders.items()}
    audits = {kind: sum(row.get("audit_calls") or 0 for row in [*rows, *watched[kind]]) for kind, rows in runs.items()}
    drawn = panels.draw(runs, out / "figures", kind)
    began = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    on_cpu = began.get("device") == "cpu"
    beside = "; penalty.kind is each of compare in turn" if config.get("compare") else ""
    sections = [
        *_said_of(runs, folders, out, oracle),
        _summary(runs, oracle, audits, on_cpu),
        *_began(began),
        _warnings(runs, config.get("logging", {}).get("window", LoggingConfig().window)),
        "<h2>Over the iterations</h2><div class='figures'>",
        *[_drawn(out / "figures", name, panels.CAPTIONS[name]) for name in drawn],
        "</div>",
        *_replies(folders, watched),
        *_memory(runs, on_cpu),
        _oracle(runs, folders, audits),
        *_controlled(out),
        "<h2>How it was run</h2>",
        details(f"config.yaml{beside}", (out / "config.yaml").read_text(encoding="utf-8")),
        details("environment.json", (out / "environment.json").read_text(encoding="utf-8")),
    ]
    title = escape("Foresighted Policy Optimization: " + " / ".join(runs))
    page = (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _run_folders(out: Path, config: dict[str, Any]) -> dict[str, Path]:
    kinds = [kind.strip() for kind in config.get("compare", "").split(",") if kind.strip()]
    return {kind: out / kind for kind in kinds} or {config["penalty"]["kind"]: out}


def _said_of(runs: Runs, folders: dict[str, Path], out: Path, oracle: Oracle) -> list[str]:
    """A verdict a penalty, with what it goes by."""
    key, lines = oracle.headline, []
    for kind, rows in runs.items():
        path = folders[kind] / "report.html"
        led = folders[kind] != out and path.is_file()
        name = f"<a href='{escape(path.relative_to(out).as_posix())}'>{escape(kind)}</a>" if led else escape(kind)
        said = verdicts.verdict(rows, key, oracle.unit)
        if key and rows and kind != BASELINE and runs.get(BASELINE):
            beside = verdicts.against(rows, runs[BASELINE], key, oracle.unit)
            said += "" if beside == verdicts.TOO_FEW else f" At the end, against {BASELINE}: {beside}."
        lines.append(Html(f"<b>{name}</b>. {escape(said)}"))
    return [
        "<h2>What can be said</h2>",
        items(lines),
        oracle.told,
        *_over_which(runs, key),
        f"<p><small>{INTERVALS}</small></p>",
    ]


def _over_which(runs: Runs, key: str | None) -> list[str]:
    """Which replies the verdict is over."""
    if key in ("audit_gain", "audit_utility"):
        return ["<p>Judged are all candidates of an iteration, none of them chosen by a penalty.</p>"]
    if key is None:
        return []
    several = " They are each penalty's own choice, so penalties are not to be compared by them." * (len(runs) > 1)
    return [
        f"<p>Judged are the learnt replies alone, whose labels were bought.{several} logging.audit asks the oracle "
        "about all candidates.</p>"
    ]


class Quantity(NamedTuple):
    """A row of the summary."""

    name: str
    note: str
    """Which way is good, and its key in metrics.jsonl."""
    of: Callable[[Rows], str]


def _summary(runs: Runs, oracle: Oracle, audits: dict[str, int], on_cpu: bool) -> str:
    def change(key: str) -> Callable[[Rows], str]:
        return lambda rows: _change(rows, key)

    def average(key: str) -> Callable[[Rows], str]:
        return lambda rows: number(mean(row.get(key) for row in rows), ".3g")

    def total(key: str) -> Callable[[Rows], str]:
        return lambda rows: str(sum(row.get(key) or 0 for row in rows))

    def seconds(rows: Rows) -> str:
        own = ({**row["seconds"], "audit": 0.0} for row in rows if row.get("seconds"))
        return number(mean(sum(phases.values()) for phases in own), ".1f")

    def kl(rows: Rows) -> str:
        return number(rows[-1].get("kl"), ".4f")

    def peak(rows: Rows) -> str:
        return show_bytes(max(row.get("peak_memory_bytes") or 0 for row in rows))

    better, gain = f"higher is better, {oracle.unit}", "U − U_ref" if oracle.unit != "probability" else "p* − ½"
    size = "process's size at most" if on_cpu else "live tensors at most"
    quantities = (
        Quantity("iterations", "", lambda rows: str(len(rows))),
        Quantity(f"oracle on all candidates: {gain}", f"{better} · audit_gain", change("audit_gain")),
        Quantity("oracle on all candidates", f"{better}; questions differ · audit_utility", change("audit_utility")),
        Quantity("oracle on the learnt reply", f"{better}, but chosen · oracle_utility", change("oracle_utility")),
        Quantity("reward model on all candidates", "no way is good by itself, log-odds · reward", change("reward")),
        Quantity("gap of the learnt reply", "nearer to 0 is better · proxy_gap", change("proxy_gap")),
        Quantity("KL at the end", "smaller is nearer to the base, nats/token · kl", kl),
        Quantity("penalty ÷ reward spread, raw", "mean · penalty_to_reward_std", average("penalty_to_reward_std")),
        Quantity(
            "penalty ÷ reward spread, scaled",
            "about γ with reward_std · scaled_penalty_to_reward_std",
            average("scaled_penalty_to_reward_std"),
        ),
        Quantity("labels bought to learn from", "pairs · oracle_calls", total("oracle_calls")),
        Quantity("labels for this page alone", "pairs · audit_calls", lambda rows: next(audited)),
        Quantity("warnings of collapse", "", lambda rows: str(sum(bool(row.get("warning")) for row in rows))),
        Quantity("time of an iteration", "seconds, what the page alone asks for aside", seconds),
        Quantity(size, "peak_memory_bytes", peak),
    )
    kinds = {kind: rows for kind, rows in runs.items() if rows}
    audited = (str(audits[kind]) for kind in kinds)
    body = [(named(one.name, one.note), *map(one.of, kinds.values())) for one in quantities if kinds]
    told = "An arrow leads from the mean over the first quarter of the iterations to that over the last."
    return f"<h2>At a glance</h2>{table(('', *kinds), body)}<p><small>{told}</small></p>"


def _began(environment: dict[str, Any]) -> list[str]:
    """What the policy and the score head were before the first iteration; runs of earlier versions do not say."""
    said = {
        "begins_on": "The policy began on",
        "score_head": "The reward model's score head before the first iteration:",
        "reward_model_reads": "The reward model reads",
        "rows_skipped": "Rows of the prompts that could not be used and were skipped:",
    }
    return [f"<p>{words} {escape(str(environment[key]))}.</p>" for key, words in said.items() if environment.get(key)]


def _change(rows: Rows, key: str) -> str:
    found = verdicts.change(rows, key)
    return f"{number(found.first)} → {number(found.last)}"


def _warnings(runs: Runs, window: int) -> str:
    found = [
        (kind, str(row["iteration"]), Prose(row["warning"]))
        for kind, rows in runs.items()
        for row in rows
        if row.get("warning")
    ]
    body = table(("penalty", "iteration", "warning"), found) if found else "<p>None.</p>"
    told = []
    for kind, rows in runs.items():
        could, n = could_warn(rows, window), len(rows)
        told.append(
            f"{kind}: a warning could have been given at {could} of {n} iterations."
            if could
            else f"{kind}: none could have been given in {n} iterations; a warning looks back over {window} with "
            "numbers (logging.window)."
        )
    return "<h2>Warnings of collapse</h2>" + body + items(told)


def _memory(runs: Runs, on_cpu: bool) -> list[str]:
    """The plan's peak of each phase beside what was measured, for runs that have either."""
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
                sizes = [show_bytes(size) if size else "–" for size in (plan, most)]
                ratio = [] if on_cpu else [number(most / plan if most and plan else None, ".2f")]
                body.append((kind, phase, *sizes, *ratio))
    if not body:
        return []
    if on_cpu:
        head: tuple[str, ...] = ("penalty", "phase", "planned: live tensors", "process's size")
        told = (
            "Planned is what live tensors take at the phase's fullest. The process's size is its resident set at most, "
            "with Python, the libraries and what malloc keeps: what the tensors alone took is not measured on a CPU."
        )
    else:
        head = ("penalty", "phase", "planned: live tensors", "measured: live tensors", "measured ÷ planned")
        told = "Live tensors at the phase's fullest, as planned and as measured on the device."
    return ["<h2>Memory</h2>", table(head, body), f"<p><small>{told}</small></p>"]


def _oracle(runs: Runs, folders: dict[str, Path], audits: dict[str, int]) -> str:
    """What was asked of the oracle, and what became of it: failures by cause and repetitions with them."""
    body = []
    for kind, rows in runs.items():
        bought, failed = (sum(row.get(key) or 0 for row in rows) for key in ("oracle_calls", "oracle_failures"))
        counted = records.counts(folders[kind] / CHECKPOINTS)
        told = ", ".join(f"{name} {count}" for name, count in sorted(counted.items())) or "–"
        body.append((kind, str(bought), str(failed), str(audits[kind]), told))
    head = (
        "penalty",
        "labels bought to learn from",
        "of them failed",
        "labels for this page alone",
        "the oracle counted",
    )
    told = (
        "Labels are counted in pairs of a reply and the base model's reply. The oracle counts what it did itself, with "
        "all of these and those of a first fit of the score head, where there was one (a comparison makes it once): "
        "scored is single replies that it gave a utility to."
    )
    return f"<h2>The oracle</h2>{table(head, body)}<p><small>{told}</small></p>"


def _replies(folders: dict[str, Path], watched: Runs) -> list[str]:
    """What the policies say to the same questions over time, and what they learnt last."""
    samples = {kind: records.read(folder / records.SAMPLES) for kind, folder in folders.items()}
    told = "Greedy replies after these iterations, to questions of the run's own that are put to every policy."
    if not any(watched.values()):
        watched = {kind: _asked_again(rows) for kind, rows in samples.items()}
        told = "What was learnt of questions that came more than once."
    if not any(watched.values()):
        told = "No question was put to the policy more than once (logging.watched puts some)."
    parts = ["<h2>What the policies say</h2>", "<h3>The same questions over time</h3>", f"<p>{told}</p>"]
    parts += _questions(watched, "after")
    last = max((row["iteration"] for rows in samples.values() for row in rows), default=0)
    if last:
        chosen = {kind: [row for row in rows if row["iteration"] == last] for kind, rows in samples.items()}
        parts += [f"<h3>What was learnt last: iteration {last}</h3>", *_questions(chosen, "")]
    numbers = (
        "Beside a reply: the reward model's score and, in brackets, that of the base model's reply (log-odds); the "
        "penalty in the units of γ; the oracle's utility, or p* where it has none. A dash: not known."
    )
    return [*parts, f"<p><small>{numbers}</small></p>"]


def _asked_again(rows: list[records.Sample]) -> list[records.Sample]:
    """The samples of questions that came in more than one iteration."""
    places: dict[str, set[int]] = {}
    for row in rows:
        places.setdefault(row["id"], set()).add(row["iteration"])
    return [row for row in rows if len(places[row["id"]]) > 1]


def _questions(samples: Runs, after: str) -> list[str]:
    """A table a question: the base model's reply and each policy's, in order, with what its reward model alone would
    have learnt. With `after`, each is named by its iteration."""
    questions: dict[str, dict[str, list[records.Sample]]] = {}  # id → penalty → samples
    for kind, rows in samples.items():
        for row in rows:
            questions.setdefault(row["id"], {}).setdefault(kind, []).append(row)
    parts = []
    for by_kind in list(questions.values())[:SHOWN]:
        first = next(iter(by_kind.values()))[0]
        base = ("base model", Prose(first["reference"]), "–", "–", number(first.get("reference_utility")))
        body: list[tuple[str, ...]] = [base]
        for kind, rows in by_kind.items():
            for row in sorted(rows, key=lambda row: int(row["iteration"])):
                name = f"{kind}, {after} {row['iteration']}" if after else kind
                body.append(_reply(name, row, ""))
                if row.get("unpenalised_reply") is not None:
                    body.append(_reply(f"{name}, by reward alone", row, "unpenalised_"))
        parts.append(f"<h4>{escape(first['prompt'])}</h4>" + table(REPLY, body))
    if len(questions) > SHOWN:
        parts.append(f"<p>{SHOWN} of {len(questions)} prompts; {records.SAMPLES} has them all.</p>")
    return parts


REPLY = ("who", "reply", "reward (base's)", "penalty", "utility")


def _reply(name: str, row: records.Sample, which: str) -> tuple[str, ...]:
    base = f" ({number(row['reference_reward'])})" if row.get("reference_reward") is not None else ""
    text = Prose(row[f"{which}reply"])
    reward, penalty, utility = (number(row.get(which + key)) for key in ("reward", "penalty", "utility"))
    return name, text, reward + base, penalty, utility


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
        "<p>A second of arithmetic that shows what the penalty is for; it knows nothing of this run's model or prompts "
        "(logging.controlled false leaves it out).</p>",
        f"<pre>{escape(format_table(summary))}</pre>",
        "<div class='figures'>",
        *[_drawn(folder / "figures", name, caption) for name, caption in CONTROLLED.items()],
        "</div>",
    ]


CONTROLLED = {
    "phase": "Actions over iterations, by their norm on the axes that matter and on those that do not, over the "
    "contours of the true utility.",
    "utility": "True utility of the policy's action over iterations. Higher is better.",
    "noise": "Its norm on the axes that earn nothing. Lower is better.",
}


def _drawn(folder: Path, name: str, caption: str) -> str:
    """A figure on file, or nothing: figures of earlier versions are not all there."""
    path = folder / f"{name}.svg"
    return figure(figures.inline_svg(path, name), caption) if path.is_file() else ""
