"""What a server refuses, and that it lives on: malformed, oversized, unauthorised, too much, too late."""

import asyncio
import concurrent.futures
import json
import socket
import threading
import time

import httpx
import pytest

from fpo_train.cli import main
from fpo_train.config import BatchingConfig, LimitsConfig, ServeConfig
from fpo_train.integrations.server import limits
from fpo_train.integrations.server.metrics import Metrics

from .serving import ORACLE, SLOW, asked, sample, scorer, serving

TOKEN = "s3cret-token"
LIMITS = LimitsConfig(body="20KB", texts=4, characters=2000, timeout=2)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return scorer(tiny, tmp_path_factory.mktemp("scorer"))


@pytest.fixture(scope="module")
def bound(folder):
    """A server with a token and small limits."""
    config = ServeConfig(reward_model=folder, gamma_units="raw", limits=LIMITS)
    with serving(config, TOKEN) as (url, _):
        yield url


def lives(url, token=TOKEN):
    return asked(url, token=token, **sample("alive")).status_code == 200


def post(url, content, route="/score", **headers):
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"} | headers
    return httpx.post(url + route, content=content, headers=headers, timeout=30)


BODY = json.dumps(sample("x"))
REFUSED = {
    "no JSON": (b'{"prompts": [', 400, "the body is no JSON"),
    "not even text": (b"\xff\xfe\x00", 400, ""),
    "nothing": (b"", 422, "body"),
    "deeper than a parser goes": (b"[" * 15_000, 400, ""),
    "a list": (b"[]", 422, "body"),
    "misspelt": (json.dumps({**sample("x"), "refrences": []}), 422, "refrences"),
    "numbers for texts": (json.dumps({**sample("x"), "prompts": [1, 2]}), 422, "prompts.0"),
    "no prompt": (json.dumps({"prompts": [], "completions": [], "references": []}), 422, "prompts"),
    "fewer completions": (json.dumps({**sample("x"), "completions": ["a"]}), 422, "wanted one for each of 2 prompts"),
    "fewer references": (json.dumps({**sample("x"), "references": ["a"]}), 422, "references: wanted one for each"),
    "no references": (
        json.dumps({**sample("x"), "references": None}),
        422,
        'wanted a text for each completion, or "gr',
    ),
    "a short column": (json.dumps({**sample("x"), "columns": {"a": [1]}}), 422, "holds 1 values for 2"),
    "a column of ours": (json.dumps({**sample("x"), "columns": {"log_extra": [1, 2]}}), 422, "a name of its own"),
    "too many": (json.dumps(sample("x", 5)), 422, "at most 4 completions"),
    "too long": (
        json.dumps({**sample("x"), "completions": ["a", "b" * 2001]}),
        422,
        "completions.1: wanted at most 2000",
    ),
    "half a surrogate": (json.dumps({**sample("x"), "completions": ["a", "\ud800"]}), 422, "no Unicode text"),
    "another role": (json.dumps({**sample("x"), "prompts": [[{"role": "tool", "content": "x"}]] * 2}), 422, "role"),
    "too large": (b" " * 30_000 + BODY.encode(), 413, "larger than 20000 bytes"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused_and_the_server_lives_on(bound, what):
    content, status, told = REFUSED[what]
    answer = post(bound, content)
    assert answer.status_code == status, answer.text
    assert told in answer.json()["detail"]
    assert "Traceback" not in answer.text
    assert lives(bound)


def test_a_body_is_counted_while_it_is_read(bound):
    sent = []

    def endless():
        for _ in range(100):
            sent.append(1)
            yield b" " * 10_000
            time.sleep(0.01)

    answer = post(bound, endless())
    assert answer.status_code == 413
    assert len(sent) < 90
    assert lives(bound)


def test_a_body_that_does_not_come_is_not_waited_for_long(bound):
    host, port = bound.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as line:
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in line.recv(1000)
    with socket.create_connection((host, int(port))) as line:  # and one that hangs up
        line.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    assert lives(bound)


def test_what_all_bodies_hold_together_is_bounded_and_given_back():
    async def app(scope, receive, send):
        await asyncio.sleep(0.05)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def run():
        gate = limits.Gate(app, "", (), 100, 5.0, Metrics(), ("/score",), lambda: False)
        for _ in range(2):
            answers = []
            await asyncio.gather(*(ask_once(gate, answers) for _ in range(limits.AT_ONCE + 3)))
            assert sorted(one for one in answers if one) == [200] * limits.AT_ONCE + [503] * 3
            assert gate._held == 0

    async def ask_once(gate, answers):
        async def receive():
            return {"type": "http.request", "body": b" " * 100}

        async def send(message):
            answers.append(message.get("status"))

        await gate({"type": "http", "method": "POST", "path": "/score", "headers": []}, receive, send)

    asyncio.run(run())


def test_another_content_type_is_refused(bound):
    assert post(bound, BODY, **{"Content-Type": "text/plain"}).status_code == 415
    assert post(bound, BODY, **{"Content-Type": "application/json; charset=utf-8"}).status_code == 200


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", f"Bearer {TOKEN}x", f"Token {TOKEN}", TOKEN, "Bearer", "Basic !!", "Bearer \xe9"]
)
@pytest.mark.parametrize("route", ["/score", "/metrics", "/openapi.json", "/nowhere"])
def test_no_route_but_health_is_served_without_the_token(bound, route, given):
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    method = "POST" if route == "/score" else "GET"
    answer = httpx.request(method, bound + route, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in answer.text
    assert httpx.get(f"{bound}/health").json() == {"status": "ready", "queue": 0}


def test_without_a_token_the_server_must_be_called_by_its_name(folder):
    with serving(ServeConfig(reward_model=folder, gamma_units="raw")) as (url, _):
        for host, status in (
            ("localhost:1", 200),
            ("[::1]:8008", 200),
            ("evil.example", 400),
            ("evil.example:80", 400),
        ):
            answer = httpx.post(f"{url}/score", json=sample("x"), headers={"Host": host})
            assert answer.status_code == status, answer.text


def test_an_address_can_bring_the_token(bound):
    answer = httpx.post(bound.replace("http://", f"http://fpo:{TOKEN}@") + "/score", json=sample("x"))
    assert answer.status_code == 200


def test_a_full_queue_and_a_late_answer_are_told(folder):
    config = ServeConfig(
        reward_model=folder,
        penalty="relaxed",
        gamma_units="raw",
        oracle=ORACLE,
        limits=LimitsConfig(timeout=1),
        batching=BatchingConfig(texts=1, queue=2),
    )
    slow = sample("slow")
    slow["completions"][0] = SLOW
    with serving(config) as (url, app), concurrent.futures.ThreadPoolExecutor(6) as pool:
        late = pool.submit(asked, url, **slow)
        worker = app.state.service.worker
        while not worker.busy or worker.waiting:
            time.sleep(0.01)
        waiting = [pool.submit(asked, url, **sample(f"{n}")) for n in range(2)]
        while worker.waiting < 2:
            time.sleep(0.01)
        full = asked(url, **sample("one more"))
        assert (full.status_code, full.headers["retry-after"]) == (503, "1")
        assert "2 requests wait" in full.json()["detail"]
        assert late.result().status_code == 504
        assert {one.result().status_code for one in waiting} <= {200, 504}
        assert lives(url, "")
        assert worker.waiting == 0


def test_many_at_once_that_are_wrong_in_all_ways(bound):
    contents = [content for content, *_ in REFUSED.values()] * 3
    wrong = []

    def ask(content):
        answer = post(bound, content)
        if answer.status_code not in (400, 413, 422):
            wrong.append(answer)

    threads = [threading.Thread(target=ask, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert lives(bound)


def told(capsys, *words):
    code = main(["serve", *words])
    return code, capsys.readouterr().err


def test_other_machines_need_a_token(capsys, monkeypatch, tmp_path, folder):
    monkeypatch.delenv("FPO_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "192.168.0.1", "somewhere.example"):
        code, error = told(capsys, "--host", host, "--reward_model", folder)
        assert code == 2
        assert f"host: {host}: other machines reach it" in error
    (tmp_path / "token").write_text("\n")
    assert told(capsys, "--token_file", str(tmp_path / "token"))[0] == 2
    assert told(capsys, "--token_file", str(tmp_path / "absent"))[0] == 2
    assert ServeConfig(host="::1").token() == ServeConfig(host="localhost").token() == ""
    (tmp_path / "token").write_text("abc\n")
    assert ServeConfig(host="0.0.0.0", token_file=str(tmp_path / "token")).token() == "abc"
    monkeypatch.setenv("FPO_TOKEN", "of-the-variable")
    assert ServeConfig(host="0.0.0.0").token() == "of-the-variable"


def test_what_cannot_be_served_is_said(capsys, monkeypatch, folder):
    monkeypatch.delenv("FPO_TOKEN", raising=False)
    assert told(capsys)[0] == 1
    assert told(capsys, "--port", "70000")[0] == 2
    assert told(capsys, "--learning.update_every", "8")[0] == 2
    assert told(capsys, "--limits.body", "much")[0] == 2
    code, error = told(capsys, "--port", "0", "--reward_model", folder, "--oracle", "json:no_such")
    assert code == 1
    assert "no function 'no_such'" in error
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, error = told(capsys, "--port", str(taken.getsockname()[1]), "--reward_model", folder)
    assert code == 1
    assert f"port {taken}"[:4] in error
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, error = told(capsys, "--port", "0", "--reward_model", folder)
    assert code == 1
    assert "pip install fastapi" in error
