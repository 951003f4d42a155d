"""verl (0.9.1): one completion a call, scored by `fpo-train serve` and kept for its next update.

As a function, with the prompt in the data set's `extra_info`:

    reward.custom_reward_function.path=pkg://fpo_train.integrations.verl
    +reward.custom_reward_function.reward_kwargs.url=http://127.0.0.1:8008

As a reward manager, which has the conversation itself, so that the data set need not repeat it:

    reward.reward_manager.source=importlib reward.reward_manager.name=FPORewardManager
    reward.reward_manager.module.path=pkg://fpo_train.integrations.verl
    +reward.reward_kwargs.url=http://127.0.0.1:8008

verl asks for each completion by itself, whose group it does not say: references are texts, by default the ground truth.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fpo_train.errors import RunError
from fpo_train.integrations.server.client import FPOClient

if TYPE_CHECKING:
    Base: Any = object
else:
    try:
        from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase as Base
    except ImportError:  # the function alone can be had
        Base = object


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: str | None = None,
    token: str | None = None,
    prompt: str = "prompt",
    reference: str = "",
    collect: bool = True,
    **more: Any,
) -> dict[str, float]:
    """`score`, which is r(z) − γ · penalty(z), and its parts `fpo_reward` and `fpo_penalty`.

    Args:
        url, token: the server's; by default of FPO_URL and FPO_TOKEN. prompt: the name in `extra_info` of the prompt, a
            text or a list of messages. reference: that of the reference; empty: the ground truth is it.
        collect: keep the completion for the server's next update.

    Raises:
        RunError: no prompt or reference, a completion that cannot be scored, or no answer.
    """
    info = extra_info or {}
    if info.get(prompt) is None:
        told = (
            "verl passes no prompt on; wanted it in the data set's extra_info, or the reward manager FPORewardManager"
        )
        raise RunError(f"extra_info: it has no {prompt!r}, it has {', '.join(map(str, info)) or 'nothing'}; {told}")
    other = info.get(reference) if reference else ground_truth
    return await _score(client(url, token), info[prompt], solution_str, other, reference or "ground_truth", collect)


class FPORewardManager(Base):
    """A reward manager that asks the server with the conversation as verl's data set has it (`raw_prompt`).

    Its settings are `reward.reward_kwargs`: `url`, `token`, `reference` (a name in `extra_info`), `collect`; see
    `compute_score`.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any = None, **more: Any) -> None:
        if Base is object:
            raise RunError("FPORewardManager: wanted verl 0.9 beside it, whose RewardManagerBase it is")
        super().__init__(config, tokenizer, compute_score)
        self._settings = dict(config.reward.get("reward_kwargs") or {})

    async def run_single(self, data: Any) -> dict[str, Any]:
        """`reward_score` of the last sequence, and `reward_extra_info`.

        Raises:
            RunError: see `compute_score`.
        """
        item = data[-1]
        ids = item.batch["responses"]
        count = int(item.batch["attention_mask"][-ids.shape[-1] :].sum())
        reply = await self.loop.run_in_executor(
            None, lambda: self.tokenizer.decode(ids[:count], skip_special_tokens=True)
        )
        own, named = item.non_tensor_batch, self._settings.get("reference")
        other = own["extra_info"].get(named) if named else own["reward_model"]["ground_truth"]
        asked = client(self._settings.get("url"), self._settings.get("token"))
        where, collect = named or "ground_truth", bool(self._settings.get("collect", True))
        found = await _score(asked, list(own["raw_prompt"]), reply, other, where, collect)
        return {"reward_score": found["score"], "reward_extra_info": found}


@functools.lru_cache(maxsize=8)
def client(url: str | None, token: str | None) -> FPOClient:
    """One client a server and process, so that connections are kept."""
    return FPOClient(url, token)


async def _score(
    asked: FPOClient, prompt: Any, reply: str, reference: Any, named: str, collect: bool
) -> dict[str, float]:
    if not isinstance(reference, str) or not reference:
        raise RunError(f"{named}: wanted the text to compare the completion with, got {reference!r:.80}")
    found = await asked.ascore([_plain(prompt)], [reply], [reference], collect=collect)
    (effective,), (reward,), (penalty,) = found["effective"], found["rewards"], found["penalties"]
    if effective is None or reward is None or penalty is None:
        raise RunError(f"the completion {reply!r:.80} cannot be scored")
    return {"score": effective, "fpo_reward": reward, "fpo_penalty": penalty}


def _plain(prompt: Any) -> Any:
    """A text, or messages as JSON has them, from a list or an array of them."""
    if isinstance(prompt, str):
        return prompt
    listed: Sequence[Any] = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    return [{"role": one["role"], "content": one["content"]} for one in listed]
