"""The engine as on a GPU, many layers a launch and padding in place: interpreted, in a process of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fpo_kernels as fk
from fpo_kernels import passes, sketched, totals
from tests.fpo_kernels import test_influence_ragged
from tests.fpo_kernels.interpreted import inside, outside, passes_apart
from tests.fpo_kernels.test_influence_ragged import Narrow
from tests.fpo_kernels.test_influence_sketch import DIM, SEED, formed_sketch
from tests.fpo_kernels.tiny import batch_of, error, rows_of_gradients, tiny_llama

pytest.importorskip("triton")
TOLERANCE = 1e-5
LENGTHS = [0, 17, 66, 1]


@outside
def test_in_its_own_process() -> None:
    passes_apart(__file__)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (passes, totals):
        monkeypatch.setattr(module, "are_grouped", lambda d: d.dtype != torch.float64)
    monkeypatch.setattr(test_influence_ragged, "WIDTH", 40)  # what is interpreted takes seconds
    monkeypatch.setattr(sketched, "is_grouped", lambda a: a.dtype != torch.float64)


class Everywhere(nn.Module):
    """Reads its padding: every position has its say, whatever the mask says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.layer, self.score = nn.Embedding(61, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.strict = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        scores = self.score(self.layer(self.embed(input_ids)).tanh())
        return (scores * attention_mask[..., None] if self.strict else scores).sum((1, 2))


@inside
@pytest.mark.parametrize(("side", "micro_batch"), [("right", None), ("left", 2)])
def test_every_product_equals_the_autograd_loop(side: str, micro_batch: int | None) -> None:
    """Embedding, LayerNorm, LoRA pair, biases; an empty example, one token, more than a tile."""
    model = Narrow()
    engine = fk.Influence(model, output=lambda returned: returned, micro_batch=micro_batch)
    batch, other = batch_of(LENGTHS, 1, side), batch_of([5, 70, 0, 12], 2, side)
    g, h = (rows_of_gradients(Narrow().double(), each) for each in (batch, other))
    assert error(engine.norms(batch), g.square().sum(1)) < TOLERANCE
    assert error(engine.gram(batch), g @ g.T) < TOLERANCE
    assert error(engine.gram(batch, other), g @ h.T) < TOLERANCE
    assert error(engine.steering(batch, other).product, (g * (g - h)).sum(1)) < TOLERANCE
    along = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    assert error(engine.direction(batch, along), g.sum(1)) < TOLERANCE


@inside
def test_sketches_of_padded_streams() -> None:
    """In one sum, and a parameter each: an embedding, layers, biases; what is interpreted takes seconds."""
    model = Everywhere()
    model.strict = True
    engine, batch = fk.Influence(model, output=lambda returned: returned), batch_of([0, 3, 1], 5, "left")
    g = rows_of_gradients(model, batch)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    parts = zip(shapes, g.split([p.numel() for p in model.parameters()], 1), strict=True)
    formed = {name: formed_sketch(name, shapes[name], rows.double()) for name, rows in parts}
    assert error(engine.sketch(batch, DIM, SEED), torch.stack(list(formed.values())).sum(0)) < TOLERANCE
    for name, sketch in engine.sketch(batch, DIM, SEED, per_layer=True).items():
        assert error(sketch, formed[name]) < TOLERANCE


@inside
def test_a_transformer() -> None:
    model = tiny_llama(dtype=torch.float32)
    engine = fk.Influence(model)
    batch = batch_of([9, 4, 1, 12], 3)
    names = [name for name, _ in model.named_parameters()]
    double = tiny_llama()
    double.load_state_dict({name: p.double() for name, p in model.state_dict().items()})
    wanted = [double.get_parameter(name) for name in names]
    rows = []
    for i in range(4):
        score = double(**{k: v[i : i + 1] for k, v in batch.items()}).logits[0, 0]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(score, wanted)]))
    g = torch.stack(rows)
    assert error(engine.gram(batch), g @ g.T) < TOLERANCE


@inside
def test_padding_that_is_read_counts() -> None:
    """Found in the first batch of a kind, and never left out in silence: where a later one reads it, NaN."""
    model = Everywhere()
    batch = batch_of([3, 5, 1], 4)
    g = rows_of_gradients(model, batch)
    engine = fk.Influence(model, output=lambda returned: returned, check="never")
    assert error(engine.norms(batch), g.square().sum(1)) < TOLERANCE
    model.strict = True
    strict = fk.Influence(model, output=lambda returned: returned, check="never")
    assert strict.norms(batch).isfinite().all()
    model.strict = False
    assert strict.norms(batch).isnan().all()
