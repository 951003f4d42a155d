"""Steering over the score head alone: the price of foresight beyond one scoring forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import fpo_kernels as fk
from benchmarks import floors, peers
from benchmarks.cases.influence import Setting, smollm2, unequal
from benchmarks.models import reward_model, rows, token_batch
from benchmarks.registry import TOLERANCE, Case, Competitor, Contest, Headline

BASELINE, CLOSED, ENGINE, LOOP = "forward", "closed form", "fk.Influence.steering", "autograd call each"
HEAD = ["score.weight"]


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """The influence case's first, and texts past what a head's gradients are formed of at a time."""
    first = smollm2(quick, device)
    return [*first, *unequal(first, 256)]


def build(setting: Setting, device: torch.device) -> Contest:
    """The influence case's model and tokens; only the head's weight is chosen."""
    dtype = getattr(torch, setting.dtype)
    model = reward_model(setting.shape, setting.layers, dtype, device)
    batch = token_batch(setting.candidates + 1, setting.tokens, device, full=setting.full)
    candidates, reference = rows(batch, slice(0, -1)), rows(batch, slice(-1, None))
    engine = fk.Influence(model, parameters="head")
    runs: dict[str, Callable[[], Tensor]] = {
        BASELINE: torch.no_grad()(functools.partial(peers.rewards, model, batch)),
        CLOSED: functools.partial(peers.head_closed_form, model, batch),
        ENGINE: lambda: engine.steering(candidates, reference).product,
        LOOP: functools.partial(peers.autograd_loop, model, HEAD, batch),
    }
    answers = {name: "reward" if name == BASELINE else "product" for name in runs}
    lengths, pairs = floors.lengths_of(batch), floors.listed(setting.candidates, "steering")
    return Contest(
        competitors={
            name: Competitor(run=run, budget=TOLERANCE[dtype], answers=answers[name]) for name, run in runs.items()
        },
        expected=functools.partial(peers.exact, model, HEAD, batch),
        floors={
            "reward": floors.whole(model, lengths, backward=False),
            "product": floors.whole(model, lengths, backward=False, pairs=pairs, head_alone=True),
        },
    )


CASE = Case(
    name="head",
    description="steering products over the score head of a reward model against scoring alone",
    competitors=(BASELINE, CLOSED, ENGINE, LOOP),
    baseline=BASELINE,
    ours=(ENGINE,),
    settings=settings,
    build=build,
    headlines=(Headline(text="steering over the head / forward", over=ENGINE, under=BASELINE),),
)
