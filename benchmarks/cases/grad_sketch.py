"""fk.grad_sketch on one layer, or on layers that read one input: its implementations against plain torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import fpo_kernels as fk
from benchmarks.registry import TOLERANCE, Case, Competitor, Contest, Headline, dtypes
from fpo_kernels import library
from fpo_kernels.testing import random_streams

IMPLS = ("torch", "native", "triton")
# What a SmolLM2 block hands over: q, k, v together; output; gate and up together; down.
LAYERS = ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Layers of p inputs and q outputs each that read one input, 9 texts of some tokens, k numbers a text."""

    name: str
    p: int
    qs: tuple[int, ...]
    tokens: int
    dim: int
    dtype: str


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """Every group of a block with two dims; one small one if quick."""
    found = []
    for dtype in dtypes(device):
        kind = str(dtype).removeprefix("torch.")
        for dim in (64,) if quick else (1024, 4096):
            for p, qs in ((96, (160, 32)),) if quick else LAYERS:
                name = f"{p} to {'+'.join(map(str, qs))}, k = {dim} {kind}"
                found.append(Setting(name=name, p=p, qs=qs, tokens=16 if quick else 64, dim=dim, dtype=kind))
    return found


def build(setting: Setting, device: torch.device) -> Contest:
    """Random streams, the same on every device."""
    dtype, lengths = getattr(torch, setting.dtype), [setting.tokens] * 9
    a, first, offsets = random_streams(lengths, setting.p, setting.qs[0], dtype)
    ds = [first, *(random_streams(lengths, 1, q, dtype, seed=n)[1] for n, q in enumerate(setting.qs[1:], 1))]
    sketches = [fk.TensorSketch(setting.p, q, setting.dim, 0, str(n), "block") for n, q in enumerate(setting.qs)]
    exact = fk.grad_sketch(a.double(), [d.double() for d in ds], offsets, sketches, impl="reference")
    moved = a.to(device), [d.to(device) for d in ds], offsets.to(device)
    cannot = {}
    if (why := library.why_not("grad_sketch", moved[0])) is not None:
        cannot["native"] = why
    if device.type != "cuda":
        cannot["triton"] = "triton wants a GPU"
    return Contest(
        competitors={
            impl: Competitor(
                run=functools.partial(fk.grad_sketch, *moved, sketches, impl=impl), budget=TOLERANCE[dtype]
            )
            for impl in IMPLS
            if impl not in cannot
        },
        expected=lambda: {"product": exact},
        cannot=cannot,
    )


CASE = Case(
    name="grad_sketch",
    description="sketches of one layer's per-example gradients, by implementation",
    competitors=IMPLS,
    baseline="torch",
    settings=settings,
    build=build,
    headlines=(
        Headline(text="plain torch / native", over="torch", under="native"),
        Headline(text="plain torch / triton", over="torch", under="triton"),
    ),
)
