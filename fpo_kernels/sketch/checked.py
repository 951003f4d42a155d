"""What of a room of `grad_sketch` is checked at its first use and by `fpo-train doctor --kernels`, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpo_kernels import budgets, library, verified
from fpo_kernels.sketch import config_triton
from fpo_kernels.sketch.blocked import grad_sketch as widened
from fpo_kernels.sketch.spec import TensorSketch

# Tokens of the examples: more than a chunk of any room's, none, one, and an odd number.
LENGTHS = (67, 0, 1, 13)


def ensure(room: Any, impl: str, a: Tensor, sketches: Sequence[TensorSketch]) -> None:
    """Refuses a launch configuration of a compiled room that has not agreed with the reference on this device."""
    if impl not in ("triton", "native") or not verified.needed(a.device):
        return
    dim, p, qs = sketches[0].dim, sketches[0].p, tuple(own.q for own in sketches)
    # A bucket's coordinates are a constant of the kernel; from some width on a stream is read in parts.
    loads = tuple((-(-n // dim), (n - 1).bit_length()) for n in (p, *qs))
    key = ("grad_sketch", impl, f"k={dim}", a.dtype, *loads)
    verified.ensure(key, a.device, lambda: check(room, impl, a.dtype, a.device, dim, p, qs))


def check(
    room: Any, impl: str, dtype: torch.dtype, device: torch.device, dim: int, p: int, qs: tuple[int, ...]
) -> verified.Comparison:
    """A room on ragged examples, an empty one and one of a token among them, against the torch room in float64.

    That room is held to the definition by the tests, where its matrices still fit.
    """
    generator = torch.Generator().manual_seed(0)
    rows = sum(LENGTHS)
    a, *ds = (torch.randn(rows, n, generator=generator, dtype=torch.float64).to(dtype) for n in (p, *qs))
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    sketches = [TensorSketch(p, q, dim, 0, f"{n}", "a") for n, q in enumerate(qs)]

    def tables(where: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
        return sketches[0].maps(where)[0].table, tuple(own.maps(where)[1].table for own in sketches)

    table, others = tables(device)
    got = room.grad_sketch(a.to(device), table, tuple(d.to(device) for d in ds), others, offsets.to(device))
    table, others = tables(torch.device("cpu"))
    exact = widened(a.double(), table, tuple(d.double() for d in ds), others, offsets)
    total = torch.float64 if dtype == torch.float64 else torch.float32
    lost = cut_off(impl, device, dim)
    allowed = sum(
        budgets.sketch_budget((a, d, offsets), own, total, len(qs), lost) for d, own in zip(ds, sketches, strict=True)
    )
    assert isinstance(allowed, Tensor)
    error = (got.detach().cpu().double() - exact).norm(dim=1)
    return verified.compared(error, torch.zeros_like(error), allowed, "sketch of example")


def cut_off(impl: str, device: torch.device, dim: int) -> float:
    """What matrix units cut off a room's sketch of `dim` numbers, in ε of fp32 and of its size: `budgets.CUT` a block.

    Only the Triton room multiplies on them; the others' products are plain fp32, of 16-bit streams too. It has W's two
    sides on both streams, each with up to three parts of a number, whatever the stream's dtype; the left one's blocks
    may have zeros for the other tokens among their terms. What sides cut off
    adds up: a sketch is linear in each of its two spectra.
    """
    if impl != "triton" or device.type != "cuda":
        return 0.0
    sides = config_triton.sides(dim)
    blocks = -(-sides.rows * sides.joined // budgets.LEAST_BLOCK) - (-sides.columns // budgets.LEAST_BLOCK)
    return budgets.CUT * 2 * 3 * blocks


def missing(impl: str, device: torch.device) -> str | None:
    """Why a compiled room cannot run on a device; None where it can."""
    if impl == "native":
        return library.why_not("grad_sketch", torch.empty(0, device=device))
    return "needs a GPU" if impl == "triton" and device.type != "cuda" else None
