"""One iteration's labels: bought when first asked for, counted, and never bought twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fpo_train.errors import RunError
from fpo_train.rollout import Readings, Said

from .base import Oracle, UtilityOracle

if TYPE_CHECKING:
    from fpo_train.processes import Ranks

NAN = float("nan")


class Labels:
    """p* of the candidates against their prompts' references, and the utilities where the oracle has them.

    A label that could not be had stays NaN for the whole iteration: it is not asked for again.
    """

    def __init__(self, oracle: Oracle, rollout: Said, readings: Readings) -> None:
        self._oracle = oracle
        self._rollout = rollout
        self._readings = readings
        self._rows, self._references = (rows.view_as(rollout.usable) for rows in rollout.pairs())  # (B, N) each
        self._asked = torch.zeros_like(rollout.usable)
        self._preference = torch.full(self._asked.shape, NAN, device=self._asked.device)
        self._read = self._asked.new_zeros(len(rollout.texts))  # of each row
        self._utility = self._preference.new_full(self._read.shape, NAN)

    @property
    def calls(self) -> int:
        """(candidate, reference) pairs the oracle was asked about, on this process."""
        return int(self._asked.sum())

    @property
    def failures(self) -> int:
        """Of those, pairs without an answer."""
        return int((self._asked & self._preference.isnan()).sum())

    def preferences(self, wanted: Tensor) -> Tensor:
        """p* of the candidates with wanted (B, N) True, fp32 (B, N); NaN where not wanted or not to be had."""
        self._buy(wanted)
        return self._preference.masked_fill(~wanted, NAN)

    def utilities(self, wanted: Tensor) -> tuple[Tensor, Tensor] | None:
        """U of the wanted candidates (B, N) and of their references (B, 1), fp32, or None where there is no such
        thing; NaN where not wanted or not to be had."""
        if not self._oracle.has_utilities:
            return None
        self._buy(wanted)
        own, of_reference = self._known_utilities()
        return own.masked_fill(~wanted, NAN), of_reference.masked_fill(~wanted.any(1, keepdim=True), NAN)

    def covers(self, wanted: Tensor) -> bool:
        """Whether those labels, wanted (B, N) bool, take no more than has been asked or read already."""
        at_hand = self._oracle.from_readings and self._readings.complete
        return at_hand or not bool((wanted & ~self._asked).any())

    def known(self) -> tuple[Tensor, Tensor]:
        """U of candidates (B, N) and references (B, 1) as far as it has been asked, or p* and NaN where there is no
        such thing; fp32, NaN where not known. It asks nothing."""
        if self._oracle.has_utilities:
            return self._known_utilities()
        return self._preference, torch.full_like(self._preference[:, :1], NAN)

    def check(self, processes: Ranks) -> None:
        """See that the labels asked for are not all missing, and gather what the oracle has counted.

        Every process must call it, once an iteration.

        Raises:
            RunError: labels were asked for and not one of them could be had, on any process, from an oracle that
                should have answered.
        """
        self._oracle.gather(processes)
        asked, failed = processes.total(torch.tensor([self.calls, self.failures], device=self._asked.device)).tolist()
        if asked and failed == asked and not self._oracle.may_be_silent:
            raise RunError(
                f"oracle: not one of the iteration's {asked} labels could be had; this process has counted "
                f"{self._oracle.report()}"
            )

    def _buy(self, wanted: Tensor) -> None:
        if wanted.shape != self._asked.shape or wanted.dtype != torch.bool:
            raise ValueError(
                f"wanted: a bool tensor of shape {tuple(self._asked.shape)}, got {wanted.dtype} {tuple(wanted.shape)}"
            )
        new = wanted & ~self._asked
        if not new.any():
            return
        rows, references = self._rows[new], self._references[new]
        if isinstance(self._oracle, UtilityOracle):
            needed = torch.cat([rows, references]).unique()
            needed = needed[~self._read[needed]]
            self._utility[needed] = self._oracle.utility(self._rollout, self._readings, needed)
            self._read[needed] = True
            answer = self._oracle.soften(self._utility[rows] - self._utility[references])
        else:
            answer = self._oracle.preference(self._rollout, self._readings, rows, references)
        self._preference[new] = answer.to(self._preference)
        self._asked |= new

    def _known_utilities(self) -> tuple[Tensor, Tensor]:
        """U of candidates (B, N) and references (B, 1) as far as it has been asked."""
        return self._utility[self._rows], self._utility[self._references[:, :1]]
