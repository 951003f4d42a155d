"""The error that an implementation may make: derived from what it adds up, never guessed.

Rounding is a random walk (`budget`); a matrix unit that truncates is not (`TRUNCATION`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# What a 16-bit product on a matrix unit loses a feature, in ε of fp32 and of the size the sums reach. A unit adds a
# block of products and the accumulator at once: each is cut off (not rounded) some bits below the last one of fp32 of
# the largest, then the sum is cut to fp32. Every cut is towards zero, so those of sums of one sign add up:
# (addends · 2^-extra + 1) / 2 ulp a block on average, over its features. Volta has blocks of 4 and no extra bit: 0.75;
# Ampere 8 and one: 0.34; Hopper and Blackwell 16 and two: 0.16. Partial sums grow to their full size evenly, so that
# half of it is met: the other half is the margin, and Volta, which has it only, keeps none.
# Sources: Fasi, Higham, Mikaitis and Pranesh 2021, Numerical behavior of NVIDIA tensor cores (PeerJ CS 7:e330), for
# V100, T4 and A100; Khattak and Mikaitis 2025, Accurate models of NVIDIA tensor cores (arXiv 2512.07004), for H100
# and B200. A product of bf16 has 16 bits and loses none of them to a sum less than 2^10 times as large; one of fp16
# has 22 and loses some to any sum above it. The band is that of fp16 for both. Sizes of blocks and extra bits are those
# of the models that the latter publish, found equal to the cards to the bit (MATLAB-tensor-core: fma 4, 8, 16, 16 and
# neab 0, 1, 2, 2 for V100, A100, H100, B200); they are not measured here.
TRUNCATION = 0.35
# The same a block where products are ±1 times a part of 8 bits, those of the sketch's W: in ε. The first parts have no
# bit below what is kept; the last part's are the lowest bits of numbers, whose signs are no sum's, so that what they
# lose is a walk, within the band for rounding. The sum's own cut to fp32 remains, half an ulp on average, towards zero.
# Parts after the first are added to sums of full size: no half is margin. Blocks have 8 products or more where there
# is bfloat16, from Ampere on.
CUT = 0.5
LEAST_BLOCK = 8


class Maps(Protocol):
    """What `sketch_budget` asks of a sketch."""

    @property
    def p(self) -> int: ...
    @property
    def q(self) -> int: ...
    @property
    def dim(self) -> int: ...


def budget(
    reference_error: Tensor,
    scale: Tensor,
    terms: Tensor | float,
    dtype: torch.dtype,
    truncated: Tensor | float = 0,
) -> Tensor:
    """The error allowed: what the reference makes in this dtype, plus a band for rounding and one for truncation.

    band = (√terms + TRUNCATION · truncated) · ε · scale. A sum of n terms in any order errs by a random walk of at
    most n roundings, each of at most ε/2 of a partial sum; √n · ε · scale is at least twice that walk's standard
    deviation.

    Args:
        reference_error: |reference in this dtype − reference in float64|, any shape.
        scale: the size the partial sums reach, e.g. ‖G_i‖·‖G_j‖; broadcasts. Zero allows no error.
        terms: how many terms are added one after another, counted over all nested sums.
        dtype: the accumulation dtype, not the inputs'.
        truncated: how many of the terms a matrix unit adds that truncates.
    """
    steps = torch.as_tensor(terms, dtype=torch.float64, device=scale.device).sqrt()
    steps = steps + TRUNCATION * torch.as_tensor(truncated, dtype=torch.float64, device=scale.device)
    return reference_error.double() + steps * torch.finfo(dtype).eps * scale.double()


def truncations(device: torch.device, dtype: torch.dtype, impl: str) -> int:
    """How often a feature of such streams goes through a matrix unit that truncates.

    Once where it has 16 bits; Triton's rooms multiply fp32 as six products of bf16 parts; plain fp32 rounds.
    """
    if device.type != "cuda":
        return 0
    if dtype in (torch.bfloat16, torch.float16):
        return 1
    return 6 if dtype == torch.float32 and impl == "triton" else 0


def products_terms(p: int, q: int, rows_i: Tensor, rows_j: Tensor, way: str) -> Tensor:
    """(n,) how many terms each pair's nested sums add one after another; the larger of both ways for "auto".

    From tokens: p and Σ_k q_k features, then T_i·T_j products. By forming: T_i and T_j tokens, then p·Σ_k q_k
    elements.
    """
    tokens, form = p + q + rows_i * rows_j, rows_i + rows_j + p * q
    return {"tokens": tokens, "form": form}.get(way, torch.maximum(tokens, form))


def products_truncated(p: int, q: int, rows_i: Tensor, rows_j: Tensor, way: str) -> Tensor:
    """(n,) how many of `products_terms` a matrix unit adds: features from tokens, tokens by forming."""
    tokens, form = torch.full_like(rows_i, p + q), rows_i + rows_j
    return {"tokens": tokens, "form": form}.get(way, torch.maximum(tokens, form))


def reach(a: Tensor, ds: Sequence[Tensor], offsets: Tensor) -> Tensor:
    """(B,) the larger of ‖G_i‖ and √Σ_t ‖a_t‖²‖d_t‖²: what sums over tokens reach even where G_i cancels."""
    energy = a.square().sum(1) * sum(d.square().sum(1) for d in ds)
    sizes = []
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        norm = sum((d[start:stop].T @ a[start:stop]).square().sum() for d in ds)
        sizes.append(torch.maximum(torch.as_tensor(norm), energy[start:stop].sum()))
    return torch.stack(sizes).sqrt() if sizes else energy[:0]


def direction_budget(
    reference_error: Tensor,
    streams: tuple[Tensor, Tensor, Tensor],
    direction: Tensor,
    dtype: torch.dtype,
    formed: bool = False,
    truncations: int = 0,
) -> Tensor:
    """(B,) the error allowed to ⟨G_i, V⟩ computed in `dtype`, whichever sum is taken first.

    Sums over features, then tokens; `formed` is for those who sum over tokens, then over all of G; `truncations`
    as it says. The scale is four standard deviations of what partial sums of random
    signs reach at each level: over single terms d_q V_qp a_p, over d_q (V a)_q and a_p (Vᵀ d)_p, and over tokens,
    whichever is largest.
    """
    a, d, V = (x.double() for x in (streams[0], streams[1], direction))
    left, right = a @ V.T, d @ V  # (S, q), (S, p)
    terms = ((a.square() @ V.square().T) * d.square()).sum(1)
    levels = torch.stack(
        [terms, (left * d).square().sum(1), (right * a).square().sum(1), (left * d).sum(1).square()], 1
    )  # (S, levels)
    counts = streams[2].diff()
    reached = torch.segment_reduce(levels, "sum", lengths=counts).amax(1).sqrt() * 4
    features = V.numel() if formed else sum(V.shape)
    return budget(reference_error, reached, features + counts, dtype, max(V.shape) * truncations)


def sketch_budget(
    streams: tuple[Tensor, Tensor, Tensor], sketch: Maps, dtype: torch.dtype, more: int = 0, cut_off: float = 0
) -> Tensor:
    """(B,) the error in norm allowed to S_i computed in `dtype`.

    Maps and transforms keep norms but for rounding: what errs is sums of p/k and q/k features, 2·log₂ k butterflies
    and T_i tokens, of partial sums no longer than Σ_t ‖C_a a_t‖‖C_d d_t‖, here bounded by √loads ‖a_t‖‖d_t‖.
    `more` are further terms that a sum has; `cut_off` is what matrix units lose, in ε of the scale (`CUT`).
    """
    a, d, offsets = (x.cpu() for x in streams)
    loads = -(-sketch.p // sketch.dim) * -(-sketch.q // sketch.dim)
    size = (a.double().square().sum(1) * d.double().square().sum(1) * loads).sqrt()
    counts = offsets.diff()
    scale = torch.segment_reduce(size, "sum", lengths=counts, initial=0) if len(size) else counts.double() * 0
    steps = loads + 2 * sketch.dim.bit_length() + counts + more
    return budget(scale * (cut_off * torch.finfo(dtype).eps), scale, steps, dtype)
