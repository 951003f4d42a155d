"""Token products of many layers, pairs and tiles in one launch, driven by a list of work items.

A program has one item of one layer: a pair's tile of tokens. It holds a tile of a·a and one of d·d in registers,
multiplies them and writes their sum, one number; nothing else is written.

Every layer's streams lie somewhere else and are of other widths. They are found through a table: offsets, in elements,
from one base address. Triton neither vectorises nor pipelines loads through an address that was read from memory unless
arithmetic shows its alignment, hence `x // UNIT * UNIT` (measured, see README.md).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stream_products(
    total, base, stream, x_row, y_row, rows_x, rows_y,
    T: tl.constexpr, F: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """total (T, T) fp32 plus x_t·y_s over a stream's features; nothing where t or s is past its example's end."""
    token = tl.arange(0, T)
    feature = tl.arange(0, F)
    x_stride = tl.load(stream + 1).to(tl.int32) // UNIT * UNIT
    y_stride = tl.load(stream + 3).to(tl.int32) // UNIT * UNIT
    width = tl.load(stream + 4).to(tl.int32) // UNIT * UNIT
    # 64 bits to the tile, 32 within it: addresses of all elements in 64 would not fit into the registers
    x_first = base + (tl.load(stream) + x_row * x_stride) // UNIT * UNIT
    y_first = base + (tl.load(stream + 2) + y_row * y_stride) // UNIT * UNIT
    x_token = token[:, None] * x_stride
    y_token = token[None, :] * y_stride
    in_x = (token < rows_x)[:, None]
    in_y = (token < rows_y)[None, :]
    if INTERPRETED:  # that of triton 3.6 counts no range to a bound that is read from memory
        first = tl.zeros((), tl.int32)
        while first < width:
            column = first + feature
            inside = column < width
            x = tl.load(x_first + (x_token + column[None, :]), in_x & inside[None, :], other=0.0)
            y = tl.load(y_first + (column[:, None] + y_token), inside[:, None] & in_y, other=0.0)
            total = tl.dot(x, y, total, input_precision="ieee")
            first += F
    else:
        for first in range(0, width, F):
            column = first + feature
            inside = column < width
            x = tl.load(x_first + (x_token + column[None, :]), in_x & inside[None, :], other=0.0)
            y = tl.load(y_first + (column[:, None] + y_token), inside[:, None] & in_y, other=0.0)
            total = tl.dot(x, y, total, input_precision=PRECISION)
    return total


@triton.jit
def left_out(base, offset, stride, width, begin, tile, extent, T: tl.constexpr, F: tl.constexpr):
    """How many elements other than 0 a stream has in the T rows from `tile` of an example that do not count."""
    row = tile + tl.arange(0, T)
    first = tl.load(extent + 2)
    outside = (row < tl.load(extent + 1)) & ((row < first) | (row >= first + tl.load(extent + 3)))
    x = base + offset + (begin + row)[:, None] * stride
    column = tl.arange(0, F)
    found = tl.zeros((T, F), tl.int32)
    start = tl.zeros((), tl.int64)
    while start < width:
        inside = outside[:, None] & (start + column < width)[None, :]
        found += (tl.load(x + (start + column)[None, :], inside, other=0.0) != 0).to(tl.int32)
        start += F
    return tl.sum(found)


@triton.jit
def grouped_products_kernel(
    base, ids_base, layers, streams, items, extents, leak, sums,
    T: tl.constexpr, F: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sums[item, layer]: Σ_{t, s} (a_t·a_s)(Σ_k d^k_t·d^k_s) of a pair's tile, times the item's weight.

    Grid (items, layers). All tables are int64 but the items, int32:

        layers (L, 4): first stream (a), one past the last (the d's follow a), 1 where a are ids, else 0, spare
        streams (M, 5): x offset, x stride, y offset, y stride, width; in elements from `base` (ids: `ids_base`)
        items (U, 5): extent i of x, its tile, extent j of y, its tile, weight
        extents (B, 4): first row, rows, the first of these that counts, how many count

    Of an item of weight 0 the x tile holds rows that do not count (−1: rows of y, given as i); `leak` is set where one
    of a layer's d is not 0 there.
    """
    item_at = tl.program_id(0).to(tl.int64)
    layer_at = tl.program_id(1).to(tl.int64)
    out = sums + item_at * tl.num_programs(1) + layer_at
    item = items + item_at * 5
    weight = tl.load(item + 4)
    layer = layers + layer_at * 4
    first_stream = tl.load(layer)
    last_stream = tl.load(layer + 1)
    x_extent = extents + tl.load(item).to(tl.int64) * 4
    x_tile = tl.load(item + 1).to(tl.int64) * T
    if weight <= 0:
        found = tl.zeros((), tl.int32)
        stream = first_stream + 1
        while stream < last_stream:
            at = streams + stream * 5
            side = at - weight * 2
            found += left_out(
                base, tl.load(side), tl.load(side + 1), tl.load(at + 4), tl.load(x_extent), x_tile, x_extent, T, F
            )
            stream += 1
        tl.store(out, 0.0)
        if found > 0:
            tl.store(leak, 1)
        return
    y_extent = extents + tl.load(item + 2).to(tl.int64) * 4
    y_tile = tl.load(item + 3).to(tl.int64) * T
    rows_x = tl.load(x_extent + 3) - x_tile
    rows_y = tl.load(y_extent + 3) - y_tile
    if (rows_x <= 0) | (rows_y <= 0):
        tl.store(out, 0.0)
        return
    x_row = tl.load(x_extent) + tl.load(x_extent + 2) + x_tile
    y_row = tl.load(y_extent) + tl.load(y_extent + 2) + y_tile
    dd = tl.zeros((T, T), tl.float32)
    if INTERPRETED:
        stream = first_stream + 1
        while stream < last_stream:
            dd = stream_products(
                dd, base, streams + stream * 5, x_row, y_row, rows_x, rows_y, T, F, UNIT, PRECISION, INTERPRETED
            )
            stream += 1
    else:
        for stream in range(first_stream + 1, last_stream):
            dd = stream_products(
                dd, base, streams + stream * 5, x_row, y_row, rows_x, rows_y, T, F, UNIT, PRECISION, INTERPRETED
            )
    inputs = streams + first_stream * 5
    if tl.load(layer + 2) == 0:
        aa = stream_products(
            tl.zeros((T, T), tl.float32), base, inputs, x_row, y_row, rows_x, rows_y,
            T, F, UNIT, PRECISION, INTERPRETED,
        )  # fmt: skip
        product = tl.sum(aa * dd)
    else:  # one-hot inputs: a_t·a_s is 1 where the ids are the same
        token = tl.arange(0, T)
        x = tl.load(ids_base + tl.load(inputs) + (x_row + token) * tl.load(inputs + 1), token < rows_x, other=-1)
        y = tl.load(ids_base + tl.load(inputs + 2) + (y_row + token) * tl.load(inputs + 3), token < rows_y, other=-2)
        product = tl.sum(tl.where(x[:, None] == y[None, :], dd, 0.0))
    tl.store(out, product * weight.to(tl.float32))
