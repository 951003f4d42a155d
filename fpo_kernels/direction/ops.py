"""The operator torch.ops.fpo.grad_direction: which implementation runs, and the checks that read values.

It is opaque to torch.compile, so the choice and the checks happen when it runs, never while tracing.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from fpo_kernels import streams

IMPLEMENTATIONS = ("auto", "reference", "torch", "triton", "native")

_LIBRARY = torch.library.Library("fpo", "FRAGMENT")
_LIBRARY.define("grad_direction(Tensor a, Tensor d, Tensor offsets, Tensor direction, str impl) -> Tensor")


def _grad_direction(a: Tensor, d: Tensor, offsets: Tensor, direction: Tensor, impl: str) -> Tensor:
    # a CUDA graph cannot sync; whoever captures has called once before, with the same shapes
    if not (a.is_cuda and torch.cuda.is_current_stream_capturing()):
        streams.refuse("grad_direction", streams.offset_flaws(offsets, len(a)), offsets=offsets)
    return _run(a, d, offsets, direction, choose(a, direction) if impl == "auto" else impl)


def _run(a: Tensor, d: Tensor, offsets: Tensor, direction: Tensor, impl: str) -> Tensor:
    # The rooms are imported where they are wanted: triton must not load on a machine that never calls it.
    if impl == "reference":
        from fpo_kernels.direction.reference import grad_direction
    elif impl == "torch":
        from fpo_kernels.direction.blocked import grad_direction
    elif impl == "native":
        raise RuntimeError(
            'grad_direction: impl="native" cannot run: this operation has no native kernel, '
            'one large matrix product being the BLAS\'s work; use "auto" or "torch"'
        )
    else:
        if not importlib.util.find_spec("triton"):
            raise RuntimeError('grad_direction: impl="triton" cannot run: triton is not installed')
        from fpo_kernels.direction.triton import grad_direction
    # under autocast a matrix product would round its inputs to 16 bits
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        return grad_direction(a, d, offsets, direction)


def unchecked_direction(a: Tensor, d: Tensor, offsets: Tensor, direction: Tensor) -> Tensor:
    """`grad_direction` by impl="auto" for callers who made the streams themselves.

    Checks nothing, goes past the dispatcher (torch.compile and dispatch modes do not see it as one operator) and
    never waits for a GPU. Arguments and result are those of `grad_direction`.
    """
    return _run(a.detach(), d.detach(), offsets, direction.detach(), choose(a, direction))


def _fake(a: Tensor, d: Tensor, offsets: Tensor, direction: Tensor, impl: str) -> Tensor:
    wide = torch.float64 in (a.dtype, direction.dtype)
    return a.new_empty(offsets.shape[0] - 1, dtype=torch.float64 if wide else torch.float32)


_LIBRARY.impl("grad_direction", _grad_direction, "CompositeExplicitAutograd")
torch.library.register_fake("fpo::grad_direction", _fake, lib=_LIBRARY)


def choose(a: Tensor, direction: Tensor) -> str:
    """What "auto" stands for: triton on a GPU for what it takes, else torch."""
    wide = torch.float64 in (a.dtype, direction.dtype)
    return "triton" if a.is_cuda and not wide and importlib.util.find_spec("triton") else "torch"
