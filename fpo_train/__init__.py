"""Foresighted Policy Optimization: iterative RLHF whose policy answers for how it steers its reward model.

`FPOReward`, `FPOCallback`, `OnBase`, `BaseReplies` and `FPOClient` are for other people's trainers; they are imported
when they are first asked for, all but the last with torch and transformers behind them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .integrations.server.client import FPOClient
    from .integrations.made import OnBase
    from .integrations.references import BaseReplies
    from .integrations.reward import FPOReward
    from .integrations.trl import FPOCallback

__version__ = "0.1.0"
__all__ = ["BaseReplies", "FPOCallback", "FPOClient", "FPOReward", "OnBase", "__version__"]
_PLACES = {
    "BaseReplies": "references",
    "FPOCallback": "trl",
    "FPOClient": "server.client",
    "FPOReward": "reward",
    "OnBase": "made",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.integrations.{_PLACES[name]}"), name)
