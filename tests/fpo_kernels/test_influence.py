"""`Influence` against a float64 per-example autograd loop, through the public API."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import fpo_kernels as fk

LINEAR = ["*_proj.weight", "score.weight"]
PAD = 0


def tiny_llama(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=PAD,
        initializer_range=0.3,
        **options,
    )
    return LlamaForSequenceClassification(config).to(dtype).eval()


def batch_of(lengths, seed=0, side="right", width=None):
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        where = slice(0, n) if side == "right" else slice(width - n, width)
        ids[row, where] = torch.randint(1, 61, (n,), generator=generator)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def gradients(model, batch, chosen):
    """One backward an example in float64: flattened gradients (B, weights)."""
    model = copy.deepcopy(model).double()
    names = {name for name, p in model.named_parameters() if chosen(name)}
    wanted = [p for name, p in model.named_parameters() if name in names]
    rows = []
    for i in range(len(batch["input_ids"])):
        score = model(**{k: v[i : i + 1] for k, v in batch.items()}).logits[0, 0]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(score, wanted)]))
    return torch.stack(rows)


def is_linear(name):
    return name.endswith("_proj.weight") or name == "score.weight"


def error(out, truth):
    return float((out.double() - truth).norm() / truth.norm())


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


class Biased(nn.Module):
    """Biases, an in-place activation, one weight used by two modules, a module called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.tied = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.tied.weight = self.second.weight
        self.act, self.score = nn.ReLU(inplace=True), nn.Linear(7, 1)

    def forward(self, x):
        h = self.act(self.first(x))
        h = self.tied(self.act(self.second(h)) + self.second(h * h))
        return self.score(h.mean(1))[:, 0]


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
        node, seen = [output.grad_fn], set()
        while node:
            one = node.pop()
            if one is not None and one not in seen:
                seen.add(one)
                tape.append(type(one).__name__)
                node += [parent for parent, _ in one.next_functions]
        return output

    fk.Influence(model, "head", output=lambda out: reaches(out.logits[:, 0])).norms(batch_of([4, 6], 26))
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


class Plain(nn.Module):
    """A linear layer and a way to use it."""

    def __init__(self, use, **parts):
        super().__init__()
        self.layer, self.use = nn.Linear(3, 2).double(), use
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.use(self, x)


def plain(use, rows=4, tokens=5, **parts):
    torch.manual_seed(35)
    engine = fk.Influence(Plain(use, **parts), ["layer.*"], output=lambda returned: returned)
    return engine.norms({"x": torch.randn(rows, tokens, 3, dtype=torch.float64)})


def test_inputs_by_keyword_and_calls_that_lead_nowhere():
    expected = plain(lambda m, x: m.layer(x).sum((1, 2)))
    assert torch.equal(plain(lambda m, x: m.layer(input=x).sum((1, 2))), expected)
    assert torch.equal(plain(lambda m, x: (m.layer(x * 2), m.layer(x).sum((1, 2)))[1]), expected)
    square = plain(lambda m, x: m.layer(x).sum((1, 2)), tokens=4)  # as many tokens as examples
    assert square.shape == (4,)


class TestRefusals:
    @pytest.mark.parametrize(
        "use",
        [
            lambda m, x: (m.layer(x) + nn.functional.linear(x, m.layer.weight)).sum((1, 2)),
            lambda m, x: (m.layer(x) + m.layer.forward(x)).sum((1, 2)),
            lambda m, x: (m.layer(x) + m.layer.weight.sum()).sum((1, 2)),
        ],
    )
    def test_weights_used_outside_their_module(self, use):
        with pytest.raises(ValueError, match=r"layer\.weight: chosen, but used outside its module's call"):
            plain(use)

    def test_forwards_without_a_graph(self):
        with pytest.raises(RuntimeError, match="Linear: it runs under no_grad"):
            plain(torch.no_grad()(lambda m, x: m.layer(x).sum((1, 2))))
        with pytest.raises(ValueError, match="was it detached"):
            plain(lambda m, x: m.layer(x).sum((1, 2)).detach())

    def test_reentrant_checkpointing(self):
        model = tiny_llama().train()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            fk.Influence(model, LINEAR).norms(batch_of([3, 4]))

    def test_sequence_first_models_with_as_many_tokens_as_examples(self):
        with pytest.raises(ValueError, match="first dimension"):
            plain(lambda m, x: m.layer(x.transpose(0, 1)).sum((0, 2)), rows=4, tokens=4)

    def test_batch_statistics(self):
        with pytest.raises(RuntimeError, match=r"norm \(BatchNorm1d\)"):
            plain(lambda m, x: m.layer(x).sum((1, 2)), norm=nn.BatchNorm1d(3))
        with pytest.raises(RuntimeError, match=r"drop \(Dropout\)"):
            plain(lambda m, x: m.layer(x).sum((1, 2)), drop=nn.Dropout(0.5))

    def test_arguments_of_the_wrong_kind(self):
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

    def test_sharded_models(self):
        class FSDPModule(nn.Linear):
            pass

        with pytest.raises(TypeError, match="FSDP-sharded"):
            fk.Influence(nn.Sequential(FSDPModule(2, 2)))

    def test_layers_without_a_rule_are_named(self):
        with pytest.raises(
            ValueError, match=r"no rule for Embedding\.weight: model\.embed_tokens\.weight; .*model\.norm\.weight"
        ):
            fk.Influence(tiny_llama())

    @pytest.mark.parametrize("choice", ["heads", ["nothing.*"], lambda name, p: False])
    def test_empty_choices(self, choice):
        with pytest.raises(ValueError, match="parameter"):
            fk.Influence(tiny_llama(), choice)

    def test_inference_mode(self):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
            fk.Influence(tiny_llama(), LINEAR).norms(batch_of([3]))

    def test_active_dropout(self):
        model = tiny_llama(attention_dropout=0.1).train()
        with pytest.raises(RuntimeError, match=r"train mode.*model\.eval\(\)"):
            fk.Influence(model, LINEAR).norms(batch_of([3]))

    def test_outputs_that_are_not_one_scalar_an_example(self):
        engine = fk.Influence(tiny_llama(), LINEAR, output=lambda out: out.logits)
        with pytest.raises(ValueError, match=r"one floating-point scalar an example, \(2,\), got \(2, 1\)"):
            engine.norms(batch_of([3, 2]))

    def test_a_module_that_is_never_called(self):
        model = tiny_llama()
        model.spare = nn.Linear(3, 3)
        with pytest.raises(ValueError, match=r"spare\.weight.*not called"):
            fk.Influence(model, ["spare.weight"]).norms(batch_of([3]))

    def test_a_batch_folded_into_the_tokens(self):
        model = Biased()
        model.forward = lambda x: model.score(model.first(x.flatten(0, 1))).view(len(x), -1).sum(1)
        model.score = nn.Linear(7, 1)
        engine = fk.Influence(model, ["first.weight"], output=lambda r: r)
        with pytest.raises(ValueError, match=r"first\.weight.*first dimension"):
            engine.norms({"x": torch.randn(3, 4, 5)})

    def test_compiled_models(self):
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
    def test_references_that_do_not_fit(self, count, reference_of, message):
        engine = fk.Influence(tiny_llama(), LINEAR)
        with pytest.raises(ValueError, match=message):
            engine.steering(batch_of([3, 2, 4]), batch_of([5] * count), reference_of)
