"""Every setting of a run, a study or an evaluation, documented and checked; imports no torch.

`settings` is a run's, `evaluation` that of `fpo-train eval`, `profiles` the named sets of defaults; `checks` and
`units` read values, `words` a command line, and `seeds` makes one seed everyone's.
"""

from .evaluation import EvalConfig, JudgeConfig
from .oracle import OracleConfig
from .settings import (
    CLASSIFIER,
    PENALTY_KINDS,
    DataConfig,
    LoggingConfig,
    MemoryConfig,
    Optimizer,
    PenaltyConfig,
    PenaltyKind,
    PolicyConfig,
    RewardModelConfig,
    RolloutConfig,
    RunConfig,
    Schedule,
    UpdateConfig,
)

__all__ = [
    "CLASSIFIER",
    "PENALTY_KINDS",
    "DataConfig",
    "EvalConfig",
    "JudgeConfig",
    "LoggingConfig",
    "MemoryConfig",
    "Optimizer",
    "OracleConfig",
    "PenaltyConfig",
    "PenaltyKind",
    "PolicyConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RunConfig",
    "Schedule",
    "UpdateConfig",
]
