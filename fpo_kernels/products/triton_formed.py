"""impl="triton", way="form": tiles of every example's gradient formed and multiplied on chip, never written out.

Examples on the right stand in blocks of `HELD`, those on the left in blocks of `ROWS`. A program has one tile of
every G and one pair of blocks: it forms the tile of up to `HELD` examples and holds them, then forms that of one row
after another and multiplies it with each. So a shared partner is formed once for `ROWS` others, and an example of a
whole Gram matrix once for every `HELD` columns. Matrix instructions form; multiplying is elementwise, in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpo_kernels.products import config_triton as config
from fpo_kernels.products.inputs_triton import readable, refuse

CELLS = (config.ROWS + config.HELD) * (config.HELD + 1)  # products of a unit


@triton.jit
def formed_tile(
    x_ptr, y_ptr, begin, end, x_stride, y_stride, m, n,
    M: tl.constexpr, N: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """(TM, TN) fp32: Σ_t x_t y_tᵀ over rows begin to end, of the features m and n, zero past M and N."""
    token = tl.arange(0, T)
    in_m = (m < M)[:, None]
    in_n = (n < N)[None, :]
    # 64 bits to the rows, 32 within them
    x_tile = m[:, None] + token[None, :] * x_stride  # (TM, T)
    y_tile = n[None, :] + token[:, None] * y_stride  # (T, TN)
    total = tl.zeros((TM, TN), tl.float32)
    for t in range(begin, end, T):
        inside = token < end - t
        x = tl.load(x_ptr + t * x_stride + x_tile, in_m & inside[None, :], other=0.0)
        y = tl.load(y_ptr + t * y_stride + y_tile, inside[:, None] & in_n, other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
    return total


@triton.jit
def formed_products_kernel(
    x_ptr, y_ptr, offsets_ptr, x2_ptr, y2_ptr, offsets2_ptr,
    units_ptr, rows_ptr, twins_ptr, held_ptr, within_ptr, sums_ptr, first_tile, tiles, blocks,
    x_stride, y_stride, x2_stride, y2_stride,
    M: tl.constexpr, N: tl.constexpr, MIRRORED: tl.constexpr,
    ROWS: tl.constexpr, HELD: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """sums[u, tile]: (ROWS + HELD, HELD + 1) products of one tile within a pair of blocks; what is unlisted is left.

    Row r, column k: row r with held k; column HELD: row r with itself. Row ROWS + e, column k: held e with held k.
    """
    program = tl.program_id(0).to(tl.int64)
    tile = first_tile + (program % tiles).to(tl.int32)
    block = tl.load(units_ptr + program // tiles)
    block_i = block // blocks
    block_j = block % blocks
    across: tl.constexpr = (N + TN - 1) // TN
    m = tile // across * TM + tl.arange(0, TM)
    n = tile % across * TN + tl.arange(0, TN)
    out = sums_ptr + program * ((ROWS + HELD) * (HELD + 1))

    held = ()
    for k in tl.static_range(HELD):
        j = block_j * HELD + k
        wanted = tl.load(held_ptr + block_i * (blocks * HELD) + j) != 0
        begin = tl.load(offsets2_ptr + j, wanted, other=0).to(tl.int64)
        end = tl.load(offsets2_ptr + j + 1, wanted, other=0).to(tl.int64)
        formed = formed_tile(x2_ptr, y2_ptr, begin, end, x2_stride, y2_stride, m, n, M, N, TM, TN, T)
        held = held + (formed,)  # type: ignore[assignment]  # noqa: RUF005 (triton knows no starred tuples)
    if MIRRORED:
        diagonal = block_j * HELD // ROWS == block_i
        for k in tl.static_range(HELD):
            for e in tl.static_range(k + 1):
                if diagonal and tl.load(within_ptr + (block_j * HELD + k) * HELD + e) != 0:
                    tl.store(out + (ROWS + e) * (HELD + 1) + k, tl.sum(held[k] * held[e]))
    for r in range(ROWS):
        i = block_i * ROWS + r
        if tl.load(rows_ptr + i * blocks + block_j) != 0:
            begin = tl.load(offsets_ptr + i).to(tl.int64)
            end = tl.load(offsets_ptr + i + 1).to(tl.int64)
            row = formed_tile(x_ptr, y_ptr, begin, end, x_stride, y_stride, m, n, M, N, TM, TN, T)
            for k in tl.static_range(HELD):
                tl.store(out + r * (HELD + 1) + k, tl.sum(row * held[k]))
            if MIRRORED and tl.load(twins_ptr + i) == block_j:
                tl.store(out + r * (HELD + 1) + HELD, tl.sum(row * row))


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which blocks to multiply and where the listed products come to lie. Made on the device, nothing is read back."""

    units: Tensor  # (U,) pairs of blocks, all with something listed among them
    blocks: int  # on the right
    rows: Tensor  # (left examples, blocks) int32, not 0: to be multiplied with the block as a row
    twins: Tensor  # (left examples,) the block beside which a row is multiplied with itself
    held: Tensor  # (row blocks, right examples) int32, not 0: to be held
    within: Tensor  # (right examples, HELD) int32, not 0: two examples of a block, or one with itself, both held
    place: Tensor  # (n,) of each pair's product in the (U, CELLS) sums

    @classmethod
    def of(cls, pairs: Tensor, examples: int, examples2: int, mirrored: bool) -> _Plan:
        R, H = config.ROWS, config.HELD
        row_blocks, blocks = -(-examples // R), -(-examples2 // H)
        # ⟨G_i, G_j⟩ = ⟨G_j, G_i⟩ in one stream
        i, j = (pairs.amin(1), pairs.amax(1)) if mirrored else pairs.unbind(1)
        row_block, block = i // R, j // H
        near = (i // H == block) if mirrored else torch.zeros_like(i, dtype=torch.bool)  # both are in one block
        rows = _count(i * blocks + block, ~near, row_blocks * R * blocks).view(-1, blocks)
        # An example that is a row anyway is multiplied with itself there, beside the first block that wants it.
        every = torch.arange(blocks, device=pairs.device)
        first = torch.where(rows != 0, every, blocks).amin(1)[i]
        twin = (i == j) & near
        twins = torch.full_like(rows[:, 0], -1, dtype=torch.int64)
        twins.scatter_reduce_(0, i, torch.where(twin, first, -1), "amax")
        twin &= first < blocks
        near &= ~twin
        block = torch.where(twin, first, block)
        width = blocks * H
        held = _count(row_block * width + j, ~twin, row_blocks * width)
        held += _count(row_block * width + i, near, row_blocks * width) if mirrored else 0
        cell = torch.where(near, R + i % H, i % R) * (H + 1) + torch.where(twin, H, j % H)
        # Units with something listed come first; there are no more than pairs.
        unit = row_block * blocks + block
        empty = _count(unit, torch.ones_like(near), row_blocks * blocks) == 0
        units = empty.to(torch.uint8).argsort(stable=True)
        slot = torch.empty_like(units).scatter_(0, units, torch.arange(len(units), device=pairs.device))
        return cls(
            units=units[: min(len(units), len(pairs))],
            blocks=blocks,
            rows=rows,
            twins=twins,
            held=held,
            within=_count(j * H + i % H, near, width * H),
            place=slot[unit] * CELLS + cell,
        )


def _count(index: Tensor, mask: Tensor, size: int) -> Tensor:
    """(size,) int32: how often each index appears where the mask is set."""
    index = torch.where(mask, index, 0)  # what is masked may lie outside
    return torch.zeros(size, dtype=torch.int32, device=index.device).scatter_add_(0, index, mask.to(torch.int32))


def grad_products(
    a: Tensor,  # (S, p)
    ds: tuple[Tensor, ...],  # each (S, q_k)
    offsets: Tensor,  # (B+1,)
    pairs: Tensor,  # (n, 2)
    other: tuple[Tensor, tuple[Tensor, ...], Tensor] | None,
    longest: int,
) -> Tensor:  # (n,)
    refuse(a)
    if len(pairs) == 0:
        return a.new_empty(0, dtype=torch.float32)
    a2, ds2, offsets2 = other or (a, ds, offsets)
    plan = _Plan.of(pairs, len(offsets) - 1, len(offsets2) - 1, other is None)
    cuts = offsets.contiguous(), offsets2.contiguous()
    total = torch.zeros(len(plan.units), CELLS, dtype=torch.float64, device=a.device)
    with torch.cuda.device_of(a):
        for d, d2 in zip(ds, ds2, strict=True):
            left, right = (readable(a), readable(d)), (readable(a2), readable(d2))
            if d.shape[1] > a.shape[1]:  # the wider stream first: ⟨Gᵀ, Gᵀ⟩ is the same
                left, right = left[::-1], right[::-1]
            _add_products(total, plan, left, right, cuts, other is None)
    return total.flatten()[plan.place].float()


def _add_products(
    total: Tensor,  # (U, CELLS)
    plan: _Plan,
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    cuts: tuple[Tensor, Tensor],
    mirrored: bool,
) -> None:
    """Adds one layer's products to the total; cells that nothing is listed for get whatever lay in memory."""
    M, N = left[0].shape[1], left[1].shape[1]
    tile = config.formed(N)
    tiles = -(-M // tile.wide) * -(-N // tile.narrow)
    step = max(1, config.SUM_BYTES // (4 * total.numel()))
    for first in range(0, tiles, step):
        some = min(step, tiles - first)
        sums = torch.empty(len(total), some, CELLS, dtype=torch.float32, device=total.device)
        formed_products_kernel[(len(total) * some,)](
            *left, cuts[0], *right, cuts[1], plan.units, plan.rows, plan.twins, plan.held, plan.within, sums,
            first, some, plan.blocks, left[0].stride(0), left[1].stride(0), right[0].stride(0), right[1].stride(0),
            M=M, N=N, MIRRORED=mirrored, ROWS=config.ROWS, HELD=config.HELD,
            TM=tile.wide, TN=tile.narrow, T=tile.tokens, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        total += sums.sum(1, dtype=torch.float64)
