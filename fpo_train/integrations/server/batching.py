"""One thread that owns the model: requests wait in a queue, and those that are scored are scored together.

What is scored together is what would get the same numbers alone (`Owner.joins`): otherwise, and for training calls and
updates, each request has the model to itself. All are served in the order in which they came, so that a request behind
an update meets the updated model.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from fpo_train.config import BatchingConfig

from .metrics import Metrics
from .owner import Failed, Owner, Seen, Texts

log = logging.getLogger("fpo_train.serve")
PAUSE = 60.0  # seconds until an update that the server makes by itself, and that has failed, is tried again
Kind = Literal["score", "rewards", "watch", "update"]


class Full(Exception):  # noqa: N818 (named for what it is)
    """As many requests wait as may."""


class Stopped(Exception):  # noqa: N818
    """The model takes no more requests."""


@dataclass(frozen=True)
class Job:
    """What is to be done, and where the answer goes."""

    kind: Kind
    texts: Texts
    answer: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Worker:
    """The thread and its queue.

    Args:
        saved: called in the thread after each update, before it is answered.
    """

    def __init__(
        self, owner: Owner, config: BatchingConfig, metrics: Metrics, saved: Callable[[], None] = lambda: None
    ) -> None:
        self.owner = owner
        self._config, self._metrics, self._saved = config, metrics, saved
        self._queue: deque[Job] = deque()
        self._more = threading.Condition()
        self._stopped = self._said = False
        self._running, self._not_before = 0, 0.0
        self._thread = threading.Thread(target=self._run, name="fpo-model", daemon=True)

    def start(self) -> None:
        """Begin to take requests."""
        self._thread.start()

    def stop(self, patience: float) -> bool:
        """Refuse what waits, finish what is under way; False where that took longer than `patience` seconds."""
        with self._more:
            self._stopped = True
            waiting, self._queue = list(self._queue), deque()
            self._more.notify_all()
        for job in waiting:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(Stopped("the server stops"))
        self._thread.join(patience)
        return not self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def busy(self) -> bool:
        """Whether any request waits or is being answered."""
        return bool(self._queue or self._running)

    def submit(self, kind: Kind, texts: Texts) -> Future[Any]:
        """Put a request into the queue.

        Raises:
            Full, Stopped: it cannot be taken.
        """
        job = Job(kind, texts)
        with self._more:
            if self._stopped:
                raise Stopped("the server stops")
            if len(self._queue) >= self._config.queue:  # for some nobody waits any more
                self._queue = deque(one for one in self._queue if not one.answer.cancelled())
            if len(self._queue) >= self._config.queue:
                raise Full(f"{len(self._queue)} requests wait already")
            self._queue.append(job)
            self._more.notify()
        return job.answer

    def _run(self) -> None:
        while jobs := self._next():
            try:
                self._serve([job for job in jobs if job.answer.set_running_or_notify_cancel()])
            finally:
                self._running = 0

    def _next(self) -> list[Job]:
        """What is done together next; nothing once there will be nothing."""
        with self._more:
            while not self._queue and not self._stopped:
                self._more.wait()
            if not self._queue:
                return []
            first = self._queue[0]
            together = first.kind == "score" and self._config.texts > 1 and self.owner.joins
            latest = first.arrived + self._config.wait_ms / 1000
            while together and not self._stopped and self._fitting() == len(self._queue):
                if sum(len(job.texts) for job in self._queue) >= self._config.texts:
                    break
                if (left := latest - time.monotonic()) <= 0:
                    break
                self._more.wait(left)
            count = self._fitting() if together and self._queue else min(1, len(self._queue))
            jobs = [self._queue.popleft() for _ in range(count)]
            self._running = len(jobs)
            return jobs

    def _fitting(self) -> int:
        """How many requests at the queue's head can be scored in one pass; at least the first."""
        names, texts = set(self._queue[0].texts.columns), 0
        for count, job in enumerate(self._queue):
            texts += len(job.texts)
            alike = job.kind == "score" and set(job.texts.columns) == names
            if count and (texts > self._config.texts or not alike):
                return count
        return len(self._queue)

    def _serve(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        try:
            if jobs[0].kind == "score":
                answers: list[Any] = self._scored(jobs)
            elif jobs[0].kind == "rewards":
                answers = [self.owner.rewards(jobs[0].texts)]
            elif isinstance(jobs[0].texts, Seen):
                answers = [self._watched(jobs[0].texts)]
            else:
                answers = [self._update()]
        except BaseException as error:  # whatever an oracle raises, sys.exit() too: the thread must live on
            if len(jobs) > 1:  # one of them is at fault, and the others are not to suffer for it
                for job in jobs:
                    self._serve([job])
                return
            named = error if isinstance(error, Exception) else Failed(f"it raised {type(error).__name__}")
            jobs[0].answer.set_exception(named)
            return
        self._metrics.passed(len(jobs), sum(len(job.texts) for job in jobs))
        for job, answer in zip(jobs, answers, strict=True):
            job.answer.set_result(answer)
        if self.owner.due and time.monotonic() >= self._not_before:
            try:
                self._update()
            except BaseException:
                self._not_before = time.monotonic() + PAUSE
                log.exception("the update that was due has failed; it is tried again after %g seconds", PAUSE)

    def _scored(self, jobs: list[Job]) -> list[Any]:
        if not self._said and not self.owner.joins:
            self._said = True
            log.warning(
                "requests are scored one by one: the penalty of a completion depends on the others of its request, "
                "as long as γ has no scale of its own (gamma_units reward_std before the first training call), and "
                "with the penalties tracin and exact"
            )
        return self.owner.score([job.texts for job in jobs])

    def _watched(self, seen: Seen) -> dict[str, Any]:
        row = self.owner.watch(seen)
        if warning := row.get("warning"):
            self._metrics.warned()
            log.warning("%s", warning)
        return row

    def _update(self) -> dict[str, Any]:
        loss = self.owner.update()
        self._metrics.updated()
        try:
            self._saved()
        except OSError:  # the model is trained all the same, and a second training would be wrong
            log.exception("the state could not be written")
        log.info("update %d: loss %s, %d pairs kept", self.owner.updates, loss, self.owner.reward.pairs)
        return {"loss": loss, "pairs": self.owner.reward.pairs, "updates": self.owner.updates}
