"""The command `compare`: two trees, some cases, a line a setting, a file."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks import cases, results
from benchmarks.comparing.measuring import BAD, Options, Pair, Pairs, Row, measure
from benchmarks.comparing.sides import SideError
from benchmarks.comparing.trees import Tree, TreeError, tree
from benchmarks.comparing.verdict import ERROR, LOOKS
from benchmarks.registry import Case

DEFAULT = ("products", "direction", "grad_sketch", "influence")
DESCRIPTION = """\
Times our own way in two revisions, on the same inputs, in two processes that take turns, until it is beyond doubt
whether the head is slower than the base. Ends with 0 where nothing is slower, 1 where something is slower, wrong or
fails, 2 on wrong usage, 130 when interrupted."""


def add_parser(commands: Any) -> None:
    """Add `compare` to the subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare", help="time two revisions against each other: slower, faster, or no change", description=DESCRIPTION
    )
    parser.add_argument("base", help="a revision of git, or a folder with a checkout")
    parser.add_argument("head", help="the same; . is the working tree")
    parser.add_argument("--case", nargs="+", default=list(DEFAULT), metavar="CASE", help="default: %(default)s")
    parser.add_argument("--setting", default="", help="only settings whose name has this in it")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="quick", action="store_true", default=True, help="small settings (the default)")
    sizes.add_argument("--full", dest="quick", action="store_false", help="all settings")
    parser.add_argument("--competitor", default="", help="time this one in place of the case's own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--margin", type=_positive, default=5.0, help="percent that count as no change (%(default)s)")
    parser.add_argument("--seconds", type=_positive, default=240.0, help="the most for one verdict (%(default)s)")
    parser.add_argument("--rounds", type=int, default=LOOKS[-1], help="the most for one verdict (%(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.set_defaults(fail=parser.error)


def run(arguments: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code, SystemExit(2) on wrong usage."""
    known = cases.cases()
    for name in arguments.case:
        if name not in known:
            arguments.fail(f"unknown case {name!r}: wanted some of {', '.join(known)}")
        if not known[name].ours and not arguments.competitor:
            able = ", ".join(case.name for case in known.values() if case.ours)
            arguments.fail(f"{name} does not say which competitor is ours: wanted --competitor, or some of {able}")
    if arguments.rounds < 1:
        arguments.fail(f"--rounds: wanted a positive number, got {arguments.rounds}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        arguments.fail("--device cuda: torch finds no usable GPU here")
    options = Options(
        device=torch.device(arguments.device),
        quick=arguments.quick,
        competitor=arguments.competitor,
        margin=arguments.margin / 100,
        seconds=arguments.seconds,
        rounds=arguments.rounds,
    )
    try:
        with _ended_in_order(), trees(arguments.base, arguments.head) as (base, head, scratch):
            for side, one in (("base", base), ("head", head)):
                print(f"{side}  {one.given}  {one.commit or one.path}; native libraries: {one.native}", flush=True)
            chosen = {name: known[name] for name in arguments.case}
            rows = compare(base, head, chosen, arguments.setting, options, scratch)
            if arguments.out:
                _write(arguments.out, describe(base, head, rows, options))
    except TreeError as problem:
        arguments.fail(str(problem))
    except SideError as problem:
        print(f"failed: {problem}")
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if not rows:
        arguments.fail(f"--setting {arguments.setting!r}: no case has a setting of that name in both revisions")
    print(summary(rows))
    return int(any(row["verdict"] in BAD for row in rows))


@contextlib.contextmanager
def trees(base: str, head: str) -> Iterator[tuple[Tree, Tree, Path]]:
    """Both checkouts, and a folder for what else is written; all that is temporary is gone in the end."""
    with tempfile.TemporaryDirectory(prefix="fpo-compare-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        with tree(base, scratch / "base") as a, tree(head, scratch / "head") as b:
            yield a, b, scratch


def compare(
    base: Tree, head: Tree, chosen: Mapping[str, Case], setting: str, options: Options, scratch: Path
) -> list[Row]:
    """Measure the settings that both trees have and whose name has `setting` in it; printed line by line.

    Returns:
        The rows of `measure`; for a case that one of the trees does not have, one that says so.

    Raises:
        SideError: a tree cannot be imported.
    """
    rows: list[Row] = []
    with Pairs(base, head, options.device, scratch) as pairs:
        listed = settings(pairs[0], chosen, setting, options.quick)
        width = max((len(f"{name}: {one}") for name, names in listed.items() for one in names), default=0)
        print(f"\n{columns(('setting', 'timed', 'base', 'head', 'rounds', 'took'), width)}  verdict", flush=True)
        for name, names in listed.items():
            for one in names:
                rows.append(measure(pairs, chosen[name], one, options))
                print(line(rows[-1], width), flush=True)
            if not names and not setting:
                missing = {"case": name, "setting": "", "verdict": "not compared"}
                rows.append({**missing, "text": "not compared: there is no setting of it that both revisions have"})
                print(line(rows[-1], width), flush=True)
    return rows


def settings(pair: Pair, chosen: Mapping[str, Case], setting: str, quick: bool) -> dict[str, list[str]]:
    """Per case the names that both sides know and that have `setting` in them."""
    try:
        known = [side.begin()["cases"] for side in (pair.base, pair.head)]
        found: dict[str, list[str]] = {}
        for name in chosen:
            found[name] = []
            if all(name in listed for listed in known):
                ours, theirs = (told["settings"] for told in pair.ask("settings", case=name, quick=quick))
                found[name] = [one for one in theirs if one in ours and setting in one]
        return found
    finally:
        with contextlib.suppress(SideError):
            pair.ask("end")


def line(row: Row, width: int) -> str:
    """One setting in a line."""
    times = (results.duration(row[key]) if key in row else "" for key in ("base_seconds", "head_seconds"))
    took = f"{row['seconds']:.0f} s" if "seconds" in row else ""
    note = f" ({row['note']})" if "note" in row else ""
    cells = (f"{row['case']}: {row['setting']}", row.get("competitor", ""), *times, str(row.get("rounds", "")), took)
    return f"{columns(cells, width)}  {row['text']}{note}"


def columns(cells: Sequence[str], width: int) -> str:
    """Setting and competitor to the left, four figures to the right."""
    setting, timed, *figures = cells
    return f"{setting:<{width}}  {timed:<12} " + " ".join(f"{figure:>7}" for figure in figures)


def summary(rows: Sequence[Row]) -> str:
    """How many settings came out how, and what an undecided one is to be done about."""
    words = [row["verdict"] for row in rows]
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    more = "; undecided ones want a quieter machine, more --seconds or a wider --margin" if "undecided" in words else ""
    return f"\n{len(rows)} settings: {counts}{more}; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def describe(base: Tree, head: Tree, rows: list[Row], options: Options) -> dict[str, Any]:
    """Everything that goes into the file."""
    return {
        **results.environment(options.device),
        "base": _described(base),
        "head": _described(head),
        "quick": options.quick,
        "margin": options.margin,
        "error": ERROR,
        "load_average": os.getloadavg(),
        "rows": rows,
    }


def _described(one: Tree) -> dict[str, str | None]:
    return {"given": one.given, "commit": one.commit, "native": one.native}


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}", flush=True)


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """What asks this process to end ends it like Ctrl-C, so that worktrees are removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"wanted a positive number, got {text}")
    return value
