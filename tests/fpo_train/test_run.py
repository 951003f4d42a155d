"""Whole runs on a tiny model through the command line: folders, seeds, resume, refusals."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

import fpo_kernels as fk
from fpo_train.cli import CONFIGS, main
from fpo_train.report.panels import CAPTIONS
from tests.fpo_train.runs import arguments, contents, rows
from tests.fpo_train.variants import variant

KEYS = {
    "iteration", "reward", "penalty", "effective_reward", "oracle_utility", "proxy_gap", "overconfidence",
    "penalty_to_reward_std", "kl", "reply_tokens", "seconds", "peak_memory_bytes", "chosen_reward", "oracle_calls",
}  # fmt: skip


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "all"
    assert main(arguments(tiny, out, "--compare", "none,practical,relaxed", "--logging.controlled", "true")) == 0
    return out


def test_a_run_s_folder(compared):
    for kind in ("none", "practical", "relaxed"):
        names = {path.name for path in (compared / kind).iterdir()}
        assert names == {
            "config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "policy", "reward_model",
            "checkpoints", "figures", "report.html", "memory.jsonl", "watched.jsonl",
        }  # fmt: skip
        assert (compared / kind / "policy" / "adapter_model.safetensors").is_file()
        assert sorted(p.name for p in (compared / kind / "checkpoints").iterdir()) == ["2", "3"]
        found = rows(compared / kind, drop=())
        assert [row["iteration"] for row in found] == [1, 2, 3]
        assert all(set(row) >= KEYS for row in found)
        assert all(set(row["seconds"]) == {"generate", "score", "update", "retrain", "audit"} for row in found)
        for row in found:
            assert row["effective_reward"] == pytest.approx(row["reward"] - row["penalty"], abs=1e-5)
        config = yaml.safe_load((compared / kind / "config.yaml").read_text())
        assert config["penalty"]["kind"] == kind
    environment = json.loads((compared / "environment.json").read_text())
    assert environment["versions"]["torch"]


def test_a_comparison_has_what_penalties_are_compared_by(tiny, tmp_path):
    """With a reward model of its own nothing has read all candidates for the oracle: it is asked."""
    scorer = variant(tiny, tmp_path / "scorer", model="LlamaForSequenceClassification", num_labels=1, pad_token_id=2)
    models = "--reward_model.kind", "classifier", "--reward_model.model", scorer, "--iterations", 1
    assert main(arguments(tiny, tmp_path / "both", "--compare", "none,practical", *models)) == 0
    for kind in ("none", "practical"):
        (row,) = rows(tmp_path / "both" / kind)
        assert row["audit_gain"] is not None
        assert row["audit_calls"] == 2 * 3 - row["oracle_calls"]
    page = (tmp_path / "both" / "report.html").read_text()
    assert "Judged are all candidates of an iteration" in page
    assert main(arguments(tiny, tmp_path / "one", *models)) == 0
    assert "audit_gain" not in rows(tmp_path / "one")[0]


def test_penalties_share_their_start_and_part_ways(compared):
    none, practical, relaxed = (rows(compared / kind) for kind in ("none", "practical", "relaxed"))
    assert none[0]["reward"] == practical[0]["reward"] == relaxed[0]["reward"]
    assert none[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert none[-1]["kl"] > 0
    assert len({tuple(row["effective_reward"] for row in r) for r in (none, practical, relaxed)}) == 3
    assert [row["oracle_calls"] for row in none] == [row["oracle_calls"] for row in practical] == [2, 2, 2]
    assert [row["oracle_calls"] for row in relaxed] == [6, 6, 6]
    assert [row["audit_calls"] for row in none] == [4, 4, 4]  # the other candidates
    assert [row["audit_calls"] for row in relaxed] == [0, 0, 0]
    assert none[0]["audit_gain"] == practical[0]["audit_gain"] == relaxed[0]["audit_gain"]


def test_the_report_is_one_file_with_everything_in_it(compared):
    page = (compared / "report.html").read_text()
    assert len(re.findall(r"<svg role=", page)) == len(CAPTIONS) + 3
    led = re.findall(r"(?:src|href)=['\"](?!#)([^'\"]*)", page)
    assert led == ["none/report.html", "practical/report.html", "relaxed/report.html"]
    assert all((compared / path).is_file() for path in led)
    for text in ("none / practical / relaxed", "9.8060", "nats/token", "policy:"):
        assert text in page
    sample = json.loads((compared / "none" / "samples.jsonl").read_text().splitlines()[-1])
    assert {"prompt", "reply", "reference", "reward", "penalty", "effective_reward"} <= set(sample)
    assert len((compared / "none" / "samples.jsonl").read_text().splitlines()) == 6


def test_a_penalty_alone_gives_what_it_gives_in_company(compared, tiny, tmp_path):
    out = tmp_path / "alone"
    assert main(arguments(tiny, out, "--penalty.kind", "relaxed")) == 0
    assert rows(out) == rows(compared / "relaxed")
    for part in ("policy/adapter_model.safetensors", "reward_model/head.safetensors", "samples.jsonl"):
        assert (out / part).read_bytes() == (compared / "relaxed" / part).read_bytes()


def test_another_seed_gives_another_run(compared, tiny, tmp_path):
    assert main(arguments(tiny, tmp_path / "other", "--seed", 1, "--iterations", 1)) == 0
    assert rows(tmp_path / "other")[0]["reward"] != rows(compared / "practical")[0]["reward"]


def test_resume_goes_on_bit_for_bit(compared, tiny, tmp_path):
    out = tmp_path / "resumed"
    assert main(arguments(tiny, out, "--iterations", 2)) == 0
    checkpoint = tmp_path / "kept"
    shutil.copytree(out / "checkpoints" / "1", checkpoint)
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").mkdir()
    checkpoint.rename(out / "checkpoints" / "1")  # as if stopped in iteration 2, its rows already written
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "rew')  # and killed in the middle of a line
    assert main(arguments(tiny, out, "--resume", "true")) == 0
    assert rows(out) == rows(compared / "practical")
    for part in ("policy/adapter_model.safetensors", "reward_model/head.safetensors", "samples.jsonl", "watched.jsonl"):
        assert (out / part).read_bytes() == (compared / "practical" / part).read_bytes()


def test_resume_of_finished_missing_and_changed_runs(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(tiny, out, "--resume", "true")) == 1
    assert "no run to resume" in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    assert main(arguments(tiny, out, "--iterations", 1, "--resume", "true")) == 0  # nothing yet: begins anew
    before = contents(out, "*.safetensors") | contents(out, "*.jsonl")
    assert main(arguments(tiny, out, "--iterations", 1, "--resume", "true")) == 0  # finished: nothing to do
    assert contents(out, "*.safetensors") | contents(out, "*.jsonl") == before
    everything = contents(out)
    assert main(arguments(tiny, out, "--resume", "true", "--penalty.gamma", "2")) == 1
    assert "penalty.gamma was 1.0 when" in capsys.readouterr().err
    assert contents(out) == everything


WRONG = {
    "an unknown penalty": (["--penalty.kind", "brave"], 2, "penalty.kind"),
    "an unknown penalty to compare": (["--compare", "none,brave"], 2, "unknown penalty 'brave'"),
    "an unknown key": (["--rollout.canddates", "3"], 2, "canddates"),
    "a number that makes no sense": (["--iterations", "-1"], 2, "iterations"),
    "a missing prompt file": (["--data.prompts", "nowhere.jsonl"], 1, "no file nowhere.jsonl"),
    "a missing model": (["--policy.model", "./nowhere"], 1, "no such file or folder"),
    "a missing config": (["--config", "nowhere.yaml"], 2, "nowhere.yaml"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_end_in_one_sentence_and_write_nothing(case, tiny, tmp_path, capfd):
    more, code, text = WRONG[case]
    out = tmp_path / "out"
    assert main([*arguments(tiny, out), *more]) == code
    message = capfd.readouterr().err.strip()
    assert text in message
    assert "\n" not in message
    assert message.startswith("fpo-train")
    assert not out.exists()


def test_config_files_with_unknown_keys(tmp_path, capfd):
    path = tmp_path / "wrong.yaml"
    path.write_text("iterations: 2\npenalty:\n  knd: relaxed\n")
    assert main(["run", "--config", str(path)]) == 2
    message = capfd.readouterr().err.strip()
    assert "penalty.knd" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("line", "text"),
    [("", "holds no prompts"), ('{"id": "x", "prompt": "' + "word " * 300 + '"}', "prompt x takes")],
)
def test_prompt_files_that_cannot_be_used(tiny, tmp_path, capfd, line, text):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(line)
    out = tmp_path / "out"
    assert main(arguments(tiny, out, "--data.prompts", prompts)) == 1
    message = capfd.readouterr().err.strip()
    assert text in message
    assert "\n" not in message
    assert not out.exists()


@pytest.mark.parametrize("more", [[], ["--compare", "none,relaxed"]])
def test_a_folder_with_something_in_it_is_left_alone(tiny, tmp_path, capfd, more):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert main(arguments(tiny, out, *more)) == 1
    message = capfd.readouterr().err.strip()
    assert f"out: {out} is not empty" in message
    assert "\n" not in message
    assert contents(out) == {(out / "thesis.txt").relative_to(out): b"years of work"}


def test_print_config_is_a_config(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        raise SystemExit(main(["run", "--config", "demo.yaml", "--penalty.kind", "relaxed", "--print_config"]))
    assert leaving.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["penalty"]["kind"] == "relaxed"
    assert printed["compare"] == ""
    assert printed["logging"]["checkpoint_every"] == 1


def test_doctor_and_simulate(tmp_path, capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("torch ", "kernels/triton", "kernels/native", "smollm2", "bitsandbytes"))
    assert main(["simulate", "linear", "--out", str(tmp_path / "linear")]) == 0
    assert "9.8060" in capsys.readouterr().out
    assert main(["simulate", "linear", "--out", str(tmp_path / "linear")]) == 1
    assert main(["simulate", "linear", "--penalties", "brave", "--out", str(tmp_path / "x")]) == 2


def test_resume_leaves_alone_what_is_no_run(tiny, tmp_path, capfd):
    out = tmp_path / "foreign"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"iteration": 1}\n')
    (out / "report.html").write_text("mine")
    before = contents(out)
    for more in ([], ["--compare", "none,relaxed"]):
        assert main(arguments(tiny, out, "--resume", "true", *more)) == 1
        assert "no run to resume" in capfd.readouterr().err
        assert contents(out) == before


def test_resume_of_a_comparison_keeps_its_penalties(compared, tiny, tmp_path, capfd):
    out = tmp_path / "copy"
    shutil.copytree(compared, out)
    before = contents(out)
    assert main(arguments(tiny, out, "--resume", "true", "--compare", "none,relaxed")) == 1
    assert "compare was 'none,practical,relaxed' when" in capfd.readouterr().err
    assert contents(out) == before
    shutil.rmtree(out / "simulate" / "figures")  # as if killed while the linear environment was drawn
    (out / "simulate").rename(out / "simulate.tmp")
    more = ["--compare", "none,practical,relaxed", "--logging.controlled", "true", "--resume", "true"]
    assert main(arguments(tiny, out, *more)) == 0
    assert "9.8060" in (out / "report.html").read_text()
    assert not (out / "simulate.tmp").exists()


def test_a_run_s_own_config_runs_again_and_its_prompts_are_part_of_it(tiny, tmp_path, capfd):
    nasty = "What\u2028is <script>alert('x')</script> & \"this\"?"
    prompts = tmp_path / "prompts with ü.jsonl"
    lines = [json.dumps({"prompt": nasty}, ensure_ascii=False), json.dumps({"prompt": "And this?"})]
    prompts.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    out = tmp_path / "first run"
    assert main(arguments(tiny, out, "--iterations", 1, "--data.prompts", prompts)) == 0
    page = (out / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert main(arguments(tiny, out, "--iterations", 2, "--data.prompts", prompts, "--resume", "true")) == 0
    again = tmp_path / "again"
    assert main(["run", "--config", str(out / "config.yaml"), "--out", str(again)]) == 0
    assert rows(again) == rows(out)
    prompts.write_text(lines[0])
    assert main(arguments(tiny, out, "--iterations", 3, "--data.prompts", prompts, "--resume", "true")) == 1
    assert "are not those that" in capfd.readouterr().err


def test_damaged_files_are_one_sentence(tiny, tmp_path, capfd):
    out = tmp_path / "run"
    assert main(arguments(tiny, out, "--iterations", 1)) == 0
    environment = out / "environment.json"
    kept = environment.read_text()
    environment.write_text(kept[:20])
    assert main(arguments(tiny, out, "--resume", "true")) == 1
    assert "does not say which prompts the run began with" in capfd.readouterr().err
    environment.write_text(kept)
    state = out / "checkpoints" / "1" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    latin, section = tmp_path / "latin.jsonl", tmp_path / "section.yaml"
    latin.write_bytes('{"prompt": "caf\xe9"}'.encode("latin-1"))
    section.write_text("penalty: 3\n")
    capfd.readouterr()
    for words, text, code in (
        (arguments(tiny, out, "--resume", "true"), "state.pt is damaged", 1),
        (arguments(model, tmp_path / "a"), "cannot be loaded", 1),
        (arguments(tiny, tmp_path / "a", "--data.prompts", latin), "not UTF-8", 1),
        (["run", "--config", str(section), "--out", str(tmp_path / "a")], "penalty", 2),
        (arguments(tiny, tmp_path / "a", "--seed", 10**15), "run.seed", 2),
        (["simulate", "linear", "--seeds", "x", "--out", str(tmp_path / "a")], "--seeds", 2),
    ):
        assert main(words) == code, words
        message = capfd.readouterr().err.strip()
        assert text in message
        assert "\n" not in message
        assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_a_polite_stop_finishes_the_iteration_and_saves_it(tiny, tmp_path, signal_name):
    out = tmp_path / "run"
    more = ["--iterations", 10_000, "--logging.checkpoint_every", 5000]
    command = [sys.executable, "-m", "fpo_train.cli", *arguments(tiny, out, *more)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(getattr(signal, signal_name))
    assert process.wait(60) == 3
    last = rows(out)[-1]["iteration"]
    expected = f"fpo-train run: stopped after iteration {last}; go on with --resume true"
    assert process.stderr.read().strip().splitlines()[-1] == expected
    assert [path.name for path in (out / "checkpoints").iterdir()] == [str(last)]
    stopped = rows(out)
    assert main(arguments(tiny, out, *more[2:], "--iterations", last + 1, "--resume", "true")) == 0
    assert rows(out)[:-1] == stopped


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_what_a_run_keeps_of_its_configuration_is_the_configuration(name, tmp_path):
    """A shipped file, and the config.yaml of its run, are read as the same settings."""
    from fpo_train.cli import _config, _profile, build
    from fpo_train.config import RunConfig
    from fpo_train.running.folder import describe

    def read(path):
        words = ["run", "--config", str(path)]
        return _config(RunConfig, build(_profile(words)).parse_args(words)["run"])

    config = dataclasses.replace(read(CONFIGS / name), out=str(tmp_path))
    describe(config, [])
    assert read(tmp_path / "config.yaml") == config


def test_help_documents_every_setting(capsys):
    assert main(["run", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "γ, the weight of the penalty." in text
    assert "Seed of everything random." in text
    assert main(["--help"]) == 0
    assert "Run a controlled environment" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kind", ["practical", "exact"])
def test_one_engine_serves_a_run(tiny, tmp_path, monkeypatch, kind):
    """Through iterations, earlier states of the reward model, and readings of labelled pairs."""
    made = []

    class Counted(fk.Influence):
        def __init__(self, *args, **options):
            made.append(args)
            super().__init__(*args, **options)

    monkeypatch.setattr(fk, "Influence", Counted)
    more = ["--reward_model.kind", "lora", "--reward_model.lora_rank", "3", "--penalty.parameters", "lora"]
    more += ["--penalty.kind", kind, "--penalty.checkpoints", "2"]
    more += ["--penalty.sketch_dim", "64"] if kind == "exact" else []
    assert main(arguments(tiny, tmp_path / "a", *more)) == 0
    assert len(made) == 1
