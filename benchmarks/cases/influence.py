"""Steering over all block weights of a reward model: what it costs beyond forward and activation-only backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fpo_kernels as fk
from benchmarks import floors, peers
from benchmarks.meters import available_bytes
from benchmarks.models import Batch, block_weights, reward_model, rows, token_batch
from benchmarks.registry import TOLERANCE, Case, Competitor, Contest, Headline, dtypes

BASELINE, OURS = "forward + backward", "fk.Influence.steering"
FIRST = "the first of a new engine"
HOOKS, GHOST = "torch hooks", "ghost norms, Opacus-style"
FLAT, LOOP, VMAP = "autograd call each, joined", "autograd call each", "torch.func vmap(grad)"
FAST = (BASELINE, OURS, FIRST, HOOKS)
# At 8B width the float64 loop takes 12 GiB and well over a minute.
EXACT_WEIGHTS = 200_000_000
# Of what takes seconds a call on a CPU. A whole run of the case has to end within ten minutes on two cores.
LIMITS: dict[str, Any] = {"rounds": 2, "slow_rounds": 0, "isolated": (BASELINE, OURS)}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A reward model and candidates with one reference.

    Attributes:
        shape: of models.SHAPES. layers: its blocks. candidates, tokens, dtype: what it is given, and in what.
        full: all of `tokens`, else of unequal lengths up to that.
        rounds: the most that baseline, engine, its first call and hooks are timed in; None for as many as asked for.
        slow_rounds: the same of the other peers.
        isolated: competitors whose memory is measured in processes of their own.
    """

    name: str
    shape: str
    layers: int
    candidates: int
    tokens: int
    dtype: str
    full: bool = False
    rounds: int | None = None
    slow_rounds: int | None = 6
    isolated: tuple[str, ...] = FAST


def smollm2(quick: bool, device: torch.device) -> Sequence[Setting]:
    """SmolLM2's 30 layers, 8 candidates and a reference of 64 tokens; 4 layers and 1 to 64 tokens if quick."""
    layers = 4 if quick else 30
    kinds = [str(dtype).removeprefix("torch.") for dtype in dtypes(device)]
    return [
        Setting(
            name=f"{layers} layers, 8+1 of {'1-64' if quick else '64'} {kind}",
            shape="smollm2-135m",
            layers=layers,
            candidates=8,
            tokens=64,
            dtype=kind,
            full=not quick,
            isolated=(BASELINE, OURS) if quick else CASE.competitors,
        )
        for kind in kinds
    ]


def unequal(settings: Sequence[Setting], tokens: int, **limits: Any) -> list[Setting]:
    """The same with texts of 1 to so many tokens."""
    return [
        replace(s, name=f"{s.layers} layers, 8+1 of 1-{tokens} {s.dtype}", tokens=tokens, full=False, **limits)
        for s in settings
    ]


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """`smollm2`; and, as time allows fewer rounds, longer texts, unequal ones, more candidates, Llama-3.1-8B's width.

    At 8B width a CPU gets fp32 like everywhere: bf16 takes half the time where the CPU multiplies it (AVX512-BF16)
    and many times as long elsewhere, and would be gated at 5% instead of 1e-5.
    """
    first = smollm2(quick, device)
    if quick:
        return first
    limits = LIMITS if device.type == "cpu" else {}
    return [
        *first,
        *(replace(s, name=f"30 layers, 8+1 of 256 {s.dtype}", tokens=256, **limits) for s in first),
        *unequal(first, 256, **limits),
        *(replace(s, name=f"30 layers, 32+1 of 64 {s.dtype}", candidates=32, **limits) for s in first),
        *(
            replace(s, name=f"2 layers of 8B width, 8+1 of 64 {s.dtype}", shape="llama3.1-8b", layers=2, **limits)
            for s in first
        ),
    ]


