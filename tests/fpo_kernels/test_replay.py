"""What `tracin` may compute once for all checkpoints, and what it may not."""

from types import SimpleNamespace

import torch
from torch import nn

import fpo_kernels as fk
from tests.fpo_kernels.tiny import error
from tests.fpo_kernels.truth import Passes, explicit


class Backbone(nn.Module):
    """Something to make awkward: `body` below a head of one layer. Idle weights make room to keep its outputs."""

    def __init__(self, body, idle=1000):
        super().__init__()
        self.body, self.score, self.idle = body, nn.Linear(4, 1), nn.Linear(idle, 1)

    def forward(self, x, **others):
        return SimpleNamespace(logits=self.score(self.body(x, **others)))


class Leaning(nn.Module):
    """Reads the head's weight through a view that no module tree shows."""

    def __init__(self):
        super().__init__()
        self.own, self.seen = nn.Linear(4, 4), []

    def forward(self, x):
        return self.own(x) * self.seen[0][0]


class Opaque(nn.Module):
    """Takes an object whose state counts."""

    def __init__(self):
        super().__init__()
        self.own = nn.Linear(4, 4)

    def forward(self, x, state):
        state.calls += 1
        return self.own(x) * state.factor


def heads(model, folder, count=3):
    store = fk.CheckpointStore(folder)
    model.requires_grad_(False)
    model.score.requires_grad_(True)
    for step in range(count):
        for parameter in model.score.parameters():
            nn.init.normal_(parameter)
        store.save(model, step=step, learning_rate=0.5 + step)
    return store


def test_what_may_have_moved_is_not_replayed(tmp_path):
    torch.manual_seed(13)
    batch, other = ({"x": torch.randn(n, 4, dtype=torch.float64)} for n in (3, 2))
    names = ["score.weight", "score.bias"]

    model = Backbone(Leaning()).double()
    model.body.seen = [model.score.weight.detach()]  # no parameter: its values move with the head's
    store = heads(model, tmp_path / "leaning")
    runs = Passes(model.body.own)
    out = fk.tracin(fk.Influence(model, "head"), store, batch, other)
    own = model.score.weight.detach().clone()
    expected = 0.0
    for checkpoint in store:
        model.score.weight.data.copy_(checkpoint.load()["score.weight"])
        expected += checkpoint.learning_rate * fk.Influence(model, "head").gram(batch, other)
    model.score.weight.data.copy_(own)
    assert error(out, expected) < 1e-12
    assert runs.count >= len(store)

    model = Backbone(nn.Linear(4, 4)).double()  # and what it returns is written into
    model.body.register_forward_hook(lambda module, args, made: made.mul_(2))
    store = heads(model, tmp_path / "spoilt")
    out = fk.tracin(fk.Influence(model, "head"), store, batch, other)
    assert error(out, explicit(model, store, batch, other, names)) < 1e-12

    model, state = Backbone(Opaque()).double(), SimpleNamespace(calls=0, factor=3.0)
    store = heads(model, tmp_path / "opaque")
    engine = fk.Influence(model, "head")
    engine.norms(batch | {"state": state})
    runs, state.calls = Passes(model.body.own), 0
    out = fk.tracin(engine, store, batch | {"state": state}, other | {"state": state})
    assert state.calls == len(store)
    assert runs.count == len(store)  # a forward hook also fires for what is replayed below
    model.body.forward = lambda x: model.body.own(x) * state.factor
    assert error(out, explicit(model, store, batch, other, names)) < 1e-12


def test_outputs_larger_than_the_model_are_not_kept(tmp_path):
    torch.manual_seed(14)
    model = Backbone(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), idle=1).double()
    store = heads(model, tmp_path)
    engine, inner = fk.Influence(model, "head"), Passes(model.body[1])
    for rows, runs in ((2, 1), (200, len(store))):
        batch = {"x": torch.randn(rows, 4, dtype=torch.float64)}
        engine.gram(batch)
        inner.count = 0
        out = fk.tracin(engine, store, batch)
        assert inner.count == runs
        assert error(out, explicit(model, store, batch, batch, ["score.weight", "score.bias"])) < 1e-12
