"""The neural environment: the reward model is a small network, retrained on what the policy does.

The policy is an action mean θ ∈ R¹⁰, the reward model a softplus network, the oracle rewards the first two axes.
Source: Gauthier, Bach, Jordan 2026, arXiv 2605.04266, the neural controlled environment.

Runs are rows, one of each penalty and seed: played one after the other (the default), or all together (`vectorised`).
Either way a row has the random numbers of the published order: one stream a seed, from which the baseline draws first;
every other penalty goes on, anew each, from where the seed's baseline left the stream. Rows together differ from rows
alone by rounding only, which a run of 60,000 steps may amplify.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fpo_train.penalty.residual import fit
from fpo_train.report.progress import Steps

from . import mlp
from .results import Summary, asked, check_folder, write_results
from .trajectories import Landscape, Trajectory

PENALTIES = ("none", "practical", "relaxed", "tracin", "exact", "residual")


@dataclass(frozen=True, kw_only=True)
class NeuralSettings:
    """The constants of the paper's neural environment, and of the penalties that are not in it."""

    dimension: int = 10  # axes of the action
    signal_axes: int = 2  # how many of them, the first ones, the oracle rewards
    target: float = 2.5  # the best action's value on those axes; 0 on all others
    utility_peak: float = 10.0  # U at the best action
    utility_rate: float = 0.2  # U falls as exp(−rate · squared distance to the best action)
    hidden: int = 32  # width of the reward model's two hidden layers
    weight_std: float = 0.1  # of its first weights; its biases begin at 0
    reward_step: float = 1e-3  # Adam's step, one an iteration
    reward_decay: float = 1e-3  # Adam's weight decay
    buffer: int = 50  # labelled points kept, and learnt from in each step
    labels: int = 5  # new ones an iteration
    iterations: int = 4000
    steps: int = 15  # of the policy, an iteration
    action_decay: float = 0.01  # weight of −‖y‖² in the policy's objective
    penalty_weight: float = 0.005  # weight of the penalty
    exact_weight: float = 1.0  # of `exact`, whose steering has a weight of its own: 1
    exact_ridge: float = 0.1  # of its curvature
    clamp: float = 1.0  # most that an axis of the policy's gradient may be
    deviation: tuple[float, float] = (0.1, 0.001)  # of the policy's actions, first and last
    policy_step: tuple[float, float] = (0.05, 0.001)  # first and last
    lengths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # `residual`: to choose ℓ from
    noises: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)  # `residual`: to choose λ from
    features: Literal["action", "gradient"] = "action"  # `residual`: what distances are between
    relative: bool = True  # `residual`: ℓ in units of the median distance of the features, in place of their own
    kept: int = 10  # iterations between the points of a trajectory

    def __post_init__(self) -> None:
        if not 1 <= self.signal_axes <= self.dimension:
            raise ValueError(f"signal_axes must be between 1 and dimension={self.dimension}; got {self.signal_axes}")
        if self.iterations < 1 or self.kept < 1 or self.iterations % self.kept:
            raise ValueError(f"iterations must be a multiple of kept={self.kept}; got {self.iterations}")

    def falling(self, ends: tuple[float, float], iteration: int) -> float:
        """A value on its way from the first to the last of `ends`: the difference falls as 1 − (t/T)⁴."""
        first, last = ends
        return last + (first - last) * (1 - (iteration / self.iterations) ** 4)


DEFAULTS = NeuralSettings()


def utility(actions: Tensor, settings: NeuralSettings = DEFAULTS) -> Tensor:
    """U(y) = peak · exp(−rate · ‖y − t‖²), the oracle's score: actions (…, dimension) → (…)."""
    target = torch.zeros(settings.dimension, dtype=actions.dtype)
    target[: settings.signal_axes] = settings.target
    return settings.utility_peak * torch.exp(-settings.utility_rate * (actions - target).square().sum(-1))


class Stream:
    """One row's random numbers in the published order."""

    def __init__(self, penalty: str, seed: int, settings: NeuralSettings) -> None:
        self._settings = settings
        self._generator = torch.Generator().manual_seed(seed)
        self.weights = self._draw()
        if penalty != "none":  # what the seed's baseline has taken comes first
            for _ in range(settings.iterations):
                self.steps()
                self.labels()
            self.weights = self._draw()

    def _draw(self) -> mlp.Weights:
        settings = self._settings
        return mlp.draw(settings.dimension, settings.hidden, settings.weight_std, self._generator)

    def steps(self) -> Tensor:
        """ε of an iteration's policy steps, (steps, dimension)."""
        one = [torch.randn(self._settings.dimension, generator=self._generator) for _ in range(self._settings.steps)]
        return torch.stack(one)

    def labels(self) -> Tensor:
        """ε of an iteration's new labels, (labels, dimension)."""
        return torch.randn(self._settings.labels, self._settings.dimension, generator=self._generator)


