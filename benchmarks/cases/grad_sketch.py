"""fk.grad_sketch on one layer, or on layers that read one input: its implementations against plain torch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import fpo_kernels as fk
from benchmarks import floors
from benchmarks.registry import TOLERANCE, Case, Competitor, Contest, Headline, dtypes
from fpo_kernels import library
from fpo_kernels.testing import ragged, random_streams

IMPLS = ("torch", "native", "triton")
# What a SmolLM2 block hands over: q, k, v together; output; gate and up together; down.
LAYERS = ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Layers of p inputs and q outputs each that read one input, 9 texts, k numbers a text.

    Attributes:
        full: every text has all `tokens`; else they have unequal lengths, none to `tokens`.
    """

    name: str
    p: int
    qs: tuple[int, ...]
    tokens: int
    dim: int
    dtype: str
    full: bool = False


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """Every group of a block with two dims, and one of them on texts of unequal lengths; if quick a small such one."""
    layers = [(dim, *layer, 64, True) for dim, layer in itertools.product((1024, 4096), LAYERS)]
    layers.append((1024, *LAYERS[0], 256, False))
    found = []
    for dtype in dtypes(device):
        kind = str(dtype).removeprefix("torch.")
        for dim, p, qs, tokens, full in [(64, 96, (160, 32), 70, False)] if quick else layers:
            name = f"{p} to {'+'.join(map(str, qs))}, k = {dim} {kind}{'' if full else f', 0-{tokens} tokens'}"
            found.append(Setting(name=name, p=p, qs=qs, tokens=tokens, dim=dim, dtype=kind, full=full))
    return found


def build(setting: Setting, device: torch.device) -> Contest:
    """Random streams, the same on every device."""
    dtype = getattr(torch, setting.dtype)
    lengths = [setting.tokens] * 9 if setting.full else ragged(9, setting.tokens, place="middle")
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
        floors={"product": floors.sketches(lengths, setting.p, sum(setting.qs), setting.dim, setting.dtype)},
    )


CASE = Case(
    name="grad_sketch",
    description="sketches of one layer's per-example gradients, by implementation",
    competitors=IMPLS,
    baseline="torch",
    ours=("triton", "native", "torch"),
    settings=settings,
    build=build,
    headlines=(
        Headline(text="plain torch / native", over="torch", under="native"),
        Headline(text="plain torch / triton", over="torch", under="triton"),
    ),
)
