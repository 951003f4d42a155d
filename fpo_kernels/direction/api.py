"""The public function: what may come in, checked before any kernel sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from fpo_kernels import streams
from fpo_kernels.direction import ops


def grad_direction(a: Tensor, d: Tensor, offsets: Tensor, direction: Tensor, *, impl: str = "auto") -> Tensor:
    """⟨G_i, V⟩ = Σ_{t∈i} d_tᵀ V a_t for every example i and one matrix V, the direction.

    G_i = Σ_t d_t a_tᵀ is example i's gradient of a linear layer's (q, p) weight; it is never formed.

    Args:
        a: (S, p) layer inputs of all examples' tokens, one example after another; float32, float64, bfloat16
            or float16, on any device an implementation serves.
        d: (S, q) gradients of each example's own scalar with respect to the layer's outputs; dtype and device
            of `a`.
        offsets: (B+1,) int32 or int64, rising from 0 to S: example i owns rows offsets[i]:offsets[i+1], none
            where the two are equal.
        direction: (q, p), e.g. a mean or preconditioned gradient; any of the four dtypes, not necessarily that
            of `a`, and the device of `a`.
        impl: "reference" forms G and runs anywhere; "torch", which "auto" stands for, is one matrix
            product of the vendor's library in bounded scratch; "triton" and "native" have no kernel for this
            operation.

    Returns:
        (B,) in the units of a·d·direction; float64 where the streams or the direction are, else float32.
        Products are accumulated in the same dtype, tokens in float64. The same inputs give the same bits. An
        empty example gives 0. Carries no autograd graph.

    Raises:
        TypeError: a dtype outside those above, or dtypes that differ between a and d.
        ValueError: shapes or devices that do not fit together, offsets that do not cut the stream, an unknown
            `impl`; on a CPU a result beyond float32 (`ranges`). Offsets are read for this, with one synchronisation on
            CUDA (skipped while a CUDA graph is captured).
        RuntimeError: the `impl` named cannot run here; the message says why.

    Source: the ghost gradient-vector product of Wang, Mittal, Song and Jia 2024 (arXiv 2406.11011).
    """
    streams.check_stream(a, d, offsets)
    wanted = (d.shape[1], a.shape[1])
    if tuple(direction.shape) != wanted:
        raise ValueError(f"direction must be (q, p) = {wanted}, got {tuple(direction.shape)}")
    if direction.dtype not in streams.DTYPES:
        raise TypeError(f"direction must be float32, float64, bfloat16 or float16, got {direction.dtype}")
    if direction.device != a.device:
        raise ValueError(f"direction must be on the device of a, {a.device}, got {direction.device}")
    if impl not in ops.IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(ops.IMPLEMENTATIONS)}, got {impl!r}")
    return torch.ops.fpo.grad_direction.default(a.detach(), d.detach(), offsets, direction.detach(), impl)