class Game:
    """R rows of (penalty, seed) played together."""

    def __init__(self, rows: Sequence[tuple[str, int]], settings: NeuralSettings) -> None:
        asked([penalty for penalty, _ in rows], [seed for _, seed in rows], PENALTIES)
        self.settings = settings
        self._streams = [Stream(penalty, seed, settings) for penalty, seed in rows]
        parts = zip(*(stream.weights for stream in self._streams), strict=True)
        self.weights = [torch.cat(part) for part in parts]
        self._kinds = [penalty for penalty, _ in rows]
        self._of = {kind: torch.tensor([k == kind for k in self._kinds]) for kind in set(self._kinds)}
        self._optimizer = torch.optim.Adam(self.weights, lr=settings.reward_step, weight_decay=settings.reward_decay)
        self.theta = torch.zeros(len(rows), settings.dimension)
        self._points = torch.zeros(len(rows), 0, settings.dimension)
        self._utility = torch.zeros(len(rows), 0)
        self.calls = [0] * len(rows)

    def iterate(self, iteration: int) -> None:
        """The policy's steps, new labels, and one step of the reward model; iterations count from 0."""
        settings = self.settings
        deviation = settings.falling(settings.deviation, iteration)
        rate = settings.falling(settings.policy_step, iteration)
        noise = torch.stack([stream.steps() for stream in self._streams], 1)  # (steps, R, d)
        held = self._hold()
        for epsilon in noise:
            actions = (self.theta + deviation * epsilon).requires_grad_(True)
            (gradient,) = torch.autograd.grad(self._objective(actions, held).sum(), actions)
            self.theta = self.theta + rate * gradient.clamp(-settings.clamp, settings.clamp)
        fresh = self.theta[:, None] + deviation * torch.stack([stream.labels() for stream in self._streams])
        self._points = torch.cat([self._points, fresh], 1)[:, -settings.buffer :]
        self._utility = torch.cat([self._utility, utility(fresh, settings)], 1)[:, -settings.buffer :]
        asks = dict.fromkeys(("relaxed", "tracin"), settings.steps) | {"exact": settings.steps * ("exact" in held)}
        self.calls = [n + settings.labels + asks.get(k, 0) for n, k in zip(self.calls, self._kinds, strict=True)]
        for weight in self.weights:
            weight.requires_grad_(True)
        error = mlp.reward(self.weights, self._points) - self._utility
        loss = error.square().mean(1).sum()  # rows do not meet
        for weight, gradient in zip(self.weights, torch.autograd.grad(loss, self.weights), strict=True):
            weight.grad = gradient
        self._optimizer.step()
        for weight in self.weights:
            weight.requires_grad_(False)

    def _objective(self, actions: Tensor, held: dict[str, tuple[Any, ...]]) -> Tensor:
        """r(y) − decay · ‖y‖² − weight · penalty(y) of each row, (R,)."""
        settings = self.settings
        passed = mlp.forward(self.weights, actions[:, None])
        reward = passed.reward[:, 0]
        objective = reward - settings.action_decay * actions.square().sum(-1)
        if set(self._kinds) == {"none"}:
            return objective
        square = passed.square()[:, 0] if set(self._kinds) & {"practical", "relaxed", "residual"} else reward
        truth = utility(actions, settings)
        over = reward - truth.detach()  # the published script holds the oracle's answer fixed
        for kind, mine in self._of.items():
            weight = settings.penalty_weight
            if kind == "none" or (kind in ("exact", "residual") and kind not in held):
                continue
            if kind == "practical":
                penalty = square
            elif kind == "relaxed":
                penalty = over * square
            elif kind == "tracin":
                penalty = over * self._with_mean(passed)
            elif kind == "exact":
                weight = settings.exact_weight
                # a whole refit takes all of r's slope back, so what is left of it is U's, which is not held fixed here
                penalty = (reward - truth) * mlp.along(self.weights, held["exact"][0], actions[:, None])[:, 0]
            else:
                penalty = self._expected(passed, *held["residual"]) * square
            objective = objective - torch.where(mine, weight * penalty, 0.0)
        return objective

    def _with_mean(self, passed: mlp.Passed) -> Tensor:
        """⟨ḡ, ∇r(y)⟩, ḡ the gradient at the policy's mean."""
        mean = mlp.forward(self.weights, self.theta[:, None]).detached()
        return mean.with_all(passed)[:, 0, 0]

    # what `exact` and `residual` take for constants between two trainings of the reward model

    def _hold(self) -> dict[str, tuple[Any, ...]]:
        """What `exact` and `residual` fit once an iteration; nothing while no point is labelled."""
        if not self._points.shape[1]:
            return {}
        held: dict[str, tuple[Any, ...]] = {}
        if "exact" in self._of:
            held["exact"] = (self._preconditioned(),)
        if "residual" in self._of:
            held["residual"] = self._foretell()
        return held

    def _preconditioned(self) -> Tensor:
        """H⁻¹ḡ, (R, P), H = mean of ∇r∇rᵀ over the labelled points + ridge, by the points' own m×m system."""
        G = mlp.forward(self.weights, self._points).gradients().double()  # (R, m, P)
        g = mlp.forward(self.weights, self.theta[:, None]).gradients().double()  # (R, 1, P)
        ridge, m = self.settings.exact_ridge, G.shape[1]
        small = G @ G.mT + m * ridge * torch.eye(m, dtype=G.dtype)
        inside = torch.linalg.solve(small, G @ g.mT)  # (R, m, 1)
        return ((g - (G.mT @ inside).mT) / ridge)[:, 0].float()

    def _foretell(self) -> tuple[Tensor, Tensor, mlp.Passed]:
        """The process of each row: its weights (R, m), ℓ (R,), and the labelled points that distances are taken to."""
        settings = self.settings
        passed = mlp.forward([w.double() for w in self.weights], self._points.double())
        square = self._distances(passed, passed)
        unit = torch.ones(len(square), dtype=square.dtype)
        if settings.relative and square.shape[-1] > 1:
            m = square.shape[-1]
            apart = square[:, torch.ones(m, m, dtype=torch.bool).triu(1)].median(-1).values.sqrt()
            unit = torch.where(apart > 0, apart, 1.0)
        residuals = passed.reward - self._utility.double()
        fitted = fit(square / unit[:, None, None].square(), residuals, settings.lengths, settings.noises)
        return fitted.weights, fitted.length * unit, mlp.forward(self.weights, self._points)

    def _expected(self, passed: mlp.Passed, weights: Tensor, length: Tensor, known: mlp.Passed) -> Tensor:
        """ĉ(y), differentiable through the kernel."""
        if self.settings.features == "action":
            square = (passed.inputs[0].double() - self._points.double()).square().sum(-1)
        else:
            square = self._distances(passed, known)[:, 0].double()
        kernel = torch.exp(-square / (2 * length[:, None].square()))
        return (kernel * weights).sum(-1).float()

    def _distances(self, one: mlp.Passed, other: mlp.Passed) -> Tensor:
        """Squared distances of the features, (R, n, m)."""
        if self.settings.features == "action":
            a, b = one.inputs[0], other.inputs[0]
            return (a[:, :, None] - b[:, None]).square().sum(-1)
        found = one.square()[:, :, None] + other.square()[:, None] - 2 * one.with_all(other)
        return found.clamp_min(0.0)


