"""What every oracle is: p* for a reply against its reference, and counts of what became of the questions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fpo_train.data.turns import Talk
from fpo_train.rollout import Readings, Said

if TYPE_CHECKING:
    from fpo_train.processes import Ranks


class Oracle(ABC):
    """Says which reply is better. A label that could not be had is NaN, never 0.5."""

    has_utilities = False
    """Whether there is a number U for a reply alone; then the oracle is a `UtilityOracle`."""
    may_be_silent = False
    """Whether an iteration without a single label is as it should be (people who have not labelled yet)."""
    local = False
    """Whether it is a model of this process: nobody else is asked, and nothing is paid."""
    from_readings = False
    """Whether it says U of a row from the base's reading of it, without a pass of its own."""
    loaded: tuple[nn.Module, Any] | None = None
    """Model of its own and that one's tokenizer (None where it reads no text), where it has one."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._others: Counter[str] = Counter()

    @abstractmethod
    def preference(self, rollout: Said, readings: Readings, rows: Tensor, references: Tensor) -> Tensor:
        """p* in [0, 1] of rows (n,) against the rows `references` (n,), fp32 (n,); NaN: could not be had."""

    def check(self, prompts: Sequence[Talk]) -> None:  # noqa: B027 (most oracles read whatever they are given)
        """See that it can read replies to these prompts.

        Raises:
            RunError: it cannot.
        """

    def state_dict(self) -> dict[str, Any]:
        """The counts so far, with those of the other processes as `gather` found them."""
        return {"counts": dict(self.counts + self._others)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from there."""
        self.counts = Counter(state["counts"])

    def gather(self, processes: Ranks) -> None:
        """Learn the counts of the other processes, for `state_dict`; every process must call it."""
        own = Counter(self.counts)
        self._others = sum((Counter(one) for one in processes.gather_objects([dict(own)])), Counter()) - own

    def report(self) -> str:
        """This process's counts in one line."""
        return ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items())) or "nothing asked"


class UtilityOracle(Oracle):
    """p* = σ((U(z) − U(ref)) / temperature)."""

    has_utilities = True

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    @abstractmethod
    def utility(self, rollout: Said, readings: Readings, rows: Tensor) -> Tensor:
        """U of rows (n,), fp32 (n,); NaN: could not be had."""

    def soften(self, difference: Tensor) -> Tensor:
        """p* = σ(difference / temperature)."""
        return torch.sigmoid(difference / self.temperature)

    def preference(self, rollout: Said, readings: Readings, rows: Tensor, references: Tensor) -> Tensor:
        """p* by the two utilities; a row named more than once is read once."""
        needed, place = torch.cat([rows, references]).unique(return_inverse=True)
        utility = self.utility(rollout, readings, needed)[place]
        return self.soften(utility[: len(rows)] - utility[len(rows) :])

    def _count(self, utility: Tensor, silent: str) -> Tensor:
        utility = utility.masked_fill(utility.isinf(), float("nan"))  # a model that overflows has said nothing
        missing = int(utility.isnan().sum())
        self.counts["scored"] += len(utility) - missing
        if missing:
            self.counts[silent] += missing
        return utility


class Unasked(Oracle):
    """Stands in where an oracle is not to be asked."""

    def preference(self, rollout: Said, readings: Readings, rows: Tensor, references: Tensor) -> Tensor:
        """Nothing."""
        return torch.full((len(rows),), torch.nan, device=rows.device)
