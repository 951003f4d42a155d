"""impl="triton": the grouped kernel on one layer, or siblings, whose chunks of tokens stand for its examples.

No length is known on the host here: chunk c of example i is number offsets[i] // CHUNK + i + c, which no two chunks
share. Numbers that are no chunk's have no tokens. So an example's chunks do not depend on the others, there are as many
numbers as tokens and examples tell, and nothing is read back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpo_kernels.sketch import config_triton as config
from fpo_kernels.sketch.plan import Streams
from fpo_kernels.sketch.triton_grouped import check, unadded


@triton.jit
def add_chunks_kernel(
    sums_ptr, offsets_ptr, out_ptr, scale, K: tl.constexpr, CHUNK: tl.constexpr, BUCKETS: tl.constexpr
):
    """out[i]: scale times the sum of example i's chunks, first to last; grid (examples, K / BUCKETS)."""
    i = tl.program_id(0).to(tl.int64)
    bucket = tl.program_id(1) * BUCKETS + tl.arange(0, BUCKETS)
    begin = tl.load(offsets_ptr + i)
    end = tl.load(offsets_ptr + i + 1)
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
    check(a)
    k, examples, cuts = table_a.shape[1], len(offsets) - 1, offsets.long().contiguous()
    out = torch.empty(examples, k, dtype=torch.float32, device=a.device)
    if examples == 0:
        return out
    starts, lengths = chunks(cuts, len(a))
    sides = ([(a, table_a)], list(zip(ds, tables_d, strict=True)))
    sums, _, _ = unadded([Streams(sides, starts, lengths, config.CHUNK, 0)], 1, k)
    buckets = min(config.SUM_BUCKETS, k)
    with torch.cuda.device_of(a):
        add_chunks_kernel[examples, k // buckets](sums, cuts, out, k**-0.5, K=k, CHUNK=config.CHUNK, BUCKETS=buckets)
    return out


def chunks(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Where the chunk of each number starts, and how many tokens it has: (rows // CHUNK + B,) each."""
    examples = len(offsets) - 1
    number = torch.arange(rows // config.CHUNK + examples, device=offsets.device)
    first = offsets[:-1] // config.CHUNK + torch.arange(examples, device=offsets.device)
    example = torch.searchsorted(first, number, right=True) - 1
    starts = offsets[example] + (number - first[example]) * config.CHUNK
    return starts, (offsets[example + 1] - starts).clamp(0, config.CHUNK)
