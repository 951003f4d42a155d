"""What each completion is compared with: a column of the data, another completion, or a frozen model's own reply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from fpo_train.config import RolloutConfig
from fpo_train.config.seeds import mix
from fpo_train.data.prompts import render
from fpo_train.data.turns import Talk, turn_of
from fpo_train.errors import RunError
from fpo_train.policy.generation import end_tokens, ended, generate
from fpo_train.rollout.sampling import RowSampler


def talk_in(prompt: Any, where: str) -> Talk:
    """What is asked: a text stays one, messages become turns, all of them.

    Raises:
        RunError: it is neither, or a message of another role than system, user and assistant.
    """
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list | tuple) or not prompt:
        raise RunError(f"{where}: wanted a text or a list of messages, got {prompt!r:.80}")
    return tuple(turn_of(message, "prompt", where) for message in prompt)


def next_in_group(keys: Sequence[str], replies: Sequence[str]) -> list[str]:
    """Another reply to the same prompt for each; a reply that is alone, or is all there is, gets itself.

    The different replies of a group stand in a circle, in an order that their texts alone decide, and each is compared
    with the one behind it: every reply is a reference once, whoever is asked beside it and in whatever order.
    """
    circles: dict[str, list[str]] = {}
    for key, reply in zip(keys, replies, strict=True):
        circle = circles.setdefault(key, [])
        if reply not in circle:
            circle.append(reply)
    for key, circle in circles.items():
        circle.sort(key=lambda reply: (mix("circle", key, reply), reply))
    after = {
        (key, reply): circle[(n + 1) % len(circle)] for key, circle in circles.items() for n, reply in enumerate(circle)
    }
    return [after[one] for one in zip(keys, replies, strict=True)]


class BaseReplies:
    """Replies of the frozen base beneath a trainer's model, one a prompt, sampled once and kept.

    A reply follows from its prompt and the seed alone, and torch's random streams are left as they are.

        reward = FPOReward(…, reference=BaseReplies(model, tokenizer, max_new_tokens=64))

    Args:
        model: a causal language model that is not trained, or a PEFT model: its adapters are off meanwhile.
        max_new_tokens, temperature, top_p, top_k: of the sampling; take those of the trainer.
        seed: of the sampling. kept: replies that are remembered, the latest.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 2**31,
        seed: int = 0,
        kept: int = 65536,
    ) -> None:
        self._model, self._tokenizer, self._seed, self._most = model, tokenizer, seed, kept
        self._settings = RolloutConfig(
            max_new_tokens=max_new_tokens, min_new_tokens=0, temperature=temperature, top_p=top_p, top_k=top_k
        )
        self._known: dict[Talk, str] = {}

    def __call__(self, prompts: Sequence[Any]) -> list[str]:
        """A reply to each prompt, texts or messages."""
        talks = [talk_in(prompt, "prompts") for prompt in prompts]
        if new := [talk for talk in dict.fromkeys(talks) if talk not in self._known]:
            found = zip(new, self._sample(new), strict=True)
            self._known |= found
        said = [self._known[talk] for talk in talks]
        for talk in list(self._known)[: max(0, len(self._known) - self._most)]:
            del self._known[talk]
        return said

    def state_dict(self) -> dict[str, Any]:
        """The replies so far."""
        return {"replies": list(self._known.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._known = {
            talk if isinstance(talk, str) else tuple(map(tuple, talk)): said for talk, said in state["replies"]
        }

    @torch.no_grad()
    def _sample(self, talks: list[Talk]) -> list[str]:
        lm = self._model.get_base_model() if hasattr(self._model, "peft_config") else self._model
        rows = [
            self._tokenizer(talk)["input_ids"] if isinstance(talk, str) else render(self._tokenizer, talk)
            for talk in talks
        ]
        ends, pad = end_tokens(lm, self._tokenizer), self._tokenizer.pad_token_id or 0
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=lm.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=lm.device)
        streams = (torch.Generator().manual_seed(mix("base reply", self._seed, repr(talk))) for talk in talks)
        count = self._settings.max_new_tokens
        draws = torch.stack([torch.rand(count, generator=stream, dtype=torch.float64) for stream in streams])
        choose = RowSampler(self._settings, draws.to(lm.device))
        with at_rest(lm), self._model.disable_adapter() if hasattr(self._model, "peft_config") else nullcontext():
            out = generate(lm, ids, mask, choose, ends=ends, pad=pad, most=count)
        said = [ended(row, ends) for row in out[:, width:].tolist()]
        return [self._tokenizer.decode(row, skip_special_tokens=True) for row in said]


def _talk(stored: Any) -> Talk:
    return stored if isinstance(stored, str) else tuple((role, text) for role, text in stored)


@contextmanager
def modes_of(model: torch.nn.Module) -> Iterator[None]:
    """Each module's own mode, training or not, comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def at_rest(model: torch.nn.Module) -> Iterator[None]:
    """In eval mode and in the model's own number format, whatever a trainer is about; each module's mode comes back."""
    device = next(model.parameters()).device.type
    with modes_of(model), torch.autocast(device, enabled=False):
        model.eval()
        yield
