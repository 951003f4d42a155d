"""`fpo-train eval` on a tiny model and a judge on this machine: answers, judgements, and going on where it stopped."""

import csv
import json
import re
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fpo_train.cli import main
from fpo_train.config import PolicyConfig
from fpo_train.data.prompts import render
from fpo_train.evaluate.answers import Answerer
from fpo_train.evaluate.questions import read_questions
from fpo_train.policy import load_policy

from .runs import arguments, contents
from .stub_judge import StubJudge

COUNT, TOKENS = 7, 6


@pytest.fixture(autouse=True)
def _straight(monkeypatch):
    """No proxy between the test and its stub, no key."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Two finished runs with steps so long that their policies say something else, and from each other."""
    out = tmp_path_factory.mktemp("runs") / "both"
    more = ["--compare", "none,relaxed", "--iterations", 2, "--update.learning_rate", 0.3, "--penalty.gamma", 20]
    assert main(arguments(tiny, out, *more)) == 0
    return out


def words(out, *more, left="base", right="", limit=COUNT):
    """The command's words; `right` and the rest as they come."""
    settings = {"out": out, "left": left, "max_new_tokens": TOKENS, "limit": limit, "rows_at_once": 3}
    settings |= {"right": right} if right else {}
    return ["eval", *[word for key, value in settings.items() for word in (f"--{key}", str(value))], *map(str, more)]


def asking(stub, *more):
    judge = {"url": stub.url, "model": "m", "requests_per_minute": 1e9, "retries": 0}
    return [word for key, value in judge.items() for word in (f"--judge.{key}", str(value))] + list(more)


