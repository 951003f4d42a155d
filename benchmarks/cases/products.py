"""fk.grad_products on one layer: its token-by-token rooms against forming each G_i and multiplying."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import fpo_kernels as fk
from benchmarks import floors
from benchmarks.peers import formed_products
from benchmarks.registry import TOLERANCE, Case, Competitor, Contest, dtypes
from fpo_kernels.testing import budget, ragged, random_streams, reach, terms

IMPLS = ("torch", "native", "triton")
FORMED = "form G, multiply"
# The four shapes of a SmolLM2 block: query and output, gate and up, down, key and value.
SHAPES = ((576, 576), (576, 1536), (1536, 576), (576, 192))
RAGGED = (7, 19, 33, 64, 64, 90, 128, 151, 64)
# A score head and a LoRA factor, on texts longer than what is formed of such a layer at a time.
NARROW = ((576, 1), (4096, 16))
Pairs = Literal["steering", "gram"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One layer (p inputs, q outputs), the examples' lengths, and which pairs of them.

    Attributes:
        pairs: "steering" is (z, z) and (z, ref) with the last example the reference, "gram" all i ≤ j.
    """

    name: str
    p: int
    q: int
    lengths: tuple[int, ...]
    pairs: Pairs
    dtype: str


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """Steering on every shape, and a Gram matrix; both of unequal lengths too. Small ones if quick, all unequal."""
    tokens, n, m = 64, 9, 16
    shapes = ((96, 160),) if quick else SHAPES
    narrow = ((576, 1),) if quick else NARROW
    found: list[tuple[str, int, int, tuple[int, ...], Pairs, str]] = []
    for dtype in dtypes(device):
        kind = str(dtype).removeprefix("torch.")
        for p, q in () if quick else shapes:
            found.append((f"steering {n}x{tokens}, {p} to {q}", p, q, (tokens,) * n, "steering", kind))
        p, q = shapes[0]
        unequal: tuple[int, ...] = (3, 16, 9, 1, 12) if quick else RAGGED
        found.append((f"steering ragged {min(unequal)}-{max(unequal)}, {p} to {q}", p, q, unequal, "steering", kind))
        if not quick:
            found.append((f"gram {m}x{tokens}, {p} to {q}", p, q, (tokens,) * m, "gram", kind))
        for p, q in narrow:
            unequal = tuple(ragged(n, 257))
            found.append((f"gram ragged 0-257, {p} to {q}", p, q, unequal, "gram", kind))
    mixed = len(dtypes(device)) > 1
    return [
        Setting(name=f"{name} {kind}" if mixed else name, p=p, q=q, lengths=lengths, pairs=pairs, dtype=kind)
        for name, p, q, lengths, pairs, kind in found
    ]


def build(setting: Setting, device: torch.device) -> Contest:
    """Random streams of the setting's shape, the same on every device."""
    dtype = getattr(torch, setting.dtype)
    streams = random_streams(setting.lengths, setting.p, setting.q, dtype, seed=0)
    pairs = list_pairs(len(setting.lengths), setting.pairs)
    exact, allowed, allowed_formed = exact_products(streams, pairs)
    a, d, offsets = (x.to(device) for x in streams)
    listed = pairs.to(device)
    # 16-bit G are rounded as they are formed; the peer is allowed that.
    formed = Competitor(
        run=functools.partial(formed_products, a, d, setting.lengths, listed),
        budget=allowed_formed if dtype == torch.float32 else TOLERANCE[dtype],
    )
    competitors, cannot = {FORMED: formed}, {}
    for impl in IMPLS:
        why = _why_not(impl, a, d)
        if why:
            cannot[impl] = why
        else:
            run = functools.partial(fk.grad_products, a, d, offsets, listed, impl=impl, way="tokens")
            competitors[impl] = Competitor(run=run, budget=allowed)
    floor = floors.products(setting.lengths, pairs, setting.p, setting.q, setting.dtype)
    return Contest(
        competitors=competitors, expected=lambda: {"product": exact}, cannot=cannot, floors={"product": floor}
    )


def list_pairs(examples: int, kind: Pairs) -> Tensor:
    """(n, 2): all i ≤ j for "gram"; (z, z) and (z, last) for "steering"."""
    if kind == "gram":
        return torch.tensor(list(itertools.combinations_with_replacement(range(examples), 2)))
    own = torch.arange(examples - 1)
    return torch.cat([torch.stack([own, own], 1), torch.stack([own, torch.full_like(own, examples - 1)], 1)])


def exact_products(streams: tuple[Tensor, Tensor, Tensor], pairs: Tensor) -> tuple[Tensor, float, float]:
    """The products in float64, and the relative errors that fp32 may make (testing.budget): from tokens, by forming."""
    a, d, offsets = streams
    wide = (a.double(), d.double(), offsets)
    exact = fk.grad_products(*wide, pairs, impl="reference")
    same = fk.grad_products(*streams, pairs, impl="reference")
    i, j = pairs.unbind(1)
    size = reach(wide)
    tokens_budget, forming_budget = (
        float(
            budget((same - exact).abs(), size[i] * size[j], terms(streams, pairs, streams, way), torch.float32).norm()
            / exact.norm()
        )
        for way in ("tokens", "form")
    )
    return exact, tokens_budget, forming_budget


def _why_not(impl: str, a: Tensor, d: Tensor) -> str:
    """The reason an implementation gives for not running here, from one token."""
    one = (a[:1], d[:1], torch.tensor([0, 1], device=a.device), torch.zeros(1, 2, dtype=torch.int64, device=a.device))
    try:
        fk.grad_products(*one, impl=impl, way="tokens")
    except RuntimeError as problem:
        if "cannot run" in str(problem):
            return str(problem)
        raise
    return ""


CASE = Case(
    name="products",
    description="inner products of one layer's per-example gradients (fk.grad_products) against forming them",
    competitors=(FORMED, *IMPLS),
    baseline=FORMED,
    ours=("triton", "native", "torch"),
    settings=settings,
    build=build,
)
