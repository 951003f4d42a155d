"""The command line as words: what stands alone, what wins, what is refused, and how that is said."""

import subprocess
import sys
from importlib import metadata

import pytest
import yaml

import fpo_kernels
import fpo_train
from fpo_train.cli import main
from fpo_train.config.units import parse_bytes


def printed(capsys, *words):
    assert main(["run", *map(str, words), "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_without_a_command_it_says_what_there_is(capsys):
    assert main([]) == 2
    said = capsys.readouterr()
    assert "simulate" in said.out
    assert not said.err


def test_it_is_a_module_too_and_all_versions_are_one(capsys):
    done = subprocess.run([sys.executable, "-m", "fpo_train", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == fpo_train.__version__ == fpo_kernels.__version__
    assert metadata.version("fpo-kernels") == fpo_train.__version__


def test_options_win_over_a_file_wherever_they_stand(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("iterations: 7\nseed: 5\nupdate:\n  learning_rate: 0.5\n")
    for words in (
        ("--iterations", 3, "--config", file, "--update.learning_rate", 0.1),
        (f"--config={file}", "--update.learning_rate", 0.1, "--iterations", 3),
        ("--update.learning_rate", 0.1, "--iterations", 3, "--config", file),
    ):
        found = printed(capsys, *words)
        assert (found["iterations"], found["seed"], found["update"]["learning_rate"]) == (3, 5, 0.1)


@pytest.mark.parametrize(
    "words", [("--resume",), ("--resume", "--seed", "1"), ("--resume", "true"), ("--resume=true",)]
)
def test_a_switch_that_stands_alone_is_true(capsys, words):
    assert printed(capsys, *words)["resume"] is True
    assert printed(capsys, "--resume", "false", "--dry_run")["resume"] is False


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "--iteration", "3"), "unrecognized arguments: --iteration 3; did you mean --iterations?"),
        (("run", "--reward_model.fi", "3"), "did you mean --reward_model.fit?"),
        (("run", "--polcy.model", "x"), "did you mean --policy.model?"),
        (("run", "--config", "dem.yaml"), "shipped with the package: demo.yaml, "),
        (("run", "demo.yaml"), "unrecognized arguments: demo.yaml; did you mean --config demo.yaml?"),
        (("run", "--modle", "x"), "unrecognized arguments: --modle x (see"),
        (("run", "--iterations", "many"), "error: iterations: wanted a whole number. Got value: many"),
        (("run", "--resume", "perhaps"), "error: resume: wanted true or false. Got value: perhaps"),
        (("frob",), "invalid choice: 'frob'"),
    ],
)
def test_what_is_refused_and_how_that_is_said(capfd, words, says):
    assert main(list(words)) == 2
    assert says in capfd.readouterr().err


@pytest.mark.parametrize("words", [("q_proj,up_proj",), ("[q_proj, up_proj]",)])
def test_lists_as_they_are_written(capsys, words):
    found = printed(capsys, "--policy.lora_targets", *words, "--penalty.lengths", "0.5", "--memory.budget", "24G")
    assert found["policy"]["lora_targets"] == ["q_proj", "up_proj"]
    assert found["penalty"]["lengths"] == [0.5]
    assert printed(capsys, f"--policy.lora_targets={words[0]}")["policy"]["lora_targets"] == ["q_proj", "up_proj"]
    assert found["oracle"]["utility_range"] is None
    assert printed(capsys, "--oracle.utility_range", "-15,5")["oracle"]["utility_range"] == [-15, 5]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("policy:\n  modle: x\n", "policy.modle: there is no such setting, but a configuration file has it; did you"),
        ("seed: 1\niterations: [3\n", "mine.yaml, line 3, column 1: expected ',' or ']'"),
    ],
)
def test_a_file_s_fault_is_told_by_its_place(tmp_path, capfd, content, says):
    (tmp_path / "mine.yaml").write_text(content)
    assert main(["run", "--config", str(tmp_path / "mine.yaml")]) == 2
    assert says in capfd.readouterr().err


def test_sizes():
    assert parse_bytes("24G", "x") == parse_bytes("24 GB", "x") == 24 * 10**9
    assert parse_bytes("1.5GiB", "x") == 3 * 2**29


def test_who_reads_may_leave_and_an_interrupt_is_no_traceback(tmp_path, monkeypatch, capfd):
    code = "import sys; from fpo_train.cli import main; sys.exit(main(['doctor']))"
    cut = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    cut.stdout.close()
    assert cut.stderr.read() == ""
    assert cut.wait() == 1

    def interrupted(*words, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("fpo_train.simulate.linear.run", interrupted)
    assert main(["simulate", "linear", "--out", str(tmp_path / "out")]) == 1
    assert capfd.readouterr().err == "fpo-train simulate: stopped\n"


@pytest.mark.parametrize("value", ["-1e-4", "-3", "-0.5"])
def test_negative_numbers_in_any_form_are_values(capsys, value):
    assert main(["run", "--update.learning_rate", value]) == 2
    assert "update.learning_rate: wanted 0 or more, got -" in capsys.readouterr().err


def test_a_choice_that_is_none_names_those_there_are(capsys):
    assert main(["run", "--penalty.kind", "practicle"]) == 2
    told = capsys.readouterr().err
    assert "wanted one of 'none', 'practical', 'relaxed'" in told
    assert "typing" not in told


IDLE = {
    ("--penalty.kind", "none", "--penalty.gamma", "2"): "penalty.gamma: penalty.kind none has no use for it, practical",
    ("--penalty.damping", "0.5"): "penalty.damping: penalty.kind practical has no use for it, exact has",
    (
        "--compare",
        "none,exact",
        "--penalty.noises",
        "0.1",
    ): "penalty.noises: penalty.kind none, exact has no use for it",
    ("--oracle.retries=2",): "oracle.retries: oracle.kind base has no use for it, judge has",
    ("--reward_model.lora_rank", "4"): "reward_model.lora_rank: reward_model.kind head has no use for it, lora has",
    ("--logging.project", "mine"): "logging.project: logging.tracker none has no use for it",
}


@pytest.mark.parametrize("words", IDLE)
def test_what_is_given_and_has_no_effect_is_an_error(words, capsys, tmp_path):
    assert main(["run", "--out", str(tmp_path / "out"), *words]) == 2
    assert f"fpo-train run: error: {IDLE[words]}" in capsys.readouterr().err


def test_what_one_of_several_penalties_reads_has_an_effect(capsys, tmp_path):
    words = ["--compare", "none,exact", "--penalty.damping", "0.5", "--data.prompts", "nowhere.jsonl"]
    assert main(["run", *words]) == 1  # for its prompts alone
    assert main(["study", "--penalty.noises", "0.1", "--data.prompts", "nowhere.jsonl"]) == 1
    file = tmp_path / "of_all.yaml"  # a file's settings may wait for another kind
    file.write_text("penalty: {kind: none, gamma: 2.0}\ndata: {prompts: nowhere.jsonl}\n")
    assert main(["run", "--config", str(file)]) == 1
