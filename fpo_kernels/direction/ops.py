"""The operator torch.ops.fpo.grad_direction: which implementation runs, and the checks that read values.

It is opaque to torch.compile, so the choice and the checks happen when it runs, never while tracing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fpo_kernels import ranges, streams, verified
from fpo_kernels.direction import checked

IMPLEMENTATIONS = ("auto", "reference", "torch", "triton", "native")

_LIBRARY = torch.library.Library("fpo", "FRAGMENT")
_LIBRARY.define("grad_direction(Tensor a, Tensor d, Tensor offsets, Tensor direction, str impl) -> Tensor")


def _grad_direction(a: Tensor, d: Tensor, offsets: Tensor, direction: Tensor, impl: str) -> Tensor:
    # a CUDA graph cannot sync; whoever captures has called once before, with the same shapes
    if not (a.is_cuda and torch.cuda.is_current_stream_capturing()):
        streams.refuse("grad_direction", streams.offset_flaws(offsets, len(a)), offsets=offsets)
    impl = "torch" if impl == "auto" else impl
    made = _run(a, d, offsets, direction, impl)
    if not ranges.are_looked_at(made):
        return made

    def scale() -> Tensor:
        return ranges.scales(a, [d], offsets) * ranges.largest(direction)

    def again(rows: Tensor) -> Tensor:
        return _run(a.double(), d.double(), offsets, direction.double(), impl)[rows]

    return ranges.mended("grad_direction", made, ranges.are_moderate(a, d, direction), scale, again)


def _run(a: Tensor, d: Tensor, offsets: Tensor, direction: Tensor, impl: str) -> Tensor:
    if impl == "reference":
        from fpo_kernels.direction.reference import grad_direction
    elif impl == "torch":
        from fpo_kernels.direction.blocked import grad_direction

        if verified.needed(a.device):
            checked.ensure(grad_direction, a, direction)
    else:
        raise RuntimeError(
            f'grad_direction: impl="{impl}" cannot run: this operation has no {impl} kernel, '
            'one large matrix product being the BLAS\'s work; use "auto" or "torch"'
        )
    # under autocast a matrix product would round its inputs to 16 bits
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        return grad_direction(a, d, offsets, direction)


def unchecked_direction(a: Tensor, d: Tensor, offsets: Tensor, direction: Tensor) -> Tensor:
    """`grad_direction` by impl="auto" for callers who made the streams themselves.

    Checks nothing, goes past the dispatcher (torch.compile and dispatch modes do not see it as one operator) and
    never waits for a GPU. Arguments and result are those of `grad_direction`.
    """
    return _run(a.detach(), d.detach(), offsets, direction.detach(), "torch")


def _fake(a: Tensor, d: Tensor, offsets: Tensor, direction: Tensor, impl: str) -> Tensor:
    wide = torch.float64 in (a.dtype, direction.dtype)
    return a.new_empty(offsets.shape[0] - 1, dtype=torch.float64 if wide else torch.float32)


_LIBRARY.impl("grad_direction", _grad_direction, "CompositeExplicitAutograd")
torch.library.register_fake("fpo::grad_direction", _fake, lib=_LIBRARY)
