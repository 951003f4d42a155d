"""Many layers' sketches in one launch, from a plan in memory: the kernels of `grouped.py` and of impl="triton".

With k = m·n buckets as a matrix X (m, n), W_k x is W_m X W_n. For larger k, W_k = W_c ⊗ W_(k/c), and block o of the
output is W_(k/c) Σ_β W_c[o, β] x_β: a sketch of k/c buckets whose entries have other signs.

Gathering. A warp that gathers from global memory touches a line for each of its threads; from shared memory it takes
three or four turns (`tl.gather`: README). So a token's features come in once, in order, and are gathered there; two
tokens of a 16-bit stream lie in one word, so that an entry of the table is read, and a word gathered, for both.

Precision. ±1 is exact in any format, and a float32 is the sum of three bfloat16 (8 bits each). A bucket of one
bfloat16 is one part, of one float16 (11 bits) two. Products are therefore exact and sums float32, on matrix units
whatever the stream's dtype. Nothing is permuted between the two products: W_m multiplies from the left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpo_kernels.sketch import config_triton as config
from fpo_kernels.sketch.plan import Launch, Layout, Streams, lay, plan


@triton.jit
def parity(x):
    """1 where x, below 2^16, has an odd number of bits."""
    x ^= x >> 8
    x ^= x >> 4
    x ^= x >> 2
    return (x ^ (x >> 1)) & 1


@triton.jit
def signs(N: tl.constexpr):
    """W_n (N, N) of ±1, exact in any format."""
    n = tl.arange(0, N)
    return 1.0 - 2.0 * parity(n[:, None] & n[None, :]).to(tl.float32)


@triton.jit
def signed(x, entry, minus, ROWS: tl.constexpr, BUCKETS: tl.constexpr):
    """(BUCKETS,) what one round of entries adds: ±x, nothing where the table has none; a bucket's ROWS are adjacent."""
    x = x.to(tl.float32)
    x = tl.where(entry >= 0, tl.where(minus == 1, -x, x), 0.0)
    if ROWS > 1:
        x = tl.sum(tl.reshape(x, (BUCKETS, ROWS)), 1)
    return x


