"""A client of `fpo-train serve`, light enough for every worker of a trainer: it imports no torch."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from fpo_train.errors import RunError

URL, TOKEN = "FPO_URL", "FPO_TOKEN"
GROUP = "group"
TRIES = 6  # of a request that was not taken, over about half a minute
LONGEST = 10.0  # seconds between two of them


class FPOClient:
    """Asks a reward server; as a whole it is a reward function of TRL, and travels to other processes by pickle.

        trainer = AsyncGRPOTrainer(…, reward_funcs=FPOClient("http://127.0.0.1:8008"))

    A request that the server did not take (503, or nobody listens yet) is put again, a few times; whatever else goes
    wrong is raised, since a training call that is made twice counts twice.

    Args:
        url: the server's; None: that of the environment variable FPO_URL. token: its token; None: FPO_TOKEN's, if any.
        reference: which column of a trainer's data set completions are compared with; "group": another completion of
            the same prompt.
        columns: more columns that the server's oracle reads. timeout: seconds an answer may take.

    Raises:
        RunError: no address.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        reference: str = "reference",
        columns: Sequence[str] = (),
        timeout: float = 180.0,
    ) -> None:
        self.url = (url or os.environ.get(URL, "")).rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise RunError(f"url: wanted a reward server's, as http://127.0.0.1:8008, or {URL} set; got {self.url!r}")
        self._token = os.environ.get(TOKEN, "") if token is None else token
        self.reference, self.columns, self.timeout = reference, tuple(columns), timeout
        self.__name__ = "fpo"  # by which trainers log a function
        self._open()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """r(z) − γ · penalty(z) of each completion, None where one cannot be scored; a training call.

        Raises:
            RunError: a column is not there, or there is no answer.
        """
        references: Any = GROUP
        if self.reference != GROUP:
            references = list(_column(columns, self.reference))
        more = {name: list(_column(columns, name)) for name in self.columns}
        return self.rewards(prompts, completions, references, more)["effective"]

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        references: Sequence[str | None] | str | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        collect: bool = False,
    ) -> dict[str, list[float | None]]:
        """`rewards`, `penalties` and `effective`, a number a completion; nothing is counted.

        Args:
            prompts, completions: texts, or lists of messages. references: texts, one a completion, "group", or None
                where the server has a rule of its own. collect: keep them for the server's next update.

        Raises:
            RunError: there is no answer; the message has the server's reason.
        """
        return self._post("/score", _batch(prompts, completions, references, columns) | {"collect": collect})

    def rewards(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        references: Sequence[str | None] | str | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> dict[str, list[float | None]]:
        """As `score`, in training: γ's scale moves, and each prompt's best completion becomes a labelled pair."""
        return self._post("/rewards", _batch(prompts, completions, references, columns))

    def monitor(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        rewards: Sequence[float | None],
        utilities: Sequence[float | None] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Have a step of a run watched that uses no penalty: `iteration`, `reward`, `oracle_utility`, `warning`, ….

        Args:
            rewards: the trainer's own. utilities: the truth; None: the server's oracle is asked. more: `references`,
                `columns` and `steering` of the route.
        """
        body = _batch(prompts, completions, None, None) | {"rewards": list(rewards)} | more
        return self._post("/monitor", body | ({} if utilities is None else {"utilities": list(utilities)}))

    def update(self) -> dict[str, Any]:
        """Train the server's reward model: `loss`, `pairs`, `updates`."""
        return self._post("/update", None)

    def openrlhf(self, query: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
        """`rewards`, `scores` and `extra_logs` of prompts and replies in one text each; kept for the next update."""
        return self._post("/openrlhf", {"query": list(query), "prompts": list(prompts), "labels": list(labels)})

    async def ascore(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        references: Sequence[str | None] | str | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        collect: bool = False,
    ) -> dict[str, list[float | None]]:
        """`score`, awaited."""
        body = _batch(prompts, completions, references, columns) | {"collect": collect}
        return await self._apost("/score", body)

    async def arewards(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        references: Sequence[str | None] | str | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> dict[str, list[float | None]]:
        """`rewards`, awaited."""
        return await self._apost("/rewards", _batch(prompts, completions, references, columns))

    async def aupdate(self) -> dict[str, Any]:
        """`update`, awaited."""
        return await self._apost("/update", None)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_held")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __repr__(self) -> str:
        return f"FPOClient({self.url!r})"  # without its token

    def _open(self) -> None:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        self._held_options: dict[str, Any] = {"base_url": self.url, "headers": headers, "timeout": self.timeout}
        self._held = httpx.Client(**self._held_options)
        self._held_loops: dict[int, tuple[Any, httpx.AsyncClient]] = {}

    def _looped(self) -> httpx.AsyncClient:
        """The connections of the running loop; they cannot be shared with another."""
        loop = asyncio.get_running_loop()
        known = self._held_loops.get(id(loop))
        if known is None or known[0] is not loop:
            self._held_loops = {key: one for key, one in self._held_loops.items() if not one[0].is_closed()}
            unbounded = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            known = self._held_loops[id(loop)] = (loop, httpx.AsyncClient(limits=unbounded, **self._held_options))
        return known[1]

    def _post(self, route: str, body: Any) -> Any:
        for wait in self._waits():
            try:
                answer: Any = self._held.post(route, json=body)
            except httpx.HTTPError as error:
                answer = error
            if _taken(answer) or wait is None:
                return self._read(route, answer)
            time.sleep(_told(answer, wait))
        raise AssertionError("the last wait is None")

    async def _apost(self, route: str, body: Any) -> Any:
        for wait in self._waits():
            try:
                answer: Any = await self._looped().post(route, json=body)
            except httpx.HTTPError as error:
                answer = error
            if _taken(answer) or wait is None:
                return self._read(route, answer)
            await asyncio.sleep(_told(answer, wait))
        raise AssertionError("the last wait is None")

    def _waits(self) -> Iterator[float | None]:
        yield from (min(0.5 * 2**n, LONGEST) for n in range(TRIES - 1))
        yield None

    def _read(self, route: str, answer: Any) -> Any:
        """An answer's contents.

        Raises:
            RunError: it is an error.
        """
        if isinstance(answer, Exception):
            raise RunError(f"{self.url}{route}: {type(answer).__name__}: {answer}") from answer
        try:
            found = answer.json()
        except ValueError:
            found = None
        if answer.status_code != 200:
            detail = found.get("detail") if isinstance(found, dict) else None
            raise RunError(f"{self.url}{route} answered {answer.status_code}: {detail or answer.text[:200]}")
        if not isinstance(found, dict):
            raise RunError(f"{self.url}{route}: wanted a reward server's answer, got {answer.text[:80]!r}")
        return found


def _taken(answer: Any) -> bool:
    """Whether a request may have had an effect, or cannot have one if put again."""
    if isinstance(answer, Exception):
        return not isinstance(answer, httpx.ConnectError)
    return answer.status_code != 503


def _told(answer: Any, wait: float) -> float:
    """Seconds to wait, by the server's word where it has one."""
    said = "" if isinstance(answer, Exception) else answer.headers.get("retry-after", "")
    return max(wait, min(float(said), LONGEST)) if said.isdigit() else wait


def _batch(
    prompts: Sequence[Any], completions: Sequence[Any], references: Any, columns: Mapping[str, Sequence[Any]] | None
) -> dict[str, Any]:
    body: dict[str, Any] = {"prompts": list(prompts), "completions": list(completions)}
    if references is not None:
        body["references"] = references if isinstance(references, str) else list(references)
    if columns:
        body["columns"] = {name: list(values) for name, values in columns.items()}
    return body


def _column(columns: Mapping[str, Any], name: str) -> Sequence[Any]:
    if name not in columns:
        there = ", ".join(sorted(key for key, value in columns.items() if isinstance(value, list))) or "none"
        told = f'FPOClient(…, reference="{GROUP}") compares with another completion of the prompt'
        raise RunError(f"{name}: the data set has no such column; those passed on: {there}. {told}")
    return columns[name]
