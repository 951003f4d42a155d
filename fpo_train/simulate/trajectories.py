"""What a game in a controlled environment leaves behind, and the landscape it was played in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """One run: entry 0 is the start, entry i the state after iteration i · every; (n,) float64 each, path (n, d)."""

    path: Array  # the policy's action, or its mean
    every: int = 1  # iterations between entries
    signal: Array  # norm of the action on the axes the oracle rewards, action units
    noise: Array  # norm of the action on all other axes, action units
    utility: Array  # U(y), the oracle's score
    proxy_reward: Array  # the retrained reward model's score of the same action, in units of U
    oracle_calls: int  # actions that the oracle was asked about, for labels and for the penalty

    @property
    def iterations(self) -> Array:
        """The entries' iterations."""
        return np.arange(len(self.signal), dtype=np.float64) * self.every

    @property
    def final(self) -> dict[str, float]:
        """Last signal norm, noise norm and utility; best utility of any entry, start and end included."""
        return {
            "signal": float(self.signal[-1]),
            "noise": float(self.noise[-1]),
            "utility": float(self.utility[-1]),
            "best_utility": float(self.utility.max()),
            "oracle_calls": self.oracle_calls,
        }


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """The utility that the figures draw behind the trajectories: U = peak · exp(−rate · ‖y − best action‖²)."""

    optimum: float  # norm of the best action, which lies on the signal axes, the same on each
    peak: float  # its utility
    rate: float
    signal_axes: int  # how many axes the signal norm covers
    title: str  # the figures' title

    def utility(self, signal: Array, noise: Array) -> Array:
        """Of the actions with these two norms, that of the best one."""
        return self.peak * np.exp(-self.rate * ((signal - self.optimum) ** 2 + noise**2))


Trajectories = Mapping[str, Mapping[int, Trajectory]]  # penalty → seed → trajectory
