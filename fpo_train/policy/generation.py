"""Generation as the caller states it, whatever the model's folder says of it; of that, only its end tokens count."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpo_train.errors import NotFinite


def end_tokens(lm: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a reply, ascending: the tokenizer's EOS, and those of the model's configurations.

    Ids that the vocabulary does not have (some folders write −1 for none) can never be said and are left out.
    """
    text = lm.config.get_text_config()
    known = (lm.config, text, getattr(lm, "generation_config", None))
    named = [tokenizer.eos_token_id, *(getattr(one, "eos_token_id", None) for one in known)]
    ids = {one for each in named for one in (each if isinstance(each, (list, tuple)) else [each])}
    return tuple(sorted(one for one in ids if type(one) is int and 0 <= one < text.vocab_size))


def ended(reply: list[int], ends: tuple[int, ...]) -> list[int]:
    """A reply up to and with its first end token."""
    for place, token in enumerate(reply):
        if token in ends:
            return reply[: place + 1]
    return reply


def positions(body: Any, mask: Tensor) -> dict[str, Tensor]:
    """`position_ids` of rows padded on the left, mask (R, T) int64, for a model that takes any.

    One whose forward takes whatever it is given (a wrapper, a model that needs none) is given them.
    """
    takes = inspect.signature(body.forward).parameters
    if "position_ids" not in takes and not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
        return {}
    return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


class Chooser(ABC):
    """Which token each row says next, from its logits.

    Args:
        said: the complaint where there are no numbers to choose from.

    Attributes:
        steady: whether a call does the same to the same tensors every time, but for `step`'s and the logits' numbers:
            then it can be recorded on a GPU.
    """

    steady = True

    def __init__(self, said: str) -> None:
        self._said = said
        self._sound: Tensor | None = None

    @abstractmethod
    def __call__(self, step: int | Tensor, rows: Tensor, logits: Tensor) -> Tensor:
        """Tokens (r,) int64 of the rows that still speak, (r,) indices, from logits (r, V).

        `step` counts the tokens said so far, a tensor (1,) int64 where the count is kept on the device. A logit of −∞
        is never chosen.
        """

    def note(self, numbers: Tensor) -> None:
        """Remember whether they are numbers, of any shape; the device is not waited for."""
        sound = numbers.isfinite().all()
        if self._sound is None:
            self._sound = sound
        else:
            self._sound.logical_and_(sound)

    def check(self) -> None:
        """See that all that was noted were numbers.

        Raises:
            NotFinite: one was NaN or infinite.
        """
        if self._sound is not None and not bool(self._sound):
            raise NotFinite(self._said)


@torch.no_grad()
def generate(
    lm: Any,
    ids: Tensor,
    mask: Tensor,
    choose: Chooser,
    *,
    ends: tuple[int, ...],
    pad: int,
    most: int,
    least: int = 0,
    cached: bool = True,
    known: Any = None,
    kept: Callable[[Tensor], None] = lambda rows: None,
) -> Tensor:
    """Token after token: (R, W + t), t ≤ most; in place where a cache with room is known, else by transformers.

    Args:
        ids, mask: (R, W) int64, padded on the left.
        ends: end a row, but none of them among its first `least` tokens. pad: what follows an end.
        cached: let the model keep what it has read. known: a cache of all but the last tokens of `ids`, of
            `decoding.Roomy` layers; it is written on.
        kept: told which of the rows that still speak are gone on with where others have ended, (r,) indices.

    Raises:
        NotFinite: see `Chooser`.
    """
    if known is not None:
        from .decoding import write

        takes = bool(positions(lm, mask))
        return write(lm, ids, mask, choose, known, ends, pad, most, least, takes, kept)
    from transformers import GenerationConfig

    every, width = torch.arange(len(ids), device=ids.device), ids.shape[1]

    def process(so_far: Tensor, logits: Tensor) -> Tensor:
        tokens = choose(so_far.shape[1] - width, every, logits)
        choose.check()
        return torch.full_like(logits, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    asked = GenerationConfig(
        do_sample=False,
        max_new_tokens=most,
        min_new_tokens=least,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
        use_cache=cached,
    )
    # transformers fills what `asked` leaves open from the model's own generation_config
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        return lm.generate(input_ids=ids, attention_mask=mask, generation_config=asked, logits_processor=[process])
    finally:
        lm.generation_config = own


def check_finite(numbers: Tensor, said: str) -> None:
    """See that they are numbers, of any shape.

    Raises:
        NotFinite: `said`, where one is NaN or infinite.
    """
    if not bool(numbers.isfinite().all()):
        raise NotFinite(said)


class Greedy(Chooser):
    """The likeliest. Some logits may be −∞: such tokens are never said."""

    def __call__(self, step: int | Tensor, rows: Tensor, logits: Tensor) -> Tensor:
        """See `Chooser`."""
        most, tokens = logits.max(-1)
        self.note(most)
        return tokens


class Listener(Chooser):
    """Keeps each step's logits and lets given tokens (R, t) be said, whatever they are."""

    steady = False

    def __init__(self, tokens: Tensor) -> None:
        super().__init__("")
        self._tokens = tokens
        self.logits: list[Tensor] = []  # (R, V) each

    def __call__(self, step: int | Tensor, rows: Tensor, logits: Tensor) -> Tensor:
        """See `Chooser`."""
        self.logits.append(logits.clone())
        return self._tokens[rows, step]
