"""Launch numbers of the Triton rooms of `grad_products`, each with its reason."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T", bound=Any)  # arrays or tensors


class Tokens(NamedTuple):
    """way="tokens": a tile of token products and how it is computed."""

    tokens: int  # rows
    features: int  # at a time
    warps: int
    stages: int  # copies in flight
    wide: int = 0  # columns, if they are not as many; a·a then waits in memory while d·d takes its registers

    @property
    def columns(self) -> int:
        return self.wide or self.tokens


class Formed(NamedTuple):
    """way="form": a tile of one example's gradient and how it is formed."""

    wide: int  # features of the wider stream
    narrow: int  # of the narrower
    tokens: int  # at a time
    warps: int
    stages: int  # copies in flight


# 16-bit tiles by the longest example: measured on an H200 (README.md), the best of a sweep for layers of 4096 and 14336
# features. Tiles of 16 and 32 tokens lost everywhere, (128, 128) to (128, 64), whose two fp32 tiles take 128 registers
# of each of 256 threads, and whose copies in flight 128 KiB of a processor's 228.
SHORT = Tokens(tokens=64, features=128, warps=8, stages=3)  # up to 64 tokens: 0.038 ms a Llama-3.1-8B block
MIDDLE = Tokens(tokens=64, features=128, warps=4, stages=3)  # up to 128: 0.096 ms
LONG = Tokens(tokens=128, features=64, warps=8, stages=4)  # longer: 0.237 ms at 256, 0.874 at 512
# Two operands of 128 rows are 64 FLOP a byte of them, which at 500 TFLOP/s is 7.8 TB/s out of the L2 cache: about all
# it gives. 128 by 256 are 85; one fp32 tile takes the 128 registers that two took. sm_80 and sm_100 spilled.
WIDE = Tokens(tokens=128, features=64, warps=8, stages=3, wide=256)
# Bytes of a·a that wait: four rounds of 132 processors.
PARKED_BYTES = 64 * 2**20
# The others by arithmetic; tests/compile_only reads them all in the binaries of sm_80, sm_90, sm_100 and gfx942.
# sm_80 spilled 8 bytes a thread of SHORT.
SHORT_SM80 = Tokens(tokens=64, features=64, warps=8, stages=4)
# Rows that do not begin at multiples of 16 bytes are loaded number by number, which takes registers: MIDDLE and LONG
# spilled 80 to 192 bytes of them.
ODD = Tokens(tokens=64, features=32, warps=8, stages=3)
# fp32 as six products of bf16 parts: two (64, 64) tiles take 32 registers of a thread, copies in flight 48 KiB; odd
# rows spilled 16 bytes from 32 features on.
FP32 = Tokens(tokens=64, features=32, warps=8, stages=3)
ODD_FP32 = Tokens(tokens=64, features=16, warps=8, stages=2)
# gfx942 has 64 KiB of shared memory, and warps of 64 threads.
AMD = Tokens(tokens=64, features=64, warps=4, stages=2)
AMD_FP32 = Tokens(tokens=64, features=16, warps=4, stages=2)
# How tl.dot multiplies. Products of 16-bit numbers are exact in fp32. Of fp32, three bf16 parts (8 bits each) add up to
# it exactly; the six products of parts that reach 2^-16 of the whole are taken and three left out: an error of 3·2^-24
# of a product, that of fp32 itself, on matrix units. TF32 in three products would err by 2^-21.
PRECISION = {torch.float32: "bf16x6", torch.bfloat16: "ieee", torch.float16: "ieee"}
# Rows further apart than this many elements are copied: 128 of them have to stay within 32 bits.
MOST_STRIDE = 2**24
# A launch is made when what was noted takes about a quarter of a millisecond (500 TFLOP/s, measured at 512 tokens),
# beside which a launch of 10 µs and its last wave are nothing, ...
ENOUGH_FLOPS = 1.3e11
# ... or when the streams kept for it reach this many bytes: five blocks of an 8B model at 9 × 64 tokens or one at 256,
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


@functools.cache
def chip(device: torch.device) -> str:
    """Which tiles a device wants: "amd", "sm_80" (and what is older), "sm_90" or "sm_100" (and what is newer)."""
    if torch.version.hip is not None:
        return "amd"
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return "sm_90" if major == 9 else "sm_80" if major < 9 else "sm_100"


def tokens(dtype: torch.dtype, longest: int, aligned: bool, chip: str) -> Tokens:
    """The tile for streams of `dtype` whose longest example has so many tokens; `aligned`: in rows of 16 bytes."""
    if chip == "amd":
        return AMD_FP32 if dtype == torch.float32 else AMD
    if dtype == torch.float32:
        return FP32 if aligned else ODD_FP32
    if not aligned:
        return ODD
    if longest <= 64:
        return SHORT_SM80 if chip == "sm_80" else SHORT
    if longest <= 128:
        return MIDDLE
    return WIDE if chip == "sm_90" else LONG


def twin_weight(tile: Tokens, row: T, column: T) -> T:
    """The weight of tiles of ⟨G_i, G_i⟩, symmetric in (t, s): 2 above the diagonal, 0 below it.

    On it 1 where the tile is square, else 3: the kernel weighs its numbers one by one.
    """
    above = column * tile.columns >= (row + 1) * tile.tokens
    below = (column + 1) * tile.columns <= row * tile.tokens
    return (1 + above * 1) * ~below if not tile.wide else (3 - above * 1) * ~below
