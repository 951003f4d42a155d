"""Padded batches to packed token streams."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows x[b, t] with mask[b, t] set, example after example, and where each example begins and ends.

    Args:
        x: (B, T, …), any dtype and device.
        mask: (B, T) bool, or integers 0 and 1, on the same device; holes and all-zero rows are allowed.

    Returns:
        stream: (S, …), dtype of `x`; differentiable in `x`.
        offsets: (B+1,) int64 on the device of `x`: example b owns rows offsets[b]:offsets[b+1].

    Raises:
        TypeError: a mask that is neither bool nor integer.
        ValueError: a mask of another shape or device, or with values other than 0 and 1.
    """
    if x.ndim < 2 or mask.shape != x.shape[:2]:
        raise ValueError(f"mask must be (B, T) for x (B, T, …), got {tuple(mask.shape)} for {tuple(x.shape)}")
    if mask.device != x.device:
        raise ValueError(f"mask must be on the device of x, {x.device}, got {mask.device}")
    if mask.dtype != torch.bool:
        if mask.is_floating_point() or mask.is_complex():
            raise TypeError(f"mask must be bool or integer, got {mask.dtype}")
        if bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError("mask must hold 0 and 1 only")
        mask = mask.bool()
    counts = mask.sum(1)
    return x[mask], torch.cat([counts.new_zeros(1), counts.cumsum(0)])
