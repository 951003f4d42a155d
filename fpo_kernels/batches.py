"""Batches as mappings for `model(**batch)`: counting, slicing, and joining two of the same shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]


def rows_of(batch: Batch) -> int:
    """How many examples a batch holds: the length of `input_ids`, `inputs_embeds` or its first tensor."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch: wanted a mapping for model(**batch), got {type(batch).__name__}")
    keys = ["input_ids", "inputs_embeds", *batch]
    lead = next((v for key in keys if isinstance(v := batch.get(key), Tensor) and v.ndim), None)
    if lead is None or not lead.shape[0]:
        raise ValueError(f"batch: no tensor with at least one example among {sorted(batch)}")
    return lead.shape[0]


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


def chunks(n: int, size: int | None) -> list[slice]:
    """Slices of at most `size` that cover range(n)."""
    step = size or n
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def join(first: Batch, second: Batch, pad_id: int | None) -> dict[str, Any] | None:
    """Both batches as one, or None where that could change an answer and they must run apart.

    Only batches of the same shapes are joined: padding the narrower one would move what a model reads at its
    last position. Without a pad id, transformers' classifiers take one sequence at a time.
    """
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