def simulate(
    rows: Sequence[tuple[str, int]], settings: NeuralSettings = DEFAULTS, told: Callable[[], None] = lambda: None
) -> list[Trajectory]:
    """Runs of (penalty, seed), played together; a point of the trajectory every `settings.kept` iterations.

    `told` is called after each iteration. Raises ValueError for a penalty that there is none of. On one thread: numbers
    in the last digits depend on it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        game = Game(rows, settings)
        path, rewards = [game.theta], [_own_reward(game)]
        for iteration in range(settings.iterations):
            game.iterate(iteration)
            told()
            if (iteration + 1) % settings.kept == 0:
                path.append(game.theta)
                rewards.append(_own_reward(game))
    finally:
        torch.set_num_threads(threads)
    paths = torch.stack(path, 1).double().numpy()  # (R, points, d)
    scores = torch.stack(rewards, 1).double().numpy()
    at = settings.signal_axes
    return [
        Trajectory(
            path=actions,
            every=settings.kept,
            signal=np.linalg.norm(actions[:, :at], axis=-1),
            noise=np.linalg.norm(actions[:, at:], axis=-1),
            utility=utility(torch.from_numpy(actions), settings).numpy(),
            proxy_reward=score,
            oracle_calls=calls,
        )
        for actions, score, calls in zip(paths, scores, game.calls, strict=True)
    ]


def _own_reward(game: Game) -> Tensor:
    return mlp.reward(game.weights, game.theta[:, None])[:, 0]


def run(
    penalties: Iterable[str],
    seeds: Iterable[int],
    out: str | Path,
    settings: NeuralSettings = DEFAULTS,
    vectorised: bool = False,
) -> Summary:
    """Every penalty at every seed; writes `summary.json`, `curves.csv` and `figures/` under `out`.

    Raises as `linear.run`.
    """
    penalties, seeds = asked(penalties, seeds, PENALTIES)
    check_folder(out)
    rows = [(penalty, seed) for penalty in penalties for seed in seeds]
    together = [rows] if vectorised else [[row] for row in rows]
    runs: list[Trajectory] = []
    with Steps("neural", len(together) * settings.iterations, "iterations") as steps:
        for some in together:
            runs += simulate(some, settings, steps)
            if len(together) > 1:
                steps.note(f"{some[0][0]}, seed {some[0][1]}: done")
    trajectories: dict[str, dict[int, Trajectory]] = {penalty: {} for penalty in penalties}
    for (penalty, seed), one in zip(rows, runs, strict=True):
        trajectories[penalty][seed] = one
    return write_results("neural", trajectories, landscape(settings), out)


def landscape(settings: NeuralSettings) -> Landscape:
    """Utility as a function of the two norms: of the actions that have them, the one along the target."""
    return Landscape(
        optimum=settings.target * settings.signal_axes**0.5,
        peak=settings.utility_peak,
        rate=settings.utility_rate,
        signal_axes=settings.signal_axes,
        title="Neural environment: where each penalty takes the policy",
    )
