"""Signed balanced bucket maps R^n → R^k, from a counter-based generator: the same bits on every machine.

The generator. `key` is the first 8 bytes, little-endian, of BLAKE2b (digest_size=8) over the UTF-8 text
"fpo-sketch-1|seed|name|role|n|k|purpose". Number c (0, 1, 2, …) of a key is SplitMix64's output function
(Steele, Lea and Flood 2014) at key + (c + 1)·0x9E3779B97F4A7C15 modulo 2^64:

    z ← (z ⊕ z>>30)·0xBF58476D1CE4E5B9;  z ← (z ⊕ z>>27)·0x94D049BB133111EB;  z ⊕ z>>31

The map. With π the order that stably sorts n numbers of purpose "order", and τ that of k numbers of purpose
"bucket", the coordinate at place m of π goes to bucket τ(m mod k): loads differ by one at most, and where n < k the
buckets that are filled are k's at random. Its sign is the top bit of number j of purpose "sign", 1 for minus.
"""

from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VERSION = 1  # of the maps: a change here makes other sketches of the same seed

_STEP = np.uint64(0x9E3779B97F4A7C15)


def numbers(text: str, count: int) -> NDArray[np.uint64]:
    """The first `count` 64-bit numbers of the key that `text` gives (see above)."""
    key = np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
    with np.errstate(over="ignore"):  # modulo 2^64 is meant
        z = key + np.arange(1, count + 1, dtype=np.uint64) * _STEP
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class BucketMap(NamedTuple):
    """C: R^n → R^k, (C x)_b = Σ_{j: bucket_j = b} sign_j x_j.

    Attributes:
        bucket: (n,) int64, in [0, k). sign: (n,) float32, ±1.
        table: (⌈n/k⌉, k) int32, the same by bucket: entry 2j + (1 if sign_j < 0) for a coordinate j of the bucket in
            each row that has one, else −1. What kernels gather by.
    """

    bucket: Tensor
    sign: Tensor
    table: Tensor

    def to(self, device: torch.device) -> BucketMap:
        """On a device."""
        return BucketMap(*(x.to(device) for x in self))


def bucket_map(n: int, k: int, seed: int, name: str, role: str) -> BucketMap:
    """The map of n coordinates into k buckets that (seed, name, role, n, k) stand for, on the CPU; see above."""

    def drawn(purpose: str, count: int) -> NDArray[np.uint64]:
        return numbers(f"fpo-sketch-1|{seed}|{name}|{role}|{n}|{k}|{purpose}", count)

    order = np.argsort(drawn("order", n), kind="stable")
    buckets = np.argsort(drawn("bucket", k), kind="stable")
    minus = (drawn("sign", n) >> np.uint64(63)).astype(np.int64)
    place = np.arange(n)
    table = np.full((max(1, -(-n // k)), k), -1, dtype=np.int32)
    table[place // k, buckets[place % k]] = 2 * order + minus[order]
    bucket = np.empty(n, dtype=np.int64)
    bucket[order] = buckets[place % k]
    sign = (1 - 2 * minus).astype(np.float32)
    return BucketMap(*(torch.from_numpy(x) for x in (bucket, sign, table)))


@functools.lru_cache(maxsize=4096)
def kept_map(n: int, k: int, seed: int, name: str, role: str, device: torch.device) -> BucketMap:
    """`bucket_map` on a device, made once: a model asks for the same few hundred in every batch."""
    return bucket_map(n, k, seed, name, role).to(device)
