"""The collapse study: every penalty from the same starts, over seeds, a process a run, and what can be said of them.

A study's folder holds `<penalty>/seed-<n>/`, a run each. Finished runs are kept and a broken one goes on, so a study
that was cut off is asked for again, and one that is done can be given more seeds. Runs of one seed share prompts, first
adapter, first reward model and the random stream of each reply: penalties are compared within a seed.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fpo_train.config import PENALTY_KINDS, PenaltyKind, RunConfig
from fpo_train.data import templates
from fpo_train.data.adapters import settle
from fpo_train.errors import RunError
from fpo_train.report import records
from fpo_train.report.verdicts import Paired, paired
from fpo_train.running.claim import claimed
from fpo_train.running.folder import LATER, flat, plain, unwritten
from fpo_train.running.stopping import listening
from fpo_train.whole import write_text

from .figures import draw
from .runs import run_all

FINAL = {"gold": "audit_utility", "proxy": "reward", "gap": "proxy_gap"}  # what a run ends at → its key in the metrics
COLUMNS = (*FINAL.values(), "oracle_utility", "overconfidence", "kl", "reply_tokens", "repetition", "prompts_left_out")
BASELINE: PenaltyKind = "none"
STUDY = "study.yaml"
QUESTION = {"practical", "relaxed", "residual"}  # kinds that the question of `nearer` is about
Table = dict[str, dict[int, list[records.Row]]]  # penalty → seed → rows


def study(config: RunConfig, seeds: Sequence[int], jobs: int = 1) -> Path:
    """Run `config` with each penalty of `config.compare` (empty: all) at each seed; returns the page it writes.

    Args:
        config: what all runs share. `out` is the study's folder; with `resume` one that is there may be given more
            seeds than it has, and the result is over all.
        jobs: runs at a time, each with its part of the machine's cores.

    Raises:
        RunError: a folder that holds another study, no study to resume, a rehearsal (`dry_run`), or a run that failed;
            the others are kept. Where none has begun, no folder is left.
        KeyboardInterrupt: an end was asked for by a signal; runs under way have finished their iteration and are saved.
    """
    if config.dry_run:
        raise RunError("study: dry_run leaves no runs to compare; rehearse with `fpo-train run`")
    seeds = list(dict.fromkeys(seeds))
    out = Path(config.out).expanduser()
    kinds = config.compared or PENALTY_KINDS
    config, resume = settle(_dated(out, config)), config.resume
    config = dataclasses.replace(
        config, compare="", resume=False, logging=dataclasses.replace(config.logging, audit=True, controlled=False)
    )
    fresh = unwritten([out])
    seeds = _claim(out, config, seeds, kinds, resume)
    todo = [
        dataclasses.replace(
            config,
            out=str(_folder(out, kind, seed)),
            seed=seed,
            resume=True,
            penalty=dataclasses.replace(config.penalty, kind=kind),
        )
        for seed in seeds  # a study that is cut off has whole seeds
        for kind in kinds
    ]
    with claimed(out), listening() as request:
        failed = run_all(todo, jobs, request)
    if failed:
        if fresh and not any(any(Path(one.out).rglob("*")) for one in todo):
            shutil.rmtree(out)
            if fresh[out]:
                out.mkdir()
        raise RunError(f"study: {len(failed)} of {len(todo)} runs failed, the others are kept; the first: {failed[0]}")
    return write_study(out)


def _dated(out: Path, config: RunConfig) -> RunConfig:
    """The configuration with one moment that chat templates take for now in all runs, whenever each of them begins."""
    path = out / STUDY
    run = _asked(path).get("run") if path.is_file() else None
    data = run.get("data") if isinstance(run, dict) else None
    before = templates.known(data.get("date")) if isinstance(data, dict) else ""
    date = config.data.date or before or templates.now()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=date))


def _asked(path: Path) -> dict[str, Any]:
    """What a study's folder says it is."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict) or not found.keys() >= {"seeds", "penalties"}:
        raise RunError(f"study: {path} is damaged or cut short; put the whole file back")
    return found


