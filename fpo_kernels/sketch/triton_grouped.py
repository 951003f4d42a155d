"""Many layers' sketches in one launch, from a plan in memory: the kernels of `grouped.py` and of impl="triton".

With k = m·n buckets as a matrix X (m, n), W_k x is W_m X W_n. For larger k, W_k = W_c ⊗ W_(k/c), and block o of the
output is W_(k/c) Σ_β W_c[o, β] x_β: a sketch of k/c buckets whose entries have other signs.

Gathering. A warp that gathers from global memory touches a line for each of its threads; from shared memory it takes
three or four turns (`tl.gather`: README). So a token's features come in once, in order, and are gathered there; two
tokens of a 16-bit stream lie in one word, so that an entry of the table is read, a word gathered and its signs turned
for both.

Products. The matrix units take several tokens at once, in the order (m, token, n): JOINED of them one below the other
in the left product, the rest side by side there, all one below the other in the right one.

Precision. ±1 is exact in any format, and a float32 is the sum of three bfloat16 (8 bits each). A bucket of one
bfloat16 is one part, of one float16 (11 bits) two. Products are therefore exact and sums float32, on matrix units
whatever the stream's dtype.
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
def signs(N: tl.constexpr, TOKENS: tl.constexpr):
    """W_n of ±1, exact in any format; for the rows of several tokens W_n ⊗ I, with zeros between tokens."""
    n = tl.arange(0, N * TOKENS)
    row, column = n[:, None], n[None, :]
    W = 1.0 - 2.0 * parity((row // TOKENS) & (column // TOKENS)).to(tl.float32)
    return tl.where(row % TOKENS == column % TOKENS, W, 0.0)


@triton.jit
def one_word(stream, stride, width, left, ROW: tl.constexpr, SPAN: tl.constexpr):
    """(SPAN,) int32: the features of row ROW, of 16 bits those of the next too; zeros from row `left` on.

    Zeros from `width` on as well, where entries point that stand for no feature.
    """
    feature = tl.arange(0, SPAN)
    there = feature < width
    word = tl.load(stream + (stride * ROW + feature), there & (left > ROW), other=0.0)
    if stream.dtype.element_ty.primitive_bitwidth == 32:
        word = word.to(tl.int32, bitcast=True)
    else:
        other = tl.load(stream + (stride * (ROW + 1) + feature), there & (left > ROW + 1), other=0.0)
        word = word.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word |= other.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return word


@triton.jit
def summed(x, ROUNDS: tl.constexpr, BUCKETS: tl.constexpr, ROWS: tl.constexpr):
    """(BUCKETS,) of what some rounds of entries add; a bucket's ROWS are adjacent in each."""
    if ROWS > 1:
        x = tl.sum(tl.reshape(x, (ROUNDS * BUCKETS, ROWS)), 1)
    if ROUNDS > 1:
        x = tl.sum(tl.reshape(x, (ROUNDS, BUCKETS)), 0)
    return x


@triton.jit
def unpacked(word, KIND: tl.constexpr, ROUNDS: tl.constexpr, BUCKETS: tl.constexpr, ROWS: tl.constexpr):
    """(BUCKETS, 2): what the two tokens of words of 16-bit features add to buckets."""
    if KIND.is_bf16():
        first = (word << 16).to(tl.float32, bitcast=True)
        second = (word & -0x10000).to(tl.float32, bitcast=True)
    else:
        first = word.to(tl.int16).to(KIND, bitcast=True).to(tl.float32)
        second = (word >> 16).to(tl.int16).to(KIND, bitcast=True).to(tl.float32)
    return tl.join(summed(first, ROUNDS, BUCKETS, ROWS), summed(second, ROUNDS, BUCKETS, ROWS))


