"""The reward and what is kept for its next training, in the hands of one thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fpo_train.config import LearningConfig
from fpo_train.errors import NotFinite, RunError
from fpo_train.integrations.groups import numbers
from fpo_train.integrations.monitor import Watch, mean_of
from fpo_train.integrations.reward import FPOReward

KEPT_STEPS = 1000  # that were watched
REFERENCE = "reference"  # the column in which a server's reward finds what completions are compared with


class Failed(Exception):  # noqa: N818 (named for what has happened)
    """The reward or its oracle could not answer; the message says why, and is fit to be read by a client."""


@dataclass(frozen=True)
class Texts:
    """The completions of one request, each with its reference; None: it cannot be scored."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    references: Sequence[str | None]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    collect: bool = False
    """Keep them for the next update."""

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Seen(Texts):
    """The completions of a watched step, and what was said of them elsewhere."""

    rewards: Sequence[float | None] = ()
    utilities: Sequence[float | None] | None = None
    steering: bool = False


@dataclass(frozen=True)
class Worth:
    """What the completions of one request are worth; None where one cannot be scored."""

    rewards: list[float | None]
    penalties: list[float | None]
    effective: list[float | None]


class Owner:
    """Not for two threads.

    Args:
        reward: with its references in the column `reference`. learning: what is kept between updates.
        window: steps over which a watched reward must rise while its utility falls for a warning.
    """

    def __init__(self, reward: FPOReward, learning: LearningConfig, window: int = 10) -> None:
        self.reward, self.updates = reward, 0
        self.watched = Watch(window)
        self._every = learning.update_every
        self._collected: deque[tuple[Any, Any, str | None, dict[str, Any]]] = deque(maxlen=learning.collect)

    @property
    def joins(self) -> bool:
        """Whether requests that are scored together get what each would get alone."""
        return self.reward.by_row

    @property
    def collected(self) -> int:
        """Completions kept for the next update."""
        return len(self._collected)

    @property
    def due(self) -> bool:
        """Whether enough is kept for the server to update by itself."""
        return 0 < self._every <= len(self._collected)

    def score(self, requests: Sequence[Texts]) -> list[Worth]:
        """What each request's completions are worth; nothing moves but what is kept for the next update.

        Requests of one call must have columns of the same names.
        """
        columns = {key: [v for one in requests for v in one.columns[key]] for key in requests[0].columns}
        columns[REFERENCE] = [other for one in requests for other in one.references]
        prompts = [prompt for one in requests for prompt in one.prompts]
        completions = [completion for one in requests for completion in one.completions]
        with own_fault():
            found = self.reward.score(prompts, completions, **columns)
        lists = [numbers(values) for values in (found.reward, found.penalty, found.effective)]
        worth, first = [], 0
        for one in requests:
            worth.append(Worth(*(values[first : first + len(one)] for values in lists)))
            first += len(one)
            if one.collect and self.reward.trains:
                self._keep(one)
        return worth

    def rewards(self, texts: Texts) -> Worth:
        """As `score`, and a training call: γ's scale moves, and pairs are labelled where there is an oracle."""
        parts: dict[str, list[Any]] = {}
        columns: dict[str, Any] = {**texts.columns, REFERENCE: texts.references}
        with own_fault():
            effective = self.reward(texts.prompts, texts.completions, log_extra=parts.__setitem__, **columns)
        return Worth(parts["fpo/reward"], parts["fpo/penalty"], effective)

    def watch(self, seen: Seen) -> dict[str, Any]:
        """A step of a run that uses no penalty: its row, with a warning where that is due."""
        columns, utility, steering = {**seen.columns, REFERENCE: list(seen.references)}, seen.utilities, None
        asked = list(seen.prompts), list(seen.completions)
        with own_fault():
            if utility is None:
                utility = numbers(self.reward.utility(*asked, **columns))
            if seen.steering:
                steering = mean_of(numbers(self.reward.steering(*asked, **columns)))
        row = self.watched.note(mean_of(seen.rewards), mean_of(utility), steering)
        del self.watched.rows[: -max(KEPT_STEPS, self.watched.window)]
        return row

    def update(self) -> float | None:
        """Train on what was collected, as one training call, and on the pairs of training calls; the mean loss.

        None, and no update, where no pair has come since the last.

        What trainers send one by one is thus grouped by prompt whatever else was under way when it came.
        """
        if self._collected:
            rows = sorted(self._collected, key=repr)
            names = {name for *_, columns in rows for name in columns}
            columns = {name: [columns.get(name) for *_, columns in rows] for name in sorted(names)}
            prompts, completions, references, _ = zip(*rows, strict=True)
            self.rewards(Texts(prompts, completions, references, columns))
            self._collected.clear()
        with own_fault():
            loss = self.reward.update()
        self.updates += loss is not None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The reward's state, and what waits for its next training."""
        rows = [list(row) for row in self._collected]
        return {
            "reward": self.reward.state_dict(),
            "collected": rows,
            "updates": self.updates,
            "watched": self.watched.rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            RunError: the state of another reward, or of something else.
        """
        try:
            reward, rows, updates = state["reward"], [tuple(row) for row in state["collected"]], state["updates"]
        except (KeyError, TypeError) as error:
            raise RunError(f"state: it is none of a server's: {type(error).__name__}: {error}") from error
        self.reward.load_state_dict(reward)
        self._collected.clear()
        self._collected.extend(rows)
        self.updates, self.watched.rows = updates, [dict(row) for row in state.get("watched", [])]

    def _keep(self, texts: Texts) -> None:
        for place, row in enumerate(zip(texts.prompts, texts.completions, texts.references, strict=True)):
            self._collected.append((*row, {key: values[place] for key, values in texts.columns.items()}))


@contextmanager
def own_fault() -> Iterator[None]:
    """Tell what goes wrong with the reward or its oracle from a request that cannot be read.

    Raises:
        Failed: numbers that are not finite, or an oracle that did not answer.
    """
    try:
        yield
    except RunError as error:
        if isinstance(error, NotFinite) or str(error).startswith("oracle"):
            raise Failed(str(error)) from error
        raise