def answers(out):
    return [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def judgements(out):
    with (out / "judgements.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def answered(runs, tmp_path_factory):
    """The answers of both runs' policies."""
    out = tmp_path_factory.mktemp("eval") / "answered"
    assert main(words(out, left=runs / "none", right=runs / "relaxed")) == 0
    return out


def greedy(model, tokenizer, text):
    """One answer alone, without padding, token by token."""
    ids = render(tokenizer, text)
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + TOKENS:
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def trained(run, tiny):
    """The policy as training left it, from the run's last checkpoint."""
    policy = load_policy(PolicyConfig(model=str(tiny), lora_rank=4), seed=0, device=torch.device("cpu"))
    state = torch.load(run / "checkpoints" / "2" / "state.pt", weights_only=False)["adapter"]
    with torch.no_grad():
        for name, parameter in policy.trainable.items():
            parameter.copy_(state[name])
    return policy


def test_answers_are_the_policies_own(runs, tiny, answered):
    rows = answers(answered)
    questions = read_questions("questions", COUNT)
    assert len(rows) == 2 * COUNT
    assert [row["policy"] for row in rows[:6]] == ["left"] * 3 + ["right"] * 3
    for side, kind in (("left", "none"), ("right", "relaxed")):
        policy = trained(runs / kind, tiny)
        told = {row["id"]: row for row in rows if row["policy"] == side}
        for question in questions:
            row = told[question.name]
            assert (row["prompt"], row["category"]) == (question.text, question.category)
            assert row["answer"] == greedy(policy.model, policy.tokenizer, question.text)
            assert 0 <= row["tokens"] <= TOKENS
    assert {row["answer"] for row in rows[:3]} != {row["answer"] for row in rows[3:6]}


def test_the_base_beside_an_adapter_is_the_base(runs, tiny, tmp_path, capsys):
    out = tmp_path / "eval"
    assert main(words(out, left="base", right=runs / "none" / "policy", limit=3)) == 0
    told = capsys.readouterr().out
    assert f"left (base): 3 answers in {out / 'answers.jsonl'}" in told
    assert "no judge is configured (judge.url, judge.model): done with the answers" in told
    policy = load_policy(PolicyConfig(model=str(tiny)), seed=0, device=torch.device("cpu"))
    for row in answers(out):
        if row["policy"] == "left":
            assert row["answer"] == greedy(policy.lm, policy.tokenizer, row["prompt"])
    assert not (out / "judgements.csv").exists()
    alone = tmp_path / "alone"
    assert main(words(alone, "--model", tiny, limit=3)) == 0
    assert "there is nobody to compare with" in capsys.readouterr().out
    assert answers(alone) == [row for row in answers(out) if row["policy"] == "left"]


def test_an_adapter_loads_as_lm_eval_loads_it(runs, tiny):
    """lm_eval --model hf --model_args pretrained=<base>,peft=<run>/policy does just this."""
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    plain = base.eval()(input_ids=torch.arange(3, 20)[None]).logits.detach()
    loaded = PeftModel.from_pretrained(base, str(runs / "relaxed" / "policy")).eval()
    policy = trained(runs / "relaxed", tiny)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, policy.model(input_ids=ids).logits)
        assert not torch.allclose(loaded(input_ids=ids).logits, plain, atol=1e-2)


def test_what_was_answered_is_not_answered_again(runs, answered, tmp_path, monkeypatch):
    out = tmp_path / "eval"
    shutil.copytree(answered, out)
    path = out / "answers.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:8]) + lines[8][:20])  # killed in the second batch of the left, in mid-line
    asked, answer = [], Answerer.answer

    def spy(self, side, prompts):
        asked.append((side, len(prompts)))
        return answer(self, side, prompts)

    monkeypatch.setattr(Answerer, "answer", spy)
    command = words(out, left=runs / "none", right=runs / "relaxed")
    assert main(command) == 0
    assert asked == [("left", 3), ("right", 3), ("left", 1), ("right", 1)]
    assert path.read_bytes() == whole
    monkeypatch.setattr("fpo_train.evaluate.answers.load_causal_lm", None)  # nothing left to load a model for
    assert main(command) == 0
    assert main(words(out, left=runs / "none", right=runs / "relaxed", limit=2)) == 0
    assert path.read_bytes() == whole


def test_judging_in_both_orders(runs, answered, tmp_path, capsys):
    out = tmp_path / "eval"
    shutil.copytree(answered, out)
    said = {side: {r["prompt"]: r["answer"] for r in answers(out) if r["policy"] == side} for side in ("left", "right")}
    same = [prompt for prompt, text in said["left"].items() if said["right"][prompt] == text]
    prompts = [prompt for prompt in said["left"] if prompt not in same]
    assert len(prompts) >= 4

    def judge(message, a, b):
        mine = "A" if b == said["left"][message] else "B"  # where the right answer stands
        other = {"A": "B", "B": "A"}[mine]
        kind = prompts.index(message)
        return [mine, other, "A", "tie" if a == said["left"][message] else mine][min(kind, 3)]

    with StubJudge(judge) as stub:
        assert main(words(out, *asking(stub), left=runs / "none", right=runs / "relaxed")) == 0
        assert len(stub.requests) == 2 * len(prompts)
        shown = [json.loads(request["body"]["messages"][-1]["content"]) for request in stub.requests]
        assert all(set(one) == {"message", "A", "B"} for one in shown)
        for prompt in prompts:
            orders = {(one["A"], one["B"]) for one in shown if one["message"] == prompt}
            assert orders == {
                (said["left"][prompt], said["right"][prompt]),
                (said["right"][prompt], said["left"][prompt]),
            }
        first = contents(out)
        told = capsys.readouterr().out
        assert main(words(out, *asking(stub), left=runs / "none", right=runs / "relaxed")) == 0
        assert len(stub.requests) == 2 * len(prompts)  # answered from the disk
        again = contents(out)
    assert {k: v for k, v in again.items() if k.name != "environment.json"} == {
        k: v for k, v in first.items() if k.name != "environment.json"
    }
    rows = {row["prompt"]: row for row in judgements(out)}
    assert list(rows) == list(said["left"])
    for n, (winner, orders) in enumerate(
        [
            ("right", ("right", "right")),
            ("left", ("left", "left")),
            ("tie", ("left", "right")),
            ("right", ("tie", "right")),
        ]
    ):
        row = rows[prompts[n]]
        assert (row["winner"], (row["first_order"], row["second_order"])) == (winner, orders)
        assert (row["left"], row["right"]) == (said["left"][prompts[n]], said["right"][prompts[n]])
        assert row["category"] == row["id"].partition("-")[0]
    for prompt in same:
        assert (rows[prompt]["winner"], rows[prompt]["first_order"]) == ("tie", "")
    report = json.loads((out / "report.json").read_text())
    assert report["wins_left"] == 1
    assert report["ties"] == 1 + len(same)
    assert report["identical"] == pytest.approx(len(same) / COUNT)
    assert report["both_orders"] == len(prompts)
    assert report["contradictions"] == 1
    assert re.search(rf"^all +1 +{len(prompts) - 2} +{1 + len(same)} ", told, re.MULTILINE)
    identical = f"identical {len(same)}, " if same else ""
    assert f"judged by m: {identical}inconsistent 1, pairs {COUNT}, requests {2 * len(prompts)}\n" in told


def test_a_failure_is_no_tie_and_is_asked_for_again(runs, answered, tmp_path, capfd):
    out = tmp_path / "eval"
    shutil.copytree(answered, out)
    rows = answers(out)
    left, right = ({r["prompt"]: r["answer"] for r in rows if r["policy"] == side} for side in ("left", "right"))
    bad = next(prompt for prompt in left if left[prompt] != right[prompt])
    command = words(out, left=runs / "none", right=runs / "relaxed")
    with StubJudge(lambda *_: "tie", always=lambda message, a, b: "http_500" if message == bad else None) as stub:
        assert main([*command, *asking(stub)]) == 0
        told = capfd.readouterr()
        assert f"1 of {COUNT} pairs have no verdict and are left out" in told.err
        assert "failed 1, http_500 2" in told.out
        assert bad not in {row["prompt"] for row in judgements(out)}
        assert len(judgements(out)) == COUNT - 1
        stub.always = None
        before = len(stub.requests)
        assert main([*command, *asking(stub)]) == 0
        assert len(stub.requests) == before + 2
    assert "no verdict" not in capfd.readouterr().err
    assert [row["prompt"] for row in judgements(out)] == list(left)


@pytest.mark.parametrize(
    ("fault", "limit", "says"),
    [
        ("http_500", COUNT, "pairs could be judged ("),
        ("hang_up", COUNT, "pairs could be judged ("),
        ("prose", COUNT, "judge.model m: not one of its first 8 answers can be read; the first: got 'I think that"),
        (
            "prose",
            2,
            "pairs could be judged (failed 2, pairs 2, requests 4, wrong_json 4; the first answer of no use: got",
        ),
    ],
)
def test_a_judge_that_never_answers_is_an_error(runs, answered, tmp_path, capfd, fault, limit, says):
    out = tmp_path / "eval"
    shutil.copytree(answered, out)
    with StubJudge(lambda *_: "tie", always=fault) as stub:
        assert main(words(out, *asking(stub), left=runs / "none", right=runs / "relaxed", limit=limit)) == 1
    *first, message = capfd.readouterr().err.strip().splitlines()
    assert says in message
    unread = [line for line in first if "judge.model m: an answer that cannot be read: got 'I think" in line]
    assert len(unread) == (fault == "prose")
    assert not (out / "judgements.csv").exists()


def test_a_folder_of_other_answers_is_left_alone(runs, answered, tiny, tmp_path, capfd):
    out = tmp_path / "eval"
    shutil.copytree(answered, out)
    before = contents(out)
    other = tmp_path / "other.jsonl"
    first = read_questions("questions", 1)[0]
    other.write_text(json.dumps({"id": first.name, "prompt": "Quite another question?"}))
    left, right = runs / "none", runs / "relaxed"
    for command, text in (
        (words(out, left=right, right=left), "adapter_sha256"),
        (words(out, left="base", right=right), "adapter_sha256"),
        (words(out, "--max_new_tokens", 5, left=left, right=right), "of max_new_tokens 6, not 5"),
        (words(out, "--questions", other, left=left, right=right), f"answers another question {first.name}"),
        (words(left, "--model", tiny), "holds something, but no evaluation to go on with"),
        (words(other, "--model", tiny), "is a file; wanted a folder"),
    ):
        assert main(command) == 1
        message = capfd.readouterr().err.strip()
        assert text in message
        assert "\n" not in message
        assert contents(out) == before
    assert not (left / "answers.jsonl").exists()


def test_the_other_side_may_come_later(runs, answered, tiny, tmp_path):
    out = tmp_path / "eval"
    assert main(words(out, left=runs / "none")) == 0
    assert main(words(out, left=runs / "none", right=runs / "relaxed")) == 0

    def both(folder):
        return sorted(answers(folder), key=lambda row: (row["policy"], row["id"]))

    assert both(out) == both(answered)
    stored = yaml.safe_load((out / "config.yaml").read_text())
    assert stored["right"] == str(runs / "relaxed")
    before = (out / "answers.jsonl").read_bytes()
    assert main(["eval", "--config", str(out / "config.yaml")]) == 0  # ready to be asked for again
    assert (out / "answers.jsonl").read_bytes() == before


def test_policies_that_cannot_be_found(runs, tiny, tmp_path, capfd):
    names = ("foreign", "unfinished", "damaged", "two", "vague")
    foreign, unfinished, damaged, two, vague = (tmp_path / name for name in names)
    for folder in (foreign, unfinished, damaged):
        folder.mkdir()
    shutil.copy(runs / "none" / "config.yaml", unfinished)
    shutil.copytree(runs / "none" / "policy", two)
    adapter = json.loads((two / "adapter_config.json").read_text())
    (two / "adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": "./elsewhere"}))
    shutil.copytree(runs / "none" / "policy", vague / "policy")
    (vague / "config.yaml").write_text("policy: {model: x, dtype: float3}\n")
    shutil.copytree(runs / "none" / "policy", damaged / "policy")
    weights = damaged / "policy" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:300])
    out = tmp_path / "eval"
    for left, more, text in (
        (tmp_path / "nowhere", [], "left: wanted base, a run's folder or an adapter's; there is no folder"),
        (foreign, [], "holds neither a run (config.yaml) nor an adapter (adapter_config.json)"),
        (unfinished, [], "the run has not finished"),
        (runs, [], f"compares several runs; name one of them, such as {runs / 'relaxed'}"),
        (vague, [], "does not say which base the policy has"),
        (two, ["--right", runs / "none"], "left on ./elsewhere and right on"),
        (two, [], "no such file or folder"),
    ):
        assert main(words(out, *more, left=left)) == 1
        message = capfd.readouterr().err.strip()
        assert text in message
        assert "\n" not in message
        assert not out.exists()
    assert main(words(out, "--model", tiny, left=two, right=runs / "none", limit=2)) == 0
    capfd.readouterr()
    assert main(words(tmp_path / "eval2", left=damaged / "policy")) == 1
    assert "left: the adapter" in capfd.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--judge.url", "http://localhost/v1"], "judge.model: judge.url needs it"),
        (["--judge.url", "http://localhost/v1", "--judge.model", "m"], "right: judge.url needs it"),
        (["--max_new_tokens", "0"], "max_new_tokens: wanted a number above 0"),
        (["--judge.timeout", "-1"], "judge.timeout: wanted a number above 0"),
        (["--lefft", "base"], "lefft"),
    ],
)
def test_wrong_usage(tmp_path, capfd, more, text):
    assert main(["eval", "--out", str(tmp_path / "eval"), *more]) == 2
    message = capfd.readouterr().err.strip()
    assert text in message
    assert "\n" not in message
    assert not (tmp_path / "eval").exists()


def test_a_judge_s_url_is_checked_before_a_model_is_loaded(runs, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("fpo_train.evaluate.answers.load_causal_lm", None)
    more = ["--judge.url", "http://me:secret@localhost/v1", "--judge.model", "m"]
    assert main(words(tmp_path / "eval", *more, right=runs / "none")) == 1
    message = capfd.readouterr().err
    assert "judge.url: wanted http://localhost/v1 alone" in message
    assert "secret" not in message


def test_stopping(tmp_path, monkeypatch, capfd):
    def broken(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("fpo_train.evaluate.evaluation.evaluate", broken)
    assert main(["eval", "--out", str(tmp_path / "eval")]) == 3
    assert capfd.readouterr().err.strip() == "fpo-train eval: stopped; the same command goes on"


def test_settings_are_printed_and_documented(tmp_path, capsys):
    assert main(["eval", "--judge.model", "m", "--judge.url", "http://x/v1", "--right", "r", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["judge"]["model"] == "m"
    assert printed["max_new_tokens"] == 64
    assert main(["eval", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Longest answer, in tokens (the paper: 64)." in text
    assert "The endpoint, up to and with /v1" in text
