"""The public function: what may come in, checked before any kernel sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from fpo_kernels.products import ops

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def grad_products(
    a: Tensor,
    d: Tensor,
    offsets: Tensor,
    pairs: Tensor,
    *,
    other: tuple[Tensor, Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> Tensor:
    """⟨G_i, G_j⟩ = Σ_{t∈i, s∈j} (a_t·a_s)(d_t·d_s) for every listed pair (i, j).

    G_i = Σ_t d_t a_tᵀ is example i's gradient of a linear layer's (q, p) weight; it is never formed.

    Args:
        a: (S, p) layer inputs of all examples' tokens, one example after another; float32, float64, bfloat16
            or float16, on any device an implementation serves.
        d: (S, q) gradients of each example's own scalar with respect to the layer's outputs; dtype and device
            of `a`.
        offsets: (B+1,) int32 or int64, rising from 0 to S: example i owns rows offsets[i]:offsets[i+1], none
            where the two are equal.
        pairs: (n, 2) int64, which examples to multiply; repetition is allowed, n = 0 too.
        other: (a2, d2, offsets2), a second packed stream of the same p, q, dtype and device; then pairs[:, 1]
            name its examples.
        impl: "reference" forms G and runs anywhere; "torch" is plain PyTorch in bounded scratch; "triton"
            wants a GPU and takes no float64; "native" wants the compiled library. "auto" goes by device: on
            CUDA triton, native, torch in this order; elsewhere native, torch.

    Returns:
        (n,) in the units of a² d²; float64 where the inputs are, else float32, accumulated in the same dtype
        at least. The same inputs give the same bits. An empty example gives 0. Carries no autograd graph.

    Raises:
        TypeError: a dtype outside those above, or dtypes that differ between streams.
        ValueError: shapes or devices that do not fit together, offsets that do not cut the stream, pairs that
            name no example, an unknown `impl`. Offsets and pairs are read for this, in one reduction with one
            synchronisation on CUDA (skipped while a CUDA graph is captured).
        RuntimeError: the `impl` named cannot run here; the message says why.

    Source: the ghost dot product of Wang, Mittal, Song and Jia 2024 (arXiv 2406.11011), taken tile by tile.
    """
    _check_stream("", a, d, offsets)
    if other is not None:
        _check_other(other, a, d)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be (n, 2), got {tuple(pairs.shape)}")
    if pairs.dtype != torch.int64:
        raise TypeError(f"pairs must be int64, got {pairs.dtype}")
    if pairs.device != a.device:
        raise ValueError(f"pairs must be on the device of a, {a.device}, got {pairs.device}")
    if impl not in ops.IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(ops.IMPLEMENTATIONS)}, got {impl!r}")
    a2, d2, offsets2 = other or (None, None, None)
    right = (a2 if a2 is None else a2.detach(), d2 if d2 is None else d2.detach(), offsets2)
    return torch.ops.fpo.grad_products.default(a.detach(), d.detach(), offsets, pairs, *right, impl)


def _check_stream(whose: str, a: Tensor, d: Tensor, offsets: Tensor) -> None:
    if a.ndim != 2 or d.ndim != 2 or a.shape[0] != d.shape[0]:
        raise ValueError(
            f"{whose}a and d must be (S, p) and (S, q) with the same S, got {tuple(a.shape)} and {tuple(d.shape)}"
        )
    if a.dtype not in _DTYPES:
        raise TypeError(f"{whose}a must be float32, float64, bfloat16 or float16, got {a.dtype}")
    if d.dtype != a.dtype:
        raise TypeError(f"{whose}d must have the dtype of a, {a.dtype}, got {d.dtype}")
    if d.device != a.device or offsets.device != a.device:
        raise ValueError(
            f"{whose}d and offsets must be on the device of a, {a.device}, got {d.device} and {offsets.device}"
        )
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{whose}offsets must be (B+1,), got {tuple(offsets.shape)}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{whose}offsets must be int32 or int64, got {offsets.dtype}")


def _check_other(other: tuple[Tensor, Tensor, Tensor], a: Tensor, d: Tensor) -> None:
    if len(other) != 3:
        raise ValueError(f"other must be (a2, d2, offsets2), got {len(other)} items")
    a2, d2, _ = other
    _check_stream("other's ", *other)
    wanted = (a.shape[1], d.shape[1])
    if (a2.shape[1], d2.shape[1]) != wanted:
        raise ValueError(f"other must have the widths of a and d, {wanted}, got {(a2.shape[1], d2.shape[1])}")
    if a2.dtype != a.dtype:
        raise TypeError(f"other must have the dtype of a, {a.dtype}, got {a2.dtype}")
    if a2.device != a.device:
        raise ValueError(f"other must be on the device of a, {a.device}, got {a2.device}")
