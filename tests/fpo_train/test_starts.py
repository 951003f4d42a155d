"""Starts that fail, in whatever way, leave no folder; models that are no policy; prompts without a chat template."""

import json
import re
import shutil
import sys

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaForSequenceClassification,
    LlamaModel,
)

from fpo_train.cli import _config, build, main
from fpo_train.config import EvalConfig, RunConfig
from fpo_train.data.prompts import read_prompts
from fpo_train.errors import RunError
from fpo_train.evaluate.answers import Answerer, find_speakers
from fpo_train.evaluate.questions import Question
from fpo_train.running.run import Workshop
from tests.fpo_train.runs import arguments, contents, rows
from tests.fpo_train.variants import variant

FAULTS = """
def raises(prompts, completions):
    raise ValueError("no opinion")

def short(prompts, completions):
    return [1.0]

def later(prompts, completions, seen=[]):
    seen.append(1)
    return [float("nan")] * len(completions) if len(seen) < 3 else [0.0]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a module of faulty oracles."""
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("faults", None)


def function(name):
    return ["--oracle.kind", "function", "--oracle.function", f"faults:{name}"]


WRONG = {
    "no such model": ["--policy.model", "./nowhere"],
    "no such function": function("nothing"),
    "an oracle that raises": function("raises"),
    "an oracle that is short of numbers": function("short"),
    "no such judge": ["--oracle.kind", "gold", "--oracle.model", "./nowhere"],
    "a head that is none": ["--oracle.kind", "gold", "--oracle.model", "empty"],
    "a classifier that is none": ["--reward_model.kind", "classifier", "--reward_model.model", "empty"],
    "people's pairs that are none": ["--oracle.kind", "file", "--oracle.file", "bad.jsonl"],
    "prompts that are none": ["--data.prompts", "bad.jsonl"],
    "a prompt that is too long": ["--data.prompts", "long.jsonl"],
    "replies that are too long": ["--rollout.max_new_tokens", 300],
    "layers that are not there": ["--policy.lora_targets", "nothing"],
    "weights of a penalty that are not there": ["--penalty.parameters", "nothing.*"],
    "a budget that is too small": ["--memory.budget", "100KiB"],
    "a tracker that is not there": ["--logging.tracker", "trackio"],
    "another processor": ["--rollout.engine", "vllm"],
}


ALL = [(case, ()) for case in WRONG] + [
    (case, ("--compare", "none,relaxed", "--memory.runs_at_once", 1))
    for case in ("an oracle that raises", "a budget that is too small", "a tracker that is not there")
]


@pytest.mark.parametrize(("case", "compared"), ALL)
def test_a_start_that_fails_leaves_no_folder(case, compared, tiny, here, capfd):
    (here / "bad.jsonl").write_text("{]\n")
    (here / "long.jsonl").write_text(json.dumps({"prompt": "word " * 300}))
    (here / "empty").mkdir()
    before = set(contents(here))
    assert main(arguments(tiny, here / "runs" / "a", *WRONG[case], *compared)) == 1
    assert "error: " in capfd.readouterr().err
    assert not (here / "runs" / "a").exists()
    assert {path for path in contents(here) if path.suffix != ".pyc"} == before


EARLY = {
    "no such function": "oracle.function: module faults has no function 'nothing'",
    "no such judge": "oracle.model ./nowhere: no such file or folder",
    "a classifier that is none": "reward_model.model empty: the folder holds neither",
    "people's pairs that are none": "oracle.file: bad.jsonl line 1 is not JSON",
}


@pytest.mark.parametrize("case", [*EARLY, "two labels"])
def test_what_needs_no_model_is_refused_before_one_is_loaded(case, tiny, here, capfd, monkeypatch):
    def load(*_):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("fpo_train.running.run.load_policy", load)
    (here / "bad.jsonl").write_text("{]\n")
    (here / "empty").mkdir()
    if case == "two labels":
        variant(tiny, here / "two", model="LlamaForSequenceClassification", num_labels=2, pad_token_id=2)
        wrong, told = ["--reward_model.kind", "classifier", "--reward_model.model", "two"], "two: has 2 outputs"
    else:
        wrong, told = WRONG[case], EARLY[case]
    assert main(arguments(tiny, here / "out", *wrong)) == 1
    assert told in capfd.readouterr().err


