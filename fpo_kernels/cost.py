"""FLOPs and bytes of the two ways to inner products of per-example gradients, and the choice between them.

Both ways give Σ_pairs ⟨G_i, G_j⟩ exactly. With G_i = Σ_t d_t a_tᵀ, p inputs and Q outputs (of all layers that read
the same a, added up), h = pQ/(p+Q):

- "tokens" multiplies token by token, ⟨G_i, G_j⟩ = Σ_{t,s} (a_t·a_s)(d_t·d_s).
- "form" forms G_i tile by tile, Σ_t d_t a_tᵀ, and multiplies the tiles elementwise.

For steering, many candidates z of T tokens with the pairs (z, z) and (z, ref), tokens take fewer FLOPs while
T < 2h/3. For all pairs of n examples they do while T < h/n + √((h/n)² + h).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a call has to do, whatever the layer: read once on the host, used for every layer of a model.

    Attributes:
        pairs: listed pairs, n.
        token_pairs: Σ over pairs of T_i·T_j; a pair (i, i) of one stream counts half, its tiles are symmetric.
        pair_tokens: Σ over pairs of T_i + T_j, the rows a token-by-token kernel reads; T_i for a pair (i, i).
        examples: distinct examples in the list, left and right apart unless they are of one stream.
        tokens: their tokens.
        longest: the most tokens an example of the list has.
    """

    pairs: int
    token_pairs: float
    pair_tokens: float
    examples: int
    tokens: int
    longest: int

    @classmethod
    def of(
        cls,
        lengths: Sequence[int] | NDArray[Any],
        pairs: Sequence[tuple[int, int]] | NDArray[Any],
        lengths2: Sequence[int] | NDArray[Any] | None = None,
    ) -> Work:
        """The work of pairs (n, 2) of examples with these lengths (B,); the right ones are of `lengths2` if given."""
        left = np.asarray(lengths, dtype=np.int64)
        right = left if lengths2 is None else np.asarray(lengths2, dtype=np.int64)
        listed = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
        i, j = listed[:, 0], listed[:, 1]
        rows_i, rows_j = left[i].astype(np.float64), right[j].astype(np.float64)
        products, rows = rows_i * rows_j, rows_i + rows_j
        used = np.zeros(len(left), dtype=bool)
        used[i] = True
        if lengths2 is None:
            used[j] = True
            twins = i == j
            products[twins] /= 2
            rows[twins] /= 2
            of_used = left[used]
        else:
            used2 = np.zeros(len(right), dtype=bool)
            used2[j] = True
            of_used = np.concatenate([left[used], right[used2]])
        return cls(
            pairs=len(listed),
            token_pairs=float(products.sum()),
            pair_tokens=float(rows.sum()),
            examples=len(of_used),
            tokens=int(of_used.sum()),
            longest=int(of_used.max(initial=0)),
        )


def token_flops(work: Work, p: int, q: int) -> float:
    """2 (p+q) Σ T_i·T_j: every token product is p + q multiply-adds. q adds up the layers that share a."""
    return 2 * (p + q) * work.token_pairs


def form_flops(work: Work, p: int, q: int) -> float:
    """2 p q (Σ T_i + n): one multiply-add a token and element of G, one a pair and element. q adds up the layers."""
    return 2 * p * q * float(work.tokens + work.pairs)


def token_bytes(work: Work, p: int, q: int, itemsize: int) -> float:
    """(p+q) · itemsize · Σ (T_i + T_j): each pair reads its rows once, a once for all layers that share it."""
    return (p + q) * itemsize * work.pair_tokens


