"""The linear environment: alignment collapse, and what the penalties do about it, in 50 dimensions.

The policy is an action y, the reward model a weight vector w. The oracle likes only the first few axes; the
other axes collapse through: the policy follows w's errors there and the retrained w follows the policy.
Source: Gauthier, Bach, Jordan 2026, arXiv 2605.04266, the linear controlled environment.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fpo_train.penalty.residual import fit

from .results import Summary, asked, check_folder, write_results
from .trajectories import Array, Landscape, Trajectory

PENALTIES = ("none", "practical", "relaxed", "tracin", "exact", "residual")


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
    buffer: int = 50  # `exact`, `residual`: newest labelled actions read
    exact_weight: float = 1.0  # of `exact`, whose steering has a weight of its own: 1
    exact_ridge: float = 0.1  # of its curvature
    lengths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # `residual`: to choose ℓ from
    noises: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)  # `residual`: to choose λ from
    relative: bool = True  # `residual`: ℓ in units of the median distance of the actions, in place of the axes'

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


@dataclass
class Played:
    """The actions so far and what the oracle said of them."""

    actions: list[Array] = field(default_factory=list)
    utilities: list[float] = field(default_factory=list)
    calls: int = 0

    def newest(self, count: int) -> tuple[Array, Array]:
        """Actions (m, d) and utilities (m,)."""
        return np.stack(self.actions[-count:]), np.array(self.utilities[-count:])


def simulate(penalty: str, seed: int = 0, settings: LinearSettings = DEFAULTS) -> Trajectory:
    """One run from y = 0: a policy step on the penalised proxy, then a reward-model step on the new action.

    y ← y + policy_step · ∇̂_y J,  J(y) = w·y − penalty(y) − decay · ‖y‖²,
    w ← w (1 − reward_decay) + reward_step · 2 (U(y) − w·y) y,

    and ∇̂ the forward difference, U included; for the penalties see `penalties`. `seed` draws the first w, by numpy's
    legacy generator. Deterministic, float64.
    Raises ValueError for a penalty that there is none of.
    """
    asked([penalty], [seed], PENALTIES)
    y = np.zeros(settings.dimension)
    w = np.random.RandomState(seed).normal(0.0, settings.reward_init_std, settings.dimension)
    w[: settings.signal_axes] += settings.reward_init
    probes = settings.difference_step * np.vstack([np.zeros_like(y), np.eye(len(y))])  # (dimension + 1, dimension)
    path, rewards, played = [y], [float(w @ y)], Played()
    for _ in range(settings.iterations):
        actions = y + probes
        objective = actions @ w - settings.action_decay * (actions**2).sum(-1)
        if penalty != "none":
            objective -= penalties(penalty, actions, w, played, settings)
        y = y + settings.policy_step * (objective[1:] - objective[0]) / settings.difference_step
        u = float(utility(y, settings))
        played.actions.append(y)
        played.utilities.append(u)
        played.calls += 1
        w = w * (1 - settings.reward_decay) + settings.reward_step * 2 * (u - w @ y) * y
        path.append(y)
        rewards.append(float(w @ y))
    positions = np.stack(path)  # (iterations + 1, dimension)
    return Trajectory(
        path=positions,
        signal=np.linalg.norm(positions[:, : settings.signal_axes], axis=-1),
        noise=np.linalg.norm(positions[:, settings.signal_axes :], axis=-1),
        utility=utility(positions, settings),
        proxy_reward=np.array(rewards),
        oracle_calls=played.calls,
    )


def penalties(kind: str, actions: Array, w: Array, played: Played, settings: LinearSettings) -> Array:
    """The weighted penalty of each action (n, dimension) → (n,); actions[0] is the policy's own, the rest probe it.

    Here ∇_w r = y and ℓ = (r − U)², so that u = y, c = r − U (with ℓ's factor 2 left to the weight) and ḡ = actions[0]:

    | practical | ‖y‖²                |
    | relaxed   | c(y) · ‖y‖²         |
    | tracin    | c(y) · ⟨ḡ, y⟩       |
    | exact     | c(y) · ⟨ḡ, H⁻¹y⟩    | H = mean of yyᵀ over the newest labelled actions + ridge: `steering` says why
    | residual  | ĉ(y) · ‖y‖²         | ĉ by a Gaussian process through the residuals of the newest labelled actions

    `exact` and `residual` are 0 while no action is labelled.
    """
    square = (actions**2).sum(-1)
    if kind == "practical":
        return settings.penalty_weight * square
    if kind == "residual":
        return settings.penalty_weight * _expected(actions, w, played, settings) * square
    if kind == "exact" and not played.actions:
        return np.zeros(len(actions))
    played.calls += len(actions)
    over = actions @ w - utility(actions, settings)
    if kind == "relaxed":
        return settings.penalty_weight * over * square
    if kind == "tracin":
        return settings.penalty_weight * over * (actions @ actions[0])
    labelled, _ = played.newest(settings.buffer)
    return settings.exact_weight * over * (actions @ np.linalg.solve(curvature(labelled, settings), actions[0]))


def curvature(actions: Array, settings: LinearSettings = DEFAULTS) -> Array:
    """H = mean yyᵀ + ridge of actions (m, d), (d, d): half the Hessian of the ridge refit's mean loss."""
    return actions.T @ actions / len(actions) + settings.exact_ridge * np.eye(actions.shape[1])


def refit(actions: Array, utilities: Array, settings: LinearSettings = DEFAULTS) -> Array:
    """The follower that `exact` takes: argmin_w of mean (U − w·y)² + ridge · ‖w‖² over actions (m, d), (d,)."""
    return np.linalg.solve(curvature(actions, settings), actions.T @ utilities / len(actions))


def steering(
    own: Array, at: int, actions: Array, utilities: Array, slope: Array, settings: LinearSettings = DEFAULTS
) -> Array:
    """d(own · w*)/dy of moving the labelled action y = actions[at], w* = `refit`, times m; (d,).

    With v = H⁻¹·own and U's gradient `slope` at y:  (∇U − w*)(v·y) − (w*·y − U)v, which is the gradient of
    −c(y) · ⟨own, H⁻¹y⟩, H held: the penalty `exact`. A policy that stays where it is moves all m actions it has made,
    hence the factor m, and hence the mean in H and the weight 1.
    """
    w, v, y = refit(actions, utilities, settings), np.linalg.solve(curvature(actions, settings), own), actions[at]
    return (slope - w) * (v @ y) - (w @ y - utilities[at]) * v


def _expected(actions: Array, w: Array, played: Played, settings: LinearSettings) -> Array:
    """ĉ of each action, (n,)."""
    if not played.actions:
        return np.zeros(len(actions))
    labelled, utilities = played.newest(settings.buffer)
    square = ((labelled[:, None] - labelled) ** 2).sum(-1)
    apart = np.median(np.sqrt(square[np.triu_indices(len(square), 1)])) if len(square) > 1 else 0.0
    unit = float(apart) if settings.relative and apart > 0 else 1.0
    residuals = torch.from_numpy(labelled @ w - utilities)
    found = fit(torch.from_numpy(square / unit**2), residuals, settings.lengths, settings.noises)
    across = ((actions[:, None] - labelled) ** 2).sum(-1)
    return np.exp(-across / (2 * (float(found.length) * unit) ** 2)) @ found.weights.numpy()


def run(
    penalties: Iterable[str], seeds: Iterable[int], out: str | Path, settings: LinearSettings = DEFAULTS
) -> Summary:
    """Every penalty at every seed; writes `summary.json`, `curves.csv` and `figures/` under `out`.

    Returns what `summary.json` holds: "linear" → penalty → seed → {signal, noise, utility, best_utility, oracle_calls}.
    Raises ValueError for an unsupported penalty or an empty list, FileExistsError when `out` is not a new or
    empty folder; in either case nothing has been written.
    """
    penalties, seeds = asked(penalties, seeds, PENALTIES)
    check_folder(out)
    trajectories = {penalty: {seed: simulate(penalty, seed, settings) for seed in seeds} for penalty in penalties}
    return write_results("linear", trajectories, landscape(settings), out)


def landscape(settings: LinearSettings) -> Landscape:
    """What the figures draw behind the trajectories."""
    return Landscape(
        optimum=settings.target * settings.signal_axes**0.5,
        peak=settings.utility_peak,
        rate=settings.utility_rate,
        signal_axes=settings.signal_axes,
        title="Linear environment: where each penalty takes the policy",
    )
