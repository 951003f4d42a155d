"""Blocks of matrices of inner products, and what is held of a batch so that a later one may meet it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batches import Batch, chunks, rows_of, take
from .gather import Consume
from .gradients import Factors, Pairs, Stream, join_batches
from .layers import Site
from .passes import Passes
from .totals import Held, Total, holding, mirrored


class Blocks:
    """What an engine's calls are made of."""

    def __init__(self, passes: Passes, most: int | None) -> None:
        """`most`: sequences on a tape where a batch is held; None: all."""
        self._passes, self._most = passes, most
        self._like = torch.zeros(())  # the outputs that came last

    def lying(self, batch: Batch, consume: Consume) -> Tensor:
        """A pass whose streams may keep their padding. → outputs (B,)."""
        self._like = self._passes.run(batch, consume, self._passes.layout(batch))
        return self._like

    def hold(self, batch: Batch) -> tuple[Tensor, Held]:
        """Outputs (B,) and every parameter's stream of a batch."""
        outputs, parts = [], []
        for rows in chunks(rows_of(batch), self._most):
            held: Held = {}
            outputs.append(self.lying(take(batch, rows), holding(held)))
            parts.append(held)
        merged = parts[0] if len(parts) == 1 else join_batches(parts, [len(o) for o in outputs])
        return torch.cat(outputs), merged

    def part(self, batch: Batch) -> tuple[int, Held]:
        """How many examples a batch has, and its streams."""
        held: Held = {}
        return len(self.lying(batch, holding(held))), held

    def of_parts(self, parts: Sequence[tuple[int, Held]]) -> Tensor:
        """⟨g_i, g_j⟩ of all examples of several batches, (B, B); streams are let go of, parameter by parameter."""
        sizes = [size for size, _ in parts]
        b, total = sum(sizes), Total(self._passes.padding_read)
        pairs = Pairs(torch.triu_indices(b, b).T.contiguous())
        for names in _families([held for _, held in parts]):
            own = join_batches([{n: held.pop(n) for n in names if n in held} for _, held in parts], sizes)
            together: dict[int, list[Stream]] = {}
            for stream in own.values():
                together.setdefault(id(stream.a) if isinstance(stream, Factors) else id(stream), []).append(stream)
            for streams in together.values():
                total.multiply([], streams, pairs)
        return mirrored(total.result(self._like, len(pairs.host)), b)

    def within(self, batch: Batch, hold: bool) -> tuple[Tensor, Held]:
        """⟨g_i, g_j⟩ of a batch's examples, (B, B); and its streams, where they are to be held."""
        total = Total(self._passes.padding_read)
        held: Held = {}
        b = rows_of(batch)
        upper_pairs = Pairs(torch.triu_indices(b, b).T.contiguous())

        def consume(sites: list[Site], streams: list[Stream]) -> None:
            total.multiply(sites, streams, upper_pairs)
            if hold:
                holding(held)(sites, streams)

        upper = total.result(self.lying(batch, consume), b * (b + 1) // 2)
        return mirrored(upper, b), held

    def across(self, size: int, held: Held, batch: Batch) -> Tensor:
        """⟨g_i, g_j⟩ of the `size` held examples i and the batch's examples j, (I, J)."""
        total = Total(self._passes.padding_read)
        b = rows_of(batch)
        pairs = Pairs(torch.cartesian_prod(torch.arange(b), torch.arange(size)))

        def consume(sites: list[Site], streams: list[Stream]) -> None:
            total.multiply(sites, streams, pairs, held)

        outputs = self.lying(batch, consume)
        return total.result(outputs, b * size).view(-1, size).T


def _families(parts: Sequence[Held]) -> list[list[str]]:
    """Names of parameters, those together whose modules read the same input."""
    families: dict[int | str, list[str]] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        stream = next(part[name] for part in parts if name in part)
        families.setdefault(id(stream.a) if isinstance(stream, Factors) else name, []).append(name)
    return list(families.values())