def form_bytes(work: Work, p: int, q: int, itemsize: int) -> float:
    """(p+q) · itemsize · Σ T_i: each example's rows are read once, its gradient stays on chip."""
    return (p + q) * itemsize * float(work.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """How fast a room goes: seconds = overhead + layers · layer_overhead + FLOPs / rate.

    Attributes:
        flops: multiply-adds of the inner loop, FLOP/s (2 a multiply-add); for "form" those of Σ_t d_t a_tᵀ.
        multiply: FLOP/s of multiplying formed tiles elementwise; bound by memory. Unused by "tokens".
        token_pair: seconds that each token pair costs besides its FLOPs. Unused by "form".
        overhead: seconds a call. layer_overhead: seconds each of the layers that share a.
    """

    flops: float
    multiply: float
    token_pair: float
    overhead: float
    layer_overhead: float


_RATES = {
    # Two cores of an AMD EPYC with AVX-512, fp32 (benchmarks/results/cpu-2threads/ways.json). The choice needs ratios
    # only, and those move less between machines than the rates do. Register tiles: 150 to 290 GFLOP/s with wide
    # features, and 4 to 6 ns a token pair and thread with narrow ones, for adding up and loading each tile.
    ("cpu", "native", "tokens"): Rates(flops=1.6e11, multiply=0, token_pair=1e-9, overhead=1e-5, layer_overhead=2e-6),
    # Both tiles are written and read again: half of that. The plan of the chunks takes 0.3 to 0.4 ms.
    ("cpu", "torch", "tokens"): Rates(flops=0.8e11, multiply=0, token_pair=1e-9, overhead=3e-4, layer_overhead=2e-5),
    # MKL's batched products: 187 GFLOP/s alone, 100 next to busy processes, which disturb them more than they do the
    # native room. Elementwise products: 12 to 40 GFLOP/s, as many as are one matrix product.
    ("cpu", "torch", "form"): Rates(flops=1.3e11, multiply=1.5e10, token_pair=0, overhead=2e-4, layer_overhead=5e-5),
    # One H200, bf16. Tokens of many layers in a launch: 179, 286, 462 and 501 TFLOP/s at 64, 128, 256 and 512 tokens;
    # forming is near only for long examples, so theirs. A call of one layer has 10 µs of launch and list.
    ("cuda", "triton", "tokens"): Rates(flops=4.6e14, multiply=0, token_pair=0, overhead=1e-5, layer_overhead=0),
    # Steering of 8 + 1, ms at 64 and 256 tokens: 4096 to 6144 in three layers 0.79 and 1.55, 4096 to 28672 in two 3.28
    # and 6.37. 2·p·q·T·9 FLOPs, T growing by 192, take 0.76 and 3.09 ms: 1.14e14 and 1.31e14. What is left at 64,
    # 0.54 and 2.25 ms, is 2·p·q·16 of multiplying: 1.5e12 and 1.7e12. A LoRA factor, 4096 to 16, takes 0.18 ms at
    # either length: the plan. These foretell 4.6 ms for the first at 1024 tokens, which took 5.0.
    ("cuda", "triton", "form"): Rates(flops=1.2e14, multiply=1.6e12, token_pair=0, overhead=1.8e-4, layer_overhead=0),
    # Not measured: plain FMA without matrix units, a tenth.
    ("cuda", "native", "tokens"): Rates(flops=1e13, multiply=0, token_pair=0, overhead=2e-5, layer_overhead=0),
    # The same shapes by torch, wall ms: tokens 1.6 to 12, the least for a LoRA factor, the most 5.2e10 FLOPs of the two
    # wide layers at 256 tokens. Forming 2.7 to 946: tiles of 8 MiB make 500 of the wide layers, each with some thirty
    # launches and lists sent from the host one by one, 2 ms a tile or 1e12 FLOP/s; "auto" does not take it.
    ("cuda", "torch", "tokens"): Rates(flops=5e12, multiply=0, token_pair=0, overhead=1.6e-3, layer_overhead=0),
    ("cuda", "torch", "form"): Rates(flops=1e12, multiply=1e12, token_pair=0, overhead=2.7e-3, layer_overhead=0),
}


def seconds(work: Work, p: int, qs: Sequence[int], rates: Rates, way: str) -> float:
    """The estimated time of a call."""
    q = sum(qs)
    fixed = rates.overhead + len(qs) * rates.layer_overhead
    if way == "tokens":
        return fixed + token_flops(work, p, q) / rates.flops + work.token_pairs * rates.token_pair
    forming, multiplying = 2 * p * q * float(work.tokens), 2 * p * q * float(work.pairs)
    return fixed + forming / rates.flops + multiplying / rates.multiply


@functools.lru_cache(maxsize=4096)  # a model's layers are few kinds
def choose_way(work: Work, p: int, qs: tuple[int, ...], device_type: str, tokens: str, form: str) -> str:
    """ "tokens" or "form", whichever the estimate says is sooner.

    Args:
        p, qs: inputs, and outputs of each layer that shares them.
        tokens, form: the room ("native", "torch", "triton") that would run each way.
    """
    # Triton is asked for on a CPU by its interpreter, and by those whom its room will refuse.
    device = "cuda" if device_type == "cuda" or tokens == "triton" else "cpu"
    by_tokens = seconds(work, p, qs, _RATES[device, tokens, "tokens"], "tokens")
    by_forming = seconds(work, p, qs, _RATES[device, form, "form"], "form")
    return "form" if by_forming < by_tokens else "tokens"
