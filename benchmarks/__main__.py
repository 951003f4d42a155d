"""python -m benchmarks list | run | compare | report: exit 0 done, 1 something failed or is slower, 2 wrong usage."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import cases, report, results
from benchmarks.comparing import command as comparing
from benchmarks.floors import Rates
from benchmarks.runner import Options, chosen, run_case

BUSY = 0.05  # of all cores' time; with 50%, two-thread matrix products were seen to take 10 times as long


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, SystemExit(2) on wrong usage."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "report":
        return report.main(parser, arguments)
    known = cases.cases()
    if arguments.command == "list":
        for case in known.values():
            print(f"{case.name:<12} {case.description}\n{'':<12} {', '.join(case.competitors)}")
        return 0
    if arguments.command == "compare":
        return comparing.run(arguments)
    names = list(known) if "all" in arguments.cases else arguments.cases
    for name in names:
        if name not in known:
            parser.error(f"unknown case {name!r}: wanted all or some of {', '.join(known)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no usable GPU here")
    failed = False
    for name in names:
        case = known[name]
        repeats = arguments.repeats or case.rounds
        options = Options(
            device=torch.device(arguments.device),
            quick=arguments.quick,
            repeats=repeats,
            clock=case.clock,
            only=arguments.setting,
        )
        if not chosen(case, options):
            parser.error(f"--setting {arguments.setting!r}: {name} has no setting of that name")
        print(f"{case.name}: {case.description}", flush=True)
        older = results.known(case, options, arguments.out)
        commit, _ = results.revision()
        rates = Rates(options.device)
        rows = [{**row, "commit": commit} for row in run_case(case, options, rates)]
        rows = results.beside(case, options, rows, older)
        result = results.describe(case, options, rows, rates)
        path = results.write(case, options, result, arguments.out)
        print(f"{results.table(rows)}\nratio: to {case.baseline}, round by round; written to {path}\n", flush=True)
        if result["headlines"]:
            print(f"{results.lines(result['headlines'])}\n", flush=True)
        if result["summary"]:
            print("\n".join(result["summary"]) + "\n")
        busiest = max((row.get("others_cpu_share") or 0.0 for row in rows), default=0.0)
        if busiest > BUSY:
            print(f"warning: other processes took up to {busiest:.0%} of the CPU; run again when it is quiet\n")
        failed |= any(row["status"] == "failed" for row in rows)
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Benchmarks of fpo_kernels, gated on correct results."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the cases and their competitors")
    run = commands.add_parser("run", help="gate, time and write results")
    run.add_argument("cases", nargs="+", metavar="case", help="names from `list`, or all")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--out", type=Path, default=results.FOLDER, help="folder of results; <device>/<case>.json below")
    run.add_argument("--repeats", type=_positive, help="timed rounds a setting, in place of the case's own")
    run.add_argument("--setting", default="", help="only settings whose name has this in it; the file keeps the others")
    run.add_argument("--quick", action="store_true", help="small settings, written to <case>-quick.json")
    comparing.add_parser(commands)
    report.add_parser(commands)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted a positive number, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
