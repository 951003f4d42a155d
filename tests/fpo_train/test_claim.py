"""Two commands and one folder: the second is refused, whatever became of the first nothing of it is lost."""

import signal
import subprocess
import sys

import pytest

from fpo_train.cli import main
from fpo_train.errors import RunError
from fpo_train.running.claim import claimed

from .runs import arguments, contents

HOLD = (
    "import pathlib, sys, time; from fpo_train.running.claim import claimed\n"
    "with claimed(pathlib.Path(sys.argv[1])): print('has it', flush=True); time.sleep(600)"
)


def test_a_second_run_is_refused_and_changes_nothing(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    with claimed(out):
        assert main(arguments(tiny, out)) == 1
        assert (
            f"error: out: another process writes into {out}; choose another folder, or wait" in capsys.readouterr().err
        )
        assert not contents(out)
    assert not out.exists()
    assert main(arguments(tiny, out)) == 0
    before = contents(out)
    with claimed(out):
        assert main(arguments(tiny, out, "--resume", "true", "--iterations", "4")) == 1
        assert contents(out) == before
    assert main(arguments(tiny, out, "--resume", "true", "--iterations", "4")) == 0


def test_a_study_is_one_writer_s_too(tiny, tmp_path, capsys):
    out = tmp_path / "study"
    asked = ["study", "--seeds", "0", "--compare", "none", *arguments(tiny, out)[1:]]
    with claimed(out):
        assert main(asked) == 1
    assert f"another process writes into {out}" in capsys.readouterr().err


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_claim_ends_with_its_process(tmp_path, end):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "has it\n"
    with pytest.raises(RunError, match="another process"), claimed(out):
        pass
    process.send_signal(end)
    process.wait()
    with claimed(out):
        pass


def test_other_ranks_leave_it_to_the_first(tmp_path, monkeypatch):
    with claimed(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with claimed(tmp_path):
            pass


def test_where_folders_cannot_be_locked_a_run_goes_on(tmp_path, monkeypatch):
    def refuse(handle, how):
        raise OSError(95, "not supported")

    monkeypatch.setattr("fpo_train.running.claim.fcntl.flock", refuse)
    with claimed(tmp_path):
        pass
