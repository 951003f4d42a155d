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


# Chosen by register and shared-memory arithmetic, not yet measured on a GPU; tests/compile_only reads the binaries
# for sm_80, sm_90, sm_100 and gfx942, where neither spills a register, whether rows are aligned or not. Two (64, 64)
# fp32 tiles over 256 threads take 32 registers of a thread; with 4 warps one to three siblings spilled.
TOKENS_16BIT = Tokens(tokens=64, features=32, warps=8, stages=3)
# fp32 is multiplied without matrix instructions, operands in registers: 32 features, or 3 copies, spilled.
TOKENS_FP32 = Tokens(tokens=64, features=16, warps=8, stages=2)
# On gfx942, with warps of 64 threads, 8 of them spilled with three siblings.
TOKENS_FP32_AMD = Tokens(tokens=64, features=16, warps=4, stages=2)
# Layers that share a in one launch (q, k, v); each more is more code and registers. Longer lists take several.
MOST_SIBLINGS = 3
# Rows further apart than this many elements are copied: 64 of them have to stay within 32 bits.
MOST_STRIDE = 2**24
# Two programs for each of an H100's 132 processors. A pair is split no further than 16 ways: its partial sums
# are written out, one float64 each. Depends on the list's length only, so that nothing is read back.
TARGET_PROGRAMS = 264
MAX_SPLIT = 16


# way="form", compiled for the same four targets without a spill. Four held (64, 64) fp32 tiles and the row's take
# 80 registers of each of 256 threads; eight would take all. 16 rows share what is held: with more, a list of few
# pairs would leave processors idle; fewer would form what is held more often.
HELD = 4
ROWS = 16  # a multiple of HELD
SQUARE = Formed(wide=64, narrow=64, tokens=32, warps=8, stages=2)
# LoRA factors of a rank up to 16, the least that a matrix instruction takes; as many elements a thread or half.
NARROW = Formed(wide=128, narrow=16, tokens=32, warps=8, stages=2)
# Partial sums are written once a tile; so many at a time, then they are added up.
SUM_BYTES = 32 * 2**20


def formed(narrow: int) -> Formed:
    """The tile of a gradient whose smaller side is `narrow`; the same in every dtype."""
    return NARROW if narrow <= NARROW.narrow else SQUARE


def tokens(dtype: torch.dtype, amd: bool = torch.version.hip is not None) -> Tokens:
    """The tile for streams of `dtype` on this torch's kind of GPU."""
    if dtype != torch.float32:
        return TOKENS_16BIT
    return TOKENS_FP32_AMD if amd else TOKENS_FP32


def split(pairs: int) -> int:
    """How many programs share one pair."""
    return min(MAX_SPLIT, -(-TARGET_PROGRAMS // max(pairs, 1)))
