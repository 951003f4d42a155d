"""What a tap costs the host beside a plain torch hook: pairs (a, d) are noted and nothing is multiplied.

On a CPU the time is the process's own (run it with one thread): a few µs would drown in what others take.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fpo_kernels as fk
from benchmarks import peers
from benchmarks.models import block_weights, reward_model, token_batch
from benchmarks.registry import TOLERANCE, Case, Competitor, Contest
from fpo_kernels.gradients import Stream
from fpo_kernels.layers import Site

BASELINE, HOOKS, TAPS = "forward + backward", "torch hooks, noting", "taps, noting"
EXAMPLES, TOKENS = 9, 8


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A reward model of narrow blocks, whose Linear weights are tapped.

    Attributes:
        layers: its blocks. taps: its Linear weights, seven a block and the head.
    """

    name: str
    layers: int
    taps: int


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """Two depths, so that what a pass costs and what a tap costs can be told apart: 8 and 32 blocks; 1 and 2 if quick.

    Texts of unequal lengths, as everywhere; padding stays in place.
    """
    return [
        Setting(name=f"{layers} narrow layers", layers=layers, taps=7 * layers + 1)
        for layers in ((1, 2) if quick else (8, 32))
    ]


def build(setting: Setting, device: torch.device) -> Contest:
    """Random weights and tokens. The engine's pass runs whole; its consumer keeps what it is given."""
    model = reward_model("narrow", setting.layers, torch.float32, device)
    batch = token_batch(EXAMPLES, TOKENS, device)
    passes = fk.Influence(model, parameters=block_weights(model))._passes

    def taps() -> Tensor:
        noted: list[Stream] = []

        def note(sites: list[Site], streams: list[Stream]) -> None:
            noted.extend(streams)

        # as on a GPU: rows of padding stay where they are
        with mock.patch("fpo_kernels.passes.are_grouped", return_value=True):
            outputs = passes.run(batch, note, passes.layout(batch))
        return _all(noted, setting, outputs)

    def hooks() -> Tensor:
        noted: list[tuple[Tensor, Tensor]] = []
        gradient = peers.hooked_backward(model, batch, lambda a, d: noted.append((a, d)))
        return _all(noted, setting, gradient)

    def expected() -> dict[str, Tensor]:
        return {
            "reward": peers.rewards(model, batch).detach(),
            "input_gradient": peers.forward_and_backward(model, batch),
        }

    def plain() -> Tensor:
        return peers.forward_and_backward(model, batch)

    budget = TOLERANCE[torch.float32]
    return Contest(
        competitors={
            BASELINE: Competitor(run=plain, budget=budget, answers="input_gradient"),
            HOOKS: Competitor(run=hooks, budget=budget, answers="input_gradient"),
            TAPS: Competitor(run=taps, budget=budget, answers="reward"),
        },
        expected=expected,
    )


def _all(noted: Sequence[object], setting: Setting, answer: Tensor) -> Tensor:
    if len(noted) != setting.taps:
        raise RuntimeError(f"{len(noted)} weights were noted, wanted {setting.taps}")
    return answer


def added(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Competitor → taps → seconds that it adds to a forward and backward: the least of its rounds less the least of
    theirs, as timeit takes it, since whatever else the machine does only adds."""
    least = {
        (row["competitor"], row["setting"]["taps"]): min(row["samples"]) for row in rows if row["status"] == "timed"
    }
    found: dict[str, dict[int, float]] = {}
    for (competitor, taps), own in least.items():
        if competitor != BASELINE and (BASELINE, taps) in least:
            found.setdefault(competitor, {})[taps] = own - least[BASELINE, taps]
    return found


def summary(rows: list[dict[str, Any]]) -> str:
    """µs a tap and a hook, their ratio, and what a pass costs whatever the number of taps."""
    found = added(rows)
    lines = []
    for taps in sorted({taps for times in found.values() for taps in times}):
        each = {name: times[taps] / taps * 1e6 for name, times in found.items() if taps in times}
        told = ", ".join(f"{name} {micro:.1f} µs" for name, micro in each.items())
        ratio = f"; tap / hook {each[TAPS] / each[HOOKS]:.2f}" if {TAPS, HOOKS} <= each.keys() else ""
        lines.append(f"(least time − least of forward and backward) / {taps} taps: {told}{ratio}")
    for name, times in found.items():
        if len(times) == 2:
            (few, less), (many, more) = sorted(times.items())
            slope = (more - less) / (many - few)
            lines.append(f"{name}: {slope * 1e6:.1f} µs a tap, {(less - few * slope) * 1e6:.0f} µs a pass beside them")
    return "\n".join(lines) or "nothing was timed"


CASE = Case(
    name="host",
    description="host time of noting every Linear layer's input and output gradient, taps beside plain torch hooks",
    competitors=(BASELINE, HOOKS, TAPS),
    baseline=BASELINE,
    ours=(TAPS,),
    settings=settings,
    build=build,
    summary=summary,
    rounds=300,  # seconds each minute: the least of many is the machine undisturbed
    clock=time.process_time,
)
