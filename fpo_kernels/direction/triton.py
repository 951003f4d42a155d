"""impl="triton": a tile of rows times V held in registers, multiplied by the other stream's tile, summed by row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpo_kernels.direction import config


@triton.jit
def grad_direction_kernel(
    x_ptr, y_ptr, v_ptr, sums_ptr, rows,
    x_stride, x_step, y_stride, y_step, v_stride, v_step,
    K: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, INTERPRETED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """sums[c, t]: the share of column tile c in Σ_n y[t, n] Σ_k v[n, k] x[t, k]; grid (row tiles, column tiles).

    SPLIT: x is bf16 and v fp32, three bf16 parts of which add up to it exactly (8 bits each). Casting x to fp32
    instead would lose the matrix instructions, and on sm_100 triton 3.7 multiplies what was cast in TF32, "ieee"
    or not.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1).to(tl.int64) * C + tl.arange(0, C)
    feature = tl.arange(0, F)
    in_row = row < rows
    in_column = column < N
    x_rows = x_ptr + row[:, None] * x_stride
    v_rows = v_ptr + column[None, :] * v_stride
    total = tl.zeros((R, C), tl.float32)
    for first in range(0, K, F):
        k = (first + feature).to(tl.int64)
        inside = k < K
        x = tl.load(x_rows + k[None, :] * x_step, in_row[:, None] & inside[None, :], other=0.0)  # (R, F)
        v = tl.load(v_rows + k[:, None] * v_step, inside[:, None] & in_column[None, :], other=0.0)  # (F, C)
        if SPLIT:
            if INTERPRETED:  # a dot of bf16 is garbage there; the parts are what the test is about
                x = x.to(tl.float32)
            for _ in tl.static_range(3):
                part = v.to(tl.bfloat16)
                v -= part.to(tl.float32)
                total = tl.dot(x, part.to(x.dtype), total, input_precision="ieee")
        else:
            total = tl.dot(x, v, total, input_precision="ieee")
    y_tile = y_ptr + row[:, None] * y_stride + column[None, :] * y_step
    y = tl.load(y_tile, in_row[:, None] & in_column[None, :], other=0.0).to(tl.float32)
    tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * rows + row, tl.sum(total * y, 1), in_row)


def grad_direction(
    a: Tensor,  # (S, p)
    d: Tensor,  # (S, q)
    offsets: Tensor,  # (B+1,)
    direction: Tensor,  # (q, p)
) -> Tensor:  # (B,)
    if torch.float64 in (a.dtype, direction.dtype):
        raise RuntimeError('grad_direction: impl="triton" takes no float64; use "torch" or "reference"')
    if not (a.is_cuda or triton.knobs.runtime.interpret):
        raise RuntimeError(f'grad_direction: impl="triton" cannot run: it needs CUDA tensors, these are on {a.device}')
    # the wider stream is the one multiplied by V, so that the product has the columns of the narrower
    x, y, V = (a, d, direction) if a.shape[1] >= d.shape[1] else (d, a, direction.T)
    split = x.dtype == torch.bfloat16 and V.dtype != torch.bfloat16
    if split:
        V = V.float()
    elif x.dtype != V.dtype:  # a copy of the narrower of the two
        x, V = x.float(), V.float()
    rows, columns = len(y), y.shape[1]
    aligned = all(n == 1 or n % 16 == 0 for tensor in (x, y, V) for n in tensor.stride())
    tile = config.launch(rows, columns, x.dtype, split, aligned)
    grid = (-(-rows // tile.rows), -(-columns // tile.columns))
    sums = torch.empty(grid[1], rows, dtype=torch.float32, device=a.device)
    if 0 not in grid:
        with torch.cuda.device_of(a):
            grad_direction_kernel[grid](
                x, y, V, sums, rows, *x.stride(), *y.stride(), *V.stride(),
                K=x.shape[1], N=columns, SPLIT=split, INTERPRETED=triton.knobs.runtime.interpret,
                R=tile.rows, C=tile.columns, F=tile.features, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    # in this order every time, and no check of the lengths that would sync
    tokens = sums.sum(0, dtype=torch.float64)
    return torch.segment_reduce(tokens, "sum", lengths=offsets.diff(), unsafe=True).float()
