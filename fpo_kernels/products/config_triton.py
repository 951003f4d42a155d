"""Launch numbers of the Triton rooms of `grad_products`, each with its reason."""

from __future__ import annotations

import functools
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


# 16-bit tiles by the longest example: measured on an H200 (README.md), the best of a sweep for layers of 4096 and 14336
# features. Tiles of 16 and 32 tokens lost everywhere, (128, 128) to (128, 64), whose two fp32 tiles take 128 registers
# of each of 256 threads, and whose copies in flight 128 KiB of a processor's 228.
SHORT = Tokens(tokens=64, features=128, warps=8, stages=3)  # up to 64 tokens: 0.038 ms a Llama-3.1-8B block
MIDDLE = Tokens(tokens=64, features=128, warps=4, stages=3)  # up to 128: 0.096 ms
# Longer: 0.202 ms at 256, 0.717 at 512 (663 of 767 TFLOP/s). Of 128 by 256 tokens, which read a quarter less but have
# registers for one fp32 tile, so that a·a waits in memory for d·d: 0.328 and 0.715. 3 stages: 0.258, 0.845; 6: same.
LONG = Tokens(tokens=128, features=64, warps=8, stages=4)
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
    """Which tiles a device wants: "amd", "sm_80" (and what else is older than Hopper), or "sm_90"."""
    if torch.version.hip is not None:
        return "amd"
    return "sm_80" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9 else "sm_90"


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
    return MIDDLE if longest <= 128 else LONG
