"""`Influence` on batches of unequal lengths, past what narrow layers take in one piece, against autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fpo_kernels as fk
from fpo_kernels.testing import PLACES, Place, ragged
from tests.fpo_kernels.test_influence_sketch import DIM, SEED, formed_sketch
from tests.fpo_kernels.tiny import batch_of, error, rows_of_gradients

TOLERANCE = 1e-5
WIDTH, RANK = 576, 8


class Narrow(nn.Module):
    """Token vectors, a LoRA pair beside a norm, and a score head; every token that the mask keeps has its say."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(40)
        self.embed, self.norm = nn.Embedding(61, WIDTH), nn.LayerNorm(WIDTH)
        self.lora_A, self.lora_B = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[..., None].to(self.score.weight.dtype)
        h = self.embed(input_ids) * mask
        h = self.norm(h + h.cumsum(1) / 16)
        scores = self.score(h + self.lora_B(self.lora_A(h)).tanh()).tanh() * mask
        return scores.sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)


def lengths(longest: int, place: Place) -> list[int]:
    """Enough long examples that a batch of them is cut into pieces, and shorter ones that share it."""
    return [n for n in ragged(6, longest, place=place) for _ in range(7 if n == longest else 1)]


def chosen(engine: fk.Influence, model: nn.Module) -> list[str]:
    names = {row.parameter for row in engine.coverage()}
    return [name for name, _ in model.named_parameters() if name in names]


@pytest.mark.parametrize(("place", "side"), [*((place, "right") for place in PLACES), ("last", "left")])
@pytest.mark.parametrize("parameters", ["head", "lora", "all"])
def test_every_answer_equals_the_autograd_loop(parameters: str, place: Place, side: str) -> None:
    """An empty example and one of a single token among them."""
    model = Narrow()
    engine = fk.Influence(model, parameters, output=lambda returned: returned)
    names = chosen(engine, model)
    batch = batch_of(lengths(257, place), 41, side)
    other = batch_of(lengths(129, place), 42, side)
    double = Narrow().double()
    g, h = (rows_of_gradients(double, each, names) for each in (batch, other))

    assert error(engine.norms(batch), g.square().sum(1)) < TOLERANCE
    assert error(engine.gram(batch), g @ g.T) < TOLERANCE
    assert error(engine.gram(batch, other), g @ h.T) < TOLERANCE
    assert error(engine.steering(batch, other).product, (g * (g - h)).sum(1)) < TOLERANCE
    longest = {key: value[h.norm(dim=1).argmax()][None] for key, value in other.items()}
    one = rows_of_gradients(double, longest, names)
    assert error(engine.steering(batch, longest).product, (g * (g - one)).sum(1)) < TOLERANCE

    shapes = {name: double.get_parameter(name).shape for name in names}
    sizes = [math.prod(shape) for shape in shapes.values()]
    vectors = dict(zip(names, h.mean(0).split(sizes), strict=True))
    along = {name: vector.view(shapes[name]).float() for name, vector in vectors.items()}
    assert error(engine.direction(batch, along), g @ h.mean(0)) < TOLERANCE
    parts = zip(names, g.split(sizes, 1), strict=True)
    expected = torch.stack([formed_sketch(name, tuple(shapes[name]), rows) for name, rows in parts]).sum(0)
    assert error(engine.sketch(batch, DIM, SEED), expected) < TOLERANCE
