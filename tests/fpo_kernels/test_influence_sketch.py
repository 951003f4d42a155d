"""`Influence.sketch` against the sketch of every parameter's formed gradient, by autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fpo_kernels as fk
from fpo_kernels.sketch.maps import bucket_map
from fpo_kernels.sketched import family_of
from tests.fpo_kernels.test_sketch import walsh
from tests.fpo_kernels.zoo import ZOO, error, truth

DIM, SEED = 256, 3


def formed_sketch(name: str, shape: tuple[int, ...], rows: Tensor) -> Tensor:
    """k^(−1/2) W b of gradients (B, numel) of a parameter, element by element."""
    if len(shape) < 2:
        of_all = bucket_map(math.prod(shape), DIM, SEED, name, "v")
        bucket, sign = of_all.bucket, of_all.sign
    else:
        columns = math.prod(shape[1:])
        of_rows = bucket_map(shape[0], DIM, SEED, name, "d")
        of_columns = bucket_map(columns, DIM, SEED, family_of(name), "a")
        bucket = (of_rows.bucket[:, None] ^ of_columns.bucket).flatten()
        sign = (of_rows.sign[:, None] * of_columns.sign).flatten()
    buckets = torch.zeros(len(rows), DIM, dtype=torch.float64).index_add_(1, bucket, rows * sign)
    return walsh(buckets) * DIM**-0.5


def expected(model: torch.nn.Module, batch: dict[str, Tensor], output) -> dict[str, Tensor]:
    right = truth(model, batch, output)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    pieces = right.rows.split([math.prod(shapes[name]) for name in right.names], 1)
    return {name: formed_sketch(name, shapes[name], g) for name, g in zip(right.names, pieces, strict=True)}


def engine_of(name: str, model: torch.nn.Module, **options) -> fk.Influence:
    return fk.Influence(model, output=ZOO[name].output, fallback="per_example", **options)


@pytest.mark.parametrize("name", ZOO)
def test_it_is_the_sketch_of_the_models_gradient(name: str) -> None:
    kind = ZOO[name]
    model, batch = kind.model(), kind.batch()
    right = expected(model, batch, kind.output)
    engine = engine_of(name, model)
    assert error(engine.sketch(batch, DIM, SEED), sum(right.values())) <= kind.exact
    apart = engine.sketch(batch, DIM, SEED, per_layer=True)
    assert apart.keys() == right.keys()
    whole = sum(right.values()).norm()
    for own, wanted in right.items():
        assert (apart[own] - wanted).norm() <= kind.exact * whole, own


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("width", [9, 12])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_single_precision_padding_and_micro_batches(name: str, width: int, micro_batch: int | None) -> None:
    kind = ZOO[name]
    model, batch = kind.model(torch.float32), kind.batch(width=width)
    right = sum(expected(kind.model(torch.float32).double(), batch, kind.output).values())
    got = engine_of(name, model, micro_batch=micro_batch).sketch(batch, DIM, SEED)
    assert got.dtype == torch.float32
    assert error(got, right) <= 1e-5


def test_inner_products_are_those_of_the_gradients() -> None:
    """The mean over 64 seeds within four of its standard errors, which are the products' scale / √(64 k)."""
    kind = ZOO["llama"]
    model, batch = kind.model(), kind.batch()
    engine = engine_of("llama", model)
    exact = engine.gram(batch)
    grams = torch.stack([(s := engine.sketch(batch, 64, seed)) @ s.T for seed in range(64)])
    scale = exact.diag().sqrt()
    off = (grams.mean(0) - exact) / (scale[:, None] * scale)
    assert off.abs().max() <= 4 * math.sqrt(2 / (64 * 64))
    assert (grams - exact).std(0).min() > 0


def test_parameters_that_are_not_chosen_are_left_out() -> None:
    kind = ZOO["llama"]
    model, batch = kind.model(), kind.batch()
    chosen = [name for name, _ in model.named_parameters() if "mlp" in name]
    right = expected(model, batch, kind.output)
    got = fk.Influence(model, parameters=chosen).sketch(batch, DIM, SEED)
    assert error(got, sum(right[name] for name in chosen)) <= kind.exact


def test_families_are_blocks() -> None:
    assert family_of("model.layers.11.mlp.up_proj.weight") == "model.layers.11"
    assert family_of("base.layers.0.q_proj.lora_A.default.weight") == "base.layers.0"
    assert family_of("score.weight") == ""


@pytest.mark.parametrize(("options", "message"), [({"dim": 100}, "power of two"), ({"seed": 2**70}, "64 bits")])
def test_a_bad_dim_or_seed_is_named_before_the_model_runs(options, message) -> None:
    def fail(*given):
        raise AssertionError("it ran")

    model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    engine = fk.Influence(model, output=lambda returned: returned[:, 0])
    model.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match=message):
        engine.sketch({"input": torch.zeros(2, 2)}, **options)
