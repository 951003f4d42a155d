"""SkyRL: an environment of one turn whose reward is a server's.

    from skyrl_gym.envs import register
    register(id="fpo", entry_point="fpo_train.integrations.skyrl:FPOEnvironment")

and `env_class: fpo` in the data's rows, whose `reward_spec.ground_truth` is the text that a reply is compared with.
Replies come one by one, and are kept for the server's next update. The server is that of FPO_URL, its token that of
FPO_TOKEN.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from fpo_train.errors import RunError
from fpo_train.integrations.server.client import FPOClient

try:
    from skyrl_gym.envs.base_text_env import BaseTextEnv
except ImportError:  # whoever has no SkyRL may look at it all the same
    BaseTextEnv = object


class FPOEnvironment(BaseTextEnv):
    """The prompt as SkyRL gives it, one reply, and r(z) − γ · penalty(z)."""

    def __init__(self, env_config: Any = None, extras: Mapping[str, Any] | None = None) -> None:
        """`extras`: the data's row, with `reward_spec.ground_truth`.

        Raises:
            RunError: no text to compare the reply with.
        """
        super().__init__()
        self._reference = ((extras or {}).get("reward_spec") or {}).get("ground_truth")
        if not isinstance(self._reference, str) or not self._reference:
            wanted = "wanted the text to compare replies with"
            raise RunError(f"reward_spec.ground_truth: {wanted}, got {self._reference!r:.80}")
        self._prompt: list[dict[str, str]] = []

    def init(self, prompt: Sequence[Mapping[str, str]]) -> tuple[Any, dict[str, Any]]:
        """The first prompt of the model, messages, as it is given."""
        self._prompt = [{"role": one["role"], "content": one["content"]} for one in prompt]
        return prompt, {}

    def step(self, action: str) -> dict[str, Any]:
        """The reward of the model's reply, with which the turn ends.

        Raises:
            RunError: a reply that cannot be scored, or no answer of the server.
        """
        completion = [{"role": "assistant", "content": action}]
        found = client().score([self._prompt], [completion], [self._reference], collect=True)
        (reward,), (proxy,), (penalty,) = found["effective"], found["rewards"], found["penalties"]
        if reward is None:
            raise RunError("the reply cannot be scored")
        return {
            "observations": [],
            "reward": reward,
            "done": True,
            "metadata": {"fpo_reward": proxy, "fpo_penalty": penalty},
        }


@functools.lru_cache(maxsize=1)
def client() -> FPOClient:
    """One a process."""
    return FPOClient()
