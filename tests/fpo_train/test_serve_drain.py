"""A server that is told to stop answers what is under way, and the next one goes on where it was."""

import concurrent.futures
import signal
import time

import httpx
import pytest
import torch

from fpo_train.config import LearningConfig, ServeConfig
from fpo_train.errors import RunError
from fpo_train.integrations.server.owner import Owner
from fpo_train.integrations.server.run import STATE, reward_of

from .serving import ORACLE, SLOW, asked, command, sample, scorer

SETTINGS = ("--oracle", ORACLE, "--learning.learning_rate", "0.05")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return scorer(tiny, tmp_path_factory.mktemp("scorer"))


def same(one, other):
    """Bit for bit, through dictionaries and lists."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_what_is_under_way_is_answered_and_all_is_kept(folder, tmp_path):
    state, kept = tmp_path / "state", torch.load
    words = ("--reward_model", folder, "--state", str(state), *SETTINGS)
    slow = sample("slow", 2)
    slow["completions"][0] = f"{SLOW}, but with many vowels: aaaaaa"
    with command(*words) as (process, url), concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert asked(url, "/rewards", **sample("first", 3)).status_code == 200
        assert asked(url, "/update").json()["updates"] == 1
        assert asked(url, **sample("kept"), collect=True).status_code == 200
        under_way = pool.submit(asked, url, "/rewards", **slow)
        time.sleep(0.4)
        process.send_signal(signal.SIGTERM)
        while (health := httpx.get(f"{url}/health")).status_code == 200:
            time.sleep(0.02)
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        refused = asked(url, **sample("late"))
        assert refused.status_code == 503
        assert "draining" in refused.json()["detail"]
        assert under_way.result().status_code == 200
        assert process.wait(20) == 0
    before = kept(state / STATE, weights_only=True)
    assert (before["updates"], len(before["collected"]), before["reward"]["counts"]["calls"]) == (1, 2, 2)
    body = sample("again")
    with command(*words) as (process, url):
        answer = asked(url, **body).json()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert same(kept(state / STATE, weights_only=True), before)
    owner = Owner(reward_of(ServeConfig(reward_model=folder, oracle=ORACLE)), LearningConfig(learning_rate=0.05))
    owner.load_state_dict(before)
    found = owner.reward.score(body["prompts"], body["completions"], reference=body["references"])
    assert answer["effective"] == pytest.approx(found.effective.tolist(), rel=1e-5)


def test_draining_ends_though_an_answer_does_not(folder):
    slow = sample("slow", 2)
    slow["completions"][0] = SLOW
    words = ("--reward_model", folder, *SETTINGS, "--drain", "0.1")
    with command(*words) as (process, url), concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = pool.submit(asked, url, "/rewards", **slow)
        time.sleep(0.3)
        waiting = pool.submit(asked, url, **sample("waits"))
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert first.result().status_code == 200  # the model itself is never cut off
        assert waiting.result().status_code in (200, 503)


def test_a_state_of_something_else_is_refused(folder, tmp_path):
    owner = Owner(reward_of(ServeConfig(reward_model=folder)), LearningConfig())
    for state in ({}, [], {"reward": {}, "collected": [], "updates": 0}):
        with pytest.raises(RunError, match="state"):
            owner.load_state_dict(state)
