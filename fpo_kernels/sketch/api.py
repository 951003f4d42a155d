"""The public function: what may come in, checked before any kernel sees it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpo_kernels.sketch import ops
from fpo_kernels.sketch.comparison import Projection
from fpo_kernels.sketch.spec import TensorSketch
from fpo_kernels.streams import check_stream


def grad_sketch(
    a: Tensor,
    d: Tensor | Sequence[Tensor],
    offsets: Tensor,
    sketch: TensorSketch | Projection | Sequence[TensorSketch],
    *,
    impl: str = "auto",
) -> Tensor:
    """S_i = k^(−1/2) Σ_{t∈i} (W C_a a_t) ∘ (W C_d d_t), with E⟨S_i, S_j⟩ = ⟨G_i, G_j⟩, for every example i.

    G_i = Σ_t d_t a_tᵀ is example i's gradient of a linear layer's (q, p) weight; it is never formed. Layers that
    read the same `a` are taken together with sequences of d's and sketches: the result is the sum over the layers,
    and `a` is transformed once.

    Args:
        a: (S, p) layer inputs of all examples' tokens, one example after another; float32, float64, bfloat16
            or float16, on any device an implementation serves.
        d: (S, q) gradients of each example's own scalar with respect to the layer's outputs, or a sequence of
            (S, q_l), one for each layer that reads `a`; dtype and device of `a`.
        offsets: (B+1,) int32 or int64, rising from 0 to S: example i owns rows offsets[i]:offsets[i+1], none
            where the two are equal.
        sketch: `TensorSketch` of these p and q, or as many as there are d's, of one dim, seed and family; or one of
            the projections it is compared with (`LoGra`, `SJLT`, `DenseProjection`), which have no `impl`.
        impl: "reference" multiplies with W, C_a and C_d as matrices; "torch" is plain PyTorch in bounded scratch;
            "triton" wants a GPU and takes no float64; "native" wants the compiled library. "auto" goes by device:
            on CUDA triton, native, torch in this order; elsewhere native, torch.

    Returns:
        (B, dim) in the units of a·d; float64 where the inputs are, else float32, accumulated in the same dtype at
        least, whatever autocast says. The same inputs give the same bits, and every implementation has the same
        maps. An empty example gives zeros. Carries no autograd graph.

    Raises:
        TypeError: a dtype outside those above, dtypes that differ between a and d, or no sketch.
        ValueError: shapes or devices that do not fit together, offsets that do not cut the stream, sketches of other
            sizes or that do not share dim, seed and family, an unknown `impl`; on a CPU a result beyond float32
            (`ranges`). Offsets are read for this, with one synchronisation on CUDA (skipped while a CUDA graph is
            captured).
        RuntimeError: the `impl` named cannot run here; the message says why.

    Source: tensor sketch (Pham and Pagh 2013), over the group Z₂^m: no inverse transform, because W keeps inner
    products. `fpo_kernels/sketch/README.md` has the derivation.
    """
    if impl not in ops.IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(ops.IMPLEMENTATIONS)}, got {impl!r}")
    ds = (d,) if isinstance(d, Tensor) else tuple(d)
    given = tuple(sketch) if isinstance(sketch, Sequence) else (sketch,)
    if not ds or len(given) != len(ds):
        raise ValueError(f"d and sketch must be as many, and at least one, got {len(ds)} and {len(given)}")
    for x, own in zip(ds, given, strict=True):
        check_stream(a, x, offsets)
        _check_size(own, a.shape[1], x.shape[1])
    first = given[0]
    if isinstance(first, Projection) and len(given) == 1:
        if impl != "auto":
            raise ValueError(f"impl must be auto for {type(first).__name__}, which has one, got {impl!r}")
        return first.project(a, ds[0], offsets)
    names = []
    for own in given:
        if not isinstance(own, TensorSketch) or not isinstance(first, TensorSketch):
            raise TypeError(f"sketch: only TensorSketch joins layers, got {type(own).__name__}")
        if (own.dim, own.seed, own.a_family) != (first.dim, first.seed, first.a_family):
            raise ValueError(f"sketch: layers taken together must share dim, seed and family, got {first} and {own}")
        names.append(own.name)
    assert isinstance(first, TensorSketch)
    streams = (a.detach(), [x.detach() for x in ds], offsets)
    return torch.ops.fpo.grad_sketch.default(*streams, first.dim, first.seed, first.a_family, names, impl)


def _check_size(sketch: object, p: int, q: int) -> None:
    if not isinstance(sketch, (TensorSketch, Projection)):
        raise TypeError(f"sketch must be a TensorSketch, LoGra, SJLT or DenseProjection, got {type(sketch).__name__}")
    if (sketch.p, sketch.q) != (p, q):
        raise ValueError(f"sketch must have the (p, q) of a and d, {(p, q)}, got {(sketch.p, sketch.q)}")
