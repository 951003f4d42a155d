"""fk.grad_products from tokens against forming tiles of G, and what "auto" makes of it, by length and shape."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import fpo_kernels as fk
from benchmarks import floors
from benchmarks.cases.products import Pairs, exact_products, list_pairs
from benchmarks.registry import Case, Competitor, Contest, dtypes
from fpo_kernels.cost import Work
from fpo_kernels.products import ops
from fpo_kernels.testing import ragged, random_streams

AUTO = "auto"
WAYS = ("tokens", "form")
SHAPES = ((576, 576), (1536, 576), (384, 384), (64, 64), (4096, 16))  # the last is a LoRA factor
TOKENS = (16, 64, 128, 256, 512, 1024, 2048)
# Of unequal lengths, at two most: these, with a score head and a narrower LoRA factor.
HEADS, UNEQUAL = ((576, 1), (576, 8)), (64, 256)
# Gram matrices of all lengths would take minutes a call from tokens; past these the ways are far apart.
LONGEST_GRAM = 512


@dataclass(frozen=True)
class Setting:
    """One layer (p inputs, q outputs), `examples` of `tokens` each, and which pairs of them (cases/products.py).

    Attributes:
        chosen: the way that auto takes here. full: else of unequal lengths, none to `tokens`.
    """

    name: str
    p: int
    q: int
    tokens: int
    examples: int
    pairs: Pairs
    dtype: str
    chosen: str
    full: bool = False

    @property
    def lengths(self) -> list[int]:
        return [self.tokens] * self.examples if self.full else ragged(self.examples, self.tokens, place="middle")


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """Steering of 8 candidates and a Gram matrix of 16 examples: on every shape at every length, and of unequal ones.

    The unequal ones on narrow layers too; if quick only those.
    """
    layers = [(layer, tokens, True) for layer in SHAPES for tokens in TOKENS]
    layers += [(layer, tokens, False) for layer in (*SHAPES, *HEADS) for tokens in UNEQUAL]
    if quick:
        layers = [(layer, 80, False) for layer in ((96, 64), (96, 1))]
    of: tuple[tuple[Pairs, int], ...] = (("steering", 9), ("gram", 16))
    found = []
    for dtype, ((p, q), tokens, full), (pairs, examples) in itertools.product(dtypes(device), layers, of):
        if pairs == "gram" and tokens > LONGEST_GRAM:
            continue
        kind = str(dtype).removeprefix("torch.")
        suffix = f" {kind}" if len(dtypes(device)) > 1 else ""
        name = f"{pairs} {examples}x{'' if full else '0-'}{tokens}, {p} to {q}{suffix}"
        setting = Setting(name, p, q, tokens, examples, pairs, kind, "", full)
        work = Work.of(setting.lengths, list_pairs(examples, pairs).numpy())
        like = torch.empty(0, p, dtype=dtype, device=device)
        _, chosen = ops.choose(like, [q], work, "auto", "auto")
        found.append(replace(setting, chosen=chosen))
    return found


def build(setting: Setting, device: torch.device) -> Contest:
    """Random streams of the setting's shape, the same on every device; every way within its own error budget."""
    streams = random_streams(setting.lengths, setting.p, setting.q, getattr(torch, setting.dtype), seed=0)
    pairs = list_pairs(setting.examples, setting.pairs)
    exact, from_tokens, by_forming = exact_products(streams, pairs)
    a, d, offsets = (x.to(device) for x in streams)
    listed = pairs.to(device)
    budgets = {AUTO: max(from_tokens, by_forming), "tokens": from_tokens, "form": by_forming}
    competitors = {
        way: Competitor(run=functools.partial(fk.grad_products, a, d, offsets, listed, way=way), budget=budget)
        for way, budget in budgets.items()
    }
    floor = floors.products(setting.lengths, pairs, setting.p, setting.q, setting.dtype)
    return Contest(competitors=competitors, expected=lambda: {"product": exact}, floors={"product": floor})


def regrets(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Setting → least time of the way that auto chose / least time of the best way; 1 where it chose the best.

    Auto's own time is left to the table: the same way timed twice differs by what the machine does besides.
    """
    least: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["status"] == "timed":
            setting = row["setting"]["name"], row["setting"]["chosen"]
            least.setdefault(setting, {})[row["competitor"]] = row["seconds"]["min"]
    return {
        name: times[chosen] / min(times[way] for way in WAYS)
        for (name, chosen), times in least.items()
        if times.keys() >= set(WAYS)
    }


def chart(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines, a layer and kind of pairs each: the least time by forming / from tokens, by equal lengths."""
    least: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        setting = row["setting"]
        if row["status"] == "timed" and setting.get("full", True):  # all were before some were not
            line = f"{setting['pairs']}, {setting['p']} to {setting['q']}"
            least.setdefault((line, setting["tokens"]), {})[row["competitor"]] = row["seconds"]["min"]
    lengths = sorted({tokens for _, tokens in least})
    lines = [f"| tokens an example | {' | '.join(map(str, lengths))} |", "|---" * (len(lengths) + 1) + "|"]
    for line in dict.fromkeys(line for line, _ in least):
        cells = []
        for tokens in lengths:
            times = least.get((line, tokens))
            cells.append(f"{times['form'] / times['tokens']:.2f}" if times else "")
        lines.append(f"| {line} | {' | '.join(cells)} |")
    return lines


def summary(rows: list[dict[str, Any]]) -> str:
    """The median and the worst regret of auto, and which way wins where."""
    found = regrets(rows)
    if not found:
        return "no setting was timed in both ways"
    worst = max(found, key=lambda name: found[name])
    middle = statistics.median(found.values())
    regret = f"regret of auto: median {middle:.2f}, worst {found[worst]:.2f} ({worst})"
    return "\n".join([regret, "time by forming / from tokens:", *chart(rows)])


CASE = Case(
    name="ways",
    description="fk.grad_products from tokens, by forming, and the one that auto chooses (the baseline)",
    competitors=(AUTO, *WAYS),
    baseline=AUTO,
    ours=(AUTO,),
    settings=settings,
    build=build,
    summary=summary,
)
