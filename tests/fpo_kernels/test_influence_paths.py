"""Models that take another path, or do more, than their classes say: exact or refused, never silently wrong."""

import contextlib
import pickle
import threading
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fpo_kernels as fk
from tests.fpo_kernels.tiny import batch_of, error, rows_of_gradients, tiny_llama

FOUR_NINES = torch.tensor([[9, 9, 0, 7], [3, 3, 8, 6], [0, 2, 2, 9], [6, 4, 9, 8]])
IDS = torch.tensor([[1, 5, 0, 7, 2], [3, 3, 8, 6, 4], [0, 2, 2, 9, 1], [6, 4, 5, 5, 8]])


class Base(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.layer, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        for name, part in parts.items():
            setattr(self, name, part)
        self.double().eval()

    def top(self, x):
        return self.head(torch.tanh(self.layer(x)).mean(1))[:, 0]

    def forward(self, ids):
        return self.top(self.table(ids))


def engine_of(model, parameters="all", **options):
    return fk.Influence(model, parameters, output=lambda returned: returned, **options)


def exact(engine, **batch):
    g = rows_of_gradients(engine.model, batch, {row.parameter for row in engine.coverage()})
    return error(engine.gram(batch), g @ g.T) < 1e-12


class Gated(nn.Module):
    """A norm with a second input, as Mamba's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x, gate=None):
        x = x if gate is None else x * F.silu(gate)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


GatedRMSNorm = type("GatedRMSNorm", (Gated,), {})


class ByGate(Base):
    def forward(self, ids):
        x = self.table(ids)
        return self.top(self.norm(x, self.layer(x)))


class Replaced(Base):
    def __init__(self, name, forward):
        super().__init__()
        module = getattr(self, name)
        module.forward = types.MethodType(forward, module)


class Elsewhere(Base):
    def forward(self, ids):
        doubled = {"weight": 2 * self.layer.weight}
        return self.head(torch.tanh(torch.func.functional_call(self.layer, doubled, (self.table(ids),))).mean(1))[:, 0]


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: ByGate(norm=GatedRMSNorm()), r"norm\.weight: GatedRMSNorm is called with more than its input"),
        (lambda: Replaced("layer", lambda s, x: 2 * F.linear(x, s.weight, s.bias)), "does not return what"),
        (lambda: Replaced("table", lambda s, x: 2 * F.embedding(x, s.weight)), "does more than look rows up"),
        (lambda: Elsewhere(), r"layer\.weight.*: Linear runs on another tensor"),
    ],
)
def test_modules_that_do_more_than_their_class(model, named):
    with pytest.raises(ValueError, match=named):
        engine_of(model()).gram({"ids": IDS})
    assert exact(engine_of(model(), fallback="per_example"), ids=IDS)


class Shut(Base):
    """Nothing reaches the layer until a token of nine or more is among the ids."""

    def __init__(self):
        super().__init__()
        self.layer.forward = types.MethodType(lambda s, x: 2 * F.linear(x, s.weight, s.bias), self.layer)

    def forward(self, ids):
        x = self.table(ids)
        return self.head(torch.tanh(x + (ids >= 9).any() * self.layer(x)).mean(1))[:, 0]


def test_an_agreement_says_nothing_of_a_layer_that_no_gradient_reached():
    with pytest.raises(ValueError, match="does not return what"):
        engine_of(Shut()).gram({"ids": IDS.clamp_max(8)})


class Paths(Base):
    def __init__(self):
        super().__init__(place=nn.Embedding(9, 6), expert=nn.Linear(6, 6))

    def forward(self, ids, again=False, deep=False, routed=False, places=None):
        x = self.table(ids)
        if places is not None:
            x = x + self.place(places if places.ndim else torch.arange(ids.shape[1]))
        if routed:
            flat, mine = x.flatten(0, 1), (ids.flatten() == 9).nonzero().flatten()
            x = flat.index_add(0, mine, torch.tanh(self.expert(flat[mine]))).view_as(x) if len(mine) else x
        y = F.linear(x, self.layer.weight) if deep else self.layer(x)
        y = y + F.linear(x, self.layer.weight) if again else y
        return self.head(torch.tanh(y).mean(1))[:, 0]


@pytest.mark.parametrize(
    ("chosen", "first", "then"),
    [
        (["layer.*"], {}, {"again": True}),
        (["layer.*", "table.*"], {}, {"deep": True}),
        (["place.*"], {"places": torch.arange(4).repeat(4, 1)}, {"places": torch.tensor(0)}),
        (
            ["expert.*", "head.*"],
            {"routed": True},
            {"routed": True, "ids": torch.where(IDS[:, :4] == 5, 9, IDS[:, :4])},
        ),
    ],
)
def test_what_was_learnt_is_not_taken_for_another_path(chosen, first, then):
    """The second call uses a weight functionally, or a module on rows that only look like the batch."""
    engine, start = engine_of(Paths(), chosen), torch.where(IDS[:, :4] == 9, 1, IDS[:, :4])
    assert exact(engine, **{"ids": start, **first})
    with pytest.raises(ValueError, match=f"{chosen[0][:-2]}.weight"):
        engine.gram({"ids": start, **then})
    assert next(row.rule for row in engine.coverage() if row.parameter.startswith(chosen[0][:-1])) is None
    engine = engine_of(Paths(), chosen, fallback="per_example")
    assert exact(engine, **{"ids": start, **first})
    assert exact(engine, **{"ids": start, **then})


def test_a_head_of_zeros_proves_nothing():
    model = Paths()
    nn.init.zeros_(model.head.weight)
    engine = engine_of(model, ["place.*", "head.*"])
    with pytest.raises(ValueError, match=r"place\.weight"):
        engine.gram({"ids": IDS[:, :4], "places": torch.tensor(0)})


def test_parameters_and_modules_that_are_replaced():
    model = Base()
    engine = engine_of(model)
    assert exact(engine, ids=IDS)
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)
    assert exact(engine, ids=IDS)
    model.layer = nn.Linear(6, 6).double()
    assert exact(engine, ids=IDS)
    del model.head
    with pytest.raises(ValueError, match=r"head\.weight is gone"):
        engine.gram({"ids": IDS})


def test_threads_wait_for_one_another():
    model = Base()
    batches = [{"ids": IDS[:, :4]}, {"ids": IDS}]
    engines = [engine_of(model) for _ in batches]
    expected = [engine.gram(batch) for engine, batch in zip(engines, batches, strict=True)]
    same = []

    def work(k):
        same.extend(torch.equal(engines[k].gram(batches[k]), expected[k]) for _ in range(15))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 30


def test_outputs_that_depend_on_one_another():
    for mix in (lambda r: r - r.mean(), lambda r: torch.cat([r[:1] - r[-1:], r[1:]])):
        for fallback in ("error", "per_example"):
            with pytest.raises(ValueError, match="depend on one another"):
                fk.Influence(Base(), output=mix, fallback=fallback).gram({"ids": IDS})


class Encoder(Base):
    def __init__(self):
        block = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        super().__init__(encoder=nn.TransformerEncoder(block, 2))

    def forward(self, ids, mask):
        return self.top(self.encoder(self.table(ids), src_key_padding_mask=~mask)[:, :1])


def test_torch_s_own_encoder_with_padding():
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[1, 3:] = False
    engine = engine_of(Encoder(), fallback="per_example")
    for _ in range(2):
        assert exact(engine, ids=IDS, mask=mask)
    assert torch.backends.mha.get_fastpath_enabled()
    refused = {row.parameter.split(".")[-1] for row in engine.coverage() if row.rule == "per_example"}
    assert refused == {"in_proj_weight", "in_proj_bias", "weight", "bias"}  # the latter two of out_proj


def test_buffers_that_count_are_put_back():
    model = nn.utils.parametrizations.spectral_norm(Base().layer), nn.Linear(6, 1).double()
    model = nn.Sequential(*model).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fk.Influence(model, ["1.*"], output=lambda r: r[:, 0]).norms({"input": torch.randn(3, 6).double()})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tied_weights_looked_up_by_short_integers():
    model = Base()
    model.out = nn.Linear(6, 11, bias=False)
    model.out.weight = model.table.weight
    model.forward = lambda ids: model.out(torch.tanh(model.layer(model.table(ids)))).square().mean((1, 2))
    chosen = ["table.*", "layer.*"]
    whole = engine_of(model, chosen).gram({"ids": IDS})
    assert torch.equal(engine_of(model, chosen).gram({"ids": IDS.int()}), whole)


def test_an_example_that_is_not_a_number_does_not_blame_the_others():
    model = Base()
    model.forward = lambda ids, w: model.top(model.table(ids) * w.view(-1, 1, 1))
    w = torch.tensor([torch.nan, 1.0, 1.0, 1.0], dtype=torch.float64)
    gram = engine_of(model).gram({"ids": IDS, "w": w})
    assert torch.isnan(gram[0]).all()
    assert error(gram[1:, 1:], engine_of(Base()).gram({"ids": IDS})[1:, 1:]) < 1e-12


def test_uses_without_a_gradient_are_no_use():
    model = Base()
    model.forward = lambda ids: model.top(
        model.table(ids).to(model.layer.weight) + model.layer.weight.detach().sum() + torch.zeros_like(model.head.bias)
    )
    assert exact(engine_of(model), ids=IDS)


def test_inputs_that_no_rule_reads_are_not_kept():
    model = Base()

    def forward(ids):
        x = model.table(ids) * 1
        y = model.layer(x)
        x += 1  # would spoil a kept input
        return model.head((torch.tanh(y) + x).mean(1))[:, 0]

    model.forward = forward
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    assert exact(engine_of(model, ["*.bias"]), ids=IDS)


def test_an_expanded_call_may_be_changed_in_place():
    model = Base(place=nn.Embedding(9, 6))

    def forward(ids):
        places = model.place(torch.arange(5)[None])
        places *= 0.5
        return model.top(model.table(ids) + places)

    model.forward = forward
    assert exact(engine_of(model), ids=IDS)


def test_an_engine_within_an_engine():
    model = Base()
    inner = engine_of(model)
    weight = inner.norms({"ids": IDS[:2]}).sum()
    outer = fk.Influence(model, output=lambda r: r * inner.norms({"ids": IDS[:2]}).sum())
    assert error(outer.gram({"ids": IDS}), weight**2 * inner.gram({"ids": IDS})) < 1e-12


def test_an_engine_may_be_pickled():
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    engine = fk.Influence(model, output=torch.abs)
    x = {"input": torch.randn(4, 3)}
    expected = engine.gram(x)
    assert torch.equal(pickle.loads(pickle.dumps(engine)).gram(x), expected)


def test_entries_of_mappings_are_split_too():
    model = Base()
    model.forward = lambda ids, more: model.top(model.table(ids) * more["w"].view(-1, 1, 1))
    batch = {"ids": IDS, "more": {"w": torch.tensor([1.0, 2.0, -1.0, 0.5]).double()}}
    assert error(engine_of(model, micro_batch=1).norms(batch), engine_of(model).norms(batch)) < 1e-12


def test_inputs_that_are_on_a_tape_of_somebody_s():
    """Siblings whose input requires grad, whoever asked for that: no gradient may be lost on the way to it."""

    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(60)
            self.left, self.right, self.score = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 1)

        def forward(self, x):
            x = x.detach().requires_grad_()  # as enable_input_require_grads does for checkpointing
            return self.score((self.left(x) * self.right(x)).tanh())[..., 0].sum(1)

    model = Forked().double()
    engine = fk.Influence(model, output=lambda returned: returned)
    for seed in range(4):
        batch = {"x": torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))}
        expected = rows_of_gradients(model, batch).square().sum(1)
        assert error(engine.norms(batch), expected) < 1e-10


def test_queries_that_see_no_key_are_kept_from_cudnn():
    """Whose attention gives NaN there: only where padding stands on the left, and as it was afterwards."""
    model, seen = tiny_llama(), []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    for side in ("right", "left"):
        for call in ("norms", "sketch", "gram"):
            seen.clear()
            getattr(fk.Influence(model), call)(batch_of([5, 3], side=side))
            assert seen
            assert set(seen) == {side == "right"}
            assert torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)
    try:  # somebody asks for cuDNN and nothing else
        seen.clear()
        with contextlib.suppress(RuntimeError):
            fk.Influence(model).norms(batch_of([5, 3], side="left"))
        assert seen
        assert all(seen)
    finally:
        torch.backends.cuda.enable_mem_efficient_sdp(True)
        torch.backends.cuda.enable_math_sdp(True)
