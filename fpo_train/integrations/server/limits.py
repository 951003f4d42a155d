"""What stands before the routes: tokens, sizes, time to read, draining; and what every answer is counted by."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from .metrics import Metrics

log = logging.getLogger("fpo_train.serve")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
OPEN = "/health"  # the one route that asks for no token, for those who only look whether the server lives
AT_ONCE = 64  # largest bodies that may be held at once, in the memory of the server, by all requests together
SWALLOWED = ("/openrlhf", "/slime")  # whose callers try again, and then go on without a reward


class Refused(Exception):  # noqa: N818 (named for what has happened)
    """A request that is not answered, and why."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.headers = {key.replace("_", "-"): value for key, value in headers.items()}


class Answer:
    """Passes an answer on, and notes its status and what an error says; `ended` is called before its end is sent."""

    def __init__(self, send: Send, ended: Callable[[Answer], None]) -> None:
        self._send, self._ended, self.status, self.said = send, ended, 0, b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif self.status >= 400:
            self.said += message.get("body", b"")[: 1000 - len(self.said)]
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._ended(self)
        await self._send(message)

    async def refuse(self, refused: Refused) -> None:
        """Answer with an error; what is left of the body is not read, so that the connection ends."""
        body = json.dumps({"detail": refused.detail}).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
        coded = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
        await self({"type": "http.response.start", "status": refused.status, "headers": coded})
        await self({"type": "http.response.body", "body": body})


class Gate:
    """ASGI around the application.

    Args:
        token: that requests must bring as a bearer, or as a basic password; empty: none.
        hosts: by one of which a request must call the server; none: by any. Without a token, a page in a browser on
            this machine could else have its own name point here, and ask.
        body: bytes that one may have. seconds: in which it must have arrived.
        routes: that are counted by their name. draining: whether new work is refused.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        token: str,
        hosts: Collection[str],
        body: int,
        seconds: float,
        metrics: Metrics,
        routes: Collection[str],
        draining: Callable[[], bool],
    ) -> None:
        self._app, self._token, self._hosts, self._most, self._seconds = app, token.encode(), hosts, body, seconds
        self._metrics, self._routes, self._draining = metrics, routes, draining
        self._held = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        route = scope["path"] if scope["path"] in self._routes else "other"
        answer = Answer(send, lambda one: self._count(route, one, time.perf_counter() - began))
        parts: list[bytes] = []
        try:
            self._look(scope)
            if scope["method"] == "POST":
                await self._body(receive, parts)
                receive = _again(b"".join(parts), receive)
            await self._app(scope, receive, answer)
        except Refused as refused:
            await answer.refuse(refused)
        except Exception:
            log.exception("%s failed", route)
            if not answer.status:
                await answer.refuse(Refused(500, "the server has failed; its log says how"))
        finally:
            self._held -= sum(map(len, parts))

    def _count(self, route: str, answer: Answer, seconds: float) -> None:
        self._metrics.answered(route, answer.status, seconds)
        if answer.status >= 400 and route != OPEN:
            level = logging.ERROR if route in SWALLOWED else logging.WARNING
            log.log(level, "%s answered %d: %s", route, answer.status, answer.said.decode("utf-8", "replace"))

    def _look(self, scope: Message) -> None:
        headers = {key.lower(): value for key, value in scope["headers"]}
        if self._token and scope["path"] != OPEN and not self._known(headers.get(b"authorization", b"")):
            told = "wanted the server's token, as Authorization: Bearer …"
            raise Refused(401, told, WWW_Authenticate="Bearer", Connection="close")
        host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1"))
        if self._hosts and host not in self._hosts:
            told = f"wanted the server's own name, as {next(iter(self._hosts))}, in Host; or a token at its start"
            raise Refused(400, told, Connection="close")
        if scope["method"] != "POST":
            return
        if self._draining():
            raise Refused(503, "the server is draining; it takes no new work", Retry_After="5", Connection="close")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._most:
            raise self._too_large()
        given = length not in (b"", b"0") or b"transfer-encoding" in headers
        if given and headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            raise Refused(415, "wanted a body of the content type application/json", Connection="close")

    def _known(self, authorization: bytes) -> bool:
        scheme, _, given = authorization.partition(b" ")
        given = given.strip()
        if scheme.lower() == b"basic":  # of http://fpo:token@host, for callers who can be told nothing but an address
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(given, self._token)

    async def _body(self, receive: Receive, parts: list[bytes]) -> None:
        """Read a body into `parts`, which count as held from then on."""

        async def whole() -> None:
            size, more = 0, True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the body was cut off", Connection="close")
                parts.append(message.get("body", b""))
                size, more = size + len(parts[-1]), message.get("more_body", False)
                self._held += len(parts[-1])
                if size > self._most:
                    raise self._too_large()
                if self._held > AT_ONCE * self._most:
                    told = "requests under way hold as much as they may; try again later"
                    raise Refused(503, told, Retry_After="1", Connection="close")

        try:
            await asyncio.wait_for(whole(), self._seconds)
        except asyncio.TimeoutError:
            told = f"the body had not arrived after {self._seconds:g} seconds"
            raise Refused(408, told, Connection="close") from None

    def _too_large(self) -> Refused:
        return Refused(413, f"the body is larger than {self._most} bytes", Connection="close")


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that brings a body which was read, and then whatever comes."""
    left = [body]

    async def once_more() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return once_more
