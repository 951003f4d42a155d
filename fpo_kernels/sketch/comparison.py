"""The projections of per-example gradients that the tensor sketch is measured against, plainly written.

Their random numbers are those of `maps.numbers`; coordinate j = i·p + c of a formed gradient is G[i, c].
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fpo_kernels.sketch.maps import numbers
from fpo_kernels.streams import check_stream, offset_flaws, refuse

SCRATCH = 1 << 20  # elements of a tile of gradients or signs: 4 MB in fp32, what second-level caches hold


@dataclass(frozen=True)
class Projection:
    """A linear map of gradients (q, p) to R^dim that keeps inner products on average over seeds.

    Attributes:
        p, q: features of the layer's input and output, at least 1.
        dim: numbers an example. seed: any integer. name: the layer's; another seed or name, another map.

    Raises:
        ValueError: p, q or dim below 1.
    """

    p: int
    q: int
    dim: int = 4096
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        if min(self.p, self.q, self.dim) < 1:
            raise ValueError(
                f"{type(self).__name__}: p, q and dim must be at least 1, got {self.p}, {self.q} and {self.dim}"
            )

    def project(self, a: Tensor, d: Tensor, offsets: Tensor) -> Tensor:
        """The sketch of each example's G_i = Σ_t d_t a_tᵀ.

        Args:
            a, d, offsets: (S, p), (S, q) and (B+1,), packed token streams as `grad_products` takes them.

        Returns:
            (B, dim) on their device, float64 where they are, else float32, computed in it. The same inputs give the
            same bits; other examples in the batch change an example's by rounding alone. No autograd graph.

        Raises:
            TypeError, ValueError: streams that do not fit together, p or q; offsets that do not cut them.
        """
        check_stream(a, d, offsets)
        if (a.shape[1], d.shape[1]) != (self.p, self.q):
            raise ValueError(
                f"a and d must be (S, {self.p}) and (S, {self.q}), got {tuple(a.shape)} and {tuple(d.shape)}"
            )
        refuse("project", offset_flaws(offsets, a.shape[0]), offsets=offsets)
        dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
        cuts = offsets.tolist()
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            if len(cuts) == 1:
                return a.new_zeros(0, self.dim, dtype=dtype)
            return self._project(a.to(dtype), d.to(dtype), cuts)

    def _project(self, a: Tensor, d: Tensor, cuts: Sequence[int]) -> Tensor:
        raise NotImplementedError

    def _key(self, purpose: str) -> str:
        kind = type(self).__name__
        return f"{kind}-1|{self.seed}|{self.name}|{self.p}|{self.q}|{self.dim}|{purpose}"


class LoGra(Projection):
    """S = Σ_t (P_d d_t)(P_a a_t)ᵀ, √k × √k, with entries of P_a (√k, p) and P_d (√k, q) from N(0, 1/√k).

    E PᵀP = I on either side, so E⟨S_i, S_j⟩ = ⟨G_i, G_j⟩. Scratch: 2·S·√k numbers beside P_a and P_d, which are kept.
    dim: a square number.

    Source: Choe et al. 2024, "What is Your Data Worth to GPT?" (arXiv 2405.13954), with random P.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.isqrt(self.dim) ** 2 != self.dim:
            raise ValueError(f"LoGra: dim must be a square number, got {self.dim}")

    def matrices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """P_a (√k, p) and P_d (√k, q), float32."""
        side = math.isqrt(self.dim)
        scale = side**-0.5
        to_a, to_d = (_gaussian(self._key(role), side, n, device) for role, n in (("a", self.p), ("d", self.q)))
        return to_a * scale, to_d * scale

    def _project(self, a: Tensor, d: Tensor, cuts: Sequence[int]) -> Tensor:
        to_a, to_d = self.matrices(a.device)
        left, right = d @ to_d.T.to(d), a @ to_a.T.to(a)  # (S, √k) each
        return torch.stack([left[s:e].T @ right[s:e] for s, e in itertools.pairwise(cuts)]).flatten(1)


