"""A model put to the test once, when it is loaded, on a few made-up tokens.

Replies are drawn, read and learnt in batches, from padded rows and from what a model keeps of its prompts. Whether any
of that changes what the model says is its own code's affair; here it is compared with plain forwards of one row alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpo_train.data.prompts import Prompt
from fpo_train.errors import RunError

from . import prefix
from .generation import Listener, generate, positions

if TYPE_CHECKING:
    from .base import Policy

TOKENS, STEPS = 12, 4  # of a row; of these said one at a time
SHORT_WINDOW = 64  # attention windows up to here are tried at once, wider ones where a run's rows are as long

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
"""‖logits − plain‖ / ‖plain‖ that rounding may come to, both centred; norms and rotary angles of float64 models are in
fp32. SmolLM2 (30 layers) comes to 3e-6 in fp32 and to 0.03 in bf16; a cache misread by one position or by a prompt read
twice to 0.1 to 2."""
EIGHT_BITS = 0.25  # which columns LLM.int8 leaves in half precision depends on all of a batch


def examine(lm: Any, where: str) -> None:
    """See that a model reads rows as everything here supposes; say so where its rows depend on each other.

    Args:
        where: the setting that names it, and the name.

    Raises:
        RunError: no decoder with an output projection, logits that are not finite, tokens that depend on later ones, or
            on padding that their mask tells of.
    """
    wanted = "wanted a causal language model"
    if getattr(lm.config, "is_encoder_decoder", False):
        raise RunError(f"{where}: it is an encoder-decoder; {wanted}")
    if not lm.can_generate() or lm.get_output_embeddings() is None:
        raise RunError(f"{where}: it cannot generate, or has no output embeddings; {wanted}")
    long, other = _tokens(lm, 2, TOKENS)
    short = long[: TOKENS // 2]
    with _reading(f"{where} in {str(lm.dtype).removeprefix('torch.')}"):
        alone = [_read(lm, row[None])[0] for row in (long, short)]
        logits = [_logits(lm, states) for states in alone]
        if not all(bool(one.isfinite().all()) for one in (*alone, *logits)):
            raise RunError(
                f"{where}: its logits are not finite numbers; its weights are damaged, or overflow in the dtype they "
                "are read in"
            )
        if _typical(lm, alone[0][: len(short)], logits[1]) > tolerance(lm):
            raise RunError(f"{where}: what it says of a token depends on later tokens; {wanted}")
        rows = (long, short, other)
        behind = [states[: len(row)] for states, row in zip(_read(lm, *_padded(rows, left=False)), rows, strict=True)]
        before = [states[-len(row) :] for states, row in zip(_read(lm, *_padded(rows, left=True)), rows, strict=True)]
        side = [("behind", behind), ("before", before)]
        off = [(place, found) for place, found in side if _worst(lm, found, logits) > tolerance(lm)]
        if off and _worst(lm, _read(lm, torch.stack([long, other]))[:1], logits[:1]) > tolerance(lm):
            print(
                f"{where}: what it says in a row depends on the rows beside it, as with experts of limited room or "
                "activations in 8 bits; so does a reply on who is sampled beside it",
                file=sys.stderr,
            )
            return
        for place, found in off:
            if max(_typical(lm, a, b) for a, b in zip(found, logits, strict=False)) > tolerance(lm):
                raise RunError(
                    f"{where}: padding {place} a row changes what it says there, so prompts of several lengths cannot "
                    "share a batch; wanted a model that heeds its attention mask"
                )


def cache_serves(lm: Any, where: str, policy: Policy | None = None, longest: int = SHORT_WINDOW) -> bool:
    """Whether what the model keeps of a row gives the logits of a plain forward; said where it does not.

    Three rows, padded on the left, are continued by a token at a time as `generate` does; those of a policy from its
    prompts as `prefix` has read them, and by all the tokens at once too. Rows reach beyond the widest attention window
    that leaves them within `longest` tokens. Apart they may be by four times what a row alone and the same row padded
    beside others are, but by no more than `tolerance`, and by a quarter of it in any case.
    """
    length = max([TOKENS, *(window + 2 * STEPS for window in _windows(lm) if window + 2 * STEPS <= longest)])
    long, other, third = _tokens(lm, 3, length)
    ids, mask = _padded((long, third[length // 3 :], other), left=True)
    try:
        plain = _plain(lm, policy, ids, mask)  # (3, STEPS + 1, V)
        own = mask[1].bool()
        rounding = _typical_logits(lm, plain[1], _plain(lm, policy, ids[1:2, own], mask[1:2, own])[0])
        most = min(tolerance(lm), max(tolerance(lm) / 4, 4 * rounding))
        off = max(_typical_logits(lm, a, b) for a, b in _continued(lm, policy, ids, mask, plain))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any model's code, given a cache that it may not know
        why = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        if off <= most:
            return True
        why = f"their relative distance is {off:.2g}, where rounding comes to {rounding:.2g}"
    print(
        f"{where}: with a cache its logits are not those of a plain forward ({why}); every token is generated "
        "from the whole row, which is slower",
        file=sys.stderr,
    )
    return False


def beyond_windows(policy: Policy, longest: int) -> None:
    """`cache_serves` for the windows that rows of up to `longest` tokens reach beyond and that are not tried yet."""
    if policy.caches and any(SHORT_WINDOW < window + 2 * STEPS <= longest for window in _windows(policy.lm)):
        policy.caches = cache_serves(policy.lm, "policy.model", policy, longest)


def tolerance(lm: Any) -> float:
    """See `TOLERANCE`."""
    known = TOLERANCE.get(lm.dtype, max(TOLERANCE.values()))
    return max(known, EIGHT_BITS) if getattr(lm, "is_loaded_in_8bit", False) else known


def _continued(
    lm: Any, policy: Policy | None, ids: Tensor, mask: Tensor, plain: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of a continuation and of the plain forward, row by row, (t, V) each."""
    width, said = ids.shape[1] - STEPS, ids[:, -STEPS:]
    known = told = None
    if policy is not None:
        rows = zip(ids[:, :width], mask[:, :width].bool(), strict=True)
        told = prefix.read(policy, [Prompt(name="", text="", ids=tuple(row[own].tolist())) for row, own in rows])
        if told.layers is not None:
            known = prefix.cache([(told, torch.arange(len(ids), device=ids.device))], width - 1, STEPS)
    heard = Listener(said)
    generate(lm, ids[:, :width], mask[:, :width], heard, ends=(), pad=0, most=STEPS, known=known)
    yield from zip(torch.stack(heard.logits, 1), plain[:, :STEPS], strict=True)
    if policy is not None and told is not None and told.layers is not None:
        lengths = [STEPS, STEPS - 1, STEPS - 2]  # with padding behind, as replies of several lengths have it
        within = torch.arange(STEPS, device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
        owners = torch.arange(len(ids), device=ids.device)
        found = _logits(lm, prefix.go_on(policy, told, owners, said, within))
        yield from ((a[:n], b[1 : n + 1]) for a, b, n in zip(found, plain, lengths, strict=True))


def _tokens(lm: Any, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(lm.config.get_text_config().vocab_size, (rows, length), generator=generator).to(lm.device)


def _padded(rows: tuple[Tensor, ...], left: bool) -> tuple[Tensor, Tensor]:
    """ids and mask (R, T) int64."""
    width = max(map(len, rows))
    ids = rows[0].new_zeros(len(rows), width)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        own = slice(width - len(row), width) if left else slice(len(row))
        ids[n, own], mask[n, own] = row, 1
    return ids, mask


@torch.no_grad()
def _read(lm: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Hidden states (R, T, H), without a cache."""
    mask, body = torch.ones_like(ids) if mask is None else mask, lm.base_model
    return body(input_ids=ids, attention_mask=mask, use_cache=False, **positions(body, mask)).last_hidden_state


@torch.no_grad()
def _logits(lm: Any, states: Tensor) -> Tensor:
    return lm.get_output_embeddings()(states).float()


@torch.no_grad()
def _plain(lm: Any, policy: Policy | None, ids: Tensor, mask: Tensor) -> Tensor:
    """The last STEPS + 1 tokens' logits, (R, STEPS + 1, V); a policy's are a projection: the others are not made."""
    if policy is not None:
        return _logits(lm, _read(lm, ids, mask)[:, -STEPS - 1 :])
    out = lm(input_ids=ids, attention_mask=mask, use_cache=False, **positions(lm, mask))
    return out.logits[:, -STEPS - 1 :].float()


def _distance(found: Tensor, truth: Tensor) -> Tensor:
    """‖found − truth‖ / ‖truth‖ of logits (t, V), centred, position by position, (t,)."""
    found, truth = (one.double() - one.double().mean(-1, keepdim=True) for one in (found, truth))
    return ((found - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(1e-30)).nan_to_num(torch.inf)


def _typical_logits(lm: Any, found: Tensor, truth: Tensor) -> float:
    """The largest distance; in half precision the middle one: rounding sends a token to other experts at times."""
    distance = _distance(found, truth)
    return float(distance.median() if lm.dtype.itemsize < 4 else distance.max())


def _typical(lm: Any, states: Tensor, truth: Tensor) -> float:
    return _typical_logits(lm, _logits(lm, states), truth)


def _worst(lm: Any, states: Any, truth: list[Tensor]) -> float:
    """The largest distance of any position, of the rows whose truth is given."""
    return max(float(_distance(_logits(lm, a), b).max()) for a, b in zip(states, truth, strict=False))


def _windows(lm: Any) -> list[int]:
    config = lm.config.get_text_config()
    named = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return [window for window in named if type(window) is int and window > 0]


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """A model whose forward knows another call than a decoder's, or not this dtype, is refused by its own words."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, ValueError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"{where}: it does not read as a causal language model does: {first}") from error