def build(setting: Setting, device: torch.device) -> Contest:
    """Random weights and tokens."""
    dtype = getattr(torch, setting.dtype)
    model = reward_model(setting.shape, setting.layers, dtype, device)
    names = block_weights(model)
    batch = token_batch(setting.candidates + 1, setting.tokens, device, full=setting.full)
    candidates, reference = rows(batch, slice(0, -1)), rows(batch, slice(-1, None))
    engine = fk.Influence(model, parameters=names)
    runs: dict[str, Callable[[], Tensor]] = {
        BASELINE: functools.partial(peers.forward_and_backward, model, batch),
        OURS: lambda: engine.steering(candidates, reference).product,
        FIRST: lambda: fk.Influence(model, parameters=names).steering(candidates, reference).product,
        HOOKS: functools.partial(peers.hooked_token_products, model, batch),
        GHOST: functools.partial(peers.ghost_norms, model, names, batch),
        FLAT: functools.partial(peers.flattened_loop, model, names, batch),
        LOOP: functools.partial(peers.autograd_loop, model, names, batch),
        VMAP: functools.partial(peers.vmap_grad, model, names, batch),
    }
    weights = sum(model.get_parameter(name).nbytes for name in names)
    needs = {
        GHOST: (weights, "the batch's weight gradients"),
        FLAT: (4 * weights, "four gradients"),
        LOOP: (2 * weights, "two gradients"),
        VMAP: (peers.vmap_bytes(model, names, setting.candidates + 1), "all gradients"),
    }
    free, cannot = available_bytes(device), {}
    for name, (need, what) in needs.items():
        if free is not None and need > free:
            cannot[name] = f"needs at least {need / 2**30:.1f} GiB for {what}, {free / 2**30:.1f} GiB are free"
            del runs[name]
    answers = {name: "input_gradient" if name == BASELINE else "product" for name in runs}
    lengths = floors.lengths_of(batch)
    return Contest(
        competitors={
            name: Competitor(
                run=run,
                budget=TOLERANCE[dtype],
                answers=answers[name],
                rounds=setting.rounds if name in FAST else setting.slow_rounds,
            )
            for name, run in runs.items()
        },
        expected=functools.partial(_expected, model, names, batch),
        cannot=cannot,
        floors={
            "input_gradient": floors.whole(model, lengths),
            "product": floors.whole(model, lengths, pairs=floors.listed(setting.candidates, "steering")),
        },
    )


def _expected(model: nn.Module, names: Sequence[str], batch: Batch) -> Mapping[str, Tensor]:
    """Exact where that is affordable, else trusted to the same budget."""
    weights = sum(model.get_parameter(name).numel() for name in names)
    right = peers.exact if weights <= EXACT_WEIGHTS else peers.trusted
    return right(model, names, batch)


LABELS = {
    BASELINE: "forward + activation-only backward",
    OURS: "`fk.Influence.steering`",
    FIRST: "the same with a new `fk.Influence`: its first call",
    HOOKS: "token products by plain torch hooks",
    GHOST: "ghost norms, Opacus-style",
    FLAT: "one autograd call a candidate, gradients joined to one vector",
    LOOP: "one autograd call a candidate, multiplied matrix by matrix",
    VMAP: "`torch.func` vmap(grad)",
}


def chart(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: the median ratio to the baseline in every setting, and the process's memory in the first."""
    names = list(dict.fromkeys(row["setting"]["name"] for row in rows))
    found = {(row["setting"]["name"], row["competitor"]): row for row in rows}
    lines = [f"| | {' | '.join(names)} | memory of its own process |", "|---" * (len(names) + 2) + "|"]
    for competitor, label in LABELS.items():
        if (names[0], competitor) not in found:  # a run from before it was measured
            continue
        cells = []
        for name in names:
            row = found[name, competitor]
            cells.append(f"{row['ratio']['median']:.2f}" if row["status"] == "timed" else "does not fit")
        memory = found[names[0], competitor].get("rss_ratio")
        lines.append(f"| {label} | {' | '.join(cells)} | {'–' if memory is None else f'{memory:.2f}'} |")
    return lines


CASE = Case(
    name="influence",
    description="steering products over all Linear weights of a reward model against one forward and backward",
    competitors=(BASELINE, OURS, FIRST, HOOKS, GHOST, FLAT, LOOP, VMAP),
    baseline=BASELINE,
    ours=(OURS,),
    settings=settings,
    build=build,
    headlines=(
        Headline(text="steering / (forward + backward)", over=OURS, under=BASELINE),
        Headline(text="first call / (forward + backward)", over=FIRST, under=BASELINE),
        Headline(text="one autograd call a candidate / steering", over=FLAT, under=OURS),
        Headline(text="the same matrix by matrix / steering", over=LOOP, under=OURS),
        Headline(text="peak memory, steering / (forward + backward)", over=OURS, under=BASELINE, figure="memory"),
    ),
    isolated=lambda setting: setting.isolated,
    summary=lambda rows: "\n".join(chart(rows)),
)
