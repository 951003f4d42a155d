"""impl="triton": a tile of a·a and one of d·d held in registers, multiplied, summed; nothing else is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpo_kernels.products import config_triton as config
from fpo_kernels.products.triton_inputs import readable, refuse


@triton.jit
def token_products(
    total, x_ptr, y_ptr, x_row, y_row, rows_x, rows_y, x_stride, y_stride,
    WIDTH: tl.constexpr, T: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """total (T, T) fp32 plus x_t·y_s over WIDTH features, nothing where t or s is past its example's end."""
    token = tl.arange(0, T)
    feature = tl.arange(0, F)
    # 64 bits to the tile, 32 within it: addresses of all elements in 64 would not fit into the registers
    x_first = x_ptr + x_row * x_stride
    y_first = y_ptr + y_row * y_stride
    in_x = (token < rows_x)[:, None]
    in_y = (token < rows_y)[None, :]
    for first in range(0, WIDTH, F):
        column = first + feature
        inside = column < WIDTH
        x_tile = x_first + (token[:, None] * x_stride + column[None, :])  # (T, F)
        y_tile = y_first + (column[:, None] + token[None, :] * y_stride)  # (F, T)
        x = tl.load(x_tile, in_x & inside[None, :], other=0.0)
        y = tl.load(y_tile, inside[:, None] & in_y, other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
    return total


@triton.jit
def grad_products_kernel(
    a_ptr, ds, offsets_ptr, a2_ptr, ds2, offsets2_ptr, pairs_ptr, sums_ptr,
    a_stride, d_strides, a2_stride, d2_strides,
    P: tl.constexpr, QS: tl.constexpr, MIRRORED: tl.constexpr, T: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """sums[n, k]: the share of pair n from tile rows k, k + K, …; grid (n, K).

    ds, ds2 are tuples of pointers to the d of the layers that share a, QS their widths.
    """
    n = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    i = tl.load(pairs_ptr + 2 * n)
    j = tl.load(pairs_ptr + 2 * n + 1)
    x_begin = tl.load(offsets_ptr + i).to(tl.int64)
    x_end = tl.load(offsets_ptr + i + 1).to(tl.int64)
    y_begin = tl.load(offsets2_ptr + j).to(tl.int64)
    y_end = tl.load(offsets2_ptr + j + 1).to(tl.int64)
    # ⟨G_i, G_i⟩ is symmetric in (t, s): only tiles on and above the diagonal, the latter counted twice. Rows
    # are dealt out in turn, so that the programs of a triangle have about the same to do.
    twin = MIRRORED and i == j
    total = tl.full((), 0.0, tl.float64)
    # `while` where a bound is read from memory: the interpreter of triton 3.6 cannot count a range to one with
    # numpy 2.4. The inner loop, the one worth pipelining, is a range of constants.
    x_row = x_begin + part * T
    while x_row < x_end:
        y_row = tl.where(twin, x_row, y_begin)
        while y_row < y_end:
            rows_x = x_end - x_row
            rows_y = y_end - y_row
            dd = tl.zeros((T, T), tl.float32)
            for k in tl.static_range(len(QS)):
                dd = token_products(
                    dd, ds[k], ds2[k], x_row, y_row, rows_x, rows_y,
                    d_strides[k], d2_strides[k], QS[k], T, F,
                )  # fmt: skip
            aa = token_products(
                tl.zeros((T, T), tl.float32), a_ptr, a2_ptr, x_row, y_row, rows_x, rows_y,
                a_stride, a2_stride, P, T, F,
            )  # fmt: skip
            weight = tl.where(twin & (y_row > x_row), 2.0, 1.0)
            total += (tl.sum(aa * dd) * weight).to(tl.float64)
            y_row += T
        x_row += parts * T
    tl.store(sums_ptr + n * parts + part, total)


def grad_products(
    a: Tensor,  # (S, p)
    ds: tuple[Tensor, ...],  # each (S, q_k)
    offsets: Tensor,  # (B+1,)
    pairs: Tensor,  # (n, 2)
    other: tuple[Tensor, tuple[Tensor, ...], Tensor] | None,
) -> Tensor:  # (n,)
    refuse(a)
    a2, ds2, offsets2 = other or (a, ds, offsets)
    n, parts = len(pairs), config.split(len(pairs))
    # one row of sums for each launch of at most MOST_SIBLINGS
    groups = range(0, len(ds), config.MOST_SIBLINGS)
    sums = torch.empty(len(groups), n, parts, dtype=torch.float64, device=a.device)
    if n == 0:
        return a.new_empty(0, dtype=torch.float32)
    tile = config.tokens(a.dtype)
    left, right = (readable(a), *map(readable, ds)), (readable(a2), *map(readable, ds2))
    cuts = offsets.contiguous(), offsets2.contiguous()
    with torch.cuda.device_of(a):
        for group, first in zip(sums, groups, strict=True):
            some = slice(1 + first, 1 + first + config.MOST_SIBLINGS)
            x, y = left[some], right[some]
            grad_products_kernel[n, parts](
                left[0], x, cuts[0], right[0], y, cuts[1], pairs.contiguous(), group,
                left[0].stride(0), tuple(d.stride(0) for d in x), right[0].stride(0), tuple(d.stride(0) for d in y),
                P=a.shape[1], QS=tuple(d.shape[1] for d in x), MIRRORED=other is None,
                T=tile.tokens, F=tile.features, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return sums.sum((0, 2)).float()
