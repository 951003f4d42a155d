"""The command line: `fpo-train run | plan | study | simulate | eval | attribute | report | serve | fetch | doctor`.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 stopped early and resumable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from fpo_train import __version__
from fpo_train.config import PENALTY_KINDS, AttributeConfig, EvalConfig, RunConfig, ServeConfig
from fpo_train.config.profiles import PROFILES
from fpo_train.config.words import arranged, files_of, meant, plain, refuse_idle, refuse_torn
from fpo_train.errors import RunError

CONFIGS = Path(__file__).parent / "configs"
C = TypeVar("C", RunConfig, EvalConfig, AttributeConfig, ServeConfig)
DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 3


class UsageError(Exception):
    """What was asked for makes no sense; the message is the one sentence that says so."""


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """A ValueError in here is the user's."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


class Parser(ArgumentParser):
    """A parser whose complaints are one sentence, without the usage text; a part of an option's name is none."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sentence = plain(message)
        if sentence.startswith("config: File does not exist"):
            sentence += f"; shipped with the package: {', '.join(sorted(path.name for path in CONFIGS.iterdir()))}"
        if file := re.match(r"unrecognized arguments: (\S+\.ya?ml)\b", sentence):
            sentence += f"; did you mean --config {file[1]}?"
        if unknown := re.match(r"unrecognized arguments: --([\w.]+)", sentence):
            sentence += meant(unknown[1], list(self._option_string_actions), "--")
        if unknown := re.match(r"Subcommand '(\w+)' does not accept option '([\w.]+)'", sentence):  # a file's
            asked = build()._subcommands_action._name_parser_map[unknown[1]]  # type: ignore[union-attr]
            sentence = f"{unknown[2]}: there is no such setting, but a configuration file has it"
            sentence += meant(unknown[2], list(asked._option_string_actions))
        command = self.prog.replace(" [options]", "")
        print(f"{command}: error: {sentence} (see {command} --help)", file=sys.stderr)
        raise SystemExit(USAGE)


def build(profile: str = "sound") -> Parser:
    """The parser with its subcommands; `profile` sets the defaults of a run."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="fpo-train", description="Foresighted Policy Optimization", version=__version__)
    commands = parser.add_subcommands(required=True)

    def command(name: str, description: str) -> Parser:
        sub = Parser(description=description)
        sub.add_argument("--config", action=ActionConfigFile, help="YAML file, local or shipped (demo.yaml)")
        commands.add_subcommand(name, sub, help=description)
        return sub

    for name, description in (
        ("run", "Train a policy by iterative RLHF with a steering penalty"),
        ("plan", "Show what a run will hold in memory, phase by phase, and whether the budget holds it"),
        ("study", "Run penalties from the same starts over seeds, and say what can be told apart"),
    ):
        sub = command(name, description)
        sub.add_class_arguments(RunConfig, None, fail_untyped=True)
        sub.set_defaults(PROFILES[profile])
        if name == "study":
            sub.add_argument(
                "--seeds", type=str, default="0,1,2,3,4", help="comma-separated whole numbers; --resume adds some"
            )
            sub.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its part of the cores")

    simulate = command("simulate", "Run a controlled environment of the paper")
    simulate.add_argument("environment", choices=("linear", "neural"), help="which environment")
    simulate.add_argument("--penalties", type=str, default="none,relaxed,practical", help="comma-separated")
    simulate.add_argument("--seeds", type=str, default="0", help="comma-separated whole numbers")
    simulate.add_argument("--vectorised", type=bool, default=False, help="neural: play all runs together")
    simulate.add_argument("--out", type=str, default="runs/simulate", help="new or empty folder for the results")

    for name, kind, description in (
        ("eval", EvalConfig, "Let policies answer a set of questions, and a judge compare the answers"),
        ("attribute", AttributeConfig, "Say which training pairs taught a reward model to like or to dislike a reply"),
        ("serve", ServeConfig, "Answer trainers in other processes over HTTP: rewards, and what retrains their model"),
    ):
        command(name, description).add_class_arguments(kind, None, fail_untyped=True)

    report = command("report", "Say what a table of pairwise judgements shows: wins, an interval, a test")
    report.add_argument("--judgements", type=str, required=True, help="CSV file with columns left, right and winner")
    report.add_argument("--out", type=str, default="", help="folder for report.json; empty: the table's")

    fetch = command("fetch", "Download and verify a model into the cache")
    fetch.add_argument("model", choices=("smollm2", "minilm"), help="which model")

    doctor = command("doctor", "Print versions, devices and what optional parts are absent")
    doctor.add_argument(
        "--kernels", action="store_true", help="hold every kernel to the float64 reference; 1 if one is wrong"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    if not sys.stderr.isatty():  # a log is no place for bars; tqdm reads this when it is first imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    arguments = arranged(_shipped_configs(sys.argv[1:] if argv is None else argv))
    try:
        with usage():
            refuse_torn(arguments)
        parser = build(_profile(arguments))
        if not arguments:
            parser.print_help()
            return USAGE
        options = parser.parse_args(arguments)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else FAILED
    except UsageError as error:
        print(f"fpo-train: error: {error}", file=sys.stderr)
        return USAGE
    except UnicodeDecodeError as error:
        print(f"fpo-train: error: a configuration file is not UTF-8 text: {error.reason}", file=sys.stderr)
        return USAGE
    command = options.subcommand
    options[command]["given"] = [word[2:].partition("=")[0] for word in arguments if word.startswith("--")]
    try:
        return COMMANDS[command](options[command])
    except UsageError as error:
        print(f"fpo-train {command}: error: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # who read the output has left; nor can what is still to be written be
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print(f"fpo-train {command}: stopped", file=sys.stderr)
        return FAILED
    except (RunError, OSError) as error:
        print(f"fpo-train {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED


def _shipped_configs(arguments: list[str]) -> list[str]:
    """Let `--config demo.yaml` mean the shipped file where no local one has that name."""
    resolved = []
    for previous, word in zip(["", *arguments], arguments, strict=False):
        name = word.removeprefix("--config=") if word.startswith("--config=") else word
        if (previous == "--config" or name != word) and not Path(name).exists() and (CONFIGS / name).is_file():
            word = word[: len(word) - len(name)] + str(CONFIGS / name)
        resolved.append(word)
    return resolved


def _profile(arguments: list[str]) -> str:
    """The profile that the command line names, else the last configuration file that does, else `sound`.

    It has to be known before the options are read, since it is their defaults.
    """
    named = "sound"
    for name in files_of(arguments):
        if name.is_file():
            with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):  # the parser will say what is wrong with it
                told = yaml.safe_load(name.read_text(encoding="utf-8"))
                named = told.get("profile", named) if isinstance(told, dict) else named
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if word == "--profile" or word.startswith("--profile="):
            named = following if word == "--profile" else word.removeprefix("--profile=")
    return named if named in PROFILES else "sound"  # the parser refuses any other


def _run(options: Any) -> int:
    config = _with_prompts(options, ())  # before what takes seconds to import
    from fpo_train.running.rehearsal import rehearse
    from fpo_train.running.run import run
    from fpo_train.running.stopping import Stopped

    try:
        if config.dry_run:
            rehearse(config)
        else:
            print(f"report: {run(config)}")
    except (KeyboardInterrupt, Stopped) as leaving:
        begun = not config.dry_run and (Path(config.out).expanduser() / "config.yaml").is_file()
        if begun:
            done = f" after iteration {leaving.iteration}" if isinstance(leaving, Stopped) else ""
            print(f"fpo-train run: stopped{done}; go on with --resume true", file=sys.stderr)
            return STOPPED
        print("fpo-train run: stopped before it began", file=sys.stderr)
        return FAILED
    return DONE


def _plan(options: Any) -> int:
    from fpo_train.memory.plan import plan_command

    return plan_command(_config(RunConfig, options))


def _study(options: Any) -> int:
    config = _with_prompts(options, PENALTY_KINDS)
    from fpo_train.study.study import study

    seeds = _whole_numbers("--seeds", options.seeds)
    if options.jobs < 1:
        raise UsageError(f"--jobs: wanted 1 or more, got {options.jobs}")
    try:
        print(f"results: {study(config, seeds, options.jobs)}")
    except KeyboardInterrupt:
        print("fpo-train study: stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    return DONE


def _with_prompts(options: Any, penalties: Sequence[str]) -> RunConfig:
    """The configuration of a run whose prompts are where it says; a rehearsal has stand-ins.

    Args:
        penalties: that run where none are compared; none here: the one of the configuration.
    """
    from fpo_train.data.places import rows_at

    config = _config(RunConfig, options)
    with usage():
        refuse_idle(options["given"], config, config.compared or penalties or (config.penalty.kind,))
    if not config.dry_run:
        rows_at(config.data.prompts, "data.prompts")
    return config


def _whole_numbers(name: str, text: str) -> list[int]:
    if not all(number.strip().isdigit() for number in text.split(",")):
        raise UsageError(f"{name}: wanted comma-separated whole numbers, got {text!r}")
    return [int(number) for number in text.split(",")]


@usage()
def _config(kind: type[C], options: Any) -> C:
    values, given = {}, options.as_dict()
    for field in dataclasses.fields(kind):
        section, value = field.default_factory, given[field.name]
        if section is not dataclasses.MISSING and not isinstance(value, dict):
            raise ValueError(f"{field.name}: wanted a section of settings, got {value!r}")
        values[field.name] = value if section is dataclasses.MISSING else section(**value)
    return kind(**values)


def _eval(options: Any) -> int:
    from fpo_train.evaluate.evaluation import evaluate
    from fpo_train.running.stopping import listening

    config = _config(EvalConfig, options)
    try:
        with listening():
            evaluate(config)
    except KeyboardInterrupt:
        print("fpo-train eval: stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    return DONE


def _serve(options: Any) -> int:
    config = _config(ServeConfig, options)
    with usage():
        token = config.token()
    if missing := [name for name in ("fastapi", "uvicorn") if not importlib.util.find_spec(name)]:
        raise RunError(f"it needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    importlib.import_module("fpo_train.integrations.server.run").serve(config, token)
    return DONE


def _attribute(options: Any) -> int:
    config = _config(AttributeConfig, options)
    for name, used in (("damping", config.curvature), ("seed", config.sketched)):
        if name in options["given"] and not used:
            wanted = "curvature true" if name == "damping" else "sketches (dim, parameters)"
            raise UsageError(f"{name}: nothing here has a use for it; it goes with {wanted}")
    from fpo_train.attribute.attribution import attribute

    try:
        print(f"results: {attribute(config)}")
    except KeyboardInterrupt:
        print("fpo-train attribute: stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    return DONE


def _report(options: Any) -> int:
    from fpo_train.evaluate.judgements import report_command

    report_command(Path(options.judgements).expanduser(), Path(options.out).expanduser() if options.out else None)
    return DONE


def _simulate(options: Any) -> int:
    from fpo_train.report.tables import format_table
    from fpo_train.simulate import linear, neural

    seeds = _whole_numbers("--seeds", options.seeds)
    if options.vectorised and options.environment != "neural":
        raise UsageError("--vectorised: only the neural environment has runs that are worth playing together")
    penalties, out = [name.strip() for name in options.penalties.split(",")], Path(options.out).expanduser()
    with usage():
        if options.environment == "linear":
            summary = linear.run(penalties, seeds, out)
        else:
            summary = neural.run(penalties, seeds, out, vectorised=options.vectorised)
    print(format_table(summary))
    print(f"results: {options.out}")
    return DONE


def _fetch(options: Any) -> int:
    from fpo_train.data.sources import fetch
    from fpo_train.report.progress import stage

    with stage(f"downloading and checking {options.model}"):
        path = fetch(options.model)
    print(path)
    return DONE


def _doctor(options: Any) -> int:
    if options.kernels:
        from fpo_train.running.kernels import kernels_command

        return DONE if kernels_command() else FAILED
    import fpo_kernels as fk
    from fpo_train.data.sources import KNOWN, cached
    from fpo_train.running.folder import environment

    facts = environment()
    print(f"python {facts['python']} on {facts['platform']}, {facts['threads']} threads, device {facts['device']}")
    for name, version in facts["versions"].items():
        print(f"  {name:<16}{version or 'absent'}")
    for kind, state in fk.native_libraries().items():
        print(f"  native/{kind:<9}{state}")
    for impl, state in _kernels().items():
        print(f"  kernels/{impl:<8}{state}")
    for name in ("trl", "bitsandbytes", "vllm", "datasets", "fastapi", "uvicorn"):
        print(f"  {name:<16}{'present' if importlib.util.find_spec(name) else 'absent (optional)'}")
    for name in KNOWN:
        print(f"  {name:<16}{cached(name) or 'not fetched yet'}")
    return DONE


def _kernels() -> dict[str, str]:
    """Which implementations of the products kernel run here, and why the others do not: by running them."""
    import torch

    import fpo_kernels as fk

    device = "cuda" if torch.cuda.is_available() else "cpu"
    one, offsets = torch.ones(1, 1, device=device), torch.tensor([0, 1], device=device)
    found = {}
    for impl in ("torch", "triton", "native"):
        try:
            fk.grad_products(one, one, offsets, torch.zeros(1, 2, dtype=torch.long, device=device), impl=impl)
            found[impl] = "runs"
        except RuntimeError as error:
            found[impl] = str(error).split("cannot run: ")[-1]
    return found


COMMANDS = {
    "run": _run,
    "plan": _plan,
    "study": _study,
    "simulate": _simulate,
    "eval": _eval,
    "attribute": _attribute,
    "report": _report,
    "serve": _serve,
    "fetch": _fetch,
    "doctor": _doctor,
}


if __name__ == "__main__":
    raise SystemExit(main())
