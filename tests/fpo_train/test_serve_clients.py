"""Trainers ask a server through their own calls: harnesses here do what the named sources of theirs do."""

import asyncio
import functools
import importlib.util
import json
import logging
import pickle
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest
import torch

from fpo_train.config import ServeConfig
from fpo_train.errors import RunError
from fpo_train.integrations import openrlhf, skyrl, slime, verl
from fpo_train.integrations.server.client import FPOClient
from fpo_train.integrations.server.run import reward_of

from .serving import ORACLE, ROOT, asked, sample, scorer, serving

TOKEN = "s3cret-token"


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return scorer(tiny, tmp_path_factory.mktemp("scorer"))


@pytest.fixture(scope="module")
def url(folder):
    config = ServeConfig(reward_model=folder, oracle=ORACLE, gamma_units="raw", reply_ends="<|endoftext|>, </s>")
    with serving(config, TOKEN) as (url, _):
        yield url


@pytest.fixture
def reward(folder):
    return reward_of(ServeConfig(reward_model=folder, oracle=ORACLE, gamma_units="raw"))


@pytest.fixture(autouse=True)
def environment(monkeypatch, url):
    monkeypatch.setenv("FPO_URL", url)
    monkeypatch.setenv("FPO_TOKEN", TOKEN)


def worth(reward, body):
    found = reward.score(body["prompts"], body["completions"], reference=body["references"])
    return pytest.approx(found.effective.tolist(), rel=1e-5)


def test_the_client_says_what_the_server_does(reward):
    client, body = FPOClient(), sample("client", 3)
    assert client.score(**body)["effective"] == worth(reward, body)
    assert client.rewards(**body)["effective"] == worth(reward, body)
    assert client.score(body["prompts"], body["completions"], "group", columns={"more": [1, None, "x"]})["rewards"]

    async def awaited():
        both = await asyncio.gather(client.ascore(**body), client.arewards(**body), client.ascore(**sample("x")))
        return [one["effective"] for one in both]

    for _ in range(2):  # in two loops, one after the other
        assert asyncio.run(awaited()) == [worth(reward, body), worth(reward, body), worth(reward, sample("x"))]
    with pytest.raises(RunError, match="/score answered 422: completions: wanted one for each of 3 prompts"):
        client.score(body["prompts"], ["a"], "group")
    with pytest.raises(RunError, match="answered 401: wanted the server's token"):
        FPOClient(token="wrong").score(**body)
    assert TOKEN not in repr(client)


def test_the_client_updates(folder):
    with serving(ServeConfig(reward_model=folder, oracle=ORACLE)) as (url, _):
        client = FPOClient(url)
        client.rewards(**sample("a", 3))
        assert client.update()["pairs"] == 1
        assert asyncio.run(client.aupdate()) == {"loss": None, "pairs": 1, "updates": 1}
    with (
        serving(ServeConfig(reward_model=folder)) as (url, _),
        pytest.raises(RunError, match="409: there is no oracle"),
    ):
        FPOClient(url).update()


def test_the_client_waits_for_a_server_that_is_busy_and_no_other(monkeypatch):
    answers, waits = [httpx.ConnectError("nobody there"), 503, 503, 200], []
    monkeypatch.setattr("time.sleep", waits.append)

    def answer(request):
        status = answers.pop(0)
        if isinstance(status, Exception):
            raise status
        return httpx.Response(status, json={"detail": "full"}, headers={"Retry-After": "3"} if answers else {})

    client = FPOClient("http://nowhere:1")
    client._held = httpx.Client(transport=httpx.MockTransport(answer), base_url=client.url)
    assert client.update() == {"detail": "full"}
    assert waits == [0.5, 3, 3]
    for status in (500, 504, 422, httpx.ReadTimeout("late")):  # which may have had its effect
        answers[:] = [status]
        with pytest.raises(RunError):
            client.update()
    answers[:] = [503] * 6
    with pytest.raises(RunError, match="503"):
        client.update()
    monkeypatch.delenv("FPO_URL")
    for wrong in (None, "", "127.0.0.1:8008"):
        with pytest.raises(RunError, match=r"url: wanted a reward server's"):
            FPOClient(wrong)


