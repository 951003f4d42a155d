"""Steering over all block weights of a reward model: what it costs beyond forward and activation-only backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fpo_kernels as fk
from benchmarks import peers
from benchmarks.meters import available_bytes
from benchmarks.models import block_weights, reward_model, rows, token_batch
from benchmarks.registry import TOLERANCE, Case, Competitor, Contest, dtypes

BASELINE, OURS = "forward + backward", "fk.Influence.steering"
LOOP, VMAP, HOOKS = "autograd call each", "torch.func vmap(grad)", "torch hooks"
CANDIDATES, TOKENS = 8, 64


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A SmolLM2-shaped reward model of some layers, and candidates of equal length with one reference."""

    name: str
    layers: int
    candidates: int
    tokens: int
    dtype: str


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """SmolLM2's 30 layers, or 4 if quick."""
    layers = 4 if quick else 30
    return [
        Setting(
            name=f"{layers} layers, {CANDIDATES}+1 of {TOKENS} {kind}",
            layers=layers,
            candidates=CANDIDATES,
            tokens=TOKENS,
            dtype=kind,
        )
        for kind in (str(dtype).removeprefix("torch.") for dtype in dtypes(device))
    ]


def build(setting: Setting, device: torch.device) -> Contest:
    """Random weights and tokens."""
    dtype = getattr(torch, setting.dtype)
    model = reward_model(setting.layers, dtype, device)
    names = block_weights(model)
    batch = token_batch(setting.candidates + 1, setting.tokens, device)
    candidates, reference = rows(batch, slice(0, -1)), rows(batch, slice(-1, None))
    engine = fk.Influence(model, parameters=names)
    runs: dict[str, Callable[[], Tensor]] = {
        BASELINE: functools.partial(peers.forward_and_backward, model, batch),
        OURS: lambda: engine.steering(candidates, reference).product,
        HOOKS: functools.partial(peers.hooked_token_products, model, batch),
        LOOP: functools.partial(peers.autograd_loop, model, names, batch),
        VMAP: functools.partial(peers.vmap_grad, model, names, batch),
    }
    cannot = {}
    need, free = peers.vmap_bytes(model, names, setting.candidates + 1), available_bytes(device)
    if free is not None and need > free:
        cannot[VMAP] = f"needs at least {need / 2**30:.1f} GiB for all gradients, {free / 2**30:.1f} GiB are free"
        del runs[VMAP]
    answers = {name: "input_gradient" if name == BASELINE else "product" for name in runs}
    return Contest(
        competitors={
            name: Competitor(run=run, budget=TOLERANCE[dtype], answers=answers[name]) for name, run in runs.items()
        },
        expected=functools.partial(peers.exact, model, names, batch),
        cannot=cannot,
    )


CASE = Case(
    name="influence",
    description="steering products over all Linear weights of a reward model against one forward and backward",
    competitors=(BASELINE, OURS, HOOKS, LOOP, VMAP),
    baseline=BASELINE,
    settings=settings,
    build=build,
)
