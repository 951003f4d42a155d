"""Oracles: who says which reply is better, and the labels an iteration buys from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fpo_train.config import RunConfig
from fpo_train.policy import Policy

from .base import Oracle, UtilityOracle
from .function import FunctionOracle
from .gold import load_gold
from .judge import JudgeOracle
from .labels import Labels
from .likelihood import BaseOracle
from .preferences import FileOracle

if TYPE_CHECKING:
    from fpo_train.processes import Processes

__all__ = [
    "BaseOracle",
    "FileOracle",
    "FunctionOracle",
    "JudgeOracle",
    "Labels",
    "Oracle",
    "UtilityOracle",
    "load_gold",
    "load_oracle",
]

CACHE, UNLABELLED = "judge.jsonl", "unlabelled.jsonl"


def load_oracle(config: RunConfig, policy: Policy, processes: Processes) -> Oracle:
    """The oracle that `config.oracle` asks for.

    Raises:
        RunError: its model, function, file, cache, url or key cannot be used.
    """
    asked = config.oracle
    out = Path(config.out)
    if asked.kind == "gold":
        return load_gold(policy, config)
    if asked.kind == "function":
        return FunctionOracle(asked)
    if asked.kind == "judge":
        cache = Path(asked.cache).expanduser() if asked.cache else out / CACHE
        return JudgeOracle(asked, cache, config.seed, processes.rank, processes.world)
    if asked.kind == "file":
        name = UNLABELLED if processes.world == 1 else f"unlabelled.rank{processes.rank}.jsonl"
        return FileOracle(Path(asked.file).expanduser(), out / name, config.data.system)
    return BaseOracle(policy, config)
