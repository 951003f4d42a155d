"""fk.Influence.sketch over all block weights of a reward model: what it costs beyond forward and backward."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import fpo_kernels as fk
from benchmarks import floors, peers
from benchmarks.cases.influence import BASELINE, Setting, smollm2, unequal
from benchmarks.models import Batch, block_weights, reward_model, rows, token_batch
from benchmarks.registry import TOLERANCE, Case, Competitor, Contest, Headline
from fpo_kernels.sketch.reference import hadamard
from fpo_kernels.sketched import Maps

OURS = {f"sketch, k = {dim}": dim for dim in (1024, 4096)}


def settings(quick: bool, device: torch.device) -> Sequence[Setting]:
    """The influence case's first: SmolLM2's 30 layers, or 4 if quick, 9 texts of 64 tokens, of 1 to 64 too."""
    first = smollm2(quick, device)
    return first if quick else [*first, *unequal(first, 64)]


def build(setting: Setting, device: torch.device) -> Contest:
    """Random weights and tokens."""
    dtype = getattr(torch, setting.dtype)
    model = reward_model(setting.shape, setting.layers, dtype, device)
    names = block_weights(model)
    batch = token_batch(setting.candidates + 1, setting.tokens, device, full=setting.full)
    engine = fk.Influence(model, parameters=names)
    competitors = {
        BASELINE: Competitor(
            run=functools.partial(peers.forward_and_backward, model, batch),
            budget=TOLERANCE[dtype],
            answers="input_gradient",
        )
    }
    for name, dim in OURS.items():
        competitors[name] = Competitor(
            run=functools.partial(engine.sketch, batch, dim), budget=TOLERANCE[dtype], answers=name
        )
    lengths = floors.lengths_of(batch)
    least = {"input_gradient": floors.whole(model, lengths)}
    least |= {name: floors.whole(model, lengths, dim=dim) for name, dim in OURS.items()}
    return Contest(competitors=competitors, expected=functools.partial(_expected, model, names, batch), floors=least)


def _expected(model: nn.Module, names: Sequence[str], batch: Batch) -> Mapping[str, Tensor]:
    """In float64: every example's gradients by autograd, folded element by element, times W."""
    double = copy.deepcopy(model).double()
    parameters = [double.get_parameter(name) for name in names]
    found: dict[str, list[Tensor]] = {name: [] for name in OURS}
    for n in range(len(batch["input_ids"])):
        with peers.trainable(parameters):
            output = peers.rewards(double, rows(batch, slice(n, n + 1))).sum()
            gradients = torch.autograd.grad(output, parameters)
        for answer, dim in OURS.items():
            buckets = gradients[0].new_zeros(dim)
            for name, G in zip(names, gradients, strict=True):
                of_columns, of_rows = Maps(dim, 0).matrix(name, *G.shape).maps(G.device)
                where = (of_rows.bucket[:, None] ^ of_columns.bucket).flatten()
                signed = of_rows.sign[:, None].double() * of_columns.sign * G
                buckets.index_add_(0, where, signed.flatten())
            found[answer].append(buckets @ hadamard(dim, buckets.dtype, buckets.device) * dim**-0.5)
    sketches = {answer: torch.stack(parts) for answer, parts in found.items()}
    return {**sketches, "input_gradient": peers.forward_and_backward(double, batch)}


CASE = Case(
    name="engine_sketch",
    description="sketches of a reward model's gradients over all Linear weights against one forward and backward",
    competitors=(BASELINE, *OURS),
    baseline=BASELINE,
    ours=tuple(OURS),
    settings=settings,
    build=build,
    headlines=tuple(Headline(text=f"{name} / (forward + backward)", over=name, under=BASELINE) for name in OURS),
)
