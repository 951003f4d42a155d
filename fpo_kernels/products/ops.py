"""The operator torch.ops.fpo.grad_products: which implementation runs, and the checks that read values.

It is opaque to torch.compile, so the choice and the checks happen when it runs, never while tracing.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "reference", "torch", "triton", "native")

# FRAGMENT: the other operations add themselves to the same namespace. Unlike torch.library.custom_op this
# imports no part of the compiler.
_LIBRARY = torch.library.Library("fpo", "FRAGMENT")
_LIBRARY.define(
    "grad_products(Tensor a, Tensor d, Tensor offsets, Tensor pairs,"
    " Tensor? a2, Tensor? d2, Tensor? offsets2, str impl) -> Tensor"
)


def _grad_products(
    a: Tensor,
    d: Tensor,
    offsets: Tensor,
    pairs: Tensor,
    a2: Tensor | None,
    d2: Tensor | None,
    offsets2: Tensor | None,
    impl: str,
) -> Tensor:
    rows2 = len(a) if a2 is None else len(a2)
    _check_values(offsets, len(a), offsets if offsets2 is None else offsets2, rows2, pairs)
    if impl == "auto":
        impl = choose(a)
    # The rooms are imported where they are wanted: triton must not load on a machine that never calls it.
    if impl == "reference":
        from fpo_kernels.products.reference import grad_products
    elif impl == "torch":
        from fpo_kernels.products.blocked import grad_products
    elif impl == "native":
        from fpo_kernels.products.native import grad_products
    else:
        if not importlib.util.find_spec("triton"):
            raise RuntimeError('grad_products: impl="triton" cannot run: triton is not installed')
        from fpo_kernels.products.triton import grad_products
    other = None if a2 is None or d2 is None or offsets2 is None else (a2, d2, offsets2)
    with torch.no_grad():
        return grad_products(a, d, offsets, pairs, other)


def _fake(
    a: Tensor,
    d: Tensor,
    offsets: Tensor,
    pairs: Tensor,
    a2: Tensor | None,
    d2: Tensor | None,
    offsets2: Tensor | None,
    impl: str,
) -> Tensor:
    return a.new_empty(pairs.shape[0], dtype=torch.float64 if a.dtype == torch.float64 else torch.float32)


_LIBRARY.impl("grad_products", _grad_products, "CompositeExplicitAutograd")
torch.library.register_fake("fpo::grad_products", _fake, lib=_LIBRARY)


def choose(a: Tensor) -> str:
    """What "auto" stands for: by device, the room that measured fastest on the steering shape (README)."""
    from fpo_kernels.products import native

    if a.is_cuda and a.dtype != torch.float64 and importlib.util.find_spec("triton"):
        return "triton"
    if native.why_not(a) is None:
        return "native"
    return "torch"


def _check_values(offsets: Tensor, rows: int, offsets2: Tensor, rows2: int, pairs: Tensor) -> None:
    """Refuses offsets that do not cut the stream and pairs that name no example; on CUDA this syncs once."""
    if pairs.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # a CUDA graph cannot sync; whoever captures has called once before, with the same shapes
    flaws = {}
    for name, cut, end in (("offsets", offsets, rows), ("other's offsets", offsets2, rows2)):
        flaws[f"{name} must start at 0"] = cut[0] != 0
        flaws[f"{name} must not fall"] = (cut.diff() < 0).any()
        flaws[f"{name} must end at the number of rows, {end}"] = cut[-1] != end
        if offsets2 is offsets:
            break
    i, j = pairs.unbind(1)
    beyond = (i >= len(offsets) - 1) | (j >= len(offsets2) - 1)
    flaws["pairs name an example that is not there"] = (beyond | (i < 0) | (j < 0)).any()
    found = torch.stack(list(flaws.values())).tolist()
    for flaw, bad in zip(flaws, found, strict=True):
        if bad:
            raise ValueError(
                f"grad_products: {flaw}; got offsets {_brief(offsets)}, "
                f"{len(offsets2) - 1} examples on the right, pairs {_brief(pairs)}"
            )


def _brief(x: Tensor) -> str:
    values = str(x.flatten()[:8].tolist())
    return values if x.numel() <= 8 else values[:-1] + ", …]"