CHILD = """
import json, pickle, sys
function = pickle.loads(sys.stdin.buffer.read())
found = function(**json.loads(sys.argv[1]))
print(json.dumps([found, function.__name__, sorted({"torch", "transformers"} & set(sys.modules))]))
"""


def test_a_reward_function_of_asyncgrpo_travels_to_a_process_without_torch(reward):
    """As trl 1.16, experimental/async_grpo/async_rollout_worker.py, `_score_group` calls it."""
    body = sample("travels", 4)
    passed = {"completions": body["completions"], "prompts": body["prompts"], "completion_ids": [[1]] * 4}
    passed |= {"answer": body["references"], "id": [1, 2, 3, 4]}
    client = FPOClient(reference="answer", columns=("id",))
    client.score(**sample("its connections are open"))
    for function in (client, functools.partial(client)):
        words = [sys.executable, "-c", CHILD.replace("function.__name__", "'fpo'"), json.dumps(passed)]
        done = subprocess.run(words, input=pickle.dumps(function), capture_output=True, cwd=ROOT, check=True)
        assert json.loads(done.stdout) == [worth(reward, body), "fpo", []]
    chat = [[{"role": "user", "content": prompt}] for prompt in body["prompts"]]
    replies = [[{"role": "assistant", "content": text}] for text in body["completions"]]
    found = client(prompts=chat, completions=replies, answer=body["references"], id=[None] * 4)
    assert found == pytest.approx(reward(chat, replies, reference=body["references"]), rel=1e-5)
    with pytest.raises(RunError, match="answer: the data set has no such column; those passed on: label"):
        client(prompts=["a"], completions=["b"], label=["c"])


def their_scores(address, queries, prompts, labels, tries=2):
    """OpenRLHF 0.11.2, utils/agent.py: what `_fetch_rewards_via_http` posts, and what becomes of the answer."""
    for _ in range(tries):
        answer = httpx.post(address, json={"query": queries, "prompts": prompts, "labels": labels}, timeout=60)
        if answer.is_success:
            info = answer.json()
            score = info.get("scores")
            logs = {key: torch.tensor([value]) for key, value in (info.get("extra_logs") or {}).items()}
            return torch.tensor([info.get("rewards")]), torch.tensor([score]), logs
    return None


def test_openrlhf_over_http(url, reward):
    body, address = sample("openrlhf", 2), url.replace("http://", f"http://any:{TOKEN}@") + "/openrlhf"
    whole = [
        f"<|im_start|>{p}{c}<|im_end|><|endoftext|>" for p, c in zip(body["prompts"], body["completions"], strict=True)
    ]
    rewards, scores, logs = their_scores(address, whole, body["prompts"], body["references"])
    assert rewards[0].tolist() == scores[0].tolist() == worth(reward, body)
    assert torch.allclose(logs["fpo_reward"] - logs["fpo_penalty"], rewards, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"labels": [None, "x"]}, "labels 0: wanted the text to compare the reply with, got None"),
        ({"labels": ["x", ""]}, "labels 1: wanted the text"),
        ({"labels": ["x"]}, "wanted as many of each, got 2, 2 and 1"),
        ({"query": ["cut off", "too"]}, "query 0: it does not hold its prompt"),
        ({"query": None}, "query"),
    ],
)
def test_openrlhf_is_told_loudly_on_our_side(url, change, told, caplog):
    """For there it is a line at level info, and a rollout without a reward."""
    body = {"query": ["Why? Because", "Why? So"], "prompts": ["Why?"] * 2, "labels": ["x", "y"]} | change
    with caplog.at_level(logging.ERROR, "fpo_train.serve"):
        answer = asked(url, "/openrlhf", TOKEN, **body)
    assert answer.status_code == 422
    assert told in answer.json()["detail"]
    assert any(record.levelno == logging.ERROR and told in record.message for record in caplog.records)
    counted = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text
    assert 'fpo_requests_total{route="/openrlhf",status="422"}' in counted


