"""impl="triton": a tile of a·a and one of d·d held in registers, multiplied, summed; nothing else is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpo_kernels.products import config


@triton.jit
def token_products(
    x_ptr, y_ptr, x_row, y_row, rows_x, rows_y, x_stride, x_step, y_stride, y_step,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """(T, T) fp32: x_t·y_s over WIDTH features, zero where t or s is past its example's end."""
    token = tl.arange(0, T)
    feature = tl.arange(0, F)
    x_rows = x_ptr + (x_row + token).to(tl.int64)[:, None] * x_stride
    y_rows = y_ptr + (y_row + token).to(tl.int64)[None, :] * y_stride
    in_x = (token < rows_x)[:, None]
    in_y = (token < rows_y)[None, :]
    total = tl.zeros((T, T), tl.float32)
    for first in range(0, WIDTH, F):
        column = (first + feature).to(tl.int64)
        inside = column < WIDTH
        x = tl.load(x_rows + column[None, :] * x_step, in_x & inside[None, :], other=0.0)  # (T, F)
        y = tl.load(y_rows + column[:, None] * y_step, inside[:, None] & in_y, other=0.0)  # (F, T)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    return total


@triton.jit
def grad_products_kernel(
    a_ptr, d_ptr, offsets_ptr, a2_ptr, d2_ptr, offsets2_ptr, pairs_ptr, sums_ptr,
    a_stride, a_step, d_stride, d_step, a2_stride, a2_step, d2_stride, d2_step,
    P: tl.constexpr, Q: tl.constexpr, MIRRORED: tl.constexpr,
    PRECISION: tl.constexpr, T: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """sums[n, k]: the share of pair n from tile rows k, k + K, …; grid (n, K)."""
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
            aa = token_products(
                a_ptr, a2_ptr, x_row, y_row, x_end - x_row, y_end - y_row,
                a_stride, a_step, a2_stride, a2_step, P, PRECISION, T, F,
            )  # fmt: skip
            dd = token_products(
                d_ptr, d2_ptr, x_row, y_row, x_end - x_row, y_end - y_row,
                d_stride, d_step, d2_stride, d2_step, Q, PRECISION, T, F,
            )  # fmt: skip
            weight = tl.where(twin & (y_row > x_row), 2.0, 1.0)
            total += (tl.sum(aa * dd) * weight).to(tl.float64)
            y_row += T
        x_row += parts * T
    tl.store(sums_ptr + n * parts + part, total)


def grad_products(
    a: Tensor,  # (S, p)
    ds: tuple[Tensor, ...],  # (S, q_k)
    offsets: Tensor,  # (B+1,)
    pairs: Tensor,  # (n, 2)
    other: tuple[Tensor, tuple[Tensor, ...], Tensor] | None,
) -> Tensor:  # (n,)
    if a.dtype == torch.float64:
        raise RuntimeError('grad_products: impl="triton" takes no float64; use "native", "torch" or "reference"')
    if not (a.is_cuda or triton.knobs.runtime.interpret):
        raise RuntimeError(f'grad_products: impl="triton" cannot run: it needs CUDA tensors, these are on {a.device}')
    a2, ds2, offsets2 = other or (a, ds, offsets)
    d = torch.cat(ds, 1) if len(ds) > 1 else ds[0]
    d2 = d if other is None else torch.cat(ds2, 1) if len(ds2) > 1 else ds2[0]
    n, parts = len(pairs), config.split(len(pairs))
    sums = torch.empty(n, parts, dtype=torch.float64, device=a.device)
    strides = (s for x in (a, d, a2, d2) for s in x.stride())
    if n == 0:
        return a.new_empty(0, dtype=torch.float32)
    with torch.cuda.device_of(a):
        grad_products_kernel[n, parts](
            a, d, offsets.contiguous(), a2, d2, offsets2.contiguous(), pairs.contiguous(), sums,
            *strides, P=a.shape[1], Q=d.shape[1],
            MIRRORED=other is None, PRECISION="ieee", T=config.BLOCK_TOKENS, F=config.BLOCK_FEATURES,
            num_warps=config.NUM_WARPS, num_stages=config.NUM_STAGES,
        )  # fmt: skip
    return sums.sum(1).float()
