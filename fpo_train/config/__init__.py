"""Every setting of a run, a study, an evaluation, an attribution or a server, documented and checked; imports no torch.

`settings` is a run's, `evaluation` that of `fpo-train eval`, `attribution` that of `fpo-train attribute`, `serving`
that of `fpo-train serve`, `profiles` the named sets of defaults; `checks` and `units` read values, `words` a command
line, and `seeds` makes one seed everyone's.
"""

from .attribution import AttributeConfig, ReadModelConfig
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
    "AttributeConfig",
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
    "ReadModelConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RunConfig",
    "Schedule",
    "ServeConfig",
    "UpdateConfig",
]
