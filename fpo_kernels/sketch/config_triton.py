"""Launch numbers of the Triton room of `grad_sketch`, each with its reason."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """What a program holds: `tokens` spectra of rows · columns buckets, W = W_blocks ⊗ W_rows ⊗ W_columns."""

    blocks: int  # of the output, each its own program
    rows: int
    columns: int
    tokens: int
    warps: int
    stages: int  # copies in flight


# No side of W under 16, the least that a matrix instruction takes, but a side of 1, which takes no product; none
# over 64, so that W stays in shared memory and a product costs 64 multiply-adds an element. Tokens fill the tile to
# 4096 elements, 64 rows or more of a matrix instruction: 16 registers of each of 256 threads, of which the sums, one
# spectrum, the other in the making and its three bf16 parts are held at a time. Chosen by that arithmetic, not yet
# measured on a GPU; tests/compile_only reads the binaries for sm_80, sm_90, sm_100 and gfx942.
_SIDES = {
    64: (1, 1, 64),
    128: (2, 1, 64),
    256: (1, 16, 16),
    512: (1, 16, 32),
    1024: (1, 32, 32),
    2048: (1, 64, 32),
    4096: (1, 64, 64),
    8192: (2, 64, 64),
    16384: (4, 64, 64),
}
ELEMENTS = 4096
WARPS = 8
WARPS_AMD = 4  # of 64 threads; 8 spilled from 4096 buckets on
STAGES = 1  # the loops read by the tables' entries, which nothing can fetch ahead
# Tokens of an example that one program adds up. A partial sum of `dim` floats is written for each chunk, 1/64 of
# what the transforms would be; shorter chunks would occupy a GPU with fewer tokens in the batch.
CHUNK = 64
# Layers that share a in one launch (q, k, v); each more is more code. Longer lists take several.
MOST_SIBLINGS = 3
# Rows further apart than this many elements are copied: 64 of them have to stay within 32 bits.
MOST_STRIDE = 2**24
# Buckets of an example whose partial sums one program adds up: one or two for each of its 128 threads.
SUM_BUCKETS = 256


def tile(dim: int, amd: bool = torch.version.hip is not None) -> Tile:
    """The tile for a sketch of `dim` buckets on this torch's kind of GPU."""
    blocks, rows, columns = _SIDES[dim]
    tokens = min(CHUNK, ELEMENTS // (rows * columns))
    return Tile(blocks, rows, columns, tokens, WARPS_AMD if amd else WARPS, STAGES)
