"""Every setting of a run, a study, an evaluation or a server, documented and checked; imports no torch.

`settings` is a run's, `evaluation` that of `fpo-train eval`, `serving` that of `fpo-train serve`, `profiles` the named
sets of defaults; `checks` and `units` read values, `words` a command line, and `seeds` makes one seed everyone's.
"""

from .evaluation import EvalConfig, JudgeConfig
from .oracle import OracleConfig
from .serving import BatchingConfig, LearningConfig, LimitsConfig, ServeConfig
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
    "BatchingConfig",
    "DataConfig",
    "EvalConfig",
    "JudgeConfig",
    "LearningConfig",
    "LimitsConfig",
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
    "ServeConfig",
    "UpdateConfig",
]
