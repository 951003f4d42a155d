"""A server watches runs that use no penalty."""

import httpx
import pytest

from fpo_train import FPOClient, FPOReward

from .serving import ORACLE, asked, sample, scorer, serving, vowels


def test_a_run_without_a_penalty_is_watched(tiny, tmp_path):
    folder = scorer(tiny, tmp_path / "scorer")
    batch = sample("wrens", 3)
    with serving(reward_model=folder, oracle=ORACLE, gamma_units="raw") as (url, _):
        client = FPOClient(url)
        said = client.monitor(batch["prompts"], batch["completions"], [1.0, None, 3.0], [0.5, 0.5, 2.0])
        assert said == {"iteration": 1, "reward": 2.0, "oracle_utility": 1.0, "steering": None, "warning": None}
        learnt = client.monitor(
            batch["prompts"], batch["completions"], [0.0] * 3, references=batch["references"], steering=True
        )
        direct = direct_reward(folder)
        columns = {"reference": batch["references"]}
        left = direct.steering(batch["prompts"], batch["completions"], **columns)
        assert learnt["steering"] == pytest.approx(float(left.mean()), rel=1e-4)
        assert learnt["oracle_utility"] == pytest.approx(sum(vowels((), batch["completions"])) / 3)
        for step in range(12):
            last = client.monitor(batch["prompts"], batch["completions"], [step + 2.0] * 3, [-float(step)] * 3)
        assert "possible collapse" in httpx.get(url + "/monitor").json()["steps"][9]["warning"]
        assert last["iteration"] == 14
        assert "fpo_collapse_warnings_total 1" in httpx.get(url + "/metrics").text
        assert asked_for(url, batch, rewards=[1.0]) == (422, "rewards: wanted one for each of 3 completions, got 1")
    with serving(reward_model=folder) as (url, _):
        status, detail = asked_for(url, batch, rewards=[1.0] * 3)
        assert status == 409
        assert "wanted utilities" in detail
        status, detail = asked_for(url, batch, rewards=[1.0] * 3, utilities=[0.0] * 3, steering=True)
        assert (status, detail.partition(";")[0]) == (409, "steering is the oracle's to say, and there is none")


def asked_for(url, batch, **more):
    answer = asked(url, "/monitor", **{**batch, **more})
    return answer.status_code, answer.json()["detail"]


def direct_reward(folder):
    return FPOReward(folder, penalty="practical", gamma_units="raw", oracle=vowels)
