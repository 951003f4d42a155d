"""Where forming gradients overtakes multiplying token by token: as the cost model has it, and as it was timed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.cases.products import Pairs, list_pairs
from benchmarks.runner import Row
from fpo_kernels.cost import Work, choose_way

ROOMS = {"cpu": ("native", "torch"), "cuda": ("triton", "triton")}
"""Device → the rooms that are fastest there: from tokens, by forming."""
LONGEST = 1 << 16


@dataclass(frozen=True)
class Crossover:
    """Tokens an example from which forming is sooner; None where it is so nowhere that was looked at.

    Attributes:
        pairs: "steering" or "gram" of `examples`. p, q: inputs and outputs of the layer.
        predicted: the least length for which `choose_way` forms. timed: between two lengths, on a straight line of the
            logarithms of length and ratio. first, last: the lengths that were timed.
    """

    pairs: Pairs
    examples: int
    p: int
    q: int
    predicted: int | None
    timed: float | None
    first: int
    last: int


def crossovers(rows: Sequence[Row], device: str) -> list[Crossover]:
    """Of every layer and kind of pairs that the case `ways` timed at several equal lengths.

    Args:
        rows: of the case. device: "cpu" or "cuda".
    """
    timed: dict[tuple[Pairs, int, int, int], dict[int, dict[str, float]]] = {}
    for row in rows:
        setting = row["setting"]
        if row["status"] == "timed" and setting.get("full", True):
            layer = setting["pairs"], setting["examples"], setting["p"], setting["q"]
            timed.setdefault(layer, {}).setdefault(setting["tokens"], {})[row["competitor"]] = row["seconds"]["min"]
    found = []
    for layer, lengths in timed.items():
        ratios = {n: ways["form"] / ways["tokens"] for n, ways in lengths.items() if ways.keys() >= {"form", "tokens"}}
        if len(ratios) > 1:
            pairs, examples, p, q = layer
            least = predicted(pairs, examples, p, q, device)
            found.append(Crossover(*layer, least, crossing(ratios), min(ratios), max(ratios)))
    return found


def predicted(pairs: Pairs, examples: int, p: int, q: int, device: str) -> int | None:
    """The least tokens an example, all alike, for which the cost model forms."""

    def forms(tokens: int) -> bool:
        work = Work.of([tokens] * examples, list_pairs(examples, pairs).numpy())
        return choose_way(work, p, (q,), device, *ROOMS[device]) == "form"

    if not forms(LONGEST):
        return None
    low, high = 0, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if forms(middle) else (middle, high)
    return high


def crossing(ratios: Mapping[int, float]) -> float | None:
    """Where forming over tokens falls below 1 for good, by length; None if it is below or above at all lengths."""
    ordered = sorted(ratios.items())
    for (before, above), (after, below) in reversed(list(itertools.pairwise(ordered))):
        if above >= 1 > below:
            part = math.log(above) / math.log(above / below)
            return float(before * (after / before) ** part)
    return None
