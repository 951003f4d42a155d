"""OpenRLHF (0.11): a reward function for `--reward.remote_url /path/to/fpo_train/integrations/openrlhf.py`.

It takes what the route /openrlhf takes, and can bring a token; the server is that of FPO_URL and FPO_TOKEN. OpenRLHF
loads the file by its path, outside of its package, calls it with one query at a time, and goes on without a reward
where it raises: the reason is logged as an error first.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch

from fpo_train.errors import RunError
from fpo_train.integrations.server.client import FPOClient

log = logging.getLogger("fpo_train.openrlhf")


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **more: Any) -> dict[str, Any]:
    """`rewards` and `scores` (n,) fp32, r(z) − γ · penalty(z), and `extra_logs` with the two parts.

    Args:
        queries: prompts with their replies. labels: the references. more: `url` and `token`, where they are not those
            of the environment.

    Raises:
        RunError: there is no answer, or a query cannot be scored.
    """
    try:
        asked = client(more.get("url"), more.get("token"))
        found = asked.openrlhf(list(queries), list(prompts), list(labels))
    except RunError as error:
        log.error("no reward: %s", error)
        raise
    rewards = torch.tensor(found["rewards"])
    logs = {key: torch.tensor(values) for key, values in found["extra_logs"].items()}
    return {"rewards": rewards, "scores": rewards, "extra_logs": logs}


@functools.lru_cache(maxsize=8)
def client(url: str | None, token: str | None) -> FPOClient:
    """One client a server and process, so that connections are kept."""
    return FPOClient(url, token)
