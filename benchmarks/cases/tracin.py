"""TracIn over checkpoints of a score head: what it costs beyond one scoring forward, whatever their number."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fpo_kernels as fk
from benchmarks import peers
from benchmarks.models import reward_model, rows, token_batch
from benchmarks.registry import TOLERANCE, Case, Competitor, Contest, Headline, dtypes

BASELINE, ENGINE, LOOP = "forward", "fk.tracin", "forward a checkpoint, closed form"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A reward model, two batches, and checkpoints of its score head.

    Attributes:
        layers: blocks of SmolLM2's shape. examples, others: B and M of the (B, M) result. tokens: of each,
        at the most unless `full`.
        checkpoints: how many. rounds: the most the peer is timed in; 0 for the call that the gate judges alone.
    """

    name: str
    layers: int
    examples: int
    others: int
    tokens: int
    dtype: str
    checkpoints: int
    rounds: int | None
    full: bool = False


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """SmolLM2's 30 layers and 1, 5 and 20 checkpoints; if quick 4 layers, 20 and texts of unequal lengths."""
    layers = 4 if quick else 30
    kinds = [str(dtype).removeprefix("torch.") for dtype in dtypes(device)]
    texts = "4+4 of 1-64" if quick else "4+4 of 64"
    return [
        Setting(
            name=f"{layers} layers, {texts} {kind}, {count} checkpoints".removesuffix("s" if count == 1 else ""),
            layers=layers,
            examples=4,
            others=4,
            tokens=64,
            dtype=kind,
            checkpoints=count,
            rounds=None if device.type == "cuda" else 2 if count == 1 else 0,
            full=not quick,
        )
        for kind in kinds
        for count in ((20,) if quick else (1, 5, 20))
    ]


def build(setting: Setting, device: torch.device) -> Contest:
    """Random weights and tokens; checkpoints of heads drawn at random in a temporary folder."""
    dtype = getattr(torch, setting.dtype)
    model = reward_model("smollm2-135m", setting.layers, dtype, device)
    joined = token_batch(setting.examples + setting.others, setting.tokens, device, full=setting.full)
    batch, other = rows(joined, slice(0, setting.examples)), rows(joined, slice(setting.examples, None))
    head = model.get_parameter("score.weight")
    folder = tempfile.TemporaryDirectory()
    store = fk.CheckpointStore(folder.name)
    generator = torch.Generator().manual_seed(1)
    head.requires_grad_(True)
    for step in range(setting.checkpoints):
        with torch.no_grad():
            head.copy_(torch.randn(head.shape, generator=generator) / head.shape[1] ** 0.5)
        store.save(model, step=step, learning_rate=1e-3 / (1 + step))
    head.requires_grad_(False)
    engine = fk.Influence(model, parameters="head")

    def ours() -> Tensor:
        assert folder  # lives as long as this does
        return fk.tracin(engine, store, batch, other)

    runs: dict[str, Callable[[], Tensor]] = {
        BASELINE: torch.no_grad()(functools.partial(peers.rewards, model, joined)),
        ENGINE: ours,
        LOOP: functools.partial(peers.head_tracin, model, list(store), batch, other),
    }
    answers = {name: "reward" if name == BASELINE else "tracin" for name in runs}
    return Contest(
        competitors={
            name: Competitor(
                run=run,
                budget=TOLERANCE[dtype],
                answers=answers[name],
                rounds=setting.rounds if name == LOOP else None,
            )
            for name, run in runs.items()
        },
        expected=functools.partial(peers.exact_head_tracin, model, list(store), batch, other),
    )


CASE = Case(
    name="tracin",
    description="TracIn over checkpoints of the score head of a reward model against scoring both batches once",
    competitors=(BASELINE, ENGINE, LOOP),
    baseline=BASELINE,
    ours=(ENGINE,),
    settings=settings,
    build=build,
    headlines=(
        Headline(text="TracIn over all checkpoints / one forward", over=ENGINE, under=BASELINE),
        Headline(text="a forward a checkpoint / TracIn", over=LOOP, under=ENGINE),
    ),
)
