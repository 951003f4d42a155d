"""A frozen model's matrices made ready once for products of few rows, not anew for each token.

On a CPU `linear` arranges a matrix in every call; of 36 rows that is a third of its time. oneDNN's arrangement is kept
beside the weights instead, as torch's own compiler does where weights are frozen. On a GPU matrices of 4 bits are
unpacked in every call; where memory holds all of them they stay so while replies are decoded. What either takes,
`plan` counts.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from fpo_train.config.units import MOST_PACKED

ROWS = 32  # that the arrangement is chosen for; fewer and more go by it as well
SEEN = 64  # numbers of a matrix that tell whether it is still the one that was arranged


class _Packed(NamedTuple):
    """A matrix's arrangement, and some of the numbers that it is of."""

    matrix: Tensor
    seen: Tensor


_packed: weakref.WeakKeyDictionary[nn.Module, _Packed] = weakref.WeakKeyDictionary()


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Let a model's frozen fp32 linear layers on a CPU go by arranged matrices, in passes without a tape.

    They give the same up to rounding. Layers of other classes or with a forward of their own run as they are; so do all
    where the arrangements would take more than `MOST_PACKED` bytes. A matrix that has changed is arranged again.
    """
    layers = [] if torch.is_grad_enabled() else [module for module in model.modules() if _can_be(module)]
    if not layers or sum(layer.weight.nbytes for layer in layers) > MOST_PACKED or not _works():
        yield
        return
    with _going_by({layer: functools.partial(_product, _arranged(layer), layer.bias) for layer in layers}):
        yield


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Let a model's 4-bit layers (bitsandbytes) multiply with matrices that are unpacked once, as they would with each.

    Those that a CPU has arranged in its own way, and layers with a forward of their own, run as they are.
    """
    layers: list[Any] = [module for module in model.modules() if _is_of_4_bits(module)]
    with _going_by({layer: functools.partial(_as_unpacked, _matrix(layer), layer.bias) for layer in layers}):
        yield


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the arrangements that a model's layers have by now."""
    return sum(one.matrix.nbytes for module in model.modules() if (one := _packed.get(module)))


@contextmanager
def _going_by(products: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    try:
        for layer, product in products.items():
            vars(layer)["forward"] = product
        yield
    finally:
        for layer in products:
            vars(layer).pop("forward", None)


def _can_be(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.is_cpu and weight.dtype == torch.float32 and not weight.requires_grad


def _is_of_4_bits(module: nn.Module) -> bool:
    known = "bitsandbytes" in sys.modules and type(module).__module__.startswith("bitsandbytes.")
    if not known or type(module).__name__ != "Linear4bit" or "forward" in vars(module):
        return False
    state = getattr(module.weight, "quant_state", None)
    return state is not None and not getattr(state, "packing_format_for_cpu", False)


def _matrix(layer: Any) -> Tensor:
    state = layer.weight.quant_state
    whole: Tensor = sys.modules["bitsandbytes"].functional.dequantize_4bit(layer.weight.data, state)
    return whole.to(layer.compute_dtype or state.dtype)


def _as_unpacked(matrix: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    bias = None if bias is None else bias.to(matrix.dtype)
    return nn.functional.linear(x.to(matrix.dtype), matrix, bias).to(x.dtype)


def _arranged(layer: nn.Linear) -> Tensor:
    weight, known = layer.weight.detach(), _packed.get(layer)
    # its version does not tell: PEFT merges adapters through .data
    seen = weight.reshape(-1)[:: max(1, weight.numel() // SEEN)]
    if known is None or not torch.equal(known.seen, seen):
        matrix = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        known = _packed[layer] = _Packed(matrix, seen.clone())
    return known.matrix


def _product(matrix: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")


@functools.cache
def _works() -> bool:
    """Whether torch was built with it, and gives what `linear` gives."""
    if not torch.backends.mkldnn.is_available():
        return False
    # of numbers of its own: a run that is resumed asks again, and goes on with the same draws
    x, weight, bias = (torch.arange(float(n)).sin() for n in (60, 720, 36))
    x, weight = x.view(3, 1, 20), weight.view(36, 20)
    try:
        matrix: Any = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        found = _product(matrix, bias, x)
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(found, nn.functional.linear(x, weight, bias), atol=1e-4)
