"""Batches as mappings for `model(**batch)`: counting, slicing, and joining two of different width."""

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
    tensors = [v for v in batch.values() if isinstance(v, Tensor) and v.ndim]
    lead = batch.get("input_ids", batch.get("inputs_embeds", tensors[0] if tensors else None))
    if not isinstance(lead, Tensor) or not lead.shape[0]:
        raise ValueError(f"batch: no tensor with at least one example among {sorted(batch)}")
    return lead.shape[0]


def take(batch: Batch, rows: slice | Tensor) -> dict[str, Any]:
    """The chosen examples of a batch; what is not one row an example stays as it is."""
    size = rows_of(batch)
    if isinstance(rows, slice) and rows == slice(0, size):
        return dict(batch)

    def pick(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != size:
            return value
        return value[rows if isinstance(rows, slice) else rows.to(value.device)]

    return {key: pick(value) for key, value in batch.items()}


def chunks(n: int, size: int | None) -> list[slice]:
    """Slices of at most `size` that cover range(n)."""
    step = size or n
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def join(first: Batch, second: Batch, pad_id: int | None) -> dict[str, Any] | None:
    """Both batches as one, the narrower padded on the right; None where that could change an answer.

    Right padding moves no token, so position ids that count from the left stay what they were. It needs
    an attention mask to hide the padding and a pad id to fill it.
    """
    if set(first) != set(second):
        return None
    sizes = rows_of(first), rows_of(second)
    joined: dict[str, Any] = {}
    for key in first:
        values = first[key], second[key]
        if not all(isinstance(v, Tensor) for v in values):
            if any(isinstance(v, Tensor) for v in values) or values[0] != values[1]:
                return None
            joined[key] = values[0]
            continue
        if any(v.ndim == 0 or v.shape[0] != n for v, n in zip(values, sizes, strict=True)):
            return None
        if values[0].shape[1:] == values[1].shape[1:]:
            joined[key] = torch.cat(values)
            continue
        fill = pad_id if key == "input_ids" else 0
        if any(v.ndim != 2 for v in values) or fill is None or "attention_mask" not in first:
            return None
        width = max(v.shape[1] for v in values)
        joined[key] = torch.cat([torch.nn.functional.pad(v, (0, width - v.shape[1]), value=fill) for v in values])
    return joined
