"""impl="triton": buckets gathered into a tile, transformed by two small matrix products, multiplied, summed.

With k = m·n buckets as a matrix X (m, n), W_k x is W_m X W_n. For larger k, W_k = W_c ⊗ W_(k/c), and block o of the
output is W_(k/c) Σ_β W_c[o, β] x_β: a sketch of k/c buckets whose entries have other signs.

Precision. ±1 is exact in any format. What it multiplies is either one entry of a 16-bit stream (a bucket of one
coordinate), multiplied in that format, or a float32, taken as the three bfloat16 parts that add up to it exactly
(8 bits each). Products are therefore exact and sums float32, on matrix units whatever the stream's dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpo_kernels.sketch import config_triton as config


@triton.jit
def parity(x):
    """1 where x, below 2^16, has an odd number of bits."""
    x ^= x >> 8
    x ^= x >> 4
    x ^= x >> 2
    return (x ^ (x >> 1)) & 1


@triton.jit
def signs(N: tl.constexpr):
    """W_n (N, N) of ±1."""
    n = tl.arange(0, N)
    return 1.0 - 2.0 * parity(n[:, None] & n[None, :]).to(tl.float32)


@triton.jit
def gathered(
    x_tile, table_ptr, piece, there, token, bucket, x_stride, block,
    C: tl.constexpr, MN: tl.constexpr,
):  # fmt: skip
    """What one row of the table, cut into C blocks of MN buckets, gathers into each bucket; block β times W_c[o, β]."""
    entry = tl.load(table_ptr + (piece * MN + bucket))
    x = tl.load(x_tile + (token * x_stride + (entry >> 1)), there & (entry >= 0), other=0.0).to(tl.float32)
    minus = (entry ^ parity(block & (piece % C))) & 1
    return tl.where(minus == 1, -x, x)


@triton.jit
def fold(
    total, x_ptr, table_ptr, x_first, rows, x_stride, block, TABLE_ROWS: tl.constexpr,
    C: tl.constexpr, M: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """total (T·M, N) fp32 plus the buckets of T tokens, of which `rows` are there."""
    line = tl.arange(0, T * M)
    token = (line // M)[:, None]
    bucket = (line % M)[:, None] * N + tl.arange(0, N)[None, :]
    # 64 bits to the tile, 32 within it
    x_tile = x_ptr + x_first * x_stride
    there = token < rows
    if TABLE_ROWS == 1:
        # from 0, which the compiler cannot know: it would lay the few rounds of several streams side by side,
        # whose entries and addresses do not fit into the registers together
        piece = tl.minimum(rows, 0).to(tl.int32)
        while piece < C:
            total += gathered(x_tile, table_ptr, piece, there, token, bucket, x_stride, block, C, M * N)
            piece += 1
    else:
        for piece in range(TABLE_ROWS * C):
            total += gathered(x_tile, table_ptr, piece, there, token, bucket, x_stride, block, C, M * N)
    return total


@triton.jit
def times(x, W, EXACT: tl.constexpr, KIND: tl.constexpr, INTERPRETED: tl.constexpr):
    """x (R, N) fp32 times W (N, N) of ±1, fp32. EXACT: x is exact in KIND; else its three bf16 parts are taken."""
    if EXACT:
        kind: tl.constexpr = tl.float32 if INTERPRETED else KIND
        total = tl.dot(x.to(kind), W.to(kind), input_precision="ieee")
    else:
        total = tl.zeros(x.shape, tl.float32)
        for _ in tl.static_range(3):
            part = x.to(tl.bfloat16)
            x -= part.to(tl.float32)
            if INTERPRETED:  # a dot of bf16 is garbage there; the parts are what the test is about
                total = tl.dot(part.to(tl.float32), W, total, input_precision="ieee")
            else:
                total = tl.dot(part, W.to(tl.bfloat16), total)
    return total


@triton.jit
def spectrum(
    x, EXACT: tl.constexpr, KIND: tl.constexpr, INTERPRETED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """W_m X W_n of each token's buckets in x (T·M, N): (T·N, M), bucket (m, n) of token t at (t·N + n, m)."""
    x = times(x, signs(N), EXACT, KIND, INTERPRETED)
    if M > 1:
        x = tl.reshape(tl.permute(tl.reshape(x, (T, M, N)), (0, 2, 1)), (T * N, M))
        x = times(x, signs(M), False, KIND, INTERPRETED)
    return x


