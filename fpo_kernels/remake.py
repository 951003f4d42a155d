"""Inputs that need not be kept, because autograd keeps what they were made of.

Most linear layers of a gated transformer read a product: a norm's weight times the normalised stream, which in 16 bits
is the cast of another, an activation times a gate. With weights frozen autograd keeps the factors for its own backward
and not the product; a tap that multiplies again, when the gradient arrives, keeps nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Node = Any  # torch.autograd.graph.Node, with its _saved_ attributes

_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def are_saved_plainly() -> bool:
    """Whether autograd keeps what it saves as it is; not where hooks pack it, as under checkpointing."""
    return _hooks is not None and _hooks(False) is None


def maker_of(x: Tensor) -> Node | None:
    """The node that made x as a product of kept factors; None where there is none, or where nothing is kept."""
    return x.grad_fn if are_saved_plainly() and _is_product(x.grad_fn) else None


def remade(node: Node, of: Callable[[Tensor], Tensor] = lambda factor: factor) -> Tensor:
    """The product that `maker_of` found, bit for bit; while the tape is there. `of` takes some rows of its factors."""
    node, dtype = _uncast(node)
    with torch.no_grad():
        if dtype is None and (made := _norm(node, of)) is not None:
            return made
        left, right = (
            remade(parent, of) if saved is None else of(saved)
            for saved, (parent, _) in zip(_factors(node), node.next_functions, strict=True)
        )
        if dtype is None:
            return left * right
        if torch.result_type(left, right) != torch.float32 or dtype.itemsize != 2:
            return (left * right).to(dtype)
        # rounded as it is written: a norm's product in fp32 would take three times the bytes
        rounded = torch.empty(torch.broadcast_shapes(left.shape, right.shape), dtype=dtype, device=left.device)
        return torch.mul(left, right, out=rounded)


def _norm(node: Node, of: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The product of a weight and the cast of another product in one kernel, where it is that of a norm on a GPU."""
    (left, right), ((of_left, _), (of_right, _)) = _factors(node), node.next_functions
    if (left is None) == (right is None):
        return None
    weight, parent = (left, of_right) if right is None else (right, of_left)
    if weight is None or not _has_kernel(weight.device.type):
        return None
    inner, dtype = _uncast(parent)
    if inner is None or dtype is None:
        return None
    x, rows = _factors(inner)
    if x is None or rows is None:
        return None
    from .remake_triton import scaled_rows  # triton loads where it is wanted

    return scaled_rows(of(x), of(rows), weight, dtype)


@functools.cache
def _has_kernel(device: str) -> bool:
    return device == "cuda" and importlib.util.find_spec("triton") is not None


def _is_product(node: Node | None) -> bool:
    if node is None:
        return False
    node, _ = _uncast(node)
    if node is None or node.name() != "MulBackward0":
        return False
    pairs = zip(_factors(node), node.next_functions, strict=True)
    return all(saved is not None or _is_product(parent) for saved, (parent, _) in pairs)


def is_cast(node: Node) -> bool:
    """Whether what `maker_of` found has a cast on the way: more to read and write than a product in one dtype."""
    made, dtype = _uncast(node)
    if made is None or dtype is not None:
        return True
    pairs = zip(_factors(made), made.next_functions, strict=True)
    return any(saved is None and is_cast(parent) for saved, (parent, _) in pairs)


def _uncast(node: Node) -> tuple[Node | None, torch.dtype | None]:
    """The node whose output a cast took, and the dtype it was cast to; norms multiply in fp32 and go on in 16 bits."""
    node = _beyond_taps(node)
    if node is None or node.name() != "ToCopyBackward0":
        return node, None
    made, (cast,) = _beyond_taps(node.next_functions[0][0]), node._input_metadata
    if made is None or len(made._input_metadata) != 1 or made._input_metadata[0].device != cast.device:
        return None, None
    return made, cast.dtype


def _beyond_taps(node: Node | None) -> Node | None:
    """The node whose output a tap passed on."""
    while node is not None and node.name() == "_TapBackward":
        node = node.next_functions[0][0]
    return node


def _factors(node: Node) -> tuple[Tensor | None, Tensor | None]:
    return node._saved_self, node._saved_other


class Inputs:
    """The inputs that the calls of a pass read: which read the same one, and those that are made again."""

    def __init__(self) -> None:
        # id → an input, its version, where it lies, and its group
        self._met: dict[int, tuple[weakref.ref[Tensor], int, int, int]] = {}
        self._latest: tuple[int, Tensor] | None = None  # the input made last, and its group

    def group(self, given: Tensor, version: int, fresh: int) -> int:
        """The number of all calls that read this very tensor at this version, `fresh` if it is the first."""
        state = version, given.data_ptr()
        known = self._met.get(id(given))
        if known is not None and known[0]() is given and known[1:3] == state:
            return known[3]
        self._met[id(given)] = weakref.ref(given), *state, fresh
        return fresh

    def remade(self, node: Node, group: int) -> Tensor:
        """A group's input, made again."""
        if self._latest is None or self._latest[0] != group:  # siblings come one after another
            self._latest = group, remade(node)
        return self._latest[1]

    def close(self) -> None:
        """Let go of what was made."""
        self._latest = None
