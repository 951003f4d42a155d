"""The public function: what may come in, checked before any kernel sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpo_kernels.cost import Work
from fpo_kernels.products import checked, ops
from fpo_kernels.streams import check_stream

if TYPE_CHECKING:
    from fpo_kernels.products.grouped import Ledger

Outputs = Tensor | Sequence[Tensor]


def grad_products(
    a: Tensor,
    d: Outputs,
    offsets: Tensor,
    pairs: Tensor,
    *,
    other: tuple[Tensor, Outputs, Tensor] | None = None,
    impl: str = "auto",
    way: str = "auto",
) -> Tensor:
    """⟨G_i, G_j⟩ = Σ_{t∈i, s∈j} (a_t·a_s)(d_t·d_s) for every listed pair (i, j).

    G_i = Σ_t d_t a_tᵀ is example i's gradient of a linear layer's (q, p) weight; it is never kept. Layers that
    read the same `a` (q, k and v of an attention, gate and up of an MLP) are taken together with a sequence of
    d's: the result is the sum over the layers, Σ_{t,s} (a_t·a_s)(Σ_k d^k_t·d^k_s), and a·a is computed once.

    Args:
        a: (S, p) layer inputs of all examples' tokens, one example after another; float32, float64, bfloat16
            or float16, on any device an implementation serves.
        d: (S, q) gradients of each example's own scalar with respect to the layer's outputs, or a sequence of
            (S, q_k), one for each layer that reads `a`; dtype and device of `a`.
        offsets: (B+1,) int32 or int64, rising from 0 to S: example i owns rows offsets[i]:offsets[i+1], none
            where the two are equal.
        pairs: (n, 2) int64, which examples to multiply; repetition is allowed, n = 0 too.
        other: (a2, d2, offsets2), a second packed stream of the same widths, dtype and device, with as many d's;
            then pairs[:, 1] name its examples.
        impl: "reference" forms whole G and runs anywhere; "torch" is plain PyTorch in bounded scratch; "triton"
            wants a GPU and takes no float64; "native" wants the compiled library and has no way "form". "auto"
            goes by device: on CUDA triton, native, torch in this order; elsewhere native, torch.
        way: "tokens" multiplies token by token, tile by tile; "form" forms a tile of every example's G and
            multiplies those. "auto" takes the one that the cost model (fpo_kernels/cost.py) expects to be
            sooner, of those that `impl` has. Exact either way, rounded in a different order.

    Returns:
        (n,) in the units of a² d²; float64 where the inputs are, else float32, accumulated in the same dtype
        at least, whatever autocast says. The same inputs give the same bits. An empty example gives 0. Carries
        no autograd graph.

    Raises:
        TypeError: a dtype outside those above, or dtypes that differ between streams.
        ValueError: shapes or devices that do not fit together, offsets that do not cut the stream, pairs that
            name no example, an unknown `impl` or `way`; on a CPU a result beyond float32 (`ranges`). Offsets and pairs
            are read for this and for the choice of the way, in one copy with one synchronisation on CUDA (while a CUDA
            graph is captured neither happens, and "auto" is "tokens").
        RuntimeError: the `impl` named cannot run here, or not in the `way` named; the message says why.

    Source: the ghost dot product of Wang, Mittal, Song and Jia 2024 (arXiv 2406.11011), taken tile by tile.
    """
    ds = _outputs(d)
    _check_stream("", a, ds, offsets)
    right: tuple[Tensor | None, list[Tensor], Tensor | None] = (None, [], None)
    if other is not None:
        right = _check_other(other, a, ds)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be (n, 2), got {tuple(pairs.shape)}")
    if pairs.dtype != torch.int64:
        raise TypeError(f"pairs must be int64, got {pairs.dtype}")
    if pairs.device != a.device:
        raise ValueError(f"pairs must be on the device of a, {a.device}, got {pairs.device}")
    for name, value, known in (("impl", impl, ops.IMPLEMENTATIONS), ("way", way, ops.WAYS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    left = (a.detach(), [x.detach() for x in ds], offsets)
    return torch.ops.fpo.grad_products.default(*left, pairs, *right, impl, way)


def unchecked_products(
    a: Tensor,
    ds: tuple[Tensor, ...],
    offsets: Tensor,
    pairs: Tensor,
    other: tuple[Tensor, tuple[Tensor, ...], Tensor] | None,
    work: Work,
    impl: str = "auto",
    way: str = "auto",
) -> Tensor:
    """`grad_products` for callers who know their arguments to be good and call once a layer of a model.

    The same numbers, without reading a value back, without the dispatcher and its fake, without autograd. Nothing
    is checked: offsets that do not cut the streams read memory that is not theirs.

    Args:
        a, ds, offsets, pairs, other: as `grad_products` takes them, the d's as tuples.
        work: `Work.of(lengths, pairs, lengths2)` of these offsets and pairs, made once on the host.
        impl, way: as `grad_products` takes them. On CUDA impl="torch" plans on the host and so synchronises; the
            others do not.
    """
    return ops.run(a, ds, offsets, pairs, other, work, impl, way)


def are_grouped(d: Tensor) -> bool:
    """Whether streams like `d` are multiplied many layers in a launch, by a `Ledger`."""
    return d.is_cuda and d.dtype != torch.float64 and ops.has_triton()


def choose_way(a: Tensor, ds: Sequence[Tensor], work: Work) -> str:
    """The way that "auto" takes by Triton: "tokens" or "form"."""
    return ops.choose(a, [d.shape[1] for d in ds], work, "triton", "auto")[1]


def new_ledger(pairs: NDArray[np.int64]) -> Ledger:
    """A `Ledger` for pairs (n, 2) on the host; `grad_products` of many layers, added up."""
    from fpo_kernels.products.grouped import Ledger  # triton loads where it is wanted

    return Ledger(pairs, checked.ensure_layers)


def _outputs(d: Outputs) -> tuple[Tensor, ...]:
    return (d,) if isinstance(d, Tensor) else tuple(d)


def _check_stream(whose: str, a: Tensor, ds: tuple[Tensor, ...], offsets: Tensor) -> None:
    if not ds:
        raise ValueError(f"{whose}d must hold at least one tensor, got none")
    for d in ds:
        check_stream(a, d, offsets, whose)


def _check_other(
    other: tuple[Tensor, Outputs, Tensor], a: Tensor, ds: tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor], Tensor]:
    if len(other) != 3:
        raise ValueError(f"other must be (a2, d2, offsets2), got {len(other)} items")
    a2, d2, offsets2 = other
    ds2 = _outputs(d2)
    _check_stream("other's ", a2, ds2, offsets2)
    wanted, widths = ([x.shape[1] for x in stream] for stream in ((a, *ds), (a2, *ds2)))
    if widths != wanted:
        raise ValueError(f"other must have the widths of a and d, {wanted}, got {widths}")
    if a2.dtype != a.dtype:
        raise TypeError(f"other must have the dtype of a, {a.dtype}, got {a2.dtype}")
    if a2.device != a.device:
        raise ValueError(f"other must be on the device of a, {a.device}, got {a2.device}")
    return a2.detach(), [x.detach() for x in ds2], offsets2
