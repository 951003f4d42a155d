"""Generation as the caller states it, whatever the model's folder says of it; of that, only its end tokens count."""

from __future__ import annotations

import inspect
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


@torch.no_grad()
def generate(
    lm: Any,
    ids: Tensor,
    mask: Tensor,
    processor: Any,
    *,
    ends: tuple[int, ...],
    pad: int,
    most: int,
    least: int = 0,
    cached: bool = True,
    known: Any = None,
) -> Tensor:
    """The likeliest token after `processor` has had its say, again and again: tokens (R, W + t), t ≤ most.

    Args:
        ids, mask: (R, W) int64, padded on the left.
        processor: of transformers' kind, (R, T) ids and (R, V) logits → (R, V).
        ends: end a row, but none of them among its first `least` tokens. pad: what follows an end.
        cached: let the model keep what it has read. known: a cache of all but the last tokens of `ids`.
    """
    from transformers import GenerationConfig

    asked = GenerationConfig(
        do_sample=False,
        max_new_tokens=most,
        min_new_tokens=least,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
        use_cache=cached,
    )
    more = {} if known is None else {"past_key_values": known}
    # transformers fills what `asked` leaves open from the model's own generation_config
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        return lm.generate(
            input_ids=ids, attention_mask=mask, generation_config=asked, logits_processor=[processor], **more
        )
    finally:
        lm.generation_config = own


def check_finite(numbers: Tensor, said: str) -> None:
    """See that they are numbers, of any shape.

    Raises:
        NotFinite: `said`, where one is NaN or infinite.
    """
    if not bool(numbers.isfinite().all()):
        raise NotFinite(said)


class Greedy:
    """A processor that changes nothing, and sees that there are numbers to choose from."""

    def __init__(self, said: str) -> None:
        self._said = said  # where there are none

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(R, V) logits as they are; see `check_finite`. Some may be −∞: such tokens are never said."""
        check_finite(scores.amax(-1), self._said)
        return scores


class Listener:
    """A processor that keeps each step's logits and lets given tokens be said, whatever they are."""

    def __init__(self, tokens: Tensor, width: int) -> None:
        self._tokens = tokens  # (R, t)
        self._width = width
        self.logits: list[Tensor] = []  # (R, V) each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(R, T) tokens so far and (R, V) logits → (R, V), 0 at the given token and −∞ elsewhere."""
        self.logits.append(scores.clone())
        said = self._tokens[:, input_ids.shape[1] - self._width, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, said, 0.0)
