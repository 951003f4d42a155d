"""fpo-train serve: what it answers is what FPOReward says, whoever else is asking."""

import concurrent.futures
import math
import time
from types import SimpleNamespace

import httpx
import pytest

from fpo_train.config import BatchingConfig, LearningConfig, ServeConfig
from fpo_train.integrations.server.batching import Full, Stopped, Worker
from fpo_train.integrations.server.metrics import Metrics
from fpo_train.integrations.server.owner import Texts
from fpo_train.integrations.server.run import reward_of

from .serving import GRADED, ORACLE, asked, sample, scorer, serving


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return scorer(tiny, tmp_path_factory.mktemp("scorer"))


def alike(got, wanted):
    """Numbers to rounding, nulls for NaN."""
    return len(got) == len(wanted) and all(
        (a is None and math.isnan(b)) or (a is not None and abs(a - b) <= 1e-5 * max(1.0, abs(b)))
        for a, b in zip(got, wanted, strict=True)
    )


def judged(reward, body):
    """What FPOReward says of a request, as lists."""
    found = reward.score(body["prompts"], body["completions"], reference=body["references"])
    return {
        "rewards": found.reward.tolist(),
        "penalties": found.penalty.tolist(),
        "effective": found.effective.tolist(),
    }


def agree(answer, wanted):
    return all(alike(answer[key], wanted[key]) for key in wanted)


SETTINGS = {
    "practical": {"penalty": "practical", "gamma_units": "raw", "gamma": 2.0},
    "all": {"penalty": "practical", "gamma_units": "raw", "gamma": 0.1, "parameters": "all"},
    "relaxed": {"penalty": "relaxed", "gamma_units": "raw", "oracle": ORACLE},
    "scale_of_the_request": {"penalty": "practical", "gamma_units": "reward_std"},
    "mean_over_the_request": {"penalty": "tracin", "gamma_units": "raw", "oracle": ORACLE},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_each_of_many_clients_gets_what_it_would_get_alone(folder, kind):
    config = ServeConfig(reward_model=folder, **SETTINGS[kind])
    reward = reward_of(config)
    bodies = [sample(f"{kind} {n}", completions=n % 3 + 1) for n in range(24)]
    bodies[3]["references"][0] = None
    wanted = [judged(reward, body) for body in bodies]
    until = time.monotonic() + 2
    with serving(config) as (url, _), httpx.Client(base_url=url, timeout=60) as client:

        def ask(who):
            count = 0
            while time.monotonic() < until or not count:
                place = (who * 7 + count) % len(bodies)
                answer = client.post("/score", json=bodies[place])
                assert answer.status_code == 200, answer.text
                assert agree(answer.json(), wanted[place])
                count += 1
            return count

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            counts = list(pool.map(ask, range(16)))
        text = client.get("/metrics").text
    passes = next(float(line.split()[1]) for line in text.splitlines() if line.startswith("fpo_pass_requests_count"))
    assert f'fpo_requests_total{{route="/score",status="200"}} {sum(counts)}' in text
    if kind in ("practical", "all", "relaxed"):
        assert passes < 0.6 * sum(counts)  # they were joined
    else:
        assert passes == sum(counts)


def test_a_training_call_is_one_and_moves_the_scale_as_a_trainers_does(folder):
    config = ServeConfig(reward_model=folder, oracle=ORACLE, learning=LearningConfig(learning_rate=0.05))
    reward = reward_of(config)
    with serving(config) as (url, _):
        for n in range(3):
            one, other = sample(f"a{n}", 3), sample(f"b{n}", 2)
            body = {key: one[key] + other[key] for key in one}
            answer = asked(url, "/rewards", **body).json()
            wanted = reward(body["prompts"], body["completions"], reference=body["references"])
            assert alike(answer["effective"], wanted)
            told = asked(url, "/update").json()
            assert told["loss"] == pytest.approx(reward.update(), rel=1e-5)
            assert (told["pairs"], told["updates"]) == (reward.pairs, n + 1) == (2 * (n + 1), n + 1)
        body = sample("after")
        assert agree(asked(url, **body).json(), judged(reward, body))


def test_columns_reach_the_oracle_joined_or_not(folder):
    config = ServeConfig(reward_model=folder, oracle=GRADED, penalty="relaxed", gamma_units="raw")
    reward = reward_of(config)
    bodies = [sample(f"{n}") | {"columns": {"grade": [n, n + 0.5]}} for n in range(8)]
    wanted = [
        reward.score(b["prompts"], b["completions"], reference=b["references"], **b["columns"]).effective.tolist()
        for b in bodies
    ]
    with serving(config) as (url, _), concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: asked(url, **body), bodies))
        missing = asked(url, **sample("without"))
    assert all(alike(a.json()["effective"], b) for a, b in zip(answers, wanted, strict=True))
    assert (missing.status_code, "grade" in missing.json()["detail"]) == (500, True)


