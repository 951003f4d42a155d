"""What of `grad_direction` is checked at its first use on a GPU and by `fpo-train doctor --kernels`, and how."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fpo_kernels import budgets, verified
from fpo_kernels.direction.reference import grad_direction as reference

Room = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ensure(room: Room, a: Tensor, direction: Tensor) -> None:
    """Refuses products of these dtypes if they do not agree with the reference on this device."""
    key = ("grad_direction", "torch", a.dtype, direction.dtype)
    verified.ensure(key, a.device, lambda: check(room, a.dtype, direction.dtype, a.device, 147, 66))


def check(
    room: Room, dtype: torch.dtype, direction_dtype: torch.dtype, device: torch.device, p: int, q: int
) -> verified.Comparison:
    """A room on ragged examples, an empty one and one of a token among them."""
    generator = torch.Generator().manual_seed(0)
    lengths = (40, 0, 1, 13)
    a, d, V = (torch.randn(*size, generator=generator) for size in ((54, p), (54, q), (q, p)))
    a, d, V, offsets = a.to(dtype), d.to(dtype), V.to(direction_dtype), torch.tensor([0, *lengths]).cumsum(0)
    exact = reference(a.double(), d.double(), offsets, V.double())
    same = reference(a, d, offsets, V)
    got = room(a.to(device), d.to(device), offsets.to(device), V.to(device))
    many = budgets.truncations(device, dtype, "")
    allowed = budgets.direction_budget((same - exact).abs(), (a, d, offsets), V, same.dtype, truncations=many)
    return verified.compared(got, exact, allowed, "example")
