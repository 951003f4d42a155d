"""Batches as mappings for `model(**batch)`: what may be in one, counting, slicing, joining two of the same shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]


def kinds_of_entries(batch: Batch) -> tuple[object, ...]:
    """What a model may take another path for: which entries there are, their dimensions and dtypes, flags."""
    entries = []
    for key in sorted(batch):
        value = batch[key]
        told: object = value if isinstance(value, (bool, str)) else None
        if isinstance(value, Tensor):
            told = value.ndim, value.dtype
        entries.append((key, type(value), told))
    return tuple(entries)


def rows_of(batch: Batch) -> int:
    """How many examples a batch holds: the length of `input_ids`, `inputs_embeds` or its first tensor."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch: wanted a mapping for model(**batch), got {type(batch).__name__}")
    keys = ["input_ids", "inputs_embeds", *batch]
    lead = next((v for key in keys if isinstance(v := batch.get(key), Tensor) and v.ndim), None)
    if lead is None or not lead.shape[0]:
        raise ValueError(f"batch: no tensor with at least one example among {sorted(batch)}")
    return lead.shape[0]


def tokens_of(batch: Batch) -> int | None:
    """How many tokens each example of a batch has, padding included; None where its entries do not say."""
    keys = ["input_ids", "inputs_embeds", "attention_mask", *batch]
    entries = (value for key in keys if isinstance(value := batch.get(key), Tensor) and value.ndim >= 2)
    return next((entry.shape[1] for entry in entries), None)


def take(batch: Batch, rows: slice | Tensor) -> dict[str, Any]:
    """The chosen examples of a batch, of mappings in it too; an entry not as long as the batch stays as it is."""
    return _take(batch, rows, rows_of(batch))


def _take(batch: Batch, rows: slice | Tensor, size: int) -> dict[str, Any]:
    if isinstance(rows, slice) and rows == slice(0, size):
        return dict(batch)
    index = range(size)[rows] if isinstance(rows, slice) else rows.tolist()

    def pick(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _take(value, rows, size)
        if isinstance(value, (list, tuple)) and len(value) == size:
            return type(value)(value[i] for i in index)
        if not getattr(value, "shape", ()) or value.shape[0] != size:
            return value
        if isinstance(rows, Tensor):
            return value[rows.to(value.device)] if isinstance(value, Tensor) else value[index]
        return value[rows]

    return {key: pick(value) for key, value in batch.items()}


def check_entries(batch: Batch) -> None:
    """Raises ValueError for an entry that a forward grows or changes: a cache of keys and values, a state."""
    rows_of(batch)
    for name, value in _entries(batch):
        if hasattr(value, "get_seq_length") or (callable(getattr(value, "update", None)) and _holds_tensors(value)):
            raise ValueError(
                f"batch: {name} is a {type(value).__name__}, which a forward grows, and the model is run "
                "more than once; put what it holds into the sequences themselves"
            )


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(one, Tensor) for one in getattr(value, "__dict__", {}).values())


def _entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of what a batch holds, of mappings, lists and tuples in it too."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _entries(one, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for n, one in enumerate(value):
            yield from _entries(one, f"{name}[{n}]")
    else:
        yield name, value


@contextmanager
def unchanged(batch: Batch) -> Iterator[None]:
    """Raises ValueError where a forward changed a tensor of the batch; the tensor is put back."""
    tensors = [(name, x) for name, x in _entries(batch) if isinstance(x, Tensor) and not x.is_inference()]
    before = [(name, x, x._version, x.detach().clone()) for name, x in tensors]
    yield
    for name, x, version, kept in before:
        if x._version != version and not torch.equal(x.detach(), kept):
            with torch.no_grad():
                x.copy_(kept)
            raise ValueError(f"batch: the model changes {name} in place, and it is run more than once; give it a copy")


