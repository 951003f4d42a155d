"""Asking an OpenAI-compatible endpoint: no faster than allowed, again after a failure, every failure counted."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from fpo_train.config import JudgeConfig, OracleConfig
from fpo_train.errors import RunError

T = TypeVar("T")
FIRST_WAIT = 1.0  # seconds before the first repetition; each later wait is twice the one before
LONGEST_WAIT = 600.0  # seconds; an endpoint that wants to be left alone for longer has failed this question
LONGEST_ANSWER = 1 << 20  # bytes
SHOWN = 120  # characters of an answer that a message quotes
FIRST_ANSWERS = 8  # where so many come before one that can be read, the judge does not know the form
COMPLETION = "a chat completion, its text under choices[0].message.content"
# What a question put once more may mend; other statuses say that the question itself is wrong.
PASSING = {408, 409, 425, 429, *range(500, 600)}
REFUSED = {
    401: "refuses the key",
    403: "does not let this key use it",
    404: "knows no such address or model",
}


@dataclass(frozen=True)
class Time:
    """Monotonic seconds and sleeping; tests bring their own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class RequestError(Exception):
    """A request that brought no answer; `cause` is what it is counted under."""

    def __init__(self, cause: str, again: bool = True, wait: float = 0.0) -> None:
        super().__init__(cause)
        self.cause, self.again, self.wait = cause, again, wait


class UnreadableError(RequestError):
    """An answer that came and says nothing in the form that is `wanted`."""

    def __init__(self, cause: str, answer: str, wanted: str) -> None:
        super().__init__(cause)
        self.answer, self.wanted = answer, wanted


class Bucket:
    """A token bucket of one: requests begin at least 60 / per_minute seconds apart, whichever thread makes them."""

    def __init__(self, per_minute: float, time: Time) -> None:
        self._gap = 60 / per_minute
        self._time = time
        self._next = time.now()
        self._lock = threading.Lock()

    def take(self) -> None:
        """Wait for this request's turn."""
        with self._lock:
            now = self._time.now()
            turn = max(now, self._next)
            self._next = turn + self._gap
        if turn > now:
            self._time.sleep(turn - now)

    def hold(self, seconds: float) -> None:
        """Let nobody begin for so long."""
        with self._lock:
            self._next = max(self._next, self._time.now() + seconds)