def test_a_folder_without_a_run_is_not_to_be_gone_on_with(tiny, here, capfd):
    (here / "out").mkdir()
    (here / "out" / "mine.txt").write_text("mine")
    assert main(arguments(tiny, here / "out")) == 1
    assert "out is not empty, and holds no run to go on with; choose another folder" in capfd.readouterr().err


def test_a_folder_that_was_there_and_empty_stays_empty(tiny, here):
    (here / "out").mkdir()
    assert main(arguments(tiny, here / "out", *function("raises"))) == 1
    assert list((here / "out").iterdir()) == []


def test_what_was_done_before_a_failure_stays(tiny, here, monkeypatch):
    """Of a comparison whose first run is whole when the second fails to start."""
    from fpo_train.running import run

    asked = []

    def load(*arguments, load=run.load_oracle):
        asked.append(arguments)
        if len(asked) == 2:
            raise RunError("oracle: gone")
        return load(*arguments)

    monkeypatch.setattr(run, "load_oracle", load)
    more = "--compare", "none,practical", "--memory.runs_at_once", 1, "--iterations", 1, "--reward_model.fit_pairs", 0
    assert main(arguments(tiny, here / "out", *more)) == 1
    assert rows(here / "out" / "none")
    assert (here / "out" / "config.yaml").is_file()
    assert not (here / "out" / "practical").exists()


def test_side_by_side_a_failed_start_leaves_nothing_either(tiny, here, capfd):
    more = "--compare", "none,practical", "--memory.runs_at_once", 2
    assert main(arguments(tiny, here / "out", *more, *function("raises"))) == 1
    assert re.search(
        "(none|practical): oracle.function: faults:raises raised ValueError: no opinion", capfd.readouterr().err
    )
    assert not (here / "out").exists()


def test_the_second_of_a_comparison_is_planned_before_the_first_begins(tiny, here, capfd, monkeypatch):
    from fpo_train.memory.plan import Plan

    asked = []

    def check(plan):
        asked.append(plan)
        if len(asked) == 2:
            raise RunError("memory.budget: the second does not fit")

    monkeypatch.setattr(Plan, "check", check)
    more = "--compare", "none,exact", "--memory.budget", "8GiB"
    assert main(arguments(tiny, here / "out", *more)) == 1
    assert "the second does not fit" in capfd.readouterr().err
    assert not (here / "out").exists()


def test_a_study_of_which_no_run_begins_leaves_no_folder(tiny, here, capfd):
    words = ["study", *arguments(tiny, here / "s", "--compare", "none", "--seeds", "0")[1:], *function("raises")]
    assert main(list(map(str, words))) == 1
    assert "1 of 1 runs failed" in capfd.readouterr().err
    assert not (here / "s").exists()


def test_answers_that_were_paid_for_stay(tiny, here, monkeypatch):
    """A folder that holds more than its own description is left to be resumed."""
    from fpo_train.running import folder

    def fail():
        with folder.withdrawing(folder.unwritten([here / "out"])):
            (here / "out").mkdir()
            (here / "out" / "config.yaml").write_text("seed: 0\n")
            (here / "out" / "judge.jsonl").write_text("{}\n")
            raise RunError("no answer")

    with pytest.raises(RunError):
        fail()
    assert {path.name for path in (here / "out").iterdir()} == {"config.yaml", "judge.jsonl"}


def headless(tiny, folder, kind, **more):
    """A model without a language-model head, saved as a policy's folder."""
    config = AutoModelForCausalLM.from_pretrained(tiny).config
    config.num_labels = 1
    for name, value in more.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)


def encoder(tiny, folder):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=400, **shape)).save_pretrained(folder)


