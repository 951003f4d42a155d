"""fk.grad_direction on one layer: its implementations against forming each G_i, and against one line of torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fpo_kernels as fk
from benchmarks import floors
from benchmarks.peers import formed_direction, plain_direction
from benchmarks.registry import TOLERANCE, Case, Competitor, Contest, dtypes
from fpo_kernels.testing import direction_budget, random_streams

IMPLS = ("torch",)
FORMED = "form G, multiply"
PLAIN = "((a @ V.T) * d).sum"
# The shapes of a SmolLM2 block, (inputs, outputs), and the two factors of a rank-8 LoRA on its query.
SHAPES = ((576, 576), (576, 1536), (1536, 576), (576, 192), (576, 8), (8, 576))
RAGGED = (7, 19, 33, 64, 64, 90, 128, 151, 64)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One layer (p inputs, q outputs) and the examples' lengths."""

    name: str
    p: int
    q: int
    lengths: tuple[int, ...]
    dtype: str


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """Equal lengths on every shape, and unequal ones on a wide and a narrow one; if quick small ones, all unequal."""
    tokens, n = 64, 16
    unequal = (3, 16, 9, 1, 12) if quick else RAGGED
    found = [(f"{n}x{tokens}, {p} to {q}", p, q, (tokens,) * n) for p, q in (() if quick else SHAPES)]
    for p, q in ((96, 160), (96, 1)) if quick else (SHAPES[0], (576, 1)):
        found.append((f"ragged {min(unequal)}-{max(unequal)}, {p} to {q}", p, q, unequal))
    kinds = [str(dtype).removeprefix("torch.") for dtype in dtypes(device)]
    return [
        Setting(name=f"{name} {kind}" if len(kinds) > 1 else name, p=p, q=q, lengths=lengths, dtype=kind)
        for kind in kinds
        for name, p, q, lengths in found
    ]


def build(setting: Setting, device: torch.device) -> Contest:
    """Random streams and a random direction of the setting's shape, the same on every device."""
    dtype = getattr(torch, setting.dtype)
    streams = random_streams(setting.lengths, setting.p, setting.q, dtype, seed=0)
    V = random_streams([setting.q], setting.p, 1, dtype, seed=1)[0]
    a, d, offsets = streams
    exact = fk.grad_direction(a.double(), d.double(), offsets, V.double(), impl="reference")
    same = fk.grad_direction(a, d, offsets, V, impl="reference")
    allowed, allowed_formed = (
        float(direction_budget((same - exact).abs(), streams, V, torch.float32, formed).norm() / exact.norm())
        for formed in (False, True)
    )
    rounded = dtype != torch.float32  # the peers round G, or the product with V, before they multiply
    a, d, offsets, V = (x.to(device) for x in (a, d, offsets, V))
    competitors = {
        FORMED: Competitor(
            run=functools.partial(formed_direction, a, d, setting.lengths, V),
            budget=TOLERANCE[dtype] if rounded else allowed_formed,
        ),
        PLAIN: Competitor(
            run=functools.partial(plain_direction, a, d, offsets, V),
            budget=TOLERANCE[dtype] if rounded else allowed,
        ),
    }
    cannot = {}
    for impl in IMPLS:
        run = functools.partial(fk.grad_direction, a, d, offsets, V, impl=impl)
        why = _why_not(run)
        if why:
            cannot[impl] = why
        else:
            competitors[impl] = Competitor(run=run, budget=allowed)
    floor = floors.direction(setting.lengths, setting.p, setting.q, setting.dtype)
    return Contest(
        competitors=competitors, expected=lambda: {"product": exact}, cannot=cannot, floors={"product": floor}
    )


def _why_not(run: functools.partial[Tensor]) -> str:
    """The reason an implementation gives for not running here."""
    try:
        run()
    except RuntimeError as problem:
        if "cannot run" in str(problem):
            return str(problem)
        raise
    return ""


CASE = Case(
    name="direction",
    description="products of one layer's per-example gradients with a stored matrix (fk.grad_direction)",
    competitors=(FORMED, PLAIN, *IMPLS),
    baseline=FORMED,
    ours=IMPLS,
    settings=settings,
    build=build,
)
