"""Launch numbers of the Triton kernels of the sketch, each with its reason.

None has been measured on a GPU yet. They follow from the arithmetic in README.md ("What a token costs") and from the
binaries that tests/compile_only reads: registers, spills, shared memory, instructions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sides(NamedTuple):
    """k = blocks · rows · columns, W = W_blocks ⊗ W_rows ⊗ W_columns."""

    blocks: int  # of the output, each its own program
    rows: int
    columns: int
    tokens: int  # that one product takes, in adjacent columns

    @property
    def buckets(self) -> int:
        """Of one block, what a program transforms of a token."""
        return self.rows * self.columns


class Tile(NamedTuple):
    """How a program runs."""

    warps: int
    registers: int | None  # a thread's, at most; None: not said


# 64 rows where there are so many, what Hopper's products take. Tokens lie in adjacent columns: the left product takes
# them as they are, the right one's matrix is W_columns ⊗ I, which multiplies zeros, and 128 columns are as many as that
# is worth. No side under 16, the least of a product.
_SIDES = {
    64: Sides(1, 16, 4, 4),
    128: Sides(1, 32, 4, 4),
    256: Sides(1, 64, 4, 4),
    512: Sides(1, 64, 8, 4),
    1024: Sides(1, 64, 16, 2),
    2048: Sides(1, 64, 32, 2),
    4096: Sides(1, 64, 64, 2),
    8192: Sides(2, 64, 64, 2),
    16384: Sides(4, 64, 64, 2),
}
# Entries of the table that are gathered at a time: the largest tile, 16 for each of 256 threads.
ENTRIES = 4096
# Features that lie in shared memory at a time. Most layers of an 8B model are 4096 wide: 16 KiB for two 16-bit tokens.
SPAN = 4096
# The same where a layer is wider. 16384 take an 8B model's 14336 at once (64 KiB); a float32 takes a word for each
# token, which needs the registers of half as many, and so much is all that gfx942 has.
WIDE_SPAN_16 = 16384
WIDE_SPAN = 8192
# Two programs of 8 warps and 128 registers fit on a processor. Where a tile or a span needs more (ptxas: 180 to 250),
# 16 warps of 128 hide more than 8 of 255; only sm_90's binaries take that without spilling. Said, because ptxas spills
# of its own accord (80 and 152 bytes on sm_100) for an occupancy that shared memory forbids.
WARPS, REGISTERS = 8, 128
HOPPER_WARPS = 16
MOST_REGISTERS = 255
STAGES = 1  # loads go by addresses and bounds that memory holds: nothing is fetched ahead
# Tokens of an example that one program adds up, a layer: four pairs. Eight and four were best of 4, 8 and 64 on an
# H200 with the kernel before this one (5 to 8 times 64's speed); a partial sum is written once for all of a program's
# layers.
CHUNK = 8
# Entries gathered and numbers transformed a token, after which a program's list of layers ends: about a block of an
# 8B model. 32 blocks are then 32 programs a chunk, 2304 for 9 examples of 64 tokens: several rounds of 132 processors.
RUN_WORK = 2**17
# Buckets of an example whose partial sums one program adds up: one or two for each of its 128 threads.
SUM_BUCKETS = 256
# Chunks that are added as a tree, read at once.
SUM_CHUNKS = 8


def architecture(device: torch.device) -> int:
    """The major compute capability of a CUDA device, 0 for AMD's; for what is interpreted, 9."""
    if torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def sides(dim: int) -> Sides:
    """Blocks, rows and columns of a sketch of `dim` buckets."""
    return _SIDES[dim]


def tile(dim: int, wide: bool, dtype: torch.dtype, major: int) -> Tile:
    """Warps and registers for a sketch of `dim` buckets; `wide`: with streams of more than SPAN features."""
    if major == 0:
        return Tile(WARPS, None)
    if not wide and sides(dim).buckets < ENTRIES and dtype.itemsize == 2:
        return Tile(WARPS, REGISTERS)
    return Tile(HOPPER_WARPS, REGISTERS) if major == 9 else Tile(WARPS, MOST_REGISTERS)


def rounds(dim: int, span: int) -> int:
    """Rounds of entries that a gather from `span` features takes: features come to shared memory once a gather."""
    return max(1, span // ENTRIES) if sides(dim).blocks == 1 else 1  # else each round is of another block


def wide_span(dtype: torch.dtype, major: int) -> int:
    """Features of a wide stream that lie in shared memory at a time; what is wider is cut."""
    if dtype.itemsize == 2:
        return WIDE_SPAN_16 if major else WIDE_SPAN
    return SPAN if major == 8 else WIDE_SPAN