@triton.jit
def grad_sketch_kernel(
    a_ptr, table_a_ptr, ds, tables_d, offsets_ptr, sums_ptr, a_stride, d_strides, examples,
    A_ROWS: tl.constexpr, D_ROWS: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
    CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sums[s, block]: what chunk s of CHUNK tokens adds to its example's sketch; grid (chunks, C).

    Chunk c of example i is number offsets[i] // CHUNK + i + c, which no two chunks share: some numbers are no
    chunk's, and nothing is written there. Example and chunk are found by bisection, so that nothing is read back
    and a chunk's tokens do not depend on the other examples.
    """
    chunk = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    example = tl.zeros((), tl.int64)
    after = examples.to(tl.int64)
    while after - example > 1:
        middle = (example + after) // 2
        below = tl.load(offsets_ptr + middle).to(tl.int64) // CHUNK + middle <= chunk
        example = tl.where(below, middle, example)
        after = tl.where(below, after, middle)
    begin = tl.load(offsets_ptr + example).to(tl.int64)
    end = tl.load(offsets_ptr + example + 1).to(tl.int64)
    row = begin + (chunk - begin // CHUNK - example) * CHUNK
    end = tl.minimum(end, row + CHUNK)
    if row >= end:
        return
    # buckets of one coordinate hold the stream's own numbers
    KIND: tl.constexpr = a_ptr.dtype.element_ty
    NARROW: tl.constexpr = KIND.primitive_bitwidth == 16
    EXACT_A: tl.constexpr = NARROW and A_ROWS * C == 1
    EXACT_D: tl.constexpr = NARROW and len(D_ROWS) == 1 and D_ROWS[0] * C == 1
    total = tl.zeros((T * M, N) if M == 1 else (T * N, M), tl.float32)
    while row < end:
        rows = end - row
        x = tl.zeros((T * M, N), tl.float32)
        x = fold(x, a_ptr, table_a_ptr, row, rows, a_stride, block, A_ROWS, C, M, N, T)
        left = spectrum(x, EXACT_A, KIND, INTERPRETED, M, N, T)
        x = tl.zeros((T * M, N), tl.float32)
        for l in tl.static_range(len(D_ROWS)):  # noqa: E741
            x = fold(x, ds[l], tables_d[l], row, rows, d_strides[l], block, D_ROWS[l], C, M, N, T)
        total += left * spectrum(x, EXACT_D, KIND, INTERPRETED, M, N, T)
        row += T
    first = sums_ptr + (chunk * C + block) * (M * N)
    bucket = tl.arange(0, M * N)
    if M > 1:  # (n, m) lies at n·M + m
        bucket = bucket % M * N + bucket // M
    tl.store(first + bucket, tl.sum(tl.reshape(total, (T, M * N)), 0))


@triton.jit
def add_chunks_kernel(
    sums_ptr, offsets_ptr, out_ptr, scale, K: tl.constexpr, CHUNK: tl.constexpr, BUCKETS: tl.constexpr
):
    """out[i]: scale times the sum of example i's chunks, first to last; grid (examples, K / BUCKETS)."""
    i = tl.program_id(0).to(tl.int64)
    bucket = tl.program_id(1) * BUCKETS + tl.arange(0, BUCKETS)
    begin = tl.load(offsets_ptr + i).to(tl.int64)
    end = tl.load(offsets_ptr + i + 1).to(tl.int64)
    chunk = begin // CHUNK + i
    total = tl.zeros((BUCKETS,), tl.float32)
    while begin < end:
        total += tl.load(sums_ptr + chunk * K + bucket)
        chunk += 1
        begin += CHUNK
    tl.store(out_ptr + i * K + bucket, total * scale)


def grad_sketch(
    a: Tensor,  # (S, p)
    table_a: Tensor,  # (rows, k)
    ds: tuple[Tensor, ...],  # each (S, q_l)
    tables_d: tuple[Tensor, ...],  # each (rows_l, k)
    offsets: Tensor,  # (B+1,)
) -> Tensor:  # (B, k)
    if a.dtype == torch.float64:
        raise RuntimeError('grad_sketch: impl="triton" takes no float64; use "native", "torch" or "reference"')
    interpreted = triton.knobs.runtime.interpret
    if not (a.is_cuda or interpreted):
        raise RuntimeError(f'grad_sketch: impl="triton" cannot run: it needs CUDA tensors, these are on {a.device}')
    k, examples, cuts = table_a.shape[1], len(offsets) - 1, offsets.contiguous()
    out = torch.empty(examples, k, dtype=torch.float32, device=a.device)
    if examples == 0:
        return out
    tile = config.tile(k)
    chunks = len(a) // config.CHUNK + examples
    x, y = _readable(a), [_readable(d) for d in ds]
    tables = table_a.contiguous(), [table.contiguous() for table in tables_d]
    # one set of partial sums for each launch of at most MOST_SIBLINGS
    sums = torch.empty(chunks, k, dtype=torch.float32, device=a.device)
    with torch.cuda.device_of(a):
        for first in range(0, len(y), config.MOST_SIBLINGS):
            some = slice(first, first + config.MOST_SIBLINGS)
            grad_sketch_kernel[chunks, tile.blocks](
                x, tables[0], tuple(y[some]), tuple(tables[1][some]), cuts, sums,
                x.stride(0), tuple(d.stride(0) for d in y[some]), examples,
                A_ROWS=len(table_a), D_ROWS=tuple(len(table) for table in tables_d[some]),
                C=tile.blocks, M=tile.rows, N=tile.columns, T=tile.tokens, CHUNK=config.CHUNK,
                INTERPRETED=interpreted, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            part = torch.empty(examples, k, dtype=torch.float32, device=a.device) if first else out
            buckets = min(config.SUM_BUCKETS, k)
            add_chunks_kernel[examples, k // buckets](
                sums, cuts, part, k**-0.5, K=k, CHUNK=config.CHUNK, BUCKETS=buckets
            )
            if first:
                out += part
    return out


def _readable(x: Tensor) -> Tensor:
    """x (S, f), copied unless its features are adjacent and 32 bits can count the places within a tile."""
    adjacent = x.stride(1) == 1 or x.shape[1] == 1
    return x if adjacent and x.stride(0) <= config.MOST_STRIDE else x.contiguous()
