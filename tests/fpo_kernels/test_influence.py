"""`Influence` against a float64 per-example autograd loop, through the public API."""

import pytest
import torch
from torch import nn

import fpo_kernels as fk
from tests.fpo_kernels.tiny import LINEAR, Biased, batch_of, error, gradients, is_linear, plain, tiny_llama

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("references", ["one", "each", "listed"])
def test_steering_equals_autograd_loop(dtype, side, references):
    model = tiny_llama(1, dtype)
    candidates = batch_of([7, 1, 12, 3, 9], seed=2, side=side)
    lengths = {"one": [15], "each": [4, 2, 8, 1, 5], "listed": [6, 11]}[references]
    reference = batch_of(lengths, seed=3, side=side)
    partner = {"one": [0] * 5, "each": list(range(5)), "listed": [1, 0, 0, 1, 1]}[references]
    reference_of = torch.tensor(partner) if references == "listed" else None

    g, h = (gradients(model, b, is_linear) for b in (candidates, reference))
    truth = (g * (g - h[partner])).sum(1)
    result = fk.Influence(model, LINEAR).steering(candidates, reference, reference_of)

    assert error(result.product, truth) < TOLERANCE[dtype]
    with torch.no_grad():
        assert error(result.reward, model(**candidates).logits[:, 0].double()) < TOLERANCE[dtype]
        expected = model(**reference).logits[:, 0].double()[partner]
    assert error(result.reference_reward, expected) < TOLERANCE[dtype]
    assert result.product.dtype == dtype


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
def test_micro_batches_do_not_move_the_answer(micro_batch):
    model = tiny_llama(4)
    batch, other = batch_of([5, 9, 1, 7, 3], seed=5), batch_of([2, 10, 6], seed=6)
    whole, bounded = fk.Influence(model, LINEAR), fk.Influence(model, LINEAR, micro_batch=micro_batch)
    seen = []
    model.model.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
    for call in (
        lambda e: e.gram(batch),
        lambda e: e.gram(batch, other),
        lambda e: e.norms(batch),
        lambda e: e.steering(batch, other, torch.tensor([0, 2, 1, 2, 2])).product,
        lambda e: e.steering(batch, batch_of([8], seed=7)).product,
        lambda e: e.steering(batch, batch_of([8, 1, 2, 3, 4], seed=7)).product,
    ):
        expected = call(whole)
        seen.clear()
        got = call(bounded)
        assert error(got, expected) < 1e-12
        assert max(seen) <= micro_batch


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("side", ["right", "left"])
def test_gram_and_norms(dtype, side):
    model = tiny_llama(8, dtype)
    batch, other = batch_of([6, 1, 13], 9, side), batch_of([3, 4], 10, side)
    g, h = gradients(model, batch, is_linear), gradients(model, other, is_linear)
    engine = fk.Influence(model, LINEAR)
    assert error(engine.gram(batch), g @ g.T) < TOLERANCE[dtype]
    assert error(engine.gram(batch, other), g @ h.T) < TOLERANCE[dtype]
    assert error(engine.norms(batch), g.square().sum(1)) < TOLERANCE[dtype]
    assert torch.equal(engine.gram(batch), engine.gram(batch).T)


def test_head_only_touches_the_head():
    model = tiny_llama(11)
    batch, reference = batch_of([6, 2, 9], 12), batch_of([5], 13)
    g, h = (
        gradients(model, batch, lambda n: n == "score.weight"),
        gradients(model, reference, lambda n: n == "score.weight"),
    )
    engine = fk.Influence(model, "head")
    assert [row.parameter for row in engine.coverage()] == ["score.weight"]
    assert error(engine.steering(batch, reference).product, (g * (g - h)).sum(1)) < 1e-9


