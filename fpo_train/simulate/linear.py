"""The linear environment: alignment collapse, and what the penalties do about it, in 50 dimensions.

The policy is an action y, the reward model a weight vector w. The oracle likes only the first few axes; the
other axes collapse through: the policy follows w's errors there and the retrained w follows the policy.
Source: Gauthier, Bach, Jordan 2026, arXiv 2605.04266, the linear controlled environment.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fpo_train.simulate import (
    Array,
    Landscape,
    Summary,
    Trajectory,
    check_folder,
    format_table,
    write_results,
)

__all__ = ["PENALTIES", "LinearSettings", "Trajectory", "format_table", "run", "simulate", "utility"]

PENALTIES = ("none", "relaxed", "practical")


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """The constants of the paper's linear environment."""

    dimension: int = 50  # axes of the action y
    signal_axes: int = 3  # how many of them, the first ones, the oracle rewards
    target: float = 2.0  # the best action's value on those axes; 0 on all others
    utility_peak: float = 10.0  # U at the best action
    utility_rate: float = 0.3  # U falls as exp(−rate · squared distance to the best action)
    reward_init: float = 1.0  # mean of the first reward model's weights on the signal axes; 0 on all others
    reward_init_std: float = 0.1  # standard deviation of the noise added to those weights on every axis
    penalty_weight: float = 0.1  # c_FPO, the weight of the penalty in the policy's objective
    action_decay: float = 0.1  # weight of −‖y‖² in the policy's objective
    difference_step: float = 0.05  # step of the forward differences that give the policy's gradient
    policy_step: float = 0.02  # the policy's learning rate
    reward_step: float = 0.005  # the reward model's learning rate on (U − w·y)²
    reward_decay: float = 1e-4  # share of w lost at each reward-model step
    iterations: int = 300  # policy steps, each followed by one reward-model step

    def __post_init__(self) -> None:
        if not 1 <= self.signal_axes <= self.dimension:
            raise ValueError(f"signal_axes must be between 1 and dimension={self.dimension}; got {self.signal_axes}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1; got {self.iterations}")
        if not self.difference_step > 0:
            raise ValueError(f"difference_step must be positive; got {self.difference_step}")


DEFAULTS = LinearSettings()


def utility(actions: Array, settings: LinearSettings = DEFAULTS) -> Array:
    """U(y) = peak · exp(−rate · ‖y − t‖²), the oracle's score: actions (…, dimension) → (…,)."""
    offset = np.array(actions, dtype=np.float64)
    offset[..., : settings.signal_axes] -= settings.target
    return settings.utility_peak * np.exp(-settings.utility_rate * (offset**2).sum(-1))


def simulate(penalty: str, seed: int = 0, settings: LinearSettings = DEFAULTS) -> Trajectory:
    """One run from y = 0: a policy step on the penalised proxy, then a reward-model step on the new action.

    y ← y + policy_step · ∇̂_y J,  J(y) = w·y − c · b(y) · ‖y‖² − decay · ‖y‖²,
    w ← w (1 − reward_decay) + reward_step · 2 (U(y) − w·y) y,

    with b = 0 (`none`), w·y − U(y) (`relaxed`) or 1 (`practical`), and ∇̂ the forward difference, U included.
    `seed` draws the first w, by numpy's legacy generator. Deterministic, float64.
    Raises ValueError for any other penalty.
    """
    if penalty not in PENALTIES:
        raise ValueError(f"penalty must be one of {', '.join(PENALTIES)} in the linear environment; got {penalty!r}")
    y = np.zeros(settings.dimension)
    w = np.random.RandomState(seed).normal(0.0, settings.reward_init_std, settings.dimension)
    w[: settings.signal_axes] += settings.reward_init
    probes = settings.difference_step * np.vstack([np.zeros_like(y), np.eye(len(y))])  # (dimension + 1, dimension)
    actions, rewards = [y], [float(w @ y)]
    for _ in range(settings.iterations):
        objective = _objective(penalty, y + probes, w, settings)
        y = y + settings.policy_step * (objective[1:] - objective[0]) / settings.difference_step
        error = float(utility(y, settings) - w @ y)
        w = w * (1 - settings.reward_decay) + settings.reward_step * 2 * error * y
        actions.append(y)
        rewards.append(float(w @ y))
    path = np.stack(actions)  # (iterations + 1, dimension)
    return Trajectory(
        signal=np.linalg.norm(path[:, : settings.signal_axes], axis=-1),
        noise=np.linalg.norm(path[:, settings.signal_axes :], axis=-1),
        utility=utility(path, settings),
        proxy_reward=np.array(rewards),
    )


def _objective(penalty: str, actions: Array, w: Array, settings: LinearSettings) -> Array:
    """J(y) of `simulate` for each row of actions (n, dimension) → (n,). Here ∇_w r = y, so ‖∇r‖² = ‖y‖²."""
    reward = actions @ w
    square = (actions**2).sum(-1)
    objective = reward - settings.action_decay * square
    if penalty == "relaxed":
        objective -= settings.penalty_weight * (reward - utility(actions, settings)) * square
    elif penalty == "practical":
        objective -= settings.penalty_weight * square
    return objective


def run(
    penalties: Iterable[str], seeds: Iterable[int], out: str | Path, settings: LinearSettings = DEFAULTS
) -> Summary:
    """Every penalty at every seed; writes `summary.json`, `curves.csv` and `figures/*.png` under `out`.

    Returns what `summary.json` holds: "linear" → penalty → seed → {signal, noise, utility, best_utility}.
    Raises ValueError for an unsupported penalty or an empty list, FileExistsError when `out` is not a new or
    empty folder; in either case nothing has been written.
    """
    penalties, seeds = list(dict.fromkeys(penalties)), list(dict.fromkeys(seeds))
    if not penalties or not seeds:
        raise ValueError(f"penalties and seeds must not be empty; got {penalties} and {seeds}")
    check_folder(out)
    trajectories = {penalty: {seed: simulate(penalty, seed, settings) for seed in seeds} for penalty in penalties}
    return write_results("linear", trajectories, _landscape(settings), out)


def _landscape(settings: LinearSettings) -> Landscape:
    """Utility as a function of the two norms: of the actions that have them, the one along the target."""
    optimum = settings.target * settings.signal_axes**0.5

    def by_norms(signal: Array, noise: Array) -> Array:
        square = (signal - optimum) ** 2 + noise**2
        return settings.utility_peak * np.exp(-settings.utility_rate * square)

    return Landscape(
        utility=by_norms,
        optimum=optimum,
        peak=settings.utility_peak,
        signal_axes=settings.signal_axes,
        title="Linear environment: where each penalty takes the policy",
    )