def test_openrlhf_by_its_loader_of_files(reward, caplog):
    """OpenRLHF 0.11.2, utils/agent.py: `SingleTurnAgentExecutor.__init__` and `_fetch_rewards_via_func`."""
    spec = importlib.util.spec_from_file_location("reward_func", openrlhf.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    body = sample("file", 1)
    whole = [body["prompts"][0] + body["completions"][0] + "<|im_end|>"]

    async def called():
        return await asyncio.to_thread(module.reward_func, whole, body["prompts"], body["references"])

    found = asyncio.run(called())
    assert torch.tensor([found["rewards"]]).tolist() == worth(reward, body)
    assert {key: torch.tensor([value]).shape for key, value in found["extra_logs"].items()} == {
        "fpo_reward": (1,),
        "fpo_penalty": (1,),
    }
    with pytest.raises(RunError, match="labels 0"):
        module.reward_func(whole, body["prompts"], [None])
    assert "no reward: " in caplog.text


async def their_single(function, reply, truth, info, **reward_kwargs):
    """verl 0.9.1, experimental/reward_loop/reward_manager/naive.py, with trainer/ppo/reward.py around the function."""
    info |= {"num_turns": None, "rollout_reward_scores": {}}
    keywords = {"data_source": "mine", "solution_str": reply, "ground_truth": truth, "extra_info": info}
    result = await function(**{**keywords, **reward_kwargs})
    return {"reward_score": result["score"], "reward_extra_info": dict(result)}


def test_verl_by_its_function(url, reward):
    body = sample("verl", 3)
    rows = list(zip(body["prompts"], body["completions"], body["references"], strict=True))

    async def all_of_them():
        calls = [
            their_single(verl.compute_score, reply, other, {"prompt": prompt}, url=url, token=TOKEN)
            for prompt, reply, other in rows
        ]
        return await asyncio.gather(*calls)

    found = asyncio.run(all_of_them())
    assert [one["reward_score"] for one in found] == worth(reward, body)
    assert {frozenset(one["reward_extra_info"]) for one in found} == {frozenset(("score", "fpo_reward", "fpo_penalty"))}
    other = {"question": [{"role": "user", "content": "Why?"}], "better": "Because."}
    renamed = {"prompt": "question", "reference": "better"}
    assert asyncio.run(their_single(verl.compute_score, "So.", "", dict(other), **renamed))["reward_score"]
    with pytest.raises(RunError, match=r"extra_info: it has no 'prompt', it has num_turns, .*FPORewardManager"):
        asyncio.run(their_single(verl.compute_score, "So.", "x", {}))
    with pytest.raises(RunError, match="ground_truth: wanted the text to compare the completion with, got 42"):
        asyncio.run(their_single(verl.compute_score, "So.", 42, {"prompt": "Why?"}))


def test_verl_by_its_reward_manager(monkeypatch, url, reward):
    """verl 0.9.1, experimental/reward_loop: `RewardLoopWorker` calls `run_single` with a slice of one."""

    class Base:  # of experimental/reward_loop/reward_manager/base.py
        def __init__(self, config, tokenizer, compute_score):
            self.config, self.tokenizer, self.loop = config, tokenizer, asyncio.get_running_loop()

    named = "verl.experimental.reward_loop.reward_manager.base"
    parts = named.split(".")
    for n in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: n + 1]), SimpleNamespace(RewardManagerBase=Base))
    spec = importlib.util.spec_from_file_location("managers", verl.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    body = sample("manager", 1)
    ids = torch.tensor([5, 6, 7, 0, 0])
    own = {"raw_prompt": [{"role": "user", "content": body["prompts"][0]}], "extra_info": {"better": "Yes."}}
    own["reward_model"] = {"ground_truth": body["references"][0]}
    item = SimpleNamespace(
        batch={"responses": ids, "attention_mask": torch.tensor([1, 1, 1, 1, 1, 0, 0])}, non_tensor_batch=own
    )
    said = {(5, 6, 7): body["completions"][0]}
    tokenizer = SimpleNamespace(decode=lambda some, skip_special_tokens: said[tuple(some.tolist())])

    async def run(**settings):
        config = SimpleNamespace(reward={"reward_kwargs": {"url": url, "token": TOKEN, **settings}})
        manager = module.FPORewardManager(
            config=config, tokenizer=tokenizer, compute_score=None, reward_router_address=None
        )
        return await manager.run_single([item])

    for settings, other in (({}, body["references"][0]), ({"reference": "better"}, "Yes.")):
        found = asyncio.run(run(**settings))
        wanted = reward.score([own["raw_prompt"]], body["completions"], reference=[other])
        assert found["reward_score"] == pytest.approx(float(wanted.effective), rel=1e-5)
        assert found["reward_extra_info"]["fpo_penalty"] == pytest.approx(float(wanted.penalty), rel=1e-5)
    with pytest.raises(RunError, match=r"wanted verl 0\.9 beside it"):
        verl.FPORewardManager({}, None)


def samples_of(body):
    """slime's utils/types.py: what a `Sample` has that its rewards read."""
    rows = zip(body["prompts"], body["completions"], body["references"], strict=True)
    return [SimpleNamespace(prompt=p, response=c + "<|im_end|>", label=r, metadata={}) for p, c, r in rows]


def test_slime(url, reward):
    """slime, rollout/rm_hub/__init__.py: `remote_rm`, `async_rm` and `batched_async_rm`, as of September 2026."""
    body, args = sample("slime", 3), SimpleNamespace(rm_url=f"{url}/slime", custom_rm_path="…")
    samples = samples_of(body)
    sent = [{"prompt": one.prompt, "response": one.response, "label": one.label} for one in samples]
    answers = [asked(url, "/slime", TOKEN, **one).json() for one in sent]
    assert answers == worth(reward, body)
    for one in samples:
        one.response = one.response.removesuffix("<|im_end|>")

    async def singly():
        return await asyncio.gather(*(slime.custom_rm(args, one) for one in samples))

    assert asyncio.run(singly()) == worth(reward, body)
    assert asyncio.run(slime.custom_rm(args, samples)) == worth(reward, body)
    group = dict(body, references="group")
    wanted = FPOClient().score(**group)["effective"]
    assert asyncio.run(slime.group_rm(SimpleNamespace(rm_url=None), samples)) == pytest.approx(wanted, rel=1e-5)
    samples[1].label = None
    with pytest.raises(RunError, match="label 1: wanted the text"):
        asyncio.run(slime.custom_rm(args, samples))
    with pytest.raises(RunError, match="--group-rm hands them over"):
        asyncio.run(slime.group_rm(args, samples[0]))


def test_skyrl(url, reward):
    """SkyRL, skyrl_gym/envs/base_text_env.py and registration.py: made with (env_config, extras), `init`, `step`."""
    skyrl.client.cache_clear()
    asked_for = [{"role": "user", "content": "Name a bird."}]
    environment = skyrl.FPOEnvironment(None, {"reward_spec": {"method": "rule", "ground_truth": "A bird."}})
    assert environment.init(asked_for) == (asked_for, {})
    answer = environment.step("A wren, I should say.")
    said = [{"role": "assistant", "content": "A wren, I should say."}]
    direct = reward.score([asked_for], [said], reference=["A bird."])
    assert answer["reward"] == pytest.approx(float(direct.effective[0]), rel=1e-5)
    assert (answer["observations"], answer["done"]) == ([], True)
    assert answer["metadata"]["fpo_penalty"] == pytest.approx(float(direct.penalty[0]), rel=1e-5)
    with pytest.raises(RunError, match=r"reward_spec\.ground_truth: wanted the text to compare replies with, got 3"):
        skyrl.FPOEnvironment(None, {"reward_spec": {"ground_truth": 3}})
