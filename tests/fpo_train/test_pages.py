"""What README and docs print runs as it stands: Python by itself, commands through the parsers that people meet."""

import functools
import re
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import _parser as benchmarks
from benchmarks.cases import cases
from fpo_train import cli
from fpo_train.cli import main
from fpo_train.config import AttributeConfig, EvalConfig, OracleConfig, RunConfig, ServeConfig
from fpo_train.config.words import arranged
from fpo_train.oracle import FunctionOracle
from fpo_train.oracle.preferences import read_preferences

from .variants import variant

ROOT = Path(__file__).parent.parent.parent
README, TRAINING = ROOT / "README.md", ROOT / "docs" / "training.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("fpo_kernels/*/README.md")),
]
CONTINUED = "# goes on from the block above\n"
COMMAND = re.compile(r"(?:PYTHONPATH=\. )?(?:fpo-train|make|python -m|torchrun) ")
OWN = ("fpo_train", "fpo_train.cli")
TARGETS = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
CONFIGS = {"run": RunConfig, "plan": RunConfig, "study": RunConfig, "eval": EvalConfig}
CONFIGS |= {"attribute": AttributeConfig, "serve": ServeConfig}
build = functools.lru_cache(cli.build)


def name(page):
    return str(page.relative_to(ROOT))


def split(page):
    """The fenced blocks of a page, (language, text) each, and what stands between them."""
    parts = re.split(r"^```(.*)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(parts) % 4 == 1, f"{page} leaves a block open"
    return list(zip(parts[1::4], parts[2::4], strict=True)), "\n".join(parts[::4])


def printed(page):
    """The commands in a page's blocks, in words."""
    lines = [
        line for language, text in split(page)[0] if not language for line in text.replace("\\\n", "").splitlines()
    ]
    return [shlex.split(line, comments=True) for line in lines if COMMAND.match(line)]


def named(page):
    """The commands in a page's sentences, in words, as far as they are spelt out."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", split(page)[1])]
    return [span.removesuffix("…").split() for span in spans if COMMAND.match(f"{span} ")]


def program(words):
    """Which program a command begins, and its words from there on."""
    words = words[words[0].startswith("PYTHONPATH") :]
    if words[0] in ("fpo-train", "make"):
        return words[0], words[1:]
    module = words[words.index("-m") + 1]
    return "fpo-train" if module in OWN else module, words[words.index("-m") + 2 :]


def parsed(words):
    """What the command line makes of words; the settings that a class of ours holds are checked too."""
    words = arranged(cli._shipped_configs(words))
    options = build(cli._profile(words)).parse_args(words)
    if options.subcommand in CONFIGS:
        cli._config(CONFIGS[options.subcommand], options[options.subcommand])


@pytest.fixture
def stand_ins(tiny, tmp_path):
    """What takes the place of the models and lengths that pages print."""
    own = variant(tiny, tmp_path / "rm", model="LlamaForSequenceClassification", num_labels=1, pad_token_id=2)
    shorter = {'"max_steps": 20': '"max_steps": 2', "max_steps=20": "max_steps=2"}
    return {'"smollm2"': repr(str(tiny)), '"my-reward-model"': repr(str(own))} | shorter


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")], ids=name)
def test_python_runs_as_printed(page, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known, lost = {}, False
    for text in (text for language, text in split(page)[0] if language == "python"):
        if not text.startswith(CONTINUED):
            known, lost = {}, "from trl " in text and sys.version_info < (3, 11)  # which TRL needs
        if not lost:
            for words, at_hand in stand_ins.items():
                text = text.replace(words, at_hand)
            exec(compile(text, name(page), "exec"), known)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_are_such_as_their_parsers_take(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in printed(page):
        begun, rest = program(words)
        if begun == "make":
            assert set(rest) <= set(TARGETS), words
        elif begun == "benchmarks":
            asked = benchmarks().parse_args(rest)
            assert set(getattr(asked, "cases", ())) <= {*cases(), "all"}, words
        else:
            assert begun == "fpo-train", words
            parsed(rest)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_sentences_are_there(page):
    for words in named(page):
        begun, rest = program(words)
        if begun == "make":
            assert set(rest) <= set(TARGETS), words
        elif begun == "fpo-train" and rest:
            command = build()._subcommands_action._name_parser_map[rest[0]]
            options = {word.partition("=")[0] for word in rest[1:] if word.startswith("--")}
            assert options <= set(command._option_string_actions), words


def test_there_is_something_to_hold():
    assert len(printed(README)) >= 3
    assert len(printed(TRAINING)) >= 14
    assert sum(len(named(page)) for page in PAGES) >= 30
    assert {program(words)[0] for page in PAGES for words in printed(page)} == {"make", "benchmarks", "fpo-train"}
    for page, count in ((README, 2), (ROOT / "docs" / "kernels.md", 2), (ROOT / "docs" / "embedding.md", 4)):
        assert sum(language == "python" for language, _ in split(page)[0]) == count


CHEAP = (["plan"], ["simulate", "linear"])


def test_what_costs_little_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = []
    for page in (README, TRAINING, ROOT / "docs" / "memory.md"):
        for words in printed(page):
            begun, rest = program(words)
            if begun == "fpo-train" and (rest[:1] in CHEAP or rest[:2] in CHEAP):
                assert main(rest) == 0, (words, capsys.readouterr().err)
                done.append(rest[0])
    assert sorted(done) == ["plan"] * 4 + ["simulate"]


def test_a_run_and_its_resume_as_printed_but_for_model_and_length(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = "--policy.model", str(tiny), "--logging.controlled", "false", "--reward_model.fit_pairs", "4"
    of_a = [words[1:] for words in printed(TRAINING) if words[:2] == ["fpo-train", "run"] and "runs/a" in words]
    assert [("--resume" in words) for words in of_a] == [False, True]
    for iterations, words in enumerate(of_a, start=1):
        assert main([*words, *other, "--iterations", str(iterations)]) == 0, capsys.readouterr().err
    assert len((tmp_path / "runs" / "a" / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_forms_of_the_data_page(tmp_path, monkeypatch):
    blocks = dict(split(ROOT / "docs" / "data.md")[0])
    (tmp_path / "people.jsonl").write_text(blocks["jsonl"])
    assert [row[3] for row in read_preferences(tmp_path / "people.jsonl")] == [1.0, 0.8]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "taste.py").write_text(blocks["python"])
    asked = next(words for words in printed(ROOT / "docs" / "data.md") if "--oracle.function" in words)
    oracle = FunctionOracle(OracleConfig(kind="function", function=asked[asked.index("--oracle.function") + 1]))
    assert oracle._function(prompts=["a"] * 2, completions=["b" * 80, "b"]) == [0, -79 / 40]