class SJLT(Projection):
    """S_b = Σ_{j: bucket_j = b} sign_j vec(G)_j: every coordinate of the formed gradient in one signed bucket.

    E⟨S_i, S_j⟩ = ⟨G_i, G_j⟩. Number j of the generator gives both: its upper half times k, upper half, is the bucket;
    its last bit the sign, 1 for minus. Drawn anew in each call: kept, the map of a model would outweigh the model.
    Scratch: a few tiles of at most max(64·B, SCRATCH) numbers.

    Source: Kane and Nelson 2014 ("Sparser Johnson–Lindenstrauss transforms"), with one nonzero a coordinate, as GraSS
    uses it (Hu et al. 2025, arXiv 2505.18976).
    """

    def buckets(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Of coordinates start … start + count − 1: bucket and sign, int64 (count,)."""
        z = numbers(self._key("bucket"), count, start)
        bucket = (z >> np.uint64(32)) * np.uint64(self.dim) >> np.uint64(32)
        sign = 1 - 2 * (z & np.uint64(1)).astype(np.int64)
        return torch.from_numpy(bucket.astype(np.int64)), torch.from_numpy(sign)

    def _project(self, a: Tensor, d: Tensor, cuts: Sequence[int]) -> Tensor:
        out = a.new_zeros(len(cuts) - 1, self.dim)
        for start, tile in _tiles(a, d, cuts, SCRATCH // len(out)):
            bucket, sign = self.buckets(start, tile.shape[1])
            order = bucket.argsort(stable=True)  # summed bucket by bucket: index_add_ would use atomics on a GPU
            loads = bucket.bincount(minlength=self.dim).to(a.device).repeat(len(out), 1)
            rows = (tile * sign.to(tile)).index_select(1, order.to(a.device))
            out += torch.segment_reduce(rows, "sum", lengths=loads, axis=1)
        return out


class DenseProjection(Projection):
    """S = k^(−1/2) R vec(G), R (k, p·q) of independent signs ±1: E⟨S_i, S_j⟩ = ⟨G_i, G_j⟩.

    R[r, j] is minus where bit j mod 64 of number ⌊j/64⌋·k + r of the generator is set. R is made block by block, in
    every call. Scratch: a few tiles of at most 64·max(B, k) or SCRATCH numbers. Cost: 2·k·p·q FLOPs an example.

    Source: Achlioptas 2003; of gradients, TRAK (Park et al. 2023, arXiv 2303.14186).
    """

    def signs(self, start: int, count: int) -> Tensor:
        """R[:, start : start + count], (k, count) int8."""
        first, last = start // 64, -(-(start + count) // 64)
        words = numbers(self._key("sign"), (last - first) * self.dim, first * self.dim).reshape(-1, self.dim)
        octets = np.ascontiguousarray(words.T).astype("<u8", copy=False).view(np.uint8)
        bits = np.unpackbits(octets, axis=1, bitorder="little").view(np.int8)
        return torch.from_numpy(1 - 2 * bits)[:, start - 64 * first :][:, :count]

    def _project(self, a: Tensor, d: Tensor, cuts: Sequence[int]) -> Tensor:
        out = a.new_zeros(len(cuts) - 1, self.dim)
        for start, tile in _tiles(a, d, cuts, SCRATCH // max(len(out), self.dim)):
            out += (self.signs(start, tile.shape[1]).to(tile) @ tile.T).T
        return out * self.dim**-0.5


def _tiles(a: Tensor, d: Tensor, cuts: Sequence[int], room: int) -> Iterator[tuple[int, Tensor]]:
    """(first coordinate, (B, n)): all examples' G, n ≤ max(64, room) coordinates at a time, in their order."""
    p, q = a.shape[1], d.shape[1]
    room = max(64, room)
    width, height = min(p, room), max(1, room // p)
    for i, c in itertools.product(range(0, q, height), range(0, p, width)):
        rows, columns = d[:, i : i + height], a[:, c : c + width]
        yield i * p + c, torch.stack([rows[s:e].T @ columns[s:e] for s, e in itertools.pairwise(cuts)]).flatten(1)


@functools.lru_cache(maxsize=4096)
def _gaussian(key: str, rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) float32 from N(0, 1) by Box and Muller, each pair of numbers giving two.

    Drawn in float64 from the numbers' upper 53 bits. Another C library's log and cosine may differ in the last bit,
    which the rounding to float32 seldom shows: unlike signs and buckets, not promised to the bit.
    """
    pairs = -(-rows * columns // 2)
    uniform = (numbers(key, 2 * pairs) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: rows * columns]
    return torch.from_numpy(both.astype(np.float32).reshape(rows, columns)).to(device)
