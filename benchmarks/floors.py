"""What a question takes at the least: how fast the machine copies and multiplies, and how much of both there is.

A floor is max(bytes / copy bandwidth, operations / matrix rate): every input read once, every answer written once, and
the floating-point operations of the cheapest exact way, a multiply-add being two. Both rates are measured in the run
itself, with its threads. Small inputs that stay in a cache, and matrix units that serve another number format, can go
below it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.meters import seconds_per_call
from benchmarks.registry import Floor
from fpo_kernels import cost
from fpo_kernels.cost import Work

Pairs = Literal["norms", "gram", "cross", "steering"]

COPIED = {"cpu": 2**26, "cuda": 2**28}  # bytes of a copy, each way: more than the caches hold
# Square matrices. A small product ends before a neighbour comes in between; a larger one may run faster on its own.
SIZES = {"cpu": (512, 1024), "cuda": (4096, 8192)}
LEAST_CALLS, LONGEST_SECONDS = 3, 0.08  # a quantity; the best call counts
PAUSE_SECONDS = 5.0  # short contests share a measurement


class Rates:
    """The best that this device was seen to do; more measuring makes it no worse.

    Attributes:
        copy: bytes a second, read and written. matmul: FLOP/s of a matrix product by the dtype's name, fp32 without
            TF32.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copy = 0.0
        self.matmul: dict[str, float] = {}
        self._last = -math.inf

    def measure(self, dtypes: Collection[str]) -> None:
        """Copies, and products in these dtypes: a quarter of a second for one dtype.

        Nothing without dtypes, and so soon after the last time where all of them are known.
        """
        if not dtypes or (time.monotonic() - self._last < PAUSE_SECONDS and self.matmul.keys() >= set(dtypes)):
            return
        self.copy = max(self.copy, self._copies())
        with _no_tf32():
            for name, size in itertools.product(sorted(dtypes), SIZES[self.device.type]):
                self.matmul[name] = max(self.matmul.get(name, 0.0), self._multiplies(name, size))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # contests look at what is free
        self._last = time.monotonic()

    def found(self) -> dict[str, Any]:
        """{"copy_bytes_per_second", "matmul_flops_per_second": by dtype}; {} where nothing was measured."""
        if not self.matmul:
            return {}
        return {"copy_bytes_per_second": self.copy, "matmul_flops_per_second": dict(self.matmul)}

    def seconds(self, floor: Floor) -> float:
        """The floor's time at these rates."""
        return max(floor.bytes / self.copy, floor.flops / self.matmul[floor.dtype])

    def judge(self, row: dict[str, Any]) -> None:
        """Give a row that has a `floor` its `floor_seconds`, and `of_floor`: them over its median, 1 at the floor."""
        if "floor" in row:
            row["floor_seconds"] = self.seconds(Floor(**row["floor"]))
            row["of_floor"] = row["floor_seconds"] / row["seconds"]["median"]

    def _copies(self) -> float:
        source = torch.ones(COPIED[self.device.type] // 4, device=self.device)
        target = torch.ones_like(source)
        return 2 * source.nbytes / self._least(lambda: target.copy_(source))

    def _multiplies(self, dtype: str, size: int) -> float:
        generator = torch.Generator(self.device).manual_seed(0)  # a GPU multiplies equal numbers at a higher clock
        x = torch.randn(size, size, generator=generator, device=self.device).to(getattr(torch, dtype))
        product = torch.empty_like(x)
        return 2 * size**3 / self._least(lambda: torch.mm(x, x, out=product))

    def _least(self, run: Callable[[], object]) -> float:
        run()
        started, took = time.monotonic(), math.inf
        for call in itertools.count(1):
            took = min(took, seconds_per_call(run, 1, self.device))
            if call >= LEAST_CALLS and time.monotonic() - started > LONGEST_SECONDS:
                break
        return took


@contextmanager
def _no_tf32() -> Iterator[None]:
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(usual)


def listed(examples: int, kind: Pairs, others: int = 0) -> list[tuple[int, int]]:
    """The pairs of a question about so many examples; `others` (or the one reference) come after them."""
    own = range(examples)
    if kind == "norms":
        return [(i, i) for i in own]
    if kind == "gram":
        return list(itertools.combinations_with_replacement(own, 2))
    if kind == "cross":
        return [(i, examples + j) for i in own for j in range(others)]
    return [(i, i) for i in own] + [(i, examples) for i in own]


def products(lengths: Sequence[int], pairs: Sequence[tuple[int, int]] | Tensor, p: int, q: int, dtype: str) -> Floor:
    """⟨G_i, G_j⟩ of one layer of p inputs and q outputs: its streams once, from tokens or by forming G (cost.py).

    Args:
        lengths: tokens of every example. pairs: (n, 2). q: outputs, added up over layers that read one input.
    """
    work = Work.of(lengths, pairs.numpy() if isinstance(pairs, Tensor) else pairs)
    moved = cost.form_bytes(work, p, q, _size(dtype)) + 4 * work.pairs
    return Floor(bytes=moved, flops=_multiplied(work, p, q), dtype=dtype)


def direction(lengths: Sequence[int], p: int, q: int, dtype: str) -> Floor:
    """⟨G_i, V⟩ of one layer: its streams and V once, every token times V."""
    tokens = sum(lengths)
    moved = _size(dtype) * (tokens * (p + q) + p * q) + 4 * len(lengths)
    return Floor(bytes=moved, flops=2.0 * tokens * p * q, dtype=dtype)


def sketches(lengths: Sequence[int], p: int, q: int, dim: int, dtype: str) -> Floor:
    """k = `dim` numbers of every G_i: its streams once, by transforms of every token or by forming G."""
    moved = _size(dtype) * sum(lengths) * (p + q) + 4 * len(lengths) * dim
    return Floor(bytes=moved, flops=_sketched(lengths, p, q, dim), dtype=dtype)


def read(streams: Sequence[Tensor], answer: Tensor) -> Floor:
    """Any estimate from these streams: they are read once, fp32 answers written once; no operations are owed."""
    moved = sum({x.data_ptr(): x.nbytes for x in streams}.values()) + 4 * answer.numel()
    return Floor(bytes=moved, flops=0.0, dtype="float32")


def whole(
    model: nn.Module,
    lengths: Sequence[int],
    *,
    backward: bool = True,
    pairs: Sequence[tuple[int, int]] = (),
    dim: int = 0,
    head_alone: bool = False,
) -> Floor:
    """A pass of a Llama-type reward model over texts of these lengths, padding left out, and what is asked of it.

    Every weight of a block meets every token once forward and, with `backward`, once more for its gradient; of
    attention each query meets the keys up to its own. Weights of the blocks are read once.

    Args:
        pairs: inner products of gradients over all Linear weights, or over the score head alone.
        dim: numbers of a sketch of the gradients over all Linear weights; 0 for none.
        head_alone: the score head is what the products are over.
    """
    settings: Any = model.config
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    hidden, tokens = settings.hidden_size, sum(lengths)
    blocks, heads = _blocks(settings), settings.num_attention_heads * settings.head_dim
    weights = sum(p * q for p, q in blocks)
    seen = settings.num_hidden_layers * sum(t * (t + 1) / 2 for t in lengths)  # pairs of a query and a key
    flops = 2.0 * weights * tokens + 4.0 * heads * seen + 2.0 * hidden * len(lengths)
    if backward:
        flops += 2.0 * weights * tokens + 8.0 * heads * seen
    if pairs:
        of_head = Work.of([1] * len(lengths), pairs)  # a score is read at the last token
        flops += _multiplied(of_head, hidden, 1)
        if not head_alone:
            work = Work.of(lengths, pairs)
            flops += sum(_multiplied(work, p, q) for p, q in blocks)
    if dim:
        flops += sum(_sketched(lengths, p, q, dim) for p, q in blocks)
    moved = _size(dtype) * (weights + tokens * hidden) + 4 * (len(pairs) + len(lengths) * dim)
    return Floor(bytes=moved, flops=flops, dtype=dtype)


def lengths_of(batch: dict[str, Tensor]) -> list[int]:
    """Tokens of every text of a padded batch."""
    return [int(length) for length in batch["attention_mask"].sum(1)]


def kept(floor: Floor) -> dict[str, Any]:
    """As a row has it."""
    return dataclasses.asdict(floor)


def _blocks(settings: Any) -> list[tuple[int, int]]:
    """(inputs, outputs) of the Linear layers of all blocks; those that read one input are added up."""
    hidden, wide = settings.hidden_size, settings.intermediate_size
    heads, keys = (n * settings.head_dim for n in (settings.num_attention_heads, settings.num_key_value_heads))
    block = [(hidden, heads + 2 * keys), (heads, hidden), (hidden, 2 * wide), (wide, hidden)]
    return block * settings.num_hidden_layers


def _multiplied(work: Work, p: int, q: int) -> float:
    return min(cost.token_flops(work, p, q), cost.form_flops(work, p, q))


def _sketched(lengths: Sequence[int], p: int, q: int, dim: int) -> float:
    """Two transforms of a token, a's and that of all d's, and their product; or G formed and added into buckets."""
    tokens = sum(lengths)
    by_token = tokens * (p + q + 2.0 * dim * math.log2(dim) + 2.0 * dim)
    return min(by_token, 2.0 * tokens * p * q + len(lengths) * p * q)


def _size(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)
