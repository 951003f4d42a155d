"""The judge against a local stub that fails in every way an endpoint can: each failure counted, none a preference."""

import itertools
import json
import logging
import threading
import time
import traceback
from email.utils import formatdate

import pytest
import torch

from fpo_train.errors import RunError
from fpo_train.oracle.endpoint import Bucket, Time
from fpo_train.processes import Processes

from .asking import Clock, ask, judge, likes
from .stub_judge import StubJudge

CAUSES = {
    "http_429": "http_429",
    "http_429 2": "http_429",
    "http_408": "http_408",
    "http_500": "http_500",
    "http_503": "http_503",
    **dict.fromkeys(("html", "empty", "torn_json", "prose", "nested_body", "nested_answer"), "wrong_json"),
    "bare_letter_in_json": "wrong_answer",
    "third_winner": "wrong_answer",
    "two_winners": "wrong_answer",
    "no_winner": "wrong_answer",
    "no_choices": "wrong_answer",
    "no_text": "wrong_answer",
    "wrong_encoding": "network",
    "endless": "too_long",
    "late": "timeout",
    "dribble": "timeout",
    "hang_up": "disconnect",
    "cut_off": "disconnect",
}


@pytest.fixture(autouse=True)
def _straight(monkeypatch):
    """No proxy between the test and its stub, no key unless the test sets one."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_both_orders_make_the_label(tmp_path):
    with StubJudge(likes("tie")) as stub:
        oracle = judge(stub, tmp_path)
        labels, p = ask(oracle, ["a good one", "just one", "the reference"])
    assert p == [1.0, 0.5, 0.5]
    assert oracle.counts == {"pairs": 3, "identical": 1, "requests": 4}
    assert labels.calls == 3
    assert labels.failures == 0
    shown = [json.loads(r["body"]["messages"][-1]["content"]) for r in stub.requests]
    both = {("a good one", "the reference"), ("the reference", "a good one")}
    assert both < {(one["A"], one["B"]) for one in shown}
    assert {one["message"] for one in shown} == {"Which is better?"}
    for request in stub.requests:
        assert request["path"] == "/v1/chat/completions"
        assert request["body"]["temperature"] == 0
        assert request["body"]["model"] == "m"
        assert "Authorization" not in request["headers"]


@pytest.mark.parametrize(
    ("winners", "label", "inconsistent"),
    [
        (("A", "A"), 0.5, 1),  # whoever is named first: the orders contradict each other
        (("B", "B"), 0.5, 1),
        (("B", "A"), 0.0, 0),
        (("A", "B"), 1.0, 0),
        (("tie", "B"), 0.75, 0),
        (("B", "tie"), 0.25, 0),
        (("tie", "tie"), 0.5, 0),
    ],
)
def test_orders_are_averaged(tmp_path, winners, label, inconsistent):
    with StubJudge(lambda message, a, b: winners[b == "one"]) as stub:
        oracle = judge(stub, tmp_path)
        assert ask(oracle, ["one"])[1] == [label]
    assert oracle.counts["inconsistent"] == inconsistent


@pytest.mark.parametrize("fault", CAUSES)
def test_a_failure_is_counted_and_the_question_put_again(tmp_path, fault):
    with StubJudge(likes("tie"), faults=[fault], slow=1.5) as stub:
        oracle = judge(stub, tmp_path, timeout=0.7 if CAUSES[fault] == "timeout" else 5.0)
        labels, p = ask(oracle, ["a good one"])
    assert p == [1.0]
    assert oracle.counts == {"pairs": 1, "requests": 4, "retried": 2, CAUSES[fault]: 2}
    assert labels.failures == 0
    labels.check(Processes())


@pytest.mark.parametrize("fault", CAUSES)
def test_a_failure_for_good_is_no_label(tmp_path, fault):
    with StubJudge(likes("tie"), always=fault) as stub:
        oracle = judge(stub, tmp_path, retries=1, timeout=0.1 if CAUSES[fault] == "timeout" else 5.0)
        labels, p = ask(oracle, ["a good one"])
        asked = len(stub.requests)
        again = labels.preferences(torch.ones(1, 1, dtype=torch.bool))
        assert len(stub.requests) == asked  # failed labels are not asked for again within the iteration
    assert torch.isnan(torch.tensor(p)).all()
    assert again.isnan().all()
    assert (labels.calls, labels.failures) == (1, 1)
    assert oracle.counts == {"pairs": 1, "failed": 1, "requests": 4, "retried": 2, CAUSES[fault]: 4}
    assert not (tmp_path / "judge.jsonl").exists()
    with pytest.raises(RunError, match=rf"not one of the iteration's 1 labels could be had.*{CAUSES[fault]} 4"):
        labels.check(Processes())


def test_one_failed_order_fails_the_pair_and_no_other(tmp_path):
    def only_when_second(message, a, b):
        return "http_500" if b == "bad luck" else None

    with StubJudge(likes("tie"), always=only_when_second) as stub:
        oracle = judge(stub, tmp_path)
        labels, p = ask(oracle, ["a good one", "bad luck", "so so"])
    assert p[0] == 1.0
    assert p[1] != p[1]
    assert p[2] == 0.5
    assert (labels.calls, labels.failures) == (3, 1)
    assert oracle.counts["failed"] == 1
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 5  # good answers alone
    labels.check(Processes())  # two of three labels are there


def test_what_no_repetition_mends_is_not_repeated(tmp_path):
    for status in (302, 400, 422):
        with StubJudge(likes("tie"), always=f"http_{status}") as stub:
            oracle = judge(stub, tmp_path)
            _, p = ask(oracle, ["one"])
        assert p[0] != p[0]
        assert oracle.counts == {"pairs": 1, "failed": 1, "requests": 2, f"http_{status}": 2}


@pytest.mark.parametrize(("status", "says"), [(401, "refuses the key"), (403, "use it"), (404, "no such address")])
def test_a_refused_key_stops_the_run_and_is_not_shown(tmp_path, monkeypatch, caplog, status, says):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", "sk-secret\n")
    with StubJudge(likes("tie"), always=f"http_{status}") as stub:
        oracle = judge(stub, tmp_path, key_variable="MY_KEY", concurrency=1)
        with pytest.raises(RunError, match=f"answered {status}: it .*{says}.* key from MY_KEY") as caught:
            ask(oracle, ["one", "two"])
    assert "sk-secret" not in "".join(traceback.format_exception(caught.value))
    assert "sk-secret" not in caplog.text
    assert "retried" not in oracle.counts
    assert len(stub.requests) == 1  # the questions not yet begun are dropped


def test_the_key_goes_into_the_header_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret\n")
    with StubJudge(likes("tie")) as stub:
        ask(judge(stub, tmp_path, key_variable="MY_KEY"), ["one"])
        assert [r["headers"]["Authorization"] for r in stub.requests] == ["Bearer sk-secret"] * 2
        assert "sk-secret" not in (tmp_path / "judge.jsonl").read_text()
        monkeypatch.setenv("MY_KEY", "sk-sec\nret")
        with pytest.raises(RunError, match="MY_KEY holds characters") as caught:
            judge(stub, tmp_path, key_variable="MY_KEY")
    assert "ret" not in str(caught.value).replace("secret", "")


def test_nobody_there(tmp_path):
    with StubJudge(likes("tie")) as stub:
        url = stub.url
    oracle = judge(url, tmp_path, retries=1)
    labels, p = ask(oracle, ["one"])
    assert p[0] != p[0]
    assert oracle.counts == {"pairs": 1, "failed": 1, "requests": 4, "retried": 2, "connect": 4}
    with pytest.raises(RunError, match="connect 4"):
        labels.check(Processes())
    with pytest.raises(RunError, match=r"oracle.url: wanted an address"):
        judge("localhost:8000/v1", tmp_path)
    for url in ("http://me:secret@localhost/v1", "https://localhost/v1?key=secret"):
        with pytest.raises(RunError, match=r"oracle.url: wanted https?://localhost/v1 alone") as caught:
            judge(url, tmp_path)
        assert "secret" not in str(caught.value)


def test_waits_double_and_come_from_the_seed(tmp_path):
    def waits(seed):
        sleeps = []
        with StubJudge(likes("tie"), always="http_500") as stub:
            ask(judge(stub, tmp_path, sleeps=sleeps, retries=4, concurrency=1, seed=seed), ["one"])
        return sleeps

    first = waits(0)
    assert len(first) == 8
    for n, wait in enumerate(first):
        assert 0.5 * 2 ** (n % 4) <= wait <= 1.5 * 2 ** (n % 4)
    assert len(set(first)) == 8
    assert waits(0) == first
    assert waits(1) != first


def test_retry_after_is_kept_to(tmp_path):
    for header, least in (("7", 7.0), (formatdate(time.time() + 30, usegmt=True), 28.0)):
        clock = Clock()
        with StubJudge(likes("tie"), faults=[f"http_429 {header}"]) as stub:
            stub.clock = clock.time.now
            ask(judge(stub, tmp_path / header[:1], clock=clock.time, concurrency=1), ["one"])
        at = [request["at"] for request in stub.requests]
        assert len(at) == 4
        assert at[1] - at[0] >= least
        assert at[3] - at[2] >= least

    clock = Clock()
    with StubJudge(likes("tie"), always="http_429 86400") as stub:
        oracle = judge(stub, tmp_path / "x", clock=clock.time, concurrency=1)
        _, p = ask(oracle, ["one"])
    assert p[0] != p[0]
    assert oracle.counts["requests"] == 2  # a day is not waited for
    assert max(clock.sleeps) < 1e-6


def test_an_endpoint_that_wants_rest_gets_it_from_all():
    clock = Clock()
    bucket = Bucket(6000, clock.time)
    bucket.take()
    bucket.hold(5)
    bucket.take()
    assert clock.seconds == pytest.approx(105.0)


def test_the_rate_is_kept_to_by_the_requests_of_all_threads(tmp_path):
    clock = Clock()
    with StubJudge(likes("tie"), faults=["http_500"]) as stub:
        stub.clock = clock.time.now
        ask(judge(stub, tmp_path, clock=clock.time, requests_per_minute=20, concurrency=1, world=1), ["one", "two"])
    at = [request["at"] for request in stub.requests]
    assert len(at) == 8
    assert all(later - earlier >= 3.0 - 1e-9 for earlier, later in itertools.pairwise(at))  # repetitions count too

    waited = []
    bucket = Bucket(600, Time(now=lambda: 0.0, sleep=waited.append))  # time stands still: each wait is its turn
    threads = [threading.Thread(target=lambda: [bucket.take() for _ in range(5)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(waited) == pytest.approx([0.1 * n for n in range(1, 40)])


def test_several_processes_share_the_rate(tmp_path):
    clock = Clock()
    with StubJudge(likes("tie")) as stub:
        stub.clock = clock.time.now
        ask(judge(stub, tmp_path, clock=clock.time, requests_per_minute=60, concurrency=1, rank=1, world=4), ["one"])
    assert stub.requests[1]["at"] - stub.requests[0]["at"] == pytest.approx(4.0)


def test_questions_run_side_by_side(tmp_path):
    meet = threading.Barrier(4, timeout=5)

    def together(message, a, b):
        meet.wait()
        return "tie"

    with StubJudge(together) as stub:
        assert ask(judge(stub, tmp_path, concurrency=4), ["one", "two"])[1] == [0.5, 0.5]


def test_answers_are_kept_on_disk(tmp_path):
    texts = ["a good one", "one", "two"]
    with StubJudge(likes("tie")) as stub:
        first = ask(judge(stub, tmp_path), texts)[1]
        assert len(stub.requests) == 6
        oracle = judge(stub, tmp_path)
        assert ask(oracle, texts)[1] == first
        assert len(stub.requests) == 6
        assert oracle.counts == {"pairs": 3, "cached": 6}
        ask(judge(stub, tmp_path, model="another"), ["one"])
        assert len(stub.requests) == 8
        ask(oracle, ["a new one", "a new one"])  # said twice, asked about once
        assert len(stub.requests) == 10


def test_a_cache_cut_off_by_a_kill(tmp_path):
    texts = ["a good one", "one"]
    with StubJudge(likes("tie")) as stub:
        ask(judge(stub, tmp_path, concurrency=1), texts)
        path = tmp_path / "judge.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-30])
        oracle = judge(stub, tmp_path)
        assert ask(oracle, texts)[1] == [1.0, 0.5]
        assert oracle.counts == {"pairs": 2, "cached": 3, "requests": 1}
        assert path.read_bytes() == whole
        path.write_bytes(whole[:-1])  # as an editor may leave it
        oracle = judge(stub, tmp_path)
        ask(oracle, [*texts, "three"])
        assert oracle.counts["cached"] == 4
        assert len([json.loads(line) for line in path.read_text().splitlines()]) == 6


def test_a_cache_that_is_none_is_refused_and_left_alone(tmp_path):
    for text in ('{"prompt": "a"}\n', "not JSON\n", '{"key": "a", "winner": "C"}\n'):
        (tmp_path / "judge.jsonl").write_text(text)
        with pytest.raises(RunError, match=r"judge\.jsonl (row|line) 1 is (no judge's answer|not JSON)"):
            judge("http://localhost/v1", tmp_path)
        assert (tmp_path / "judge.jsonl").read_text() == text


def test_each_process_keeps_a_file_and_reads_all(tmp_path):
    with StubJudge(likes("tie")) as stub:
        ask(judge(stub, tmp_path, rank=0, world=2), ["one"])
        ask(judge(stub, tmp_path, rank=1, world=2), ["two"])
        assert {path.name for path in tmp_path.iterdir()} == {"judge.rank0.jsonl", "judge.rank1.jsonl"}
        assert len(stub.requests) == 4
        alone = judge(stub, tmp_path)
        ask(alone, ["one", "two"])
        assert len(stub.requests) == 4


def test_counts_survive_a_checkpoint_and_go_on(tmp_path):
    with StubJudge(likes("tie"), faults=["http_500"]) as stub:
        oracle = judge(stub, tmp_path)
        ask(oracle, ["one"])
        again = judge(stub, tmp_path)
        again.load_state_dict(json.loads(json.dumps(oracle.state_dict())))
        ask(again, ["two"])
    assert again.counts == {"pairs": 2, "requests": 8, "retried": 4, "http_500": 4}
    assert again.report() == "http_500 4, pairs 2, requests 8, retried 4"
    again.gather(Processes())
    assert again.state_dict()["counts"] == again.counts


def test_a_checkpoint_holds_the_counts_of_all_processes(tmp_path):
    class Two(Processes):
        def __init__(self):
            pass

        def gather_objects(self, items):
            return [*items, {"requests": 5, "http_429": 1}]

    with StubJudge(likes("tie")) as stub:
        oracle = judge(stub, tmp_path)
        ask(oracle, ["one"])
        for _ in range(2):
            oracle.gather(Two())
            assert oracle.state_dict()["counts"] == {"pairs": 1, "requests": 7, "http_429": 1}
        assert oracle.counts == {"pairs": 1, "requests": 2}