NO_POLICY = {
    "a body without its head": (lambda tiny, f: headless(tiny, f, LlamaModel), "lm_head.weight"),
    "a judge": (lambda tiny, f: headless(tiny, f, LlamaForSequenceClassification), "lm_head.weight"),
    "a judge whose head would be its embedding": (
        lambda tiny, f: headless(tiny, f, LlamaForSequenceClassification, tie_word_embeddings=True),
        "it is a LlamaForSequenceClassification",
    ),
    "an encoder": (encoder, "; its config.json calls it a BertModel"),
}


@pytest.mark.parametrize("case", NO_POLICY)
def test_a_model_that_is_no_policy_is_refused(case, tiny, tmp_path, capfd):
    make, says = NO_POLICY[case]
    make(tiny, tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
    capfd.readouterr()
    assert main(arguments(tmp_path / "model", tmp_path / "out")) == 1
    message = capfd.readouterr().err.strip()
    assert f"policy.model {tmp_path / 'model'}: " in message
    assert says in message
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(tiny, tmp_path, capfd):
    folder = shutil.copytree(tiny, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|user|>")
    tokenizer.save_pretrained(folder)
    for more in ([], ["--data.chat_template", "none", "--data.prompts", tmp_path / "prompts.jsonl"]):
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "One"}\n{"prompt": "Two <|user|>"}\n')
        capfd.readouterr()
        assert main(arguments(folder, tmp_path / "out", *more)) == 1
        message = capfd.readouterr().err.strip()
        assert "holds the token '<|user|>' (400), but the embedding of policy.model" in message
        assert "\n" not in message
        assert not (tmp_path / "out").exists()


def started(model, out, *more):
    """The workshop of a run, without its iterations."""
    config = _config(RunConfig, build().parse_args(arguments(model, out, *more))["run"])
    return Workshop(config, read_prompts("questions"))


def test_no_chat_template_is_said_aloud_or_asked_for(tiny, tmp_path, capfd):
    bare = shutil.copytree(tiny, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    without = list(started(bare, tmp_path / "a").prompts)
    assert capfd.readouterr().err.splitlines() == [
        f"policy.model {bare} has no chat template: prompts are read as they are written, without turns "
        "(data.chat_template none says that this is meant)"
    ]
    none = "--data.chat_template", "none"
    assert list(started(bare, tmp_path / "a", *none).prompts) == without
    assert list(started(tiny, tmp_path / "a", *none).prompts) == without  # one that is there is not used
    assert capfd.readouterr().err == ""
    assert list(started(tiny, tmp_path / "a").prompts) != without
    assert without[0].ids == tuple(AutoTokenizer.from_pretrained(tiny)(without[0].text)["input_ids"])


def test_a_run_without_a_template_goes_on_without_one_and_so_do_questions(tiny, tmp_path, capfd):
    out, other = tmp_path / "none", tmp_path / "auto"
    short = "--iterations", 1, "--reward_model.fit_pairs", 0
    assert main(arguments(tiny, out, *short, "--data.chat_template", "none")) == 0
    capfd.readouterr()
    assert main(arguments(tiny, out, *short, "--resume", "true")) == 1
    assert "resume: data.chat_template was 'none' when" in capfd.readouterr().err
    found = find_speakers(EvalConfig(left=str(out), right="base"))
    answerer = Answerer(found, 4, torch.device("cpu"))
    question = Question(name="q", text="What is this?", category="")
    assert answerer.render(question) == answerer.tokenizer(question.text)["input_ids"]
    assert found["left"].facts()["chat_template"] == "none"
    shutil.copytree(out, other)
    asked = yaml.safe_load((other / "config.yaml").read_text())
    del asked["data"]["chat_template"]  # as a run of an earlier version
    (other / "config.yaml").write_text(yaml.safe_dump(asked))
    with pytest.raises(RunError, match=r"data\.chat_template none, the other's did not"):
        find_speakers(EvalConfig(left=str(out), right=str(other)))
