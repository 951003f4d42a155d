"""`Influence` over many architectures against one autograd call an example, through the public API."""

from __future__ import annotations

import functools
import re
from fnmatch import fnmatchcase

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

import fpo_kernels as fk
from tests.fpo_kernels.zoo import LENGTHS, ZOO, Truth, error, lora, random_direction, scatter, truth

REFERENCES, PARTNER = (6, 2), [0, 1, 1, 0]
FLOAT32 = 1e-5

# Parameters that no rule separates by example, by architecture: fallback="error" may refuse these and no other.
# DeBERTa reads its table of relative positions once for all examples, and with share_att_key sends it through the
# queries' and keys' own projections.
EXPECTED_REFUSED = {
    "deberta_v2": (
        "deberta.encoder.rel_embeddings.weight",
        "deberta.encoder.LayerNorm.*",
        "deberta.encoder.layer.*.attention.self.query_proj.*",
        "deberta.encoder.layer.*.attention.self.key_proj.*",
    ),
}

everyone = pytest.mark.parametrize("name", ZOO)


@functools.cache
def model_of(name, dtype=torch.float64):
    return ZOO[name].model(dtype, seed=1)


@functools.cache
def wide_of(name, dtype):
    """The model in float64 with the weights that `dtype` rounds to."""
    return ZOO[name].model(dtype, seed=1).double()


@functools.cache
def truth_of(name, dtype=torch.float64, loop=torch.float64, **batch):
    """The loop run in the dtype `loop` over weights rounded to `dtype`."""
    model = model_of(name, dtype) if loop == dtype else wide_of(name, dtype)
    return truth(model, ZOO[name].batch(**batch), ZOO[name].output)


def engine_of(name, dtype=torch.float64, **options):
    options = {"parameters": "all", "fallback": "per_example", "output": ZOO[name].output, **options}
    return fk.Influence(model_of(name, dtype), **options)


def answers(engine, batch, references, vectors) -> dict[str, Tensor]:
    """Everything the engine is asked for; four candidates share two references."""
    steering = engine.steering(batch, references, torch.tensor(PARTNER))
    return {
        "gram": engine.gram(batch),
        "cross": engine.gram(batch, references),
        "norms": engine.norms(batch),
        "product": steering.product,
        "reward": steering.reward,
        "reference_reward": steering.reference_reward,
        "direction": engine.direction(batch, vectors),
    }


def wanted(own: Truth, references: Truth, vectors) -> dict[str, Tensor]:
    return {
        "gram": own.gram(),
        "cross": own.gram(references),
        "norms": own.norms(),
        "product": own.steering(references, PARTNER),
        "reward": own.outputs,
        "reference_reward": references.outputs[PARTNER],
        "direction": own.direction(vectors),
    }


def errors(got, right) -> dict[str, float]:
    return {key: error(got[key], right[key]) for key in right}


def assert_within(made: dict[str, float], allowed: dict[str, float]):
    over = {key: (value, allowed[key]) for key, value in made.items() if not value <= allowed[key]}
    assert not over, f"error over what is allowed: {over}"


def everything(name, dtype, side, width=None, **options):
    """The engine's answers for one batch with references of their own width, and its errors."""
    batch = ZOO[name].batch(seed=2, side=side)
    references = ZOO[name].batch(REFERENCES, seed=3, side=side, width=width)
    own = truth_of(name, dtype, seed=2, side=side)
    theirs = truth_of(name, dtype, lengths=REFERENCES, seed=3, side=side, width=width)
    vectors = random_direction(model_of(name, dtype), own.names, seed=4)
    right = wanted(own, theirs, vectors)
    return errors(answers(engine_of(name, dtype, **options), batch, references, vectors), right), right


def loop_errors(name, dtype, right) -> dict[str, float]:
    """What one autograd call an example makes in this dtype against the same loop in float64, padded on the right."""
    own = truth_of(name, dtype, dtype, seed=2, side="right")
    theirs = truth_of(name, dtype, dtype, lengths=REFERENCES, seed=3, side="right", width=None)
    vectors = random_direction(model_of(name, dtype), own.names, seed=4)
    return errors(wanted(own, theirs, vectors), right)


# The truth, checked without the engine


@everyone
def test_the_truth_adds_up_to_the_batch_gradient(name):
    model, batch = ZOO[name].model(seed=1).requires_grad_(True), ZOO[name].batch(seed=2)
    outputs = ZOO[name].output(model(**batch), batch)
    whole = torch.autograd.grad(outputs.sum(), list(model.parameters()), allow_unused=True, materialize_grads=True)
    found = truth_of(name, seed=2, side="right")
    assert error(outputs, found.outputs) < 1e-12
    assert error(torch.cat([g.flatten() for g in whole]), found.rows.sum(0)) < ZOO[name].exact


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_truth_is_what_vmap_computes(name):
    model, batch = ZOO[name].model(seed=1), ZOO[name].batch(seed=2)
    model.config._attn_implementation = "eager"  # the other one branches on the mask's values, which vmap cannot
    found = truth(model, batch)

    def score(parameters, row):
        alone = {key: value[None] for key, value in row.items()}
        return functional_call(model, parameters, (), alone).logits[0, 0]

    rows = vmap(grad(score), in_dims=(None, 0))(dict(model.named_parameters()), batch)
    assert error(torch.cat([rows[n].flatten(1) for n in found.names], 1), found.rows) < 1e-12


# The engine


@everyone
@pytest.mark.parametrize("side", ["right", "left"])
def test_float64(name, side):
    found, _ = everything(name, torch.float64, side, width=max(LENGTHS) if side == "left" else None)
    assert_within(found, dict.fromkeys(found, ZOO[name].exact))


