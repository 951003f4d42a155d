"""A call when a tensor's gradient arrives, at the price of a dictionary."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor


def on_arrival(x: Tensor, arrived: Callable[[Tensor], None]) -> bool:
    """Have `arrived` called with the gradient of x, complete, whatever becomes of x in place; False if it cannot be.

    What `Tensor.register_hook` does, without the handle, which costs most of it. A view's hook is lost where somebody
    goes on in place, so it is put on what the view is of, if that is all of it: the layer's own product.
    """
    if x._is_view():
        base = x._base
        if base is None or base.numel() != x.numel() or not base.is_contiguous() or not x.is_contiguous():
            return False
        shape = x.shape
        return on_arrival(base, lambda d: arrived(d.view(shape) if d.is_contiguous() else d.reshape(shape)))
    node = x.grad_fn
    if node is None or x._backward_hooks is not None:
        return False
    x._backward_hooks = OrderedDict({0: arrived})
    node._register_hook_dict(x)
    return True