def test_an_update_that_fails_keeps_what_it_was_to_learn_from(folder):
    config = ServeConfig(reward_model=folder, oracle=ORACLE, gamma_units="raw")
    body = sample("kept")
    body["completions"] = [f"{one} break the oracle" for one in body["completions"]]
    with serving(config) as (url, app):
        assert asked(url, **body, collect=True).status_code == 200
        assert asked(url, "/update").status_code == 500
        assert (app.state.service.worker.owner.collected, app.state.service.worker.owner.updates) == (2, 0)


def test_a_group_is_of_one_request_alone(folder):
    config = ServeConfig(reward_model=folder, gamma_units="raw", reference="group")
    reward = reward_of(config)
    body = sample("birds", 3)
    body["references"] = body["completions"][1:] + body["completions"][:1]
    circle = [{**body, "references": body["completions"][n:] + body["completions"][:n]} for n in (1, 2)]
    wanted = [judged(reward, one) for one in circle]
    del body["references"]
    with serving(config) as (url, _):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda n: asked(url, **body), range(16)))
        assert all(any(agree(answer.json(), one) for one in wanted) for answer in answers)
        assert len({answer.text for answer in answers}) <= 16
        alone = {key: values[:1] for key, values in body.items()}
        refused = asked(url, **alone)
    assert refused.status_code == 422
    assert "the only one of its prompt" in refused.json()["detail"]


def test_what_comes_one_by_one_is_grouped_when_it_is_learnt_from(folder):
    learning = LearningConfig(learning_rate=0.05)
    config = ServeConfig(reward_model=folder, oracle=ORACLE, gamma_units="raw", learning=learning)
    reward = reward_of(config)
    body = {key: sample("a", 3)[key] + sample("b", 3)[key] for key in sample("a")}
    with serving(config) as (url, app):
        order = [4, 1, 5, 0, 2, 3]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            ones = [{key: [values[n]] for key, values in body.items()} for n in order]
            answers = list(pool.map(lambda one: asked(url, **one, collect=True).json(), ones))
        together = judged(reward, body)
        assert alike([answer["effective"][0] for answer in answers], [together["effective"][n] for n in order])
        asked(url, **sample("never kept"))
        assert app.state.service.worker.owner.collected == 6
        told = asked(url, "/update").json()
        reward(body["prompts"], body["completions"], reference=body["references"])
        assert told["pairs"] == reward.pairs == 2
        assert told["loss"] == pytest.approx(reward.update(), rel=1e-4)
        assert app.state.service.worker.owner.collected == 0


def test_an_update_comes_by_itself_where_it_is_asked_for(folder):
    learning = LearningConfig(update_every=4)
    config = ServeConfig(reward_model=folder, oracle=ORACLE, gamma_units="raw", learning=learning)
    with serving(config) as (url, app):
        for n in range(3):
            assert asked(url, **sample(f"{n}", 2), collect=True).status_code == 200
        assert asked(url, **sample("x")).status_code == 200  # in order, so that the update is over
        owner = app.state.service.worker.owner
        assert (owner.updates, owner.collected) == (1, 2)
        assert "fpo_updates_total 1\n" in httpx.get(f"{url}/metrics").text


