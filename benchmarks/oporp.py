"""OPORP, of the formed gradient, in plain torch."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.gradients import Layer


def oporp(vectors: Tensor, dim: int, seed: int, name: str = "") -> Tensor:
    """S_b = Σ_{j in bin b} sign_j x_j of the permuted coordinates, the k bins of equal length: E⟨S_x, S_y⟩ = ⟨x, y⟩.

    Where k does not divide the number of coordinates, zeros are added.

    Args:
        vectors: (n, D). dim: k. seed, name: what permutation and signs are drawn from.

    Returns:
        (n, k), of the vectors' dtype.

    Source: Li and Li 2023, "OPORP: One Permutation + One Random Projection", arXiv 2302.03505, with fixed-length bins
    and signs; without its last step, which divides by the norm and estimates cosines.
    """
    key = hashlib.sha256(f"oporp {seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    padded = -(-vectors.shape[1] // dim) * dim
    order = torch.randperm(padded, generator=generator)
    signs = torch.randint(2, (padded,), generator=generator).mul_(2).sub_(1)
    wide = torch.nn.functional.pad(vectors, (0, padded - vectors.shape[1]))
    return (wide[:, order] * signs.to(wide)).view(len(vectors), dim, -1).sum(2)


def of_layers(layers: Sequence[Layer], dim: int, seed: int) -> Tensor:
    """Every layer's k numbers a text, (layers, examples, k), each layer by a draw of its own."""
    return torch.stack([oporp(formed(x.a, x.d, x.offsets), dim, seed, x.name) for x in layers])


def formed(a: Tensor, d: Tensor, offsets: Tensor) -> Tensor:
    """Each text's gradient of a linear layer, vec(Σ_t d_t a_tᵀ), (examples, q·p)."""
    cuts = offsets.tolist()
    return torch.stack([(d[s:e].T @ a[s:e]).flatten() for s, e in itertools.pairwise(cuts)])