class Endpoint:
    """`ask` puts one question to /chat/completions; threads may share it.

    `counts` holds requests, retried (requests that repeat a failed one) and, by cause, the requests that failed:
    http_<status>, timeout, connect, disconnect, network, too_long, wrong_json, wrong_answer.

    The first answer that cannot be read is told on stderr, once. One that comes now and then is a request that failed;
    where the first `FIRST_ANSWERS` answers are all of that kind, there is no use in asking on.

    Attributes:
        unread: the first answer that could not be read, shortened, and the form wanted; empty while there is none.
    """

    def __init__(
        self,
        config: OracleConfig | JudgeConfig,
        counts: Counter[str],
        seed: int,
        share: int,
        time: Time,
        section: str = "oracle",
    ) -> None:
        """`share`: how many processes ask the endpoint; each takes its part of the rate. `section`: the config's name.

        Raises:
            RunError: a url that is none, or a key that no header can carry.
        """
        self._config = config
        self._section = section
        self._counts = counts
        self.unread = ""
        self._understood, self._unreadable = False, 0
        self._lock = threading.Lock()
        self._seed = seed
        self._time = time
        self._bucket = Bucket(config.requests_per_minute / share, time)
        self._url = config.url.rstrip("/") + "/chat/completions"
        parts = urlsplit(config.url)
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        if parts.username or parts.password or parts.query or parts.fragment:  # it is logged and kept in config.yaml
            raise RunError(f"{section}.url: wanted {shown} alone; a key belongs into {config.key_variable}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RunError(f"{section}.url: wanted an address such as http://localhost:8000/v1, got {config.url}")
        limits = httpx.Limits(max_connections=config.concurrency)
        self._client = httpx.Client(
            headers=_headers(config.key_variable, section), timeout=config.timeout, limits=limits
        )

    def ask(self, messages: list[dict[str, str]], read: Callable[[str], T]) -> T | None:
        """`read` of the answer's text, or None after `retries` repetitions in vain.

        `read` raises `RequestError` on a text it cannot use. Waits double from try to try, times a random 0.5 to 1.5
        that depends on the seed and the question alone, and are never shorter than the endpoint's Retry-After.

        Raises:
            RunError: the endpoint refuses the key, the address or the model, or not one of its first answers can be
                read: no repetition mends that.
        """
        jitter = random.Random(f"{self._seed} {json.dumps(messages)}")
        for repetition in range(self._config.retries + 1):
            if self._hopeless:  # another thread has said so while this one waited
                return None
            self._bucket.take()
            self._count("requests", *["retried"] * (repetition > 0))
            try:
                found = read(self._request(messages))
                self._understood = True
                return found
            except RequestError as failure:
                self._count(failure.cause)
                if isinstance(failure, UnreadableError):
                    self._tell(failure)
                if not failure.again or failure.wait > LONGEST_WAIT or repetition == self._config.retries:
                    return None
                if failure.wait:
                    self._bucket.hold(failure.wait)  # for all: it is the endpoint that wants rest, not this question
                self._time.sleep(FIRST_WAIT * 2**repetition * (0.5 + jitter.random()))
        return None

    @property
    def _hopeless(self) -> bool:
        return not self._understood and self._unreadable >= FIRST_ANSWERS

    def _tell(self, failure: UnreadableError) -> None:
        """Quote the first answer that cannot be read; give up where none of the first ones can."""
        with self._lock:
            self._unreadable += 1
            first = not self.unread
            self.unread = self.unread or self._quoted(failure)
        judge = f"{self._section}.model {self._config.model}"
        if first:
            print(f"{judge}: an answer that cannot be read: {self.unread}", file=sys.stderr, flush=True)
        if self._hopeless:
            told = f"not one of its first {FIRST_ANSWERS} answers can be read"
            raise RunError(f"{judge}: {told}; the first: {self.unread}")

    def _quoted(self, failure: UnreadableError) -> str:
        words = " ".join(failure.answer.split())
        if key := self._client.headers.get("Authorization", "").removeprefix("Bearer "):
            words = words.replace(key, "…")
        return f"got {words[:SHOWN]!r}{' …' * (len(words) > SHOWN)}, wanted {failure.wanted}"

    def _count(self, *names: str) -> None:
        with self._lock:
            self._counts.update(names)

    def _request(self, messages: list[dict[str, str]]) -> str:
        body = {"model": self._config.model, "temperature": 0, "messages": messages}
        deadline = self._time.now() + self._config.timeout
        try:
            with self._client.stream("POST", self._url, json=body) as response:
                self._check(response)
                return _content(self._read(response, deadline))
        except httpx.TimeoutException as error:
            raise RequestError("timeout") from error
        except httpx.ConnectError as error:
            raise RequestError("connect") from error
        except (httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError) as error:
            raise RequestError("disconnect") from error
        except httpx.HTTPError as error:
            raise RequestError("network") from error

    def _check(self, response: httpx.Response) -> None:
        status = response.status_code
        if status in REFUSED:
            raise RunError(
                f"{self._section}.url: {self._url} answered {status}: it {REFUSED[status]} "
                f"({self._section}.model {self._config.model}, key from {self._config.key_variable})"
            )
        if not 200 <= status < 300:
            wait = _retry_after(response.headers.get("Retry-After", ""))
            raise RequestError(f"http_{status}", again=status in PASSING, wait=wait)

    def _read(self, response: httpx.Response, deadline: float) -> bytes:
        """The body; httpx bounds each piece of it, the deadline bounds the whole."""
        body = b""
        for piece in response.iter_bytes():
            body += piece
            if self._time.now() > deadline:
                raise RequestError("timeout")
            if len(body) > LONGEST_ANSWER:
                raise RequestError("too_long")
        return body


def _content(body: bytes) -> str:
    """The text of the first choice."""
    told = body.decode("utf-8", errors="replace")
    try:
        answer: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UnreadableError("wrong_json", told, COMPLETION) from error
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise UnreadableError("wrong_answer", told, COMPLETION) from error
    if not isinstance(text, str):
        raise UnreadableError("wrong_answer", told, COMPLETION)
    return text


def _headers(key_variable: str, section: str) -> dict[str, str]:
    key = os.environ.get(key_variable, "").strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):  # httpx would refuse it too, and print it
        raise RunError(f"{section}.key_variable: the key in {key_variable} holds characters that no header can carry")
    return {"Authorization": f"Bearer {key}"}


def _retry_after(header: str) -> float:
    """Seconds, from a number of seconds or a date; 0 where there is neither."""
    with suppress(ValueError):
        return max(float(header), 0.0)
    with suppress(ValueError, TypeError):
        return max(parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    return 0.0