def _claim(out: Path, config: RunConfig, seeds: Sequence[int], kinds: Sequence[str], resume: bool) -> list[int]:
    """Write what the study is, or see that it is this one that the folder holds; the seeds that it has now."""
    path, before = out / STUDY, []
    run = plain(dataclasses.replace(config, out="-", seed=0))
    if path.is_file():
        asked = _asked(path)
        before = asked["seeds"]
        if told := _changed(asked, {"penalties": list(kinds), "run": run}):
            raise RunError(f"study: {out} holds a study of other settings ({told}); choose another folder")
        held = f"study: {out} holds the seeds {','.join(map(str, before))}"
        if gone := [seed for seed in before if seed not in seeds]:
            raise RunError(f"{held}; ask for all of them, {gone[0]} too, and for any more")
        if len(seeds) > len(before) and not resume:
            raise RunError(f"{held}; --resume adds those that are missing")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"out: {out} is not an empty folder and holds no study")
    elif resume and not out.exists():
        raise RunError(f"out: there is no study to resume in {out}")
    every = [*before, *(seed for seed in seeds if seed not in before)]
    if every != before:
        out.mkdir(parents=True, exist_ok=True)
        wanted = {"seeds": every, "penalties": list(kinds), "run": run}
        write_text(path, yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True))
    return every


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first setting that is another than the study began with, in words; empty where all are as they were.

    A study of an earlier version does not have those that came later.
    """
    old, new = (flat({"penalties": one.get("penalties"), **(one.get("run") or {})}) for one in (before, now))
    later = {key for key in new if key not in old and (key in LATER or key.startswith("logging."))}
    for key in dict.fromkeys([*new, *old]):
        if key not in later and old.get(key) != new.get(key):
            return f"{key} was {old.get(key)!r} and is {new.get(key)!r} now"
    return ""


def _folder(out: Path, kind: str, seed: int) -> Path:
    return out / kind / f"seed-{seed}"


def read_table(out: Path) -> Table:
    """The rows of every run of a study's folder."""
    asked = _asked(out / STUDY)
    return {
        kind: {seed: records.read(_folder(out, kind, seed) / records.METRICS) for seed in asked["seeds"]}
        for kind in asked["penalties"]
    }


def write_study(out: Path) -> Path:
    """`study.json`, `curves.csv`, `figures/` and the page `study.md` of a study whose runs are done."""
    table = read_table(out)
    summary = summarise(table)
    write_text(out / "study.json", json.dumps(summary, indent=2) + "\n")
    with (out / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["penalty", "seed", "iteration", *COLUMNS])
        for kind, by_seed in table.items():
            for seed, rows in by_seed.items():
                writer.writerows([kind, seed, row["iteration"], *(row.get(key) for key in COLUMNS)] for row in rows)
    draw(table, out / "figures", FINAL)
    page = out / "study.md"
    write_text(page, _page(summary) + _pages(out, table))
    return page


def summarise(table: Table) -> dict[str, Any]:
    """Final values of each run (means over the last quarter of its iterations), and paired differences of penalties.

    penalty → {final: {seed: {gold, proxy, gap}}, oracle_calls: {seed: n}, against: {other: {gold: {…}, …}}}. A value is
    None where those iterations have none, and its seed is left out of the differences.
    """
    summary: dict[str, Any] = {}
    for kind, by_seed in table.items():
        final = {seed: _final(rows) for seed, rows in by_seed.items()}
        calls = {seed: sum(row["oracle_calls"] for row in rows) for seed, rows in by_seed.items()}
        summary[kind] = {"final": final, "oracle_calls": calls}
    for kind, found in summary.items():
        found["against"] = {
            other: {
                key: paired([a - b for a, b in _together(summary, key, kind, other) if a is not None and b is not None])
                for key in FINAL
            }
            for other in summary
            if other != kind
        }
    return summary


def nearer(summary: dict[str, Any], one: str, other: str, goal: str) -> Paired:
    """How much nearer `one` ends to `goal` than `other`, in gold utility: |other − goal| − |one − goal|, paired."""
    ends = [values for values in _together(summary, "gold", one, other, goal) if None not in values]
    return paired([abs(b - end) - abs(a - end) for a, b, end in ends])


