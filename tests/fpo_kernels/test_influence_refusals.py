"""What `Influence` refuses, by name and with the reason, rather than answer wrongly."""

import pytest
import torch
from torch import nn

import fpo_kernels as fk
from tests.fpo_kernels.tiny import LINEAR, batch_of, plain, tiny_llama


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
    with pytest.raises(ValueError, match=r"layer\.weight.*: used outside its module's call"):
        plain(use)


def test_forwards_without_a_graph():
    with pytest.raises(ValueError, match="computed under no_grad"):
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


def test_several_logits_and_no_word_of_which():
    """Of two labels the first is that of the negative class, of a language model's the first is some token's."""
    model, batch = tiny_llama(), batch_of([3, 4])
    model.score = nn.Linear(model.score.in_features, 2, bias=False, dtype=torch.float64)
    for ask in (
        lambda **more: fk.Influence(model, LINEAR, **more).norms(batch),
        lambda **more: fk.Influence(model, "head", **more).steering(batch, batch).product,
    ):
        with pytest.raises(ValueError, match=r"output: the model gives logits of shape \(\d, 2\), wanted \(B, 1\)"):
            ask()
        assert ask(output=lambda returned: returned.logits[:, 1]).isfinite().all()


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
    model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Bilinear(2, 2, 2))
    with pytest.raises(
        ValueError, match=r"0\.weight: no rule for Conv1d\.weight; .*1\.bias: no rule for Bilinear\.bias"
    ):
        fk.Influence(model)


@pytest.mark.parametrize("choice", ["heads", ["nothing.*"], lambda name, p: False])
def test_empty_choices(choice):
    with pytest.raises(ValueError, match="parameter"):
        fk.Influence(tiny_llama(), choice)


@pytest.mark.parametrize("lost", ["scor.weight", "model.layers.7.*", "*.q_porj.*", "SCORE.weight", ""])
def test_each_name_has_to_choose_something(lost):
    """Also beside names that do."""
    with pytest.raises(ValueError, match="matches no parameter of LlamaForSequenceClassification") as caught:
        fk.Influence(tiny_llama(), ["score.*", lost, "*.q_proj.*"])
    assert f"parameters: {lost!r} matches" in str(caught.value)


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


def test_a_choice_that_nothing_depends_on():
    model = tiny_llama()
    model.spare = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="depends on none of the chosen parameters' modules"):
        fk.Influence(model, ["spare.weight"]).norms(batch_of([3]))


class Doubled(torch.autograd.Function):
    """Uses a weight where neither a tap nor a torch function sees it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return None, grad.flatten(0, 1).T @ x.flatten(0, 1)


def test_a_weight_used_by_an_autograd_function_alone():
    with pytest.raises(ValueError, match=r"hidden\.weight: used outside its module's call"):
        plain(
            lambda m, x: (m.layer(x) + Doubled.apply(x, m.hidden.weight)).sum((1, 2)),
            chosen=["layer.*", "hidden.weight"],
            hidden=nn.Linear(3, 2).double(),
        )


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: m.layer(x.transpose(0, 1)).sum((0, 2)),  # sequence first
        lambda m, x: m.layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (5, -1)).sum((0, 2)),  # folded so
        lambda m, x: (m.layer(x).sum((1, 2)) - m.layer(x).sum((1, 2)).mean()).tanh(),  # examples meet
        lambda m, x: m.layer(x).sum((1, 2)).tanh() - m.layer(x[:1]).sum().tanh(),
    ],
)
def test_examples_that_meet(use):
    with pytest.raises(ValueError, match=r"layer\.weight.*: .*first dimension|depend on one another"):
        plain(use)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: (x + m.place(torch.arange(5)[None])[0]).square().sum((1, 2)),  # one row for all
        lambda m, x: (x + m.place(torch.arange(5))).square().sum((1, 2)),  # no batch at all
        lambda m, x: torch.cat([m.place(torch.arange(5)[None]), x]).square().sum((1, 2))[1:],
    ],
)
def test_calls_broadcast_over_the_batch_that_cannot_be_expanded(use):
    with pytest.raises(ValueError, match=r"place\.weight"):
        plain(use, chosen=["place.weight"], place=nn.Embedding(5, 3).double())


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({}, "wanted parameter name"),
        ({"score.bias": torch.zeros(1)}, "'score.bias' is not among the chosen"),
        ({"model.norm.weight": torch.zeros(24)}, "'model.norm.weight' is not among the chosen"),
        ({"score.weight": torch.zeros(24)}, r"wanted floating point \(1, 24\), got torch.float32 \(24,\)"),
        ({"score.weight": torch.zeros(1, 24, dtype=torch.long)}, "got torch.int64"),
    ],
)
def test_directions_that_do_not_fit(vectors, message):
    with pytest.raises(ValueError, match=message):
        fk.Influence(tiny_llama(), LINEAR).direction(batch_of([3, 4]), vectors)


class Packed(nn.Linear):
    """A quantised layer that was packed for inference: the gradient ends here."""

    def __init__(self):
        super().__init__(3, 3)
        self.weight.quant_state = object()

    def forward(self, x):
        return super().forward(x.detach())


def test_quantised_layers_that_drop_the_gradient():
    with pytest.raises(RuntimeError, match="Packed passes no gradient on"):
        plain(lambda m, x: m.packed(m.first(x)).sum((1, 2)), chosen=["first.*"], first=nn.Linear(3, 3).double(),
              packed=Packed().double())  # fmt: skip
    plain(lambda m, x: m.layer(m.packed(x)).sum((1, 2)), packed=Packed().double())  # nothing below was asked for


def test_whole_numbers_have_no_gradient():
    model = tiny_llama()
    model.packed = nn.Linear(2, 2)
    model.packed.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    for fallback in ("error", "per_example"):
        with pytest.raises(ValueError, match=r"packed\.weight: a torch\.uint8 weight has no gradient"):
            fk.Influence(model, fallback=fallback)


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
