"""What a model can read: token ids that its embedding has a row for, and so many of them at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fpo_train.errors import RunError

# Where configurations state the context, the first that does; a number below 1 says that there is no bound.
STATED = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
    "n_ctx",
    "context_length",
)


def context_of(model: Any) -> int | None:
    """Tokens that a model reads at most, as its configuration and its table of positions have it; None: no bound.

    A table with a row for padding (RoBERTa's, XLM-R's, MPNet's) gives its first token the row behind that one: of 514
    rows, with padding in row 1, 512 are left.
    """
    config = model.config.get_text_config()
    stated = [value for name in STATED if isinstance(value := getattr(config, name, None), int)]
    bounds = [value for value in stated[:1] if value > 0]
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            bounds.append(len(module.weight) - padding - 1)
    return min(bounds, default=None)


def rows_of(model: Any) -> int:
    """Rows of the embedding: token ids from there on cannot be read."""
    return len(model.get_input_embeddings().weight)


def pad_id(*wanted: int | None, rows: int) -> int:
    """The first id that has a row: masks tell padding, so that any will do; token 0 where there is none."""
    return next((one for one in wanted if one is not None and 0 <= one < rows), 0)


def oversized(tokenizer: Any, rows: int) -> bool:
    """Whether the tokenizer knows a token that has no row: texts may hold it then."""
    return max(tokenizer.get_vocab().values(), default=0) >= rows


def refuse_wordless(tokenizer: Any, name: str) -> None:
    """See that a tokenizer has words: transformers makes up one of special tokens where a folder holds none.

    Raises:
        RunError: it has none.
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        told = f"its tokenizer has {len(tokenizer)} special tokens and no other, so that it reads no text"
        raise RunError(f"model {name}: {told}; put the tokenizer's files there (tokenizer.save_pretrained)")


def check_tokens(ids: Iterable[int], rows: int, tokenizer: Any, holder: str, setting: str = "model") -> None:
    """See that a model with so many `rows` in its embedding can read the ids.

    Args:
        holder: whose tokens they are, as the complaint begins. setting: that names the model.

    Raises:
        RunError: there is none, or one without a row.
    """
    listed = list(ids)
    if not listed:
        raise RunError(f"{holder} comes to no token at all under the tokenizer of {setting} {named(tokenizer)}")
    beyond = next((one for one in listed if not 0 <= one < rows), None)
    if beyond is not None:
        raise RunError(
            f"{holder} holds the token {tokenizer.convert_ids_to_tokens(beyond)!r} ({beyond}), but the embedding of "
            f"{setting} {named(tokenizer)} has {rows} rows: tokens were added without resizing it"
        )


def alike(together: Tensor, alone: Tensor, within: float) -> bool:
    """Whether rows (R, N) that were read together are those that were read each alone, `within` a part of their norm.

    Rows that are no numbers even alone are passed over: that is not their neighbours' doing.
    """
    off, bound = (together - alone).norm(dim=1), within * alone.norm(dim=1) + 1e-6
    return bool(((off <= bound) | bound.isnan()).all())


def named(tokenizer: Any) -> str:
    """The folder or hub id that a tokenizer came from."""
    return str(getattr(tokenizer, "name_or_path", ""))