def test_one_request_that_fails_does_not_fail_those_beside_it(folder):
    config = ServeConfig(
        reward_model=folder,
        penalty="relaxed",
        gamma_units="raw",
        oracle=ORACLE,
        batching=BatchingConfig(wait_ms=300),
    )
    bad = sample("bad")
    bad["completions"][1] = "break the oracle"
    worse = sample("worse")
    worse["completions"][0] = "leave"
    with serving(config) as (url, _), concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: asked(url, **body), [bad, *(sample(f"{n}") for n in range(7))]))
        text = httpx.get(f"{url}/metrics").text
        left = asked(url, **worse)
        assert asked(url, **sample("after")).status_code == 200
    assert [answer.status_code for answer in answers] == [500, *[200] * 7]
    assert "oracle" in answers[0].json()["detail"]
    assert (left.status_code, left.json()["detail"]) == (500, "the reward has failed: it raised SystemExit")
    assert "Traceback" not in answers[0].text
    assert 'fpo_requests_total{route="/score",status="500"} 1' in text


class Noting:
    """An owner that notes in which order it is asked for what."""

    joins, due, updates, reward = True, False, 0, SimpleNamespace(pairs=0)

    def __init__(self):
        self.calls = []

    def score(self, requests):
        self.calls.append([one.prompts[0] for one in requests])
        return requests

    def rewards(self, texts):
        self.calls.append(f"rewards {texts.prompts[0]}")

    def update(self):
        self.calls.append("update")


@pytest.mark.parametrize("joins", [True, False])
def test_requests_are_served_in_order_and_joined_only_side_by_side(joins):
    owner = Noting()
    owner.joins = joins
    worker = Worker(owner, BatchingConfig(texts=4, wait_ms=0, queue=20), Metrics())

    def submit(kind, name, count=1, columns=()):
        texts = Texts([name] * count, ["x"] * count, ["y"] * count, {key: [0] * count for key in columns})
        return worker.submit(kind, texts)

    jobs = [submit("score", "a"), submit("score", "b", 3), submit("score", "c"), submit("rewards", "d")]
    jobs += [
        submit("score", "e"),
        submit("score", "f", columns=["grade"]),
        submit("score", "g", 9),
        submit("update", "h"),
    ]
    jobs += [submit("score", "nobody waits for it"), submit("score", "i")]
    jobs[-2].cancel()
    for _ in range(11):  # of which the last takes the place of that for which nobody waits
        submit("score", "z")
    with pytest.raises(Full, match="20 requests wait"):
        submit("score", "z")
    worker.start()
    for job in jobs:
        assert job.cancelled() or job.exception(5) is None
    joined = [["a", "b"], ["c"], "rewards d", ["e"], ["f"], ["g"], "update", ["i"]]
    alone = [["a"], ["b"], ["c"], "rewards d", ["e"], ["f"], ["g"], "update", ["i"]]
    assert worker.stop(5)
    found = [[one for one in call if one != "z"] if isinstance(call, list) else call for call in owner.calls]
    assert [call for call in found if call] == (joined if joins else alone)
    with pytest.raises(Stopped):
        submit("score", "too late")


def test_an_update_that_was_due_and_failed_is_not_tried_with_every_request():
    class Failing(Noting):
        due = True

        def update(self):
            super().update()
            raise RuntimeError("the oracle is away")

    owner = Failing()
    worker = Worker(owner, BatchingConfig(wait_ms=0), Metrics())
    worker.start()
    for name in "abc":
        worker.submit("score", Texts([name], ["x"], ["y"])).result(5)
    assert worker.stop(5)
    assert owner.calls == [["a"], "update", ["b"], ["c"]]