def test_all_with_biases_shared_weights_and_repeated_calls():
    torch.manual_seed(14)
    model = Biased().double()
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    rows = []
    for i in range(4):
        grads = torch.autograd.grad(model(x[i : i + 1])[0], list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    g = torch.stack(rows)
    engine = fk.Influence(model, "all", output=lambda returned: returned)
    assert error(engine.gram({"x": x}), g @ g.T) < 1e-12
    assert len(engine.coverage()) == len(list(model.parameters()))


def test_gradient_checkpointing_gives_the_same():
    model = tiny_llama(15)
    batch = batch_of([6, 3, 8], 16)
    expected = fk.Influence(model, LINEAR).gram(batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # transformers checkpoints in train mode only; this model has no dropout
    assert error(fk.Influence(model, LINEAR).gram(batch), expected) < 1e-12


def test_a_padding_that_is_read_still_counts():
    """A model that pools over masked positions has gradient there; dropping those rows would be wrong."""
    torch.manual_seed(17)
    layer = nn.Linear(3, 2).double()

    class Sloppy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, attention_mask):
            return self.layer(x).tanh().sum((1, 2))

    x = torch.randn(2, 4, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    engine = fk.Influence(Sloppy(), "all", output=lambda r: r)
    masked = engine.gram({"x": x, "attention_mask": mask})
    assert error(masked, engine.gram({"x": x, "attention_mask": torch.ones_like(mask)})) < 1e-12


def test_companions_do_not_move_an_example():
    model = tiny_llama(18, torch.float32)
    alone = fk.Influence(model, LINEAR).norms(batch_of([9], 19))
    ids = batch_of([9], 19)
    crowd = batch_of([14, 2, 9, 5], 20)
    for key in ids:
        crowd[key][2] = torch.nn.functional.pad(ids[key][0], (0, 5))
    assert error(fk.Influence(model, LINEAR).norms(crowd)[2:3], alone.double()) < 1e-5


def state_of(model):
    return (
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        {name: m.training for name, m in model.named_modules()},
        sum(len(m._forward_hooks) for m in model.modules()),
        {k: v.clone() for k, v in model.state_dict().items()},
    )


def same_state(left, right):
    return left[:4] == right[:4] and all(torch.equal(left[4][k], right[4][k]) for k in left[4])


def test_the_model_is_left_as_it_was_found():
    model = tiny_llama(21)
    model.model.layers[0].requires_grad_(False)
    before = state_of(model)
    engine = fk.Influence(model, LINEAR)
    expected = engine.gram(batch_of([4, 6], 22))
    with torch.no_grad():
        assert torch.equal(engine.gram(batch_of([4, 6], 22)), expected)
        assert not torch.is_grad_enabled()
    assert same_state(before, state_of(model))

    def explode(returned):
        raise KeyError("after the forward")

    with pytest.raises(KeyError):
        fk.Influence(model, LINEAR, output=explode).gram(batch_of([4, 6], 22))
    assert same_state(before, state_of(model))


def test_output_may_look_at_the_batch():
    model = tiny_llama(23)
    batch = batch_of([4, 6], 24)
    scaled = fk.Influence(model, LINEAR, output=lambda out, b: out.logits[:, 0] * b["input_ids"][:, 0])
    first = batch["input_ids"][:, 0].double()
    expected = fk.Influence(model, LINEAR).gram(batch) * first[:, None] * first[None]
    assert error(scaled.gram(batch), expected) < 1e-6  # Llama normalises in fp32, and the scale moves its rounding


def test_no_weight_gradient_and_nothing_below_the_lowest_tap_is_computed():
    model = tiny_llama(25)
    tape = []

    def reaches(output):
        tape.clear()  # an engine's first call makes two passes
        node, seen = [output.grad_fn], set()
        while node:
            one = node.pop()
            if one is not None and one not in seen:
                seen.add(one)
                tape.append(type(one).__name__)
                node += [parent for parent, _ in one.next_functions]
        return output

    fk.Influence(model, "head", output=lambda out: reaches(out.logits[:, 0]), check="never").norms(batch_of([4, 6], 26))
    assert tape.count("_TapBackward") == 1
    assert not {name for name in tape if "Mm" in name or "Attention" in name or "Silu" in name}
    assert tape.count("AccumulateGrad") == 1  # the anchor; no weight


def test_hooks_of_the_user_s_own_come_after_the_tap():
    model = tiny_llama(27)
    batch = batch_of([4, 6], 28)
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, out: out * 3)
    rows = []
    chosen = {n: p for n, p in model.named_parameters() if is_linear(n)}
    for i in range(2):
        score = model(**{k: v[i : i + 1] for k, v in batch.items()}).logits[0, 0]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(score, list(chosen.values()))]))
    g = torch.stack(rows)
    assert error(fk.Influence(model, LINEAR).gram(batch), g @ g.T) < 1e-9


def test_an_answer_read_at_the_last_position_survives_another_width():
    """Right-padding a left-padded batch would move what such a model reads."""
    model = tiny_llama(29)
    body = fk.Influence(model.model, ["*_proj.weight"], output=lambda out: out.last_hidden_state[:, -1].sum(-1))
    narrow, wide = batch_of([5, 3], 30, "left"), batch_of([9, 4], 31, "left")
    g, h = body.gram(narrow), body.gram(narrow, wide)
    assert error(body.steering(narrow, wide).product, g.diagonal() - h.diagonal()) < 1e-9


@pytest.mark.parametrize("choice", ["lora", "trainable"])
def test_keyword_choices_under_peft(choice):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(tiny_llama(32), config).double().eval()
    torch.manual_seed(33)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wanted = {n for n, p in model.named_parameters() if ("lora_" in n if choice == "lora" else p.requires_grad)}
    batch = batch_of([4, 6, 2], 34)
    g = gradients(model, batch, lambda n: n in wanted)
    engine = fk.Influence(model, choice)
    assert {row.parameter for row in engine.coverage()} == wanted
    assert error(engine.gram(batch), g @ g.T) < 1e-9
    (head,) = fk.Influence(model, "head").coverage()
    assert head.parameter.endswith("score.modules_to_save.default.weight")


def test_inputs_by_keyword_and_calls_that_lead_nowhere():
    expected = plain(lambda m, x: m.layer(x).sum((1, 2)))
    assert torch.equal(plain(lambda m, x: m.layer(input=x).sum((1, 2))), expected)
    assert torch.equal(plain(lambda m, x: (m.layer(x * 2), m.layer(x).sum((1, 2)))[1]), expected)
    square = plain(lambda m, x: m.layer(x).sum((1, 2)), tokens=4)  # as many tokens as examples
    assert square.shape == (4,)