def as_long_as_the_batch(batch: Batch) -> set[str]:
    """Names of the entries that are as long as the batch, and are not plainly its tokens."""
    size = rows_of(batch)
    keys = ["input_ids", "inputs_embeds", *batch]
    lead = next(v for key in keys if isinstance(v := batch.get(key), Tensor) and v.ndim)
    plain = {"attention_mask", "token_type_ids", "position_ids"}

    def doubtful(name: str, value: Any) -> bool:
        shape = getattr(value, "shape", (len(value),) if isinstance(value, (list, tuple)) else ())
        if value is lead or not shape or shape[0] != size:
            return False
        return not (name in plain and len(shape) >= 2 and tuple(shape[:2]) == tuple(lead.shape[:2]))

    def names(mapping: Mapping[str, Any], within: str) -> Iterator[str]:
        for key, value in mapping.items():
            if isinstance(value, Mapping):
                yield from names(value, f"{within}{key}.")
            elif doubtful(f"{within}{key}", value):
                yield f"{within}{key}"

    return set(names(batch, ""))


def telling(batch: Batch, least: int) -> Tensor:
    """A few examples that tell of the whole, rising: `least`, or an eighth of the batch up to four.

    First come those, one or two, that a model would move that sorts by length inside, longest or shortest first; then
    long ones with padding, the longest, the shortest. Of equals those inside, where fewer permutations leave them.
    """
    size, mask = rows_of(batch), batch.get("attention_mask")
    lengths, order = torch.zeros(size, dtype=torch.long), torch.arange(size)
    if isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == size:
        lengths = mask.bool().sum(1).cpu()
    falling, rising = ((lengths * sign).argsort(stable=True) != order for sign in (-1, 1))
    moved = (falling & rising,) if bool((falling & rising).any()) else (falling, rising)
    worth = lengths.where(lengths < lengths.max(), -1).tolist()
    places = [*range(size - 2, -1, -1), size - 1]
    wanted = [max((i for i in places if group[i]), key=worth.__getitem__) for group in moved if bool(group.any())]
    count = max(least, min(size // 8, 4), len(wanted))
    wanted += [max(places, key=worth.__getitem__), int(lengths.argmax()), int(lengths.argmin()), *places]
    return torch.tensor(sorted(list(dict.fromkeys(wanted))[:count]))


def chunks(n: int, size: int | None) -> list[slice]:
    """Slices of at most `size` that cover range(n)."""
    step = size or n
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def join(first: Batch, second: Batch, pad_id: int | None) -> dict[str, Any] | None:
    """Both batches as one, or None where that could change an answer and they must run apart.

    Only batches of the same shapes are joined: padding the narrower one would move what a model reads at its
    last position. Without a pad id, transformers' classifiers take one sequence at a time.
    """
    if rows_of(first) == rows_of(second) == 1 and (as_long_as_the_batch(first) or as_long_as_the_batch(second)):
        return None  # an entry of length one may be the example's or the batch's
    if set(first) != set(second) or ("input_ids" in first and (pad_id is None or pad_id < 0)):
        return None
    sizes = rows_of(first), rows_of(second)
    joined: dict[str, Any] = {}
    for key in first:
        left, right = first[key], second[key]
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            if left.ndim == 0 or (left.shape[0], right.shape[0]) != sizes or left.shape[1:] != right.shape[1:]:
                return None
            joined[key] = torch.cat([left, right])
        elif left is right or (
            isinstance(left, (bool, int, float, str)) and type(left) is type(right) and left == right
        ):
            joined[key] = left
        else:
            return None
    return joined


def partners(n: int, m: int, reference_of: Tensor | None) -> Tensor:
    """(n,) int64 on the CPU: the reference of each candidate among m; raises where `reference_of` does not fit."""
    if reference_of is None:
        if m not in (1, n):
            raise ValueError(f"references: {m} for {n} candidates; wanted one for all, one each, or `reference_of`")
        return torch.zeros(n, dtype=torch.long) if m == 1 else torch.arange(n)
    if not isinstance(reference_of, Tensor):
        raise TypeError(f"reference_of: wanted a tensor of integers ({n},), got {type(reference_of).__name__}")
    if reference_of.shape != (n,) or reference_of.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"reference_of: {reference_of.dtype} {tuple(reference_of.shape)}; wanted integers ({n},)")
    reference_of = reference_of.long().cpu()
    if n and not (int(reference_of.min()) >= 0 and int(reference_of.max()) < m):
        raise ValueError(f"reference_of: indices must lie in [0, {m}), got {reference_of.tolist()}")
    return reference_of
