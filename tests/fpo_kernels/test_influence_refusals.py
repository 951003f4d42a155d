"""What `Influence` refuses, by name and with the reason, rather than answer wrongly."""

import pytest
import torch
from torch import nn

import fpo_kernels as fk
from tests.fpo_kernels.tiny import LINEAR, Biased, batch_of, plain, tiny_llama


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: (m.layer(x) + nn.functional.linear(x, m.layer.weight)).sum((1, 2)),
        lambda m, x: (m.layer(x) + m.layer.forward(x)).sum((1, 2)),
        lambda m, x: (m.layer(x) + m.layer.weight.sum()).sum((1, 2)),
        lambda m, x: (m.layer(x) + torch.cat([m.layer.weight, m.layer.weight]).sum()).sum((1, 2)),
        lambda m, x: (m.layer(x) + m.layer.weight.chunk(2)[0].sum()).sum((1, 2)),
    ],
)
def test_weights_used_outside_their_module(use):
    with pytest.raises(ValueError, match=r"layer\.weight: chosen, but used outside its module's call"):
        plain(use)


def test_forwards_without_a_graph():
    with pytest.raises(RuntimeError, match="Linear: it runs under no_grad"):
        plain(torch.no_grad()(lambda m, x: m.layer(x).sum((1, 2))))
    with pytest.raises(ValueError, match="was it detached"):
        plain(lambda m, x: m.layer(x).sum((1, 2)).detach())


def test_reentrant_checkpointing():
    model = tiny_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        fk.Influence(model, LINEAR).norms(batch_of([3, 4]))


def test_sequence_first_models_with_as_many_tokens_as_examples():
    with pytest.raises(ValueError, match="first dimension"):
        plain(lambda m, x: m.layer(x.transpose(0, 1)).sum((0, 2)), rows=4, tokens=4)


def test_batch_statistics():
    with pytest.raises(RuntimeError, match=r"norm \(BatchNorm1d\)"):
        plain(lambda m, x: m.layer(x).sum((1, 2)), norm=nn.BatchNorm1d(3))
    with pytest.raises(RuntimeError, match=r"drop \(Dropout\)"):
        plain(lambda m, x: m.layer(x).sum((1, 2)), drop=nn.Dropout(0.5))


def test_arguments_of_the_wrong_kind():
    for wrong in (0, 2.0, "2"):
        with pytest.raises(ValueError, match="micro_batch"):
            fk.Influence(tiny_llama(), LINEAR, micro_batch=wrong)
    with pytest.raises(ValueError, match="fallback"):
        fk.Influence(tiny_llama(), LINEAR, fallback="silence")
    with pytest.raises(ValueError, match="parameters=None"):
        fk.Influence(tiny_llama(), None)
    with pytest.raises(TypeError, match="reference_of: wanted a tensor"):
        fk.Influence(tiny_llama(), LINEAR).steering(batch_of([3]), batch_of([2]), [0])
    with pytest.raises(ValueError, match="no tensor with at least one example"):
        fk.Influence(tiny_llama(), LINEAR).norms({"input_ids": None})


def test_sharded_models():
    class FSDPModule(nn.Linear):
        pass

    with pytest.raises(TypeError, match="FSDP-sharded"):
        fk.Influence(nn.Sequential(FSDPModule(2, 2)))


def test_layers_without_a_rule_are_named():
    with pytest.raises(
        ValueError, match=r"no rule for Embedding\.weight: model\.embed_tokens\.weight; .*model\.norm\.weight"
    ):
        fk.Influence(tiny_llama())


@pytest.mark.parametrize("choice", ["heads", ["nothing.*"], lambda name, p: False])
def test_empty_choices(choice):
    with pytest.raises(ValueError, match="parameter"):
        fk.Influence(tiny_llama(), choice)


def test_inference_mode():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        fk.Influence(tiny_llama(), LINEAR).norms(batch_of([3]))


def test_active_dropout():
    model = tiny_llama(attention_dropout=0.1).train()
    with pytest.raises(RuntimeError, match=r"train mode.*model\.eval\(\)"):
        fk.Influence(model, LINEAR).norms(batch_of([3]))


def test_outputs_that_are_not_one_scalar_an_example():
    engine = fk.Influence(tiny_llama(), LINEAR, output=lambda out: out.logits)
    with pytest.raises(ValueError, match=r"one floating-point scalar an example, \(2,\), got \(2, 1\)"):
        engine.norms(batch_of([3, 2]))


def test_a_module_that_is_never_called():
    model = tiny_llama()
    model.spare = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"spare\.weight.*not called"):
        fk.Influence(model, ["spare.weight"]).norms(batch_of([3]))


def test_a_batch_folded_into_the_tokens():
    model = Biased()
    model.forward = lambda x: model.score(model.first(x.flatten(0, 1))).view(len(x), -1).sum(1)
    model.score = nn.Linear(7, 1)
    engine = fk.Influence(model, ["first.weight"], output=lambda r: r)
    with pytest.raises(ValueError, match=r"first\.weight.*first dimension"):
        engine.norms({"x": torch.randn(3, 4, 5)})


def test_compiled_models():
    with pytest.raises(TypeError, match="compiled"):
        fk.Influence(torch.compile(tiny_llama(), backend="eager"), LINEAR)


@pytest.mark.parametrize(
    ("count", "reference_of", "message"),
    [
        (2, None, "one for all, one each"),
        (2, torch.tensor([0, 2, 1]), r"\[0, 2\)"),
        (2, torch.tensor([0.0, 1.0, 1.0]), "wanted integers"),
    ],
)
def test_references_that_do_not_fit(count, reference_of, message):
    engine = fk.Influence(tiny_llama(), LINEAR)
    with pytest.raises(ValueError, match=message):
        engine.steering(batch_of([3, 2, 4]), batch_of([5] * count), reference_of)
