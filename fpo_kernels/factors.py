"""Per-example gradients of one parameter, unformed: packed streams of inputs and output gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """G_i = Σ_t d_t a_tᵀ over the rows offsets[i]:offsets[i+1]."""

    a: Tensor  # (S, p) inputs
    d: Tensor  # (S, q) output gradients
    offsets: Tensor  # (B+1,) int64

    @property
    def examples(self) -> int:
        """B."""
        return self.offsets.numel() - 1


def offsets_of(counts: Tensor) -> Tensor:
    """Row offsets (B+1,) of examples with the given token counts (B,)."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def interleave(parts: Sequence[Factors]) -> Factors:
    """Several calls over the same examples as one stream: each example's tokens of every call together."""
    if len(parts) == 1:
        return parts[0]
    counts = [part.offsets.diff() for part in parts]
    owner = torch.cat([torch.repeat_interleave(c) for c in counts])
    order = owner.argsort(stable=True)
    a, d = torch.cat([part.a for part in parts]), torch.cat([part.d for part in parts])
    return Factors(a[order], d[order], offsets_of(torch.stack(counts).sum(0)))


def concatenate(parts: Sequence[Factors | None], sizes: Sequence[int]) -> Factors:
    """The examples of several batches, of the given sizes, as one stream; None stands for empty examples."""
    present = [part for part in parts if part is not None]
    counts = [
        present[0].offsets.new_zeros(size) if part is None else part.offsets.diff()
        for part, size in zip(parts, sizes, strict=True)
    ]
    a, d = torch.cat([part.a for part in present]), torch.cat([part.d for part in present])
    return Factors(a, d, offsets_of(torch.cat(counts)))