@everyone
def test_float32(name):
    found, right = everything(name, torch.float32, "right")
    loop = loop_errors(name, torch.float32, right)
    assert 2 * max(loop.values()) < FLOAT32, "the allowance has to hold twice what the loop itself makes in float32"
    assert_within(found, dict.fromkeys(found, FLOAT32))


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_bfloat16(name):
    found, right = everything(name, torch.bfloat16, "right")
    loop = loop_errors(name, torch.bfloat16, right)
    assert_within(found, {key: 2 * e + torch.finfo(torch.bfloat16).eps for key, e in loop.items()})


@everyone
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches(name, micro_batch):
    found, _ = everything(name, torch.float64, "left", micro_batch=micro_batch)
    assert_within(found, dict.fromkeys(found, ZOO[name].exact))


# One example; one token each; as many examples as tokens (and as Gemma 3 has heads); as DeBERTa's table has rows
SHAPES = {"one": (4,), "token": (1,), "tokens": (1, 1, 1), "square": (4, 2, 3, 1), "table": (2, 3, 1, 2, 3, 3, 1, 2)}


@everyone
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_look_alike(name, shape):
    batch, right = ZOO[name].batch(SHAPES[shape], seed=5), truth_of(name, lengths=SHAPES[shape], seed=5)
    engine = engine_of(name)
    assert error(engine.norms(batch), right.norms()) < ZOO[name].exact
    assert error(engine.gram(batch), right.gram()) < ZOO[name].exact


@everyone
def test_eight_candidates_share_two_references(name):
    lengths, partner = (2, 3, 1, 2, 3, 3, 1, 2), [0, 1, 1, 0, 0, 1, 0, 1]
    batch, references = ZOO[name].batch(lengths, seed=5), ZOO[name].batch((3, 2), seed=6)
    product = truth_of(name, lengths=lengths, seed=5).steering(truth_of(name, lengths=(3, 2), seed=6), partner)
    result = engine_of(name).steering(batch, references, torch.tensor(partner))
    assert error(result.product, product) < ZOO[name].exact


@everyone
def test_an_example_does_not_feel_its_company(name):
    engine, batch = engine_of(name), ZOO[name].batch(seed=2, side="left")
    together = engine.norms(batch)
    alone = torch.cat([engine.norms({key: value[i : i + 1] for key, value in batch.items()}) for i in range(4)])
    assert ((together - alone).abs() <= ZOO[name].exact * alone).all()  # each by its own size, the smallest too


@everyone
def test_what_has_no_rule(name):
    globs, model, batch = EXPECTED_REFUSED.get(name, ()), model_of(name), ZOO[name].batch(seed=2)
    names = [n for n, _ in model.named_parameters()]
    left = {n for n in names if not any(fnmatchcase(n, glob) for glob in globs)}
    assert {row.parameter for row in engine_of(name).coverage()} == set(names)

    engine = engine_of(name, parameters=lambda n, p: n in left, fallback="error")
    right = truth(model, batch, ZOO[name].output, left.__contains__)
    assert error(engine.gram(batch), right.gram()) < ZOO[name].exact
    assert {row.parameter: row.rule for row in engine.coverage() if row.rule is None} == {}
    assert {row.parameter for row in engine.coverage()} == left

    if globs:
        with pytest.raises(ValueError) as refusal:
            engine_of(name, fallback="error").norms(batch)
        named = {n for n in names if re.search(rf"(?<![\w.]){re.escape(n)}(?!\.?\w)", str(refusal.value))}
        assert named, "the refusal names no parameter"
        assert named <= set(names) - left


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_gradient_checkpointing(name):
    model, batch = ZOO[name].model(seed=1), ZOO[name].batch(seed=2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = fk.Influence(model.train(), fallback="per_example")
    right = truth_of(name, seed=2, side="right")
    vectors = random_direction(model, right.names, seed=4)
    assert error(engine.gram(batch), right.gram()) < 1e-10
    assert error(engine.direction(batch, vectors), right.direction(vectors)) < 1e-10


@pytest.mark.parametrize("parameters", ["lora", "trainable"])
def test_lora_beside_a_head_that_peft_replaced(parameters):
    torch.manual_seed(0)
    model = scatter(lora(task_type="SEQ_CLS")(), seed=1).eval()
    names = {n for n, p in model.named_parameters() if "lora_" in n or (parameters == "trainable" and p.requires_grad)}
    batch = ZOO["llama"].batch(seed=2, side="left")
    right = truth(model, batch, chosen=names.__contains__)
    assert any("score.modules_to_save" in n for n in right.names) == (parameters == "trainable")
    engine = fk.Influence(model, parameters)
    vectors = random_direction(model, right.names, seed=4)
    assert {row.parameter for row in engine.coverage()} == names
    assert error(engine.gram(batch), right.gram()) < 1e-10
    assert error(engine.norms(batch), right.norms()) < 1e-10
    assert error(engine.direction(batch, vectors), right.direction(vectors)) < 1e-10


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("lengths", [(7,), (7, 4, 1, 9)], ids=["one", "each"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_llama_steering(side, micro_batch, lengths, dtype):
    partner = [0] * 4 if len(lengths) == 1 else [0, 1, 2, 3]
    batch, references = (ZOO["llama"].batch(n, seed=s, side=side) for n, s in ((LENGTHS, 2), (lengths, 7)))
    own, theirs = (truth_of("llama", dtype, lengths=n, seed=s, side=side) for n, s in ((LENGTHS, 2), (lengths, 7)))
    result = engine_of("llama", dtype, micro_batch=micro_batch).steering(batch, references)
    assert result.product.dtype == dtype
    allowed = ZOO["llama"].exact if dtype == torch.float64 else FLOAT32
    assert error(result.product, own.steering(theirs, partner)) < allowed
    assert error(result.reference_reward, theirs.outputs[partner]) < allowed
