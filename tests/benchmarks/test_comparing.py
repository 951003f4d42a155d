"""`compare` on tiny repositories: which code is run, what is told, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
import torch

from benchmarks import cases, results
from benchmarks.__main__ import main
from benchmarks.comparing import command, timed, trees
from benchmarks.comparing.sides import Side, SideError
from benchmarks.registry import Case

# A tree whose package and cases are as small as the timing process allows.
CASES = """\
import dataclasses
import torch
from types import SimpleNamespace
import fpo_kernels

@dataclasses.dataclass
class Setting:
    name: str
    size: int
    dtype: str = "float32"

def build(setting, device):
    if setting.name == "broken":
        raise ValueError("no such size")
    if setting.name == "fatal":
        import os
        os.abort()
    x = torch.ones(setting.size)
    run = SimpleNamespace(run=lambda: fpo_kernels.double(x))
    return SimpleNamespace(competitors={"ours": run, "theirs": run}, cannot={"faster": "no GPU"})

CASE = SimpleNamespace(
    settings=lambda quick, device: [Setting(name, SIZE) for name in ("broken", "fatal", "small")[2 if quick else 0 :]],
    build=build,
)

def cases():
    return {"tiny": CASE}
"""


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write(folder: Path, factor: str = "2", size: int = 5) -> None:
    """The tree's files; its one function multiplies by the factor."""
    files = {
        "benchmarks/__init__.py": "",
        "benchmarks/cases/__init__.py": CASES.replace("SIZE", str(size)),
        "fpo_kernels/__init__.py": f"def double(x):\n    return x * {factor}\n",
        "csrc/a.cpp": "// one\n",
        "setup.py": 'import pathlib\npathlib.Path("fpo_kernels/_native.abi3.so").write_text("built")\n',
        ".gitignore": "*.so\n__pycache__/\n",
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Three commits, tagged: right, same (otherwise written), wrong; and the command made to look there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    folder = tmp_path / "repository"
    write(folder)
    git(folder, "init", "-q")
    for tag, factor in (("right", "2"), ("same", "2.0"), ("wrong", "2.001")):
        write(folder, factor)
        git(folder, "add", ".")
        git(folder, "commit", "-qm", tag)
        git(folder, "tag", tag)
    case = Case(
        name="tiny",
        description="",
        competitors=(),
        baseline="",
        settings=lambda quick, device: [],
        build=lambda setting, device: None,
        ours=("faster", "ours"),
    )
    other = Case(**{**vars(case), "name": "young", "ours": ()})
    monkeypatch.setattr(cases, "cases", lambda: {"tiny": case, "young": other})
    monkeypatch.setattr(trees.tree.__wrapped__, "__defaults__", (folder,))
    monkeypatch.setattr(results, "ROOT", folder)
    yield folder
    assert git(folder, "worktree", "list").count("\n") == 0, "a worktree is left"
    assert not list((tmp_path / "temporary").iterdir()), "something temporary is left"


def compared(*options: str) -> int:
    return main(["compare", *options, "--case", "tiny", "--rounds", "1", "--device", "cpu"])


def test_each_side_runs_its_own_code(repository, tmp_path, capsys):
    assert compared("right", "same", "--out", str(tmp_path / "found" / "out.json")) == 0
    found = json.loads((tmp_path / "found" / "out.json").read_text())
    (row,) = found["rows"]
    assert (row["case"], row["setting"], row["competitor"], row["error"]) == ("tiny", "small", "ours", 0.0)
    assert row["verdict"] == "undecided"  # of one round
    assert len(row["samples"]) == len(row["samples"][0]) == 1
    assert found["base"]["commit"] == git(repository, "rev-parse", "right")
    said = capsys.readouterr().out
    assert "undecided: 1 rounds, 12 are the fewest that decide" in said
    assert "1 settings: 1 undecided" in said


def test_a_folder_is_run_as_it_is_and_its_wrong_answer_told(repository, tmp_path, monkeypatch, capsys):
    write(tmp_path / "copy", "2.001")
    monkeypatch.chdir(tmp_path / "copy")
    assert compared("right", ".", "--out", str(tmp_path / "out.json")) == 1
    assert "wrong: the head's answer is not the base's: relative error 5.0e-04" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert "samples" not in row, "timed although it is wrong"


def test_what_fails_does_not_end_the_others_and_other_inputs_are_no_comparison(repository, tmp_path, capsys):
    write(tmp_path / "copy", size=6)
    assert compared("right", str(tmp_path / "copy"), "--full") == 1
    said = capsys.readouterr().out
    assert "failed: right: ValueError: no such size" in said
    assert "failed: right: its process ended with SIGABRT" in said
    assert "not compared: the setting's size is not the same in both" in said
    assert "3 settings: 2 failed, 1 not compared" in said


@pytest.mark.parametrize(
    ("package", "complaint"),
    [
        (
            "__file__ = '/elsewhere/fpo_kernels/__init__.py'",
            "fpo_kernels was imported from /elsewhere/.*, wanted from ",
        ),
        ("raise RuntimeError('half written')", "copy: RuntimeError: half written"),
    ],
)
def test_a_tree_that_is_not_what_it_should_be_says_so(tmp_path, package, complaint):
    write(tmp_path / "copy")
    (tmp_path / "copy" / "fpo_kernels" / "__init__.py").write_text(f"{package}\n")
    copy = trees.Tree("copy", tmp_path / "copy", None, "")
    with Side(copy, torch.device("cpu"), tmp_path / "scratch") as side, pytest.raises(SideError, match=complaint):
        side.begin()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["right", "none such"], "'none such' is no revision of"),
        (["right", "same", "--rounds", "0"], "--rounds: wanted a positive number, got 0"),
        (["right", "same", "--margin", "-1"], "wanted a positive number, got -1"),
        (["right", "same", "--case", "unheard"], "unknown case 'unheard': wanted some of tiny, young"),
        (["right", "same", "--case", "young"], "young does not say which competitor is ours"),
        (["right"], "head"),
    ],
)
def test_wrong_usage(repository, options, complaint, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", *options, *([] if "--case" in options else ["--case", "tiny"])])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_setting_that_no_case_has(repository, monkeypatch, capsys):
    monkeypatch.setattr(command, "compare", lambda *arguments: [])
    with pytest.raises(SystemExit) as ended:
        compared("right", "same", "--setting", "huge")
    assert ended.value.code == 2
    assert "--setting 'huge': no case has a setting of that name in both revisions" in capsys.readouterr().err


def test_a_revision_from_before_there_were_cases(repository, capsys):
    git(repository, "checkout", "-q", "--orphan", "old")
    git(repository, "rm", "-rqf", ".")
    git(repository, "commit", "-qm", "old", "--allow-empty")
    with pytest.raises(SystemExit):
        compared("old", "right")
    assert "'old' has no benchmarks/cases/__init__.py" in capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_it_is_interrupted(repository, monkeypatch, how):
    def interrupted(*arguments):
        os.kill(os.getpid(), how)
        time.sleep(60)

    monkeypatch.setattr(command, "compare", interrupted)
    assert compared("right", "same") == 130


def test_native_libraries_are_taken_where_their_sources_are_the_same(repository, tmp_path):
    assert trees.bring_native(repository, "right", repository) == "none, as the working tree has none"
    library = repository / "fpo_kernels" / "_native.abi3.so"
    library.write_text("here")
    with trees.tree("right", tmp_path / "worktree") as found:
        assert found.native == "the working tree's, which has the same sources"
        assert (found.path / "fpo_kernels" / library.name).read_text() == "here"
    (repository / "csrc" / "a.cpp").write_text("// two\n")
    with trees.tree("right", tmp_path / "worktree") as found:
        assert found.native.startswith("built for it, in ")
        assert (found.path / "fpo_kernels" / library.name).read_text() == "built"
    git(repository, "checkout", "-q", "csrc")
    (repository / "csrc" / "new.cpp").touch()
    with trees.tree("right", tmp_path / "worktree") as found:
        assert found.native.startswith("built for it, in ")


def test_a_library_that_does_not_build_is_told(repository, tmp_path):
    (repository / "setup.py").write_text("raise SystemExit('no compiler')\n")
    git(repository, "commit", "-qam", "broken")
    git(repository, "revert", "--no-edit", "HEAD")
    with trees.tree("HEAD~1", tmp_path / "worktree") as found:
        assert found.native == "none, as they do not build: no compiler"


def test_the_least_block_counts_without_what_others_took(monkeypatch):
    """Three blocks of two calls: one undisturbed, one behind others on the processor, one counted late."""
    wall, worked, waited = iter([0, 4, 10, 16, 20, 25]), iter([0, 3, 3, 6, 6, 9]), iter([0, 0, 0, 2, 2, 9])
    monkeypatch.setattr(timed.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(timed.time, "thread_time", lambda: next(worked))
    monkeypatch.setattr(timed, "_waited", lambda: next(waited))
    calls: list[int] = []
    assert timed.least(lambda: calls.append(1), 2, 3, torch.device("cpu")) == 1.5
    assert len(calls) == 6


def test_what_is_planted_is_a_share_of_the_call_s_own_work(monkeypatch):
    clock = [0.0]

    def read() -> float:
        clock[0] += 0.001  # what looking costs
        return clock[0]

    def work() -> str:
        clock[0] += 10.0
        return "answer"

    monkeypatch.setattr(timed.time, "thread_time", read)
    assert timed.burning(work, 0.2)() == "answer"
    assert clock[0] == pytest.approx(12.0, abs=0.01)


def test_the_timing_script_needs_nothing_of_its_own_tree():
    source = Path(timed.__file__).read_text()
    imported = re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE)
    assert set(imported) <= {*sys.stdlib_module_names, "torch"}


def test_help_tells_of_it(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "compare" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert "130 when interrupted" in textwrap.dedent(capsys.readouterr().out).replace("\n", " ")