@triton.jit
def gathered(
    x, stream, table, stride, width, gathers, left, block,
    C: tl.constexpr, BUCKETS: tl.constexpr, TOKENS: tl.constexpr, ENTRIES: tl.constexpr, ROUNDS: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """x (BUCKETS, TOKENS) fp32 plus what as many rows' features, at most SPAN, fall into; `left` rows are there."""
    KIND: tl.constexpr = stream.dtype.element_ty
    ROWS: tl.constexpr = ENTRIES // BUCKETS
    WORDS: tl.constexpr = TOKENS * KIND.primitive_bitwidth // 32
    # the sign of an entry of 16 bits stands in bits 15 and 31 once it has 32: those of two packed tokens
    SIGN: tl.constexpr = -0x80000000 if KIND.primitive_bitwidth == 32 else -0x7FFF8000
    # asked for beside the features, so that both are waited for at once, where registers can hold them so long
    AHEAD: tl.constexpr = WORDS == 1 and ROUNDS * BUCKETS <= 4096
    place = tl.arange(0, ROUNDS * ENTRIES)
    if AHEAD:
        entry = tl.load(table + place)
    word0 = one_word(stream, stride, width, left, 0, SPAN)
    if WORDS > 1:
        word1 = one_word(stream, stride, width, left, TOKENS // WORDS, SPAN)
    if WORDS > 2:
        word2 = one_word(stream, stride, width, left, 2, SPAN)
        word3 = one_word(stream, stride, width, left, 3, SPAN)
    n = tl.full((), 0, tl.int32)
    while n < gathers:
        if not AHEAD:
            entry = tl.load(table + (n * (ROUNDS * ENTRIES) + place))
        index = entry.to(tl.int32) & (SPAN - 1)
        sign = entry.to(tl.int32) & SIGN
        if C > 1:
            sign ^= -parity(block & (n % C)) & SIGN
        y = tl.gather(word0, index, 0) ^ sign
        if WORDS == 4:
            y = summed(y.to(tl.float32, bitcast=True), ROUNDS, BUCKETS, ROWS)
            y1 = summed((tl.gather(word1, index, 0) ^ sign).to(tl.float32, bitcast=True), ROUNDS, BUCKETS, ROWS)
            y2 = summed((tl.gather(word2, index, 0) ^ sign).to(tl.float32, bitcast=True), ROUNDS, BUCKETS, ROWS)
            y3 = summed((tl.gather(word3, index, 0) ^ sign).to(tl.float32, bitcast=True), ROUNDS, BUCKETS, ROWS)
            y = tl.reshape(tl.join(tl.join(y, y1), tl.join(y2, y3)), (BUCKETS, 4))
        elif KIND.primitive_bitwidth == 32:
            y = summed(y.to(tl.float32, bitcast=True), ROUNDS, BUCKETS, ROWS)
            y1 = summed((tl.gather(word1, index, 0) ^ sign).to(tl.float32, bitcast=True), ROUNDS, BUCKETS, ROWS)
            y = tl.join(y, y1)
        else:
            y = unpacked(y, KIND, ROUNDS, BUCKETS, ROWS)
            if WORDS == 2:
                y1 = unpacked(tl.gather(word1, index, 0) ^ sign, KIND, ROUNDS, BUCKETS, ROWS)
                y = tl.reshape(tl.join(y, y1), (BUCKETS, 4))
        x += y
        n += 1
        if AHEAD:  # noqa: SIM102 (of a constant and of a number)
            if n < gathers:
                entry = tl.load(table + (n * (ROUNDS * ENTRIES) + place))
    return x


@triton.jit
def fold(
    x, base, entries, piece, row, left, block,
    C: tl.constexpr, BUCKETS: tl.constexpr, TOKENS: tl.constexpr, ENTRIES: tl.constexpr, ROUNDS: tl.constexpr,
    SPAN: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """x plus what a piece of a stream's rows from `row` on falls into."""
    stride = tl.load(piece + 1) // ALIGN * ALIGN
    width = (tl.load(piece + 2) // ALIGN * ALIGN).to(tl.int32)
    stream = base + (tl.load(piece) // ALIGN * ALIGN + row * stride)
    table = entries + tl.load(piece + 3) // 8 * 8
    gathers = tl.load(piece + 4).to(tl.int32)
    if WIDE > SPAN:
        if tl.load(piece + 5) > 0:
            x = gathered(
                x, stream, table, stride, width, gathers, left, block, C, BUCKETS, TOKENS, ENTRIES, ROUNDS, WIDE
            )
        else:
            x = gathered(x, stream, table, stride, width, gathers, left, block, C, BUCKETS, TOKENS, ENTRIES, 1, SPAN)
    else:
        x = gathered(x, stream, table, stride, width, gathers, left, block, C, BUCKETS, TOKENS, ENTRIES, 1, SPAN)
    return x


@triton.jit
def times(x, W, parts, LEFT: tl.constexpr):
    """W x if LEFT, else x W, in fp32: x as the sum of so many bfloat16, W of ±1 and 0."""
    total = tl.full(x.shape, 0, tl.float32)
    # a loop to Triton too: products one after another would each be all warps' on Hopper, twice and four times over
    while parts > 0:
        # cut off, which is cheaper than rounding and as exact: eight bits of the 24 a time
        bits = x.to(tl.int32, bitcast=True)
        part = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        x -= (bits & -0x10000).to(tl.float32, bitcast=True)
        # W is fp32 when interpreted: a dot of bf16 is garbage there, and the parts are what is to be tested
        if LEFT:
            total = tl.dot(W, part.to(W.dtype), total, input_precision="ieee")
        else:
            total = tl.dot(part.to(W.dtype), W, total, input_precision="ieee")
        parts -= 1
    return total


@triton.jit
def grouped_sketch_kernel(
    base, entries, rows_base, runs, members, pieces, sums, examples, chunks,
    C: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, JOINED: tl.constexpr,
    ENTRIES: tl.constexpr, ROUNDS: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sums[run, chunk, example, block] = Σ over a run's members and a chunk's tokens; grid (runs · chunks · B · C).

    Rows of int64, `plan.py` writes them. runs: first member, the one after the last. members: where starts and lengths
    lie, first piece, pieces of a and of the d's, bfloat16 parts of their buckets. pieces: first element, stride, width,
    first entry, gathers, whether WIDE. Addresses that come from memory are shown to be multiples of ALIGN elements.
    """
    program = tl.program_id(0).to(tl.int64)
    block = (program % C).to(tl.int32)
    example = (program // C % examples).to(tl.int32)
    place = program // C // examples
    before = (place % chunks).to(tl.int32) * CHUNK
    member = tl.load(runs + place // chunks * 2).to(tl.int32)
    last = tl.load(runs + place // chunks * 2 + 1).to(tl.int32)
    WHOLE: tl.constexpr = tl.float32 if INTERPRETED else tl.bfloat16
    W_m = signs(M, JOINED).to(WHOLE)
    W_n = signs(N, 1).to(WHOLE)
    total = tl.full((M * TOKENS, N), 0, tl.float32)
    while member < last:
        own = members + member * 7
        row = tl.load(rows_base + (tl.load(own) + example)) + before
        left = tl.minimum(tl.load(rows_base + (tl.load(own + 1) + example)) - before, CHUNK).to(tl.int32)
        while left > 0:
            product = tl.full((M * TOKENS, N), 1.0, tl.float32)
            piece = tl.load(own + 2).to(tl.int32)
            side = tl.full((), 0, tl.int32)
            while side < 2:
                x = tl.full((M * N, TOKENS), 0, tl.float32)
                stop = piece + tl.load(own + 3 + side).to(tl.int32)
                while piece < stop:
                    x = fold(
                        x, base, entries, pieces + piece * 6, row, left, block,
                        C, M * N, TOKENS, ENTRIES, ROUNDS, SPAN, WIDE, ALIGN,
                    )  # fmt: skip
                    piece += 1
                parts = tl.load(own + 5 + side).to(tl.int32)
                x = tl.permute(tl.reshape(x, (M, N, TOKENS)), (0, 2, 1))
                x = times(tl.reshape(x, (M * JOINED, TOKENS // JOINED * N)), W_m, parts, True)
                product *= times(tl.reshape(x, (M * TOKENS, N)), W_n, tl.full((), 3, tl.int32), False)
                side += 1
            total += product
            row += TOKENS
            left -= TOKENS
        member += 1
    # halves, not a sum: that of an axis which warps share went wrong (README)
    total = tl.permute(tl.reshape(total, (M, TOKENS, N)), (0, 2, 1))
    if TOKENS == 4:
        total, other = tl.split(tl.reshape(total, (M, N, 2, 2)))
        total += other
    total, other = tl.split(total)
    total += other
    line = tl.arange(0, M)[:, None]
    tl.store(sums + (program * (M * N) + (line * N + tl.arange(0, N)[None, :])), total)


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
    span = config.wide_span(k, launch.dtype, major) if launch.wide else config.SPAN
    options = {} if tile.registers is None else {"maxnreg": tile.registers}
    with torch.cuda.device_of(sums):
        grouped_sketch_kernel[len(launch.runs) * launch.chunks * examples * sides.blocks,](
            *layout, sums, examples, launch.chunks,
            C=sides.blocks, M=sides.rows, N=sides.columns, TOKENS=sides.tokens, JOINED=sides.joined,
            ENTRIES=config.ENTRIES, ROUNDS=config.rounds(k, span), CHUNK=config.CHUNK, SPAN=config.SPAN, WIDE=span,
            ALIGN=launch.align, INTERPRETED=triton.knobs.runtime.interpret,
            num_warps=tile.warps, num_stages=config.STAGES, **options,
        )  # fmt: skip
