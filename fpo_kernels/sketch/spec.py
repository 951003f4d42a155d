"""`TensorSketch`: which sketch is meant, by (p, q, dim, seed, name)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fpo_kernels.sketch.maps import BucketMap, kept_map

LEAST, MOST = 64, 16384


@dataclass(frozen=True)
class TensorSketch:
    """S = k^(−1/2) Σ_t (W C_a a_t) ∘ (W C_d d_t): E⟨S_i, S_j⟩ = ⟨G_i, G_j⟩ over the maps that seeds give.

    W is the ±1 Walsh–Hadamard matrix of order k (natural order: W[b, c] = (−1)^popcount(b & c)); C_a: R^p → R^k and
    C_d: R^q → R^k are signed balanced bucket maps (`maps`). Sketches of one seed and dim add up over layers, whose
    C_d are independent.

    Attributes:
        p, q: features of the layer's input and output, at least 1.
        dim: k, a power of two from 64 to 16384; smaller or larger than p and q.
        seed: any 64-bit integer; another seed, other maps.
        name: the layer's (in a model: the parameter's canonical name). C_d depends on it.
        family: what C_a depends on; None: `name`. Layers that read one input and share a family share C_a, so that
            the input is mapped and transformed once; their sketches added up remain that of their gradients one
            above the other.

    Raises:
        ValueError: a size outside those above.

    Source: tensor sketch (Pham and Pagh 2013) over the group Z₂^m in place of Z_k.
    """

    p: int
    q: int
    dim: int = 4096
    seed: int = 0
    name: str = ""
    family: str | None = None

    def __post_init__(self) -> None:
        check_dim(self.dim)
        if self.p < 1 or self.q < 1:
            raise ValueError(f"TensorSketch: p and q must be at least 1, got {self.p} and {self.q}")
        check_seed(self.seed)

    @property
    def a_family(self) -> str:
        """What C_a is keyed by."""
        return self.name if self.family is None else self.family

    def maps(self, device: torch.device) -> tuple[BucketMap, BucketMap]:
        """C_a and C_d on a device."""
        return (
            kept_map(self.p, self.dim, self.seed, self.a_family, "a", device),
            kept_map(self.q, self.dim, self.seed, self.name, "d", device),
        )


def check_dim(dim: int) -> None:
    """Raises ValueError where `dim` is no power of two from 64 to 16384."""
    if not (isinstance(dim, int) and LEAST <= dim <= MOST and dim & (dim - 1) == 0):
        raise ValueError(f"dim must be a power of two from {LEAST} to {MOST}, got {dim!r}")


def check_seed(seed: int) -> None:
    """Raises ValueError where `seed` is no signed 64-bit integer."""
    if not (isinstance(seed, int) and -(2**63) <= seed < 2**63):
        raise ValueError(f"seed must be an integer of 64 bits, got {seed!r}")
