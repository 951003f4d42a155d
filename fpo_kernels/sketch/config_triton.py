"""Launch numbers of the Triton kernels of the sketch, each with its reason.

They follow from the arithmetic in README.md ("What a token costs") and from the binaries that tests/compile_only reads:
registers, spills, shared memory, instructions. On a GPU, CHUNK, RUN_WORK and warps have been compared (README.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sides(NamedTuple):
    """k = blocks · rows · columns, W = W_blocks ⊗ W_rows ⊗ W_columns."""

    blocks: int  # of the output, each its own program
    rows: int
    columns: int
    tokens: int  # that one product takes

    @property
    def joined(self) -> int:
        """Of these, those that the left product takes as rows, by W_rows ⊗ I; the others are further columns."""
        return self.tokens if self.rows * self.tokens <= _PRODUCT_ROWS else 1

    @property
    def buckets(self) -> int:
        """Of one block, what a program transforms of a token."""
        return self.rows * self.columns


class Tile(NamedTuple):
    """How a program runs."""

    warps: int
    registers: int | None  # a thread's, at most; None: not said


# What Hopper's products take. Tokens fill them where a sketch has fewer rows; where it has as many, tokens lie side by
# side in the left product and one below the other in the right one, which is the same order of numbers. No side of a
# product is under 16, its least. Two tokens, four of a small sketch, are what 128 registers hold beside a gather.
_PRODUCT_ROWS = 64
_SIDES = {
    64: Sides(1, 4, 16, 4),
    128: Sides(1, 8, 16, 4),
    256: Sides(1, 16, 16, 2),
    512: Sides(1, 16, 32, 2),
    1024: Sides(1, 32, 32, 2),
    2048: Sides(1, 32, 64, 2),
    4096: Sides(1, 64, 64, 2),
    8192: Sides(2, 64, 64, 2),
    16384: Sides(4, 64, 64, 2),
}
# Entries of a round of the table: 16 for each of 256 threads, of one block's buckets. A gather takes one, or `rounds`.
ENTRIES = 4096
# Features that lie in shared memory at a time. Most layers of an 8B model are 4096 wide: 16 KiB for two 16-bit tokens.
SPAN = 4096
# The same where a layer is wider. 16384 take an 8B model's 14336 at once (64 KiB); a float32 takes a word for each
# token, which needs the registers of half as many, and so much is all that gfx942 has.
WIDE_SPAN_16 = 16384
WIDE_SPAN = 8192
# Two programs of 8 warps and 128 registers fit on a processor. Where a tile or a span needs more (ptxas: 180 to 250),
# one does. 16 warps of 128, which only sm_90's binaries take without spilling, lost to 8 of 255 on an H200 in bfloat16:
# by 7 % at k = 4096, by 1 to 7 % for wide streams; of float32, which nobody has measured, they are thought to hide
# more. Said, because ptxas spills of its own accord (80 and 152 bytes on sm_100) for an occupancy that shared memory
# forbids.
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
    many = major == 9 and dtype.itemsize == 4
    return Tile(HOPPER_WARPS, REGISTERS) if many else Tile(WARPS, MOST_REGISTERS)


def rounds(dim: int, span: int) -> int:
    """Rounds of entries that a gather from `span` features takes: features come to shared memory once a gather."""
    # of several blocks, each round is another's; of four tokens, more takes more registers than there are
    return max(1, span // ENTRIES) if sides(dim).blocks == 1 and sides(dim).tokens == 2 else 1


def wide_span(dim: int, dtype: torch.dtype, major: int) -> int:
    """Features of a wide stream that lie in shared memory at a time; what is wider is cut."""
    large = sides(dim).buckets >= ENTRIES
    if dtype.itemsize == 2:
        return WIDE_SPAN if major == 0 or (major == 8 and large) else WIDE_SPAN_16
    return SPAN if major == 8 or large else WIDE_SPAN
