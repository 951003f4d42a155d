"""Models that do something else later, or something unusual: right, or refused for what it is, never another number."""

import accelerate
import pytest
import torch
import transformers
from torch import nn

import fpo_kernels as fk
from tests.fpo_kernels.tiny import batch_of, error, gradients, plain, rows_of_gradients, tiny_llama

IDS = torch.randint(1, 11, (5, 7), generator=torch.Generator().manual_seed(0))


class Scorer(nn.Module):
    """A table, a layer, a score a token; `use` says how they make (B, T)."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(3)
        self.table, self.layer, self.score = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.use = use
        self.double()

    def forward(self, ids, **more):
        return self.use(self, ids, **more)


def ordinary(m, ids, attention_mask=None):
    said = m.score(torch.tanh(m.layer(m.table(ids))))[..., 0]
    return (said if attention_mask is None else said * attention_mask).sum(1)


def engine_of(model, **options):
    return fk.Influence(model, output=lambda returned: returned, **options)


def is_right(engine, model, **batch):
    rows = rows_of_gradients(model, batch)
    return error(engine.gram(batch), rows @ rows.T) < 1e-9


def functional_for(token):
    def use(m, ids):
        h = torch.tanh(m.layer(m.table(ids)))
        if (ids == token).any():
            h = h + torch.where((ids == token)[..., None], nn.functional.linear(h, m.layer.weight), 0.0)
        return m.score(h)[..., 0].sum(1)

    return use


def test_a_weight_read_as_a_matrix_for_some_content():
    model = Scorer(functional_for(0))
    engine = engine_of(model)
    assert is_right(engine, model, ids=IDS)
    late = IDS.clone()
    late[4, 6] = 0  # in the last token of the last example, which no look at a few would meet
    with pytest.raises(ValueError, match=r"layer\.weight: used outside its module's call"):
        engine.gram({"ids": late})
    served = engine_of(model, fallback="per_example")
    assert is_right(served, model, ids=IDS)
    assert is_right(served, model, ids=late)


def test_a_layer_that_only_some_content_calls():
    def use(m, ids):
        h = m.table(ids)
        return m.score(torch.tanh(m.layer(h) if (ids == 0).any() else h))[..., 0].sum(1)

    model, late = Scorer(use), IDS.clone()
    late[:, 0] = 0
    engine = engine_of(model)
    assert all(is_right(engine, model, ids=ids) for ids in (IDS, late, IDS, late))


@pytest.mark.parametrize("pieces", [1, 2])
def test_wide_batches_taken_in_pieces(pieces):
    def use(m, ids):
        if ids.shape[1] <= 7:
            return ordinary(m, ids)
        return torch.cat([ordinary(m, some) for some in ids.split(pieces)])

    model = Scorer(use)
    engine = engine_of(model)
    assert is_right(engine, model, ids=IDS)
    with pytest.raises(ValueError, match=r"examples|broadcast over the batch"):
        engine.gram({"ids": torch.cat([IDS, IDS], 1)})


def test_examples_sorted_by_length_inside():
    def use(m, ids, attention_mask):
        order = attention_mask.sum(1).argsort(descending=True, stable=True)
        return ordinary(m, ids[order], attention_mask[order])[order.argsort()]

    model = Scorer(use)
    engine = engine_of(model)
    falling, mixed = ((torch.arange(7) < torch.tensor(n)[:, None]).long() for n in ([7, 6, 4, 4, 1], [1, 6, 4, 7, 4]))
    assert is_right(engine, model, ids=IDS, attention_mask=falling)
    with pytest.raises(ValueError, match=r"examples|one ordinary backward"):
        engine.gram({"ids": IDS, "attention_mask": mixed})


@pytest.mark.parametrize("how", ["instance", "class", "parent"])
def test_forwards_replaced_after_the_engine_was_made(monkeypatch, how):
    model, batch = tiny_llama(), batch_of([5, 2, 9, 3])
    engine = fk.Influence(model)
    engine.norms(batch)
    mlp = model.model.layers[0].mlp
    if how == "instance":
        monkeypatch.setattr(mlp.up_proj, "forward", lambda x: 2 * nn.functional.linear(x, mlp.up_proj.weight))
    elif how == "class":
        kind = type(model.model.norm)
        before = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x: before(self, x) * 2)
    else:
        monkeypatch.setattr(mlp, "forward", lambda x: mlp.down_proj(nn.functional.linear(x, mlp.up_proj.weight)))
    if how == "class":  # twice the norm is the norm of a weight twice as large: served by its own arithmetic
        rows = gradients(model, batch, lambda name: True)
        assert error(engine.gram(batch), rows @ rows.T) < 1e-7
    else:
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight"):
            engine.gram(batch)


def test_batches_that_a_forward_grows_or_changes():
    model, batch = tiny_llama(), batch_of([5, 5])
    cache = model.model(input_ids=batch["input_ids"], use_cache=True).past_key_values
    for given in (cache, transformers.DynamicCache()):
        before = given.get_seq_length()
        with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
            fk.Influence(model).norms({**batch, "past_key_values": given})
        assert given.get_seq_length() == before
    with pytest.raises(ValueError, match=r"state\[0\] is a DynamicCache"):
        fk.Influence(model).norms({**batch, "state": [cache]})

    def in_place(m, ids, offset):
        return ordinary(m, ids) * offset.add_(1)

    offset = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(ValueError, match="changes offset in place"):
        engine_of(Scorer(in_place)).norms({"ids": IDS, "offset": offset})
    assert not offset.any()
    refilled = torch.ones(5, dtype=torch.float64)
    same = Scorer(lambda m, ids, scale: ordinary(m, ids) * scale.fill_(1))  # no change of what it holds
    assert is_right(engine_of(same), same, ids=IDS, scale=refilled)


def test_models_that_remember_the_call_before():
    def use(m, ids):
        m.last = getattr(m, "last", 0.0) + 1.0
        return ordinary(m, ids) * m.last

    with pytest.raises(ValueError, match="keeps something from call to call"):
        engine_of(Scorer(use)).norms({"ids": IDS})


def force(m, x, graph):
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        energy = m.layer(torch.tanh(m.layer(torch.cat([x, x], -1)[..., :3]))[..., [0, 1, 0]]).square().sum((1, 2))
        (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=graph)
    return slope.square().sum((1, 2)) if graph else energy * slope.square().sum((1, 2))


def test_gradients_taken_inside_the_forward():
    with pytest.raises(ValueError, match=r"layer\.weight.*: a gradient is taken through it in the forward"):
        plain(lambda m, x: force(m, x, graph=True))
    with pytest.raises(ValueError, match=r"layer\.weight.*torch\.func transform"):
        plain(lambda m, x: torch.func.vmap(torch.func.grad(lambda one: m.layer(one).square().sum()))(x).sum((1, 2)))


@pytest.mark.parametrize("transform", ["graph", "func"])
def test_what_one_ordinary_backward_serves(transform):
    def use(m, ids):
        x = nn.functional.one_hot(ids, 6 + 5)[..., :6].double()
        if transform == "func":
            slope = torch.func.vmap(torch.func.grad(lambda one: torch.tanh(m.layer(one)).square().sum()))(x)
        else:
            x.requires_grad_(True)
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(torch.tanh(m.layer(x)).square().sum(), x, create_graph=True)
        return slope.square().sum((1, 2)) + ordinary(m, ids)

    model = Scorer(use)
    assert is_right(engine_of(model, fallback="per_example"), model, ids=IDS)
    with pytest.raises(ValueError, match=r"layer\.weight"):
        engine_of(model).gram({"ids": IDS})


def test_hooks_on_parameters():
    model, batch = tiny_llama(), batch_of([5, 2, 9, 3])
    name = "model.layers.1.mlp.up_proj.weight"
    engine, served = fk.Influence(model, [name]), fk.Influence(model, [name], fallback="per_example")
    engine.norms(batch)
    weight = model.get_parameter(name)
    weight.register_post_accumulate_grad_hook(lambda p: p.grad.zero_())  # of `.grad`, which nobody asks for
    rows = gradients(model, batch, lambda n: n == name)
    assert error(engine.norms(batch), rows.square().sum(1)) < 1e-7
    handle = weight.register_hook(lambda gradient: 3 * gradient)  # after the engine was made
    with pytest.raises(ValueError, match=r"up_proj\.weight: a hook on it"):
        engine.norms(batch)
    assert error(served.norms(batch), 9 * rows.square().sum(1)) < 1e-7
    handle.remove()
    assert error(engine.norms(batch), rows.square().sum(1)) < 1e-7


class Lookup(nn.Embedding):
    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight, **self.given)


@pytest.mark.parametrize("attribute", [None, 3])
@pytest.mark.parametrize(
    "given", [{}, {"padding_idx": 3}, {"padding_idx": -8}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}], ids=str
)
def test_embeddings_that_look_rows_up_in_their_own_way(given, attribute):
    model = Scorer(ordinary)
    model.table = Lookup(11, 6, padding_idx=attribute).double()
    model.table.given = given
    if "max_norm" in given or "scale_grad_by_freq" in given:
        with pytest.raises(ValueError, match=r"table\.weight: .*max_norm"):
            engine_of(model).gram({"ids": IDS})
    else:
        assert is_right(engine_of(model), model, ids=IDS)


def test_entries_that_happen_to_be_as_long_as_the_batch():
    def weighted(m, ids, weights):
        return (m.layer(m.table(ids))[..., : len(weights)].log_softmax(-1) * torch.as_tensor(weights)).sum((1, 2))

    def placed(m, ids, places):  # a position a token, of as many tokens as examples
        return m.score(torch.tanh(m.layer(m.table(ids) + places[..., None])))[..., 0].sum(1)

    weights, square = torch.arange(1.0, 6.0).double(), IDS[:, :5]
    for use, batch in (
        (weighted, {"ids": IDS, "weights": weights}),
        (weighted, {"ids": IDS, "weights": weights.tolist()}),
        (placed, {"ids": square, "places": weights}),
    ):
        name = next(key for key in batch if key != "ids")
        for options in ({"micro_batch": 2}, {"fallback": "per_example"}):
            with pytest.raises(ValueError, match=f"batch: {name}: as long as the batch"):
                engine_of(Scorer(use), **options).gram(batch)
        with pytest.raises(ValueError, match=f"batch: {name}"):
            engine_of(Scorer(use)).gram(batch, batch)

    def scaled(m, ids, scale):  # one an example: split like the rest
        return ordinary(m, ids) * scale

    model = Scorer(scaled)
    assert is_right(engine_of(model, micro_batch=2), model, ids=IDS, scale=weights)


def test_weights_that_are_elsewhere(tmp_path):
    for offload in (
        lambda m: accelerate.cpu_offload(m, execution_device=torch.device("cpu")),
        lambda m: accelerate.disk_offload(m, tmp_path, execution_device=torch.device("cpu")),
    ):
        model = tiny_llama()
        engine = fk.Influence(model)
        engine.norms(batch_of([3, 2]))
        offload(model)
        for ask in (lambda model=model: fk.Influence(model), lambda engine=engine: engine.norms(batch_of([3, 2]))):
            with pytest.raises(ValueError, match=r"embed_tokens\.weight is on the meta device"):
                ask()
    with pytest.raises(ValueError, match="has no shape yet"):
        fk.Influence(nn.Sequential(nn.LazyLinear(3)))


def test_branches_without_gradients():
    def against(m, ids):
        with torch.no_grad():
            baseline = m.score(m.layer(m.table(ids)) / 2)[..., 0].sum(1) + m.score.weight.sum()
        return ordinary(m, ids) - baseline

    model = Scorer(against)
    assert is_right(engine_of(model), model, ids=IDS)
    assert is_right(engine_of(model, fallback="per_example", micro_batch=2), model, ids=IDS)

    def frozen_below(m, ids):
        with torch.no_grad():
            h = m.layer(m.table(ids))
        return m.score(h)[..., 0].sum(1)

    model = Scorer(frozen_below)
    engine = engine_of(model)
    assert is_right(engine, model, ids=IDS)
    assert [row.parameter for row in engine.coverage() if "gradient is zero" in row.reason]
