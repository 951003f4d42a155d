"""Foresighted Policy Optimization: iterative RLHF whose policy answers for how it steers its reward model.

What it offers to other people's trainers (`FPOReward`, `FPOCallback`, …) is imported when it is first asked for, with
torch and transformers behind it (behind `FPOClient` neither).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .integrations.made import OnBase, load_model
    from .integrations.monitor import FPOMonitor
    from .integrations.reward import FPOReward
    from .integrations.server.client import FPOClient
    from .integrations.texts import BaseReplies
    from .integrations.trl import FPOCallback, MonitorCallback

__version__ = "0.1.0"
__all__ = [
    "BaseReplies",
    "FPOCallback",
    "FPOClient",
    "FPOMonitor",
    "FPOReward",
    "MonitorCallback",
    "OnBase",
    "__version__",
    "load_model",
]
_PLACES = {
    "BaseReplies": "texts",
    "FPOCallback": "trl",
    "FPOClient": "server.client",
    "FPOMonitor": "monitor",
    "MonitorCallback": "trl",
    "FPOReward": "reward",
    "OnBase": "made",
    "load_model": "made",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.integrations.{_PLACES[name]}"), name)
