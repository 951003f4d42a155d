"""A judge whose answers cannot be read: told at once and once, given up on early, counted where it is rare."""

import time

import pytest
import torch

from fpo_train.cli import main
from fpo_train.errors import RunError
from fpo_train.oracle.endpoint import FIRST_ANSWERS, SHOWN, Time
from fpo_train.processes import Processes

from .asking import Clock, ask, judge, likes
from .runs import arguments
from .stub_judge import StubJudge

PROSE = 'got \'I think that A is better.\', wanted {"winner": "A"}, {"winner": "B"} or {"winner": "tie"}'


@pytest.fixture(autouse=True)
def _straight(monkeypatch):
    """No proxy between the test and its stub, no key unless the test sets one."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_the_first_is_quoted_before_anything_is_waited_for_and_no_other_is(tmp_path, capfd):
    told = []
    with StubJudge(likes("tie"), faults=["prose", "third_winner"]) as stub:
        clock = Time(sleep=lambda seconds: told.append(capfd.readouterr().err))
        _, p = ask(judge(stub, tmp_path, clock=clock, concurrency=1), ["a good one"])
    assert p == [1.0]
    first = next(line for line in told if line)
    assert first == f"oracle.model m: an answer that cannot be read: {PROSE} and nothing else\n"
    assert "".join(told) + capfd.readouterr().err == first


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("prose", PROSE),
        ("html", "Welcome to the hotel's network</body></html>\", wanted a chat completion, its text"),
        ("no_text", '"content": null}}]}\', wanted a chat completion, its text under choices[0].message.content'),
        ("nested_answer", f"got '{'[' * SHOWN}' …, wanted"),
    ],
    ids=["prose", "html", "no_text", "nested_answer"],
)
def test_where_none_of_the_first_can_be_read_the_run_ends(tmp_path, fault, says):
    clock = Clock()
    with StubJudge(likes("tie"), always=fault) as stub:
        oracle = judge(stub, tmp_path, clock=clock.time, concurrency=1, retries=4)
        with pytest.raises(RunError) as caught:
            ask(oracle, [f"reply {n}" for n in range(20)])
        assert len(stub.requests) == FIRST_ANSWERS
    said = str(caught.value)
    assert said.startswith(f"oracle.model m: not one of its first {FIRST_ANSWERS} answers can be read; the first: got ")
    assert says in said
    assert "\n" not in said


def test_questions_under_way_are_not_put_again(tmp_path):
    def until_all_have_failed(seconds):
        while oracle.counts["wrong_json"] < FIRST_ANSWERS:
            time.sleep(0.01)
        time.sleep(0.1)

    with StubJudge(likes("tie"), always="prose") as stub:
        oracle = judge(stub, tmp_path, clock=Time(sleep=until_all_have_failed), concurrency=FIRST_ANSWERS)
        with pytest.raises(RunError, match="can be read"):
            ask(oracle, [f"reply {n}" for n in range(20)])
        assert len(stub.requests) == FIRST_ANSWERS


def test_after_one_that_can_be_read_the_others_are_counted(tmp_path):
    def unless_good(message, a, b):
        return None if "good" in a + b else "prose"

    with StubJudge(likes("tie"), always=unless_good) as stub:
        oracle = judge(stub, tmp_path, concurrency=1)
        labels, p = ask(oracle, ["a good one", "one", "two", "three"])
    assert p[0] == 1.0
    assert torch.tensor(p[1:]).isnan().all()
    assert oracle.counts["wrong_json"] == 3 * 2 * 4 > FIRST_ANSWERS
    assert labels.failures == 3
    labels.check(Processes())


def test_few_answers_are_quoted_when_none_is_left(tmp_path):
    with StubJudge(likes("tie"), always="prose") as stub:
        oracle = judge(stub, tmp_path, retries=1)
        labels, _ = ask(oracle, ["one"])
    with pytest.raises(RunError, match=r"not one of the iteration's 1 labels .* wrong_json 4; .* got 'I think that A"):
        labels.check(Processes())


def test_a_key_that_comes_back_is_not_quoted(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with StubJudge(likes("tie"), always="echo") as stub:
        oracle = judge(stub, tmp_path, key_variable="MY_KEY", retries=1)
        ask(oracle, ["one"])
    told = capfd.readouterr().err + oracle.report()
    assert "You are Bearer …." in told
    assert "secret" not in told


def test_a_run_ends_at_its_first_questions(tiny, tmp_path, capfd):
    out = tmp_path / "run"
    with StubJudge(likes("tie"), always="prose") as stub:
        words = "--oracle.kind", "judge", "--oracle.url", stub.url, "--oracle.model", "m"
        assert main(arguments(tiny, out, *words)) == 1
        assert len(stub.requests) <= FIRST_ANSWERS + 8
    told = capfd.readouterr().err.splitlines()
    assert sum(PROSE in line for line in told) == 2
    assert told[-1].startswith("fpo-train run: error: oracle.model m: not one of its first 8 answers can be read")