def _together(summary: dict[str, Any], key: str, *kinds: str) -> list[tuple[Any, ...]]:
    """Final values of several penalties, a row a seed."""
    finals = [summary[kind]["final"] for kind in kinds]
    return [tuple(final[seed][key] for final in finals) for seed in finals[0]]


def _final(rows: Sequence[records.Row]) -> dict[str, float | None]:
    last = rows[-max(1, len(rows) // 4) :]
    return {name: _mean([row[key] for row in last]) for name, key in FINAL.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _page(summary: dict[str, Any]) -> str:
    """Tables of final values and differences, and in words which differences are told apart from chance."""
    seeds = len(next(iter(summary.values()))["final"])
    rivals = [kind for kind in summary if kind != BASELINE]
    lines = [
        "# Collapse study",
        "",
        f"Means over the last quarter of the iterations, over {seeds} seed{'s' * (seeds != 1)}; differences are paired "
        "by seed, with 95 % intervals by Student's t, each for itself: not widened for being one of "
        f"{math.comb(len(summary), 2)}. The gap is the best reply's, and a penalty that asks the oracle has a hand in "
        "which reply that is.",
        "",
        "| penalty | gold utility | proxy reward | gap | oracle calls | gold − none | gap − none |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, found in summary.items():
        means = [_number(_mean([run[key] for run in found["final"].values()])) for key in FINAL]
        calls = statistics.fmean(found["oracle_calls"].values())
        against = found["against"].get(BASELINE)
        cells = [_interval(against[key]) if against else "–" for key in ("gold", "gap")]
        lines.append(f"| {kind} | {' | '.join(means)} | {calls:.0f} | {' | '.join(cells)} |")
    if len(rivals) > 1:
        lines += ["", "Gold utility, row − column:", "", f"| | {' | '.join(rivals)} |"]
        lines.append("|---" * (len(rivals) + 1) + "|")
        for kind in rivals:
            against = summary[kind]["against"]
            cells = [_interval(against[other]["gold"]) if other != kind else "" for other in rivals]
            lines.append(f"| {kind} | {' | '.join(cells)} |")
    said = []
    if BASELINE in summary:
        for kind in rivals:
            verdict = _verdict(summary[kind]["against"][BASELINE]["gold"], "Higher", "Lower")
            said.append(f"- `{kind}` against `{BASELINE}`: {verdict}")
    if summary.keys() >= QUESTION:
        verdict = _verdict(nearer(summary, "residual", "practical", "relaxed"), "Nearer", "Farther")
        said.append(f"- Does `residual` end nearer to `relaxed` than `practical` does? {verdict}")
    if said:
        lines += ["", "## What can be said of the gold utility", "", *said]
    return "\n".join([*lines, ""])


def _pages(out: Path, table: Table) -> str:
    """Where each run's own page is, for those that have one."""
    lines = []
    for kind, by_seed in table.items():
        pages = {seed: _folder(out, kind, seed).relative_to(out) / "report.html" for seed in by_seed}
        led = [f"[seed {seed}]({page.as_posix()})" for seed, page in pages.items() if (out / page).is_file()]
        lines += [f"- `{kind}`: {', '.join(led)}"] if led else []
    return "\n".join(["", "## Each run's own page", "", *lines, ""]) if lines else ""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _interval(found: Paired) -> str:
    known = "" if found["low"] is None else f" [{_number(found['low'])}, {_number(found['high'])}]"
    return _number(found["mean"]) + known


def _verdict(found: Paired, more: str, less: str) -> str:
    if found["low"] is None:
        return f"{_interval(found)}; {found['pairs']} pair{'s' * (found['pairs'] != 1)} of runs give no interval."
    end = f"{_interval(found)}, p = {found['p']:.3g}."
    if found["low"] > 0:
        return f"{more} by {end}"
    return f"{less} by {end}" if found["high"] < 0 else f"Not told apart from chance: {end}"
