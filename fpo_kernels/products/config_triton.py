"""Launch numbers of the Triton rooms of `grad_products`, each with its reason."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tokens(NamedTuple):
    """way="tokens": a tile of token products and how it is computed."""

    tokens: int  # rows, and columns
    features: int  # at a time
    warps: int
    stages: int  # copies in flight


class Formed(NamedTuple):
    """way="form": a tile of one example's gradient and how it is formed."""

    wide: int  # features of the wider stream
    narrow: int  # of the narrower
    tokens: int  # at a time
    warps: int
    stages: int  # copies in flight


# Measured on an H200 (README.md): 16-bit tiles by the longest example, the best of a sweep for layers of 4096 and 14336
# features. Tiles of 16 and 32 tokens lost everywhere, (128, 128) to (128, 64), whose two fp32 tiles take 128 registers
# of each of 256 threads, and whose copies in flight 128 KiB of a processor's 228.
SHORT_16BIT = Tokens(tokens=64, features=128, warps=8, stages=3)  # up to 64 tokens: 0.038 ms a Llama-3.1-8B block
MIDDLE_16BIT = Tokens(tokens=64, features=128, warps=4, stages=3)  # up to 128: 0.096 ms
LONG_16BIT = Tokens(tokens=128, features=64, warps=8, stages=4)  # longer: 0.237 ms at 256, 0.874 at 512
# fp32 goes through the matrix units in three TF32 products of its parts (`tf32x3`). By arithmetic: two (64, 64) tiles
# take 32 registers of a thread, copies in flight 48 KiB.
FP32 = Tokens(tokens=64, features=32, warps=8, stages=3)
# gfx942 has 64 KiB of shared memory and no TF32: fp32 is multiplied as it is. By arithmetic, compiled without spills.
AMD_16BIT = Tokens(tokens=64, features=64, warps=4, stages=2)
AMD_FP32 = Tokens(tokens=64, features=16, warps=4, stages=2)
# Rows further apart than this many elements are copied: 128 of them have to stay within 32 bits.
MOST_STRIDE = 2**24
# A launch is made when what was noted takes about a quarter of a millisecond (500 TFLOP/s, measured at 512 tokens),
# beside which a launch of 10 µs and its last wave are nothing, ...
ENOUGH_FLOPS = 1.3e11
# ... or when the streams kept for it reach this many bytes: five blocks of an 8B model at 9 × 64 tokens, one at 9 × 256,
# about a sixth of what the backward of such a model keeps at 64 tokens and a twenty-fifth at 256.
KEPT_BYTES = 384 * 2**20
# Partial sums, one fp32 number an item and layer, are added up when there are so many bytes of them.
SUM_BYTES = 32 * 2**20


# way="form", compiled for the same four targets without a spill. Four held (64, 64) fp32 tiles and the row's take
# 80 registers of each of 256 threads; eight would take all. 16 rows share what is held: with more, a list of few
# pairs would leave processors idle; fewer would form what is held more often.
HELD = 4
ROWS = 16  # a multiple of HELD
SQUARE = Formed(wide=64, narrow=64, tokens=32, warps=8, stages=2)
# LoRA factors of a rank up to 16, the least that a matrix instruction takes; as many elements a thread or half.
NARROW = Formed(wide=128, narrow=16, tokens=32, warps=8, stages=2)


def formed(narrow: int) -> Formed:
    """The tile of a gradient whose smaller side is `narrow`; the same in every dtype."""
    return NARROW if narrow <= NARROW.narrow else SQUARE


def tokens(dtype: torch.dtype, longest: int, amd: bool = torch.version.hip is not None) -> Tokens:
    """The tile for streams of `dtype` whose longest example has so many tokens, on this torch's kind of GPU."""
    if dtype == torch.float32:
        return AMD_FP32 if amd else FP32
    if amd:
        return AMD_16BIT
    return SHORT_16BIT if longest <= 64 else MIDDLE_16BIT if longest <= 128 else LONG_16BIT


def precision(dtype: torch.dtype, amd: bool = torch.version.hip is not None) -> str:
    """How `tl.dot` multiplies: 16-bit products are exact in fp32; fp32 is taken in three TF32 products where there are
    units for it, which leaves an error of 2^-21 of a product, a sixteenth of what adding up 4096 of them makes."""
    return "tf32x3" if dtype == torch.float32 and not amd else "ieee"
