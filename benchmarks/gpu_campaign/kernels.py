"""Operations on one layer's streams by shape, beside what reading them and multiplying them takes at the least."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import fpo_kernels as fk
from benchmarks import peers
from benchmarks.gpu_campaign.clock import Run, kernel_ms, tidy
from benchmarks.gpu_campaign.record import Record
from benchmarks.models import SHAPES

EXAMPLES = 9
DIMS = (1024, 4096)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Layers that read one input of p features and make q's."""

    name: str
    p: int
    q: tuple[int, ...]


def layers(shape: str) -> list[Layer]:
    """What a block is made of, siblings together, and a LoRA factor."""
    hidden, feed_forward, query_heads, key_heads = SHAPES[shape]
    narrow = hidden * key_heads // query_heads
    return [
        Layer(name="q,k,v", p=hidden, q=(hidden, narrow, narrow)),
        Layer(name="o", p=hidden, q=(hidden,)),
        Layer(name="gate,up", p=hidden, q=(feed_forward, feed_forward)),
        Layer(name="down", p=feed_forward, q=(hidden,)),
        Layer(name="LoRA a", p=hidden, q=(16,)),
    ]


def run(record: Record) -> None:
    """Rows of the two rates, then one a layer, length and operation: ms, floor_ms and their ratio."""
    cuda = record.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    copied, multiplied = rates(record.device, dtype)
    record.add(f"copies move {copied / 1e12:.2f} TB/s, read + written", what="copy", per_second=copied)
    record.add(f"matrix products run at {multiplied / 1e12:.1f} TFLOP/s", what="matrix", per_second=multiplied)
    shape, lengths = ("llama3.1-8b", (64, 256, 512)) if cuda else ("tiny", (16,))
    for tokens in lengths[:1] if record.quick else lengths:
        for layer in layers(shape):
            for name, work, floor in operations(layer, tokens, dtype, record.device, copied, multiplied):
                one(record, layer, tokens, name, work, floor)
            tidy(record.device)


def one(record: Record, layer: Layer, tokens: int, name: str, work: Run, floor: float) -> None:
    """One row; an operation that does not run fails the part and leaves the others."""
    setting = f"{layer.name}, {EXAMPLES} of {tokens}"
    try:
        took, how = kernel_ms(work, record.device)
    except Exception as problem:
        record.fail(f"{setting}: {name}: {type(problem).__name__}: {str(problem)[:200]}")
        return
    said = f"{setting}: {name}: {took:.4f} ms, floor {floor:.4f} ({how})"
    record.add(said, setting=setting, run=name, ms=took, floor_ms=floor, ratio=took / floor, how=how)


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy (read + written), and operations a second of a square matrix product."""
    cuda = device.type == "cuda"
    source = torch.empty(2**28 if cuda else 2**22, dtype=torch.float32, device=device).fill_(1)
    target = torch.empty_like(source)
    took, _ = kernel_ms(lambda: target.copy_(source), device)
    copied = 2 * source.nbytes / (took / 1e3)
    size = 8192 if cuda else 256
    x = torch.randn(size, size, device=device).to(dtype)
    took, _ = kernel_ms(lambda: x @ x, device)
    return copied, 2 * size**3 / (took / 1e3)


def operations(
    layer: Layer, tokens: int, dtype: torch.dtype, device: torch.device, copied: float, multiplied: float
) -> Iterator[tuple[str, Run, float]]:
    """(name, run, floor in ms): steering's products, sketches, and for one layer alone a direction and its peer."""
    generator = torch.Generator(device).manual_seed(0)
    rows = EXAMPLES * tokens

    def stream(width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator, device=device).to(dtype)

    a, ds = stream(layer.p), tuple(stream(q) for q in layer.q)
    offsets = torch.arange(EXAMPLES + 1, device=device) * tokens
    own = torch.arange(EXAMPLES - 1)
    listed = torch.cat([torch.stack([own, own], 1), torch.stack([own, torch.full_like(own, EXAMPLES - 1)], 1)])
    pairs = listed.to(device)
    features, size = layer.p + sum(layer.q), a.element_size()
    read = rows * features * size / copied * 1e3
    # (z, z) is symmetric: half of 2·T²·(p + q); (z, ref) is whole
    flops = (EXAMPLES - 1) * 3 * tokens**2 * features / multiplied * 1e3
    yield "steering products", lambda: fk.grad_products(a, ds, offsets, pairs), max(read, flops)
    for dim in DIMS:
        maps = [fk.TensorSketch(layer.p, q, dim, 0, f"layer {n}", "one input") for n, q in enumerate(layer.q)]
        yield f"sketch {dim}", lambda maps=maps: fk.grad_sketch(a, ds, offsets, maps), read  # type: ignore[misc]
    if len(ds) == 1:
        (d,) = ds
        V = torch.randn(layer.q[0], layer.p, generator=generator, device=device).to(dtype)
        least = max(read + V.nbytes / copied * 1e3, 2 * rows * V.numel() / multiplied * 1e3)
        yield "direction", lambda: fk.grad_direction(a, d, offsets, V), least
        yield "direction, plain torch", lambda: peers.plain_direction(a, d, offsets, V), least
