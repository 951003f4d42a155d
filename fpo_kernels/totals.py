"""What the parameters contribute, added up, and matrices from blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .gather import Consume
from .gradients import Factors, Pairs, Rows, Stream
from .layers import Site

Held = dict[str, Stream]


class Total:
    """Sums what the parameters contribute, in float64."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, part: Tensor) -> None:
        """A parameter's contribution, one number a pair or an example."""
        part = part.double()
        self.value = part if self.value is None else self.value + part.to(self.value.device)

    def multiply(self, sites: list[Site], streams: list[Stream], pairs: Pairs, held: Held | None = None) -> None:
        """Add the products of `pairs`, within the streams or with the held ones; siblings are multiplied together."""
        if held is None:
            self.add(type(streams[0]).products(streams, pairs, None))  # type: ignore[arg-type]
            return
        together: dict[int, list[tuple[Stream, Stream]]] = {}
        for site, stream in zip(sites, streams, strict=True):
            if site.name in held:
                own, other = _alike(stream, held[site.name])
                together.setdefault(id(other.a) if isinstance(other, Factors) else 0, []).append((own, other))
        for members in together.values():
            left, right = zip(*members, strict=True)
            self.add(type(left[0]).products(left, pairs, right))

    def over(self, pairs: Pairs) -> Consume:
        """A consumer that adds the products of these pairs."""
        return lambda sites, streams: self.multiply(sites, streams, pairs)

    def result(self, outputs: Tensor, n: int) -> Tensor:
        """The sum in the outputs' precision, or zeros where no gradient reached any chosen parameter."""
        like = wide(outputs)
        return like.new_zeros(n) if self.value is None else self.value.to(like)


def _alike(left: Stream, right: Stream) -> tuple[Stream, Stream]:
    """Streams of one kind: a tied embedding may have met its linear layer in one batch only."""
    if isinstance(left, Rows) and isinstance(right, Factors):
        return left.as_factors(), right
    if isinstance(left, Factors) and isinstance(right, Rows):
        return left, right.as_factors()
    return left, right


def holding(held: Held) -> Consume:
    """A consumer that keeps every stream by its parameter's name."""

    def consume(sites: list[Site], streams: list[Stream]) -> None:
        held.update((site.name, stream) for site, stream in zip(sites, streams, strict=True))

    return consume


def symmetric(blocks: list[list[Tensor]]) -> Tensor:
    """A symmetric matrix from its blocks on and above the diagonal."""
    sizes = [row[0].shape[0] for row in blocks]
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    whole = blocks[0][0].new_empty(sum(sizes), sum(sizes))
    for n, row in enumerate(blocks):
        top = slice(starts[n], starts[n] + sizes[n])
        upper = torch.cat(row, 1)
        whole[top, starts[n] :] = upper
        whole[starts[n] :, top] = upper.T
    return whole


def wide(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x if x.dtype == torch.float64 else x.float()
