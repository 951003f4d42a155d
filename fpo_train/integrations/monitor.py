"""A watch on runs that use no penalty: is the reward rising while what it stands for falls?"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from fpo_train.config import OracleConfig
from fpo_train.errors import RunError
from fpo_train.processes import Ranks
from fpo_train.report.watch import ORACLE, PROXY, collapse

from .made import CalledOracle
from .reward import FPOReward


class Watch:
    """Reward and true utility, step after step, and the warning of `report.watch.collapse`.

    Args:
        window: steps over which the reward must rise while the utility falls, 4 or more.

    Attributes:
        rows: a step each: `iteration`, `reward`, `oracle_utility`, `steering` where it is known, `warning` where one
            was given.
    """

    def __init__(self, window: int = 10) -> None:
        if window < 4:
            raise RunError(f"window: wanted 4 steps or more, got {window}")
        self.window, self.rows = window, list[dict[str, Any]]()

    def note(self, reward: float, utility: float | None, steering: float | None = None) -> dict[str, Any]:
        """The row of one more step; what is no finite number is left out of the comparison."""
        row: dict[str, Any] = {
            "iteration": self.rows[-1]["iteration"] + 1 if self.rows else 1,
            PROXY: _finite(reward),
            ORACLE: _finite(utility),
        }
        if steering is not None:
            row["steering"] = _finite(steering)
        self.rows.append(row)
        if warning := collapse(self.rows[-self.window :], self.window):
            row["warning"] = warning
        return row


class FPOMonitor(Watch):
    """Calls a reward function for a trainer, hands on what it says, and watches over it.

        monitor = FPOMonitor(my_reward, oracle=score)
        trainer = GRPOTrainer(…, reward_funcs=monitor)

    The reward's mean and the oracle's are compared over a window of calls; a warning is given (`warnings.warn`, and
    `fpo/collapse` 1 in TRL's metrics) where the first rises while the second falls. With `steering`, an FPOReward over
    the reward model, the mean of c(z) · ⟨ḡ, u(z)⟩ over the completions is logged too: training the reward model on
    them changes its mean reward by −η times that, to first order, so that a value below 0 says that it will learn to
    like what it is being shown. Nothing is changed in the run. Calls while a model that `watch` was told of is in eval
    mode are handed on alone.

    Args:
        reward: the trainer's reward function, as TRL calls it. oracle: one more of the same form, the truth as far as
            it can be had. asked: completions of a call that the oracle is asked about, evenly spread; 0: all.
        window: see `Watch`. steering: an FPOReward with an oracle.
    """

    def __init__(
        self,
        reward: Callable[..., Sequence[float | None]],
        oracle: Callable[..., Sequence[float | None]],
        *,
        asked: int = 0,
        window: int = 10,
        steering: FPOReward | None = None,
    ) -> None:
        super().__init__(window)
        if not callable(reward) or inspect.iscoroutinefunction(reward):
            raise RunError(f"reward: wanted a function that is not async, got {reward!r:.80}")
        if steering is not None and not steering.trains:
            raise RunError("steering: the reward has no oracle; wanted FPOReward(…, oracle=…)")
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)
        self._reward, self._oracle = reward, CalledOracle(OracleConfig(), oracle)
        self._asked, self._steering, self._ranks = asked, steering, Ranks()
        self._learning: Callable[[], bool] = lambda: True

    def watch(self, model: Any) -> None:
        """Take note only of what is said while `model`, the trainer's, is in train mode."""
        self._learning = lambda: model.training

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> Sequence[float | None]:
        """What the reward function says; see the class."""
        handed = columns if log_metric is None else columns | {"log_metric": log_metric}
        said = self._reward(prompts=prompts, completions=completions, **handed)
        if not self._learning():
            return said
        count = len(completions)
        some = min(self._asked or count, count)
        places = [n * count // some for n in range(some)]
        listed = {key: value for key, value in columns.items() if isinstance(value, list) and len(value) == count}
        utility = self._oracle.ask(
            [prompts[n] for n in places],
            [completions[n] for n in places],
            {key: [value[n] for n in places] for key, value in listed.items()},
        )
        steering = None
        if self._steering is not None:
            steering = self._mean(self._steering.steering(prompts, completions, **columns).tolist())
        row = self.note(self._mean(said), self._mean(utility), steering)
        if warning := row.get("warning"):
            warnings.warn(f"fpo: {warning}", stacklevel=2)
        if log_metric is not None:
            logged = {"fpo/oracle_utility": row[ORACLE], "fpo/steering": row.get("steering")}
            for name, value in logged.items():
                if value is not None:
                    log_metric(name, value)
            log_metric("fpo/collapse", float("warning" in row))
        return said

    def state_dict(self) -> dict[str, Any]:
        """The steps so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.rows = [dict(row) for row in state["rows"]]

    def _mean(self, values: Sequence[float | None]) -> float:
        """Over the numbers of all processes; NaN without any."""
        return mean_of(self._ranks.gather_objects(list(values)))


def mean_of(values: Sequence[float | None]) -> float:
    """Of the finite numbers; NaN without any."""
    known = [float(one) for one in values if one is not None and math.isfinite(one)]
    return math.fsum(known) / len(known) if known else math.nan


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
