"""Which update a run asks for."""

from __future__ import annotations

from fpo_train.config import RunConfig
from fpo_train.errors import RunError
from fpo_train.policy import Policy
from fpo_train.processes import Processes

from .base import Update
from .best_of_n import BestOfN
from .rloo import RLOO


def load_update(policy: Policy, config: RunConfig, processes: Processes) -> Update:
    """The update that `update.kind` names.

    Raises:
        RunError: settings that do not go together, or an optimizer whose package is missing.
    """
    if config.update.kind == "best_of_n":
        return BestOfN(policy, config, processes)
    if config.update.loss_on != "reply" or config.update.mean != "token":
        raise RunError("update: rloo learns reply tokens; update.loss_on and update.mean are best_of_n's")
    if config.rollout.candidates < 2:
        raise RunError(f"update: rloo needs 2 candidates or more, got rollout.candidates {config.rollout.candidates}")
    return RLOO(policy, config, processes)