@triton.jit
def gathered(
    x0, x1, stream, table, stride, width, rounds, both, block,
    C: tl.constexpr, BUCKETS: tl.constexpr, ENTRIES: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """x0, x1 (BUCKETS,) fp32 plus what two tokens' features, at most SPAN, fall into; the second if `both`."""
    KIND: tl.constexpr = stream.dtype.element_ty
    PACKED: tl.constexpr = KIND.primitive_bitwidth == 16
    feature = tl.arange(0, SPAN)
    there = feature < width
    first = tl.load(stream + feature, there, other=0.0)
    second = tl.load(stream + (stride + feature), there & both, other=0.0)
    if PACKED:
        words = first.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        words |= second.to(tl.int16, bitcast=True).to(tl.int32) << 16
    n = tl.full((), 0, tl.int32)
    while n < rounds:
        entry = tl.load(table + (n * ENTRIES + tl.arange(0, ENTRIES))).to(tl.int32)
        index = (entry >> 1) & (SPAN - 1)
        minus = entry & 1
        if C > 1:
            minus ^= parity(block & (n % C))
        if PACKED:
            word = tl.gather(words, index, 0)
            y0 = word.to(tl.int16).to(KIND, bitcast=True)
            y1 = (word >> 16).to(tl.int16).to(KIND, bitcast=True)
        else:
            y0 = tl.gather(first, index, 0)
            y1 = tl.gather(second, index, 0)
        x0 += signed(y0, entry, minus, ENTRIES // BUCKETS, BUCKETS)
        x1 += signed(y1, entry, minus, ENTRIES // BUCKETS, BUCKETS)
        n += 1
    return x0, x1


@triton.jit
def fold(
    x0, x1, base, entries, piece, row, both, block,
    C: tl.constexpr, BUCKETS: tl.constexpr, ENTRIES: tl.constexpr,
    SPAN: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """x0, x1 plus what a piece of a stream's rows `row` and `row` + 1 falls into."""
    stride = tl.load(piece + 1) // ALIGN * ALIGN
    width = (tl.load(piece + 2) // ALIGN * ALIGN).to(tl.int32)
    stream = base + (tl.load(piece) // ALIGN * ALIGN + row * stride)
    table = entries + tl.load(piece + 3) // 8 * 8
    rounds = tl.load(piece + 4).to(tl.int32)
    if WIDE > SPAN:
        if width > SPAN:
            x0, x1 = gathered(x0, x1, stream, table, stride, width, rounds, both, block, C, BUCKETS, ENTRIES, WIDE)
        else:
            x0, x1 = gathered(x0, x1, stream, table, stride, width, rounds, both, block, C, BUCKETS, ENTRIES, SPAN)
    else:
        x0, x1 = gathered(x0, x1, stream, table, stride, width, rounds, both, block, C, BUCKETS, ENTRIES, SPAN)
    return x0, x1


@triton.jit
def times(x, W, parts, LEFT: tl.constexpr):
    """W x if LEFT, else x W, in fp32: x as the sum of so many bfloat16, W of ±1."""
    total = tl.full(x.shape, 0, tl.float32)
    while parts > 0:
        part = x.to(tl.bfloat16)
        x -= part.to(tl.float32)
        # W is fp32 when interpreted: a dot of bf16 is garbage there, and the parts are what is to be tested
        if LEFT:
            total = tl.dot(W, part.to(W.dtype), total, input_precision="ieee")
        else:
            total = tl.dot(part.to(W.dtype), W, total, input_precision="ieee")
        parts -= 1
    return total


@triton.jit
def spectrum(x, left, right, parts, M: tl.constexpr, N: tl.constexpr):
    """W_m X W_n of the buckets x (M·N,): (M, N); M = 1: sixteen times the same row, the fewest a product takes."""
    if M == 1:
        x = times(tl.broadcast_to(x[None, :], (16, N)), right, parts, False)
    else:
        x = times(tl.reshape(x, (M, N)), left, parts, True)
        x = times(x, right, tl.full((), 3, tl.int32), False)
    return x


@triton.jit
def grouped_sketch_kernel(
    base, entries, rows_base, runs, members, pieces, sums, examples, chunks,
    C: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr,
    SPAN: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sums[run, chunk, example, block] = Σ over a run's members and a chunk's tokens; grid (runs · chunks · B · C).

    Rows of int64, `plan.py` writes them. runs: first member, the one after the last. members: where starts and lengths
    lie, first piece, pieces of a and of the d's, bfloat16 parts of their buckets. pieces: first element, stride, width,
    first entry, rounds. Addresses that come from memory are shown to be multiples of ALIGN elements.
    """
    program = tl.program_id(0).to(tl.int64)
    block = (program % C).to(tl.int32)
    example = program // C % examples
    place = program // C // examples
    before = place % chunks * CHUNK
    member = tl.load(runs + place // chunks * 2)
    last = tl.load(runs + place // chunks * 2 + 1)
    LINES: tl.constexpr = 16 if M == 1 else M
    WHOLE: tl.constexpr = tl.float32 if INTERPRETED else tl.bfloat16
    W_m = signs(M).to(WHOLE)
    W_n = signs(N).to(WHOLE)
    total = tl.full((LINES, N), 0, tl.float32)
    while member < last:
        own = members + member * 7
        begin = tl.load(rows_base + (tl.load(own) + example))
        row = begin + before
        end = tl.minimum(begin + tl.load(rows_base + (tl.load(own + 1) + example)), row + CHUNK)
        while row < end:
            left = tl.full((LINES, N), 1.0, tl.float32)
            right = tl.full((LINES, N), 1.0, tl.float32)
            piece = tl.load(own + 2)
            side = tl.full((), 0, tl.int32)
            while side < 2:
                x0 = tl.full((M * N,), 0, tl.float32)
                x1 = tl.full((M * N,), 0, tl.float32)
                stop = piece + tl.load(own + 3 + side)
                while piece < stop:
                    x0, x1 = fold(
                        x0, x1, base, entries, pieces + piece * 5, row, row + 1 < end, block,
                        C, M * N, ENTRIES, SPAN, WIDE, ALIGN,
                    )  # fmt: skip
                    piece += 1
                parts = tl.load(own + 5 + side).to(tl.int32)
                left *= spectrum(x0, W_m, W_n, parts, M, N)
                right *= spectrum(x1, W_m, W_n, parts, M, N)
                side += 1
            total += left + right
            row += 2
        member += 1
    line = tl.arange(0, LINES)[:, None]
    tl.store(sums + (program * (M * N) + (line * N + tl.arange(0, N)[None, :])), total, line < M)


@triton.jit
def add_runs_kernel(
    sums, runs, slots, out, scale, examples, K: tl.constexpr, BUCKETS: tl.constexpr, STEP: tl.constexpr
):
    """out[slot, example]: scale times its runs' sums, chunk by chunk; grid (slots · B, K / BUCKETS).

    runs: place and chunks; slots: where each slot's begin, and the last's end.

    STEP chunks are added as a tree, in float64 from there: a chunk has its place in it whatever follows.
    """
    program = tl.program_id(0).to(tl.int64)
    slot, example = program // examples, program % examples
    bucket = tl.program_id(1) * BUCKETS + tl.arange(0, BUCKETS)
    run = tl.load(slots + slot)
    last = tl.load(slots + slot + 1)
    total = tl.full((BUCKETS,), 0, tl.float64)
    while run < last:
        place = tl.load(runs + run * 2)
        chunks = tl.load(runs + run * 2 + 1)
        first = chunks * 0
        while first < chunks:
            chunk = first + tl.arange(0, STEP)[:, None]
            row = (place + chunk) * examples + example
            part = tl.load(sums + (row * K + bucket[None, :]), chunk < chunks, other=0.0)
            total += tl.sum(part, 0).to(tl.float64)
            first += STEP
        run += 1
    tl.store(out + program * K + bucket, (total * scale).to(tl.float32))


def check(x: Tensor) -> None:
    """RuntimeError where these kernels cannot run on x."""
    if x.dtype == torch.float64:
        raise RuntimeError('grad_sketch: impl="triton" takes no float64; use "native", "torch" or "reference"')
    if not (x.is_cuda or triton.knobs.runtime.interpret):
        raise RuntimeError(f'grad_sketch: impl="triton" cannot run: it needs CUDA tensors, these are on {x.device}')


def sums_of_slots(streams: Sequence[Streams], slots: int, k: int) -> Tensor:
    """`grouped_sketch` by maps: (slots, B, k)."""
    first = streams[0].sides[0][0][0]
    check(first)
    examples, buckets = len(streams[0].starts), min(config.SUM_BUCKETS, k)
    out = torch.empty(slots, examples, k, dtype=torch.float32, device=first.device)
    if examples:
        sums, runs, begin = unadded(streams, slots, k)
        with torch.cuda.device_of(first):
            add_runs_kernel[slots * examples, k // buckets](
                sums, runs, begin, out, k**-0.5, examples, K=k, BUCKETS=buckets, STEP=config.SUM_CHUNKS
            )
    return out


def unadded(streams: Sequence[Streams], slots: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of every run, chunk and example (·, k), without k^(−1/2); and `add_runs_kernel`'s runs and slots."""
    device = streams[0].starts.device
    major = config.architecture(device)
    launches = plan(streams, k, major)
    layouts, runs, begin = lay(launches, slots)
    examples = len(streams[0].starts)
    end = launches[-1].place + len(launches[-1].runs) * launches[-1].chunks
    sums = torch.empty(end * examples, k, dtype=torch.float32, device=device)
    for launch, layout in zip(launches, layouts, strict=True):
        if launch.chunks:
            _add_tokens(launch, layout, sums[launch.place * examples :], k, examples, major)
    return sums, runs, begin


def _add_tokens(launch: Launch, layout: Layout, sums: Tensor, k: int, examples: int, major: int) -> None:
    sides = config.sides(k)
    tile = config.tile(k, launch.wide, launch.dtype, major)
    options = {} if tile.registers is None else {"maxnreg": tile.registers}
    with torch.cuda.device_of(sums):
        grouped_sketch_kernel[len(launch.runs) * launch.chunks * examples * sides.blocks,](
            *layout, sums, examples, launch.chunks,
            C=sides.blocks, M=sides.rows, N=sides.columns, ENTRIES=config.ENTRIES, CHUNK=config.CHUNK,
            SPAN=config.SPAN, WIDE=config.wide_span(launch.dtype, major) if launch.wide else config.SPAN,
            ALIGN=launch.align, INTERPRETED=triton.knobs.runtime.interpret,
            num_warps=tile.warps, num_stages=config.STAGES, **options,
        )  # fmt: skip
