"""`tracin` against the explicit sum of autograd dot products over checkpoints, through the public API."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import fpo_kernels as fk
from tests.fpo_kernels.tiny import batch_of, error, tiny_llama
from tests.fpo_kernels.truth import Passes, explicit, first_logit

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
RATES = [0.3, 0.0, 0.02, 0.1, 1.7]


def trained(model, folder, parameters, rates=RATES):
    """A store of a few steps of training of these parameters on random rewards."""
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        parameter.requires_grad_(name in parameters)
    store = fk.CheckpointStore(folder)
    optimizer = torch.optim.SGD([own[name] for name in parameters], lr=0.05)
    for step, rate in enumerate(rates):
        batch = batch_of([4, 7, 3], seed=step)
        optimizer.zero_grad()
        (model(**batch).logits[:, 0] - torch.tensor([1.0, -2.0, 0.5])).square().mean().backward()
        optimizer.step()
        store.save(model, step=10 * step, learning_rate=rate)
    optimizer.zero_grad()
    return store


def names_of(model, part=""):
    return [name for name, _ in model.named_parameters() if part in name]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("kept", "chosen"),
    [
        ("", "all"),
        ("score", "head"),
        ("score", "all"),
        ("", "head"),
        ("layers.1", ["score.*", "*layers.0*"]),
        ("score", ["*layers.0*"]),  # between what is chosen and what is stored lies a layer that is neither
    ],
)
def test_tracin_equals_the_sum_of_autograd_dot_products(tmp_path, dtype, kept, chosen):
    model = tiny_llama(1, dtype)
    store = trained(model, tmp_path, names_of(model, kept))
    engine = fk.Influence(model, chosen)
    names = [row.parameter for row in engine.coverage()]
    batch, other = batch_of([5, 9, 1], 2), batch_of([4, 7, 2, 6], 3)
    out = fk.tracin(engine, store, batch, other)
    assert out.dtype == dtype
    assert error(out, explicit(model, store, batch, other, names)) < TOLERANCE[dtype]
    own = fk.tracin(engine, list(store)[1:4], batch)
    assert error(own, explicit(model, list(store)[1:4], batch, batch, names)) < TOLERANCE[dtype]
    bounded = fk.Influence(model, chosen, micro_batch=2)
    assert error(fk.tracin(bounded, store, batch, other), out.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("last_only", [False, True])
def test_lora(tmp_path, last_only):
    from peft import LoraConfig, get_peft_model

    layers = [1] if last_only else None
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=layers)
    model = get_peft_model(tiny_llama(4), config).double().eval()
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    store = trained(model, tmp_path, [n for n, p in model.named_parameters() if p.requires_grad])
    engine = fk.Influence(model, "lora", check="never")  # passes are counted
    names = [row.parameter for row in engine.coverage()]
    batch, other = batch_of([5, 9, 1], 6), batch_of([4, 7], 7)
    engine.norms(batch)
    first = Passes(model.base_model.model.model.layers[0].mlp.down_proj)
    assert error(fk.tracin(engine, store, batch, other), explicit(model, store, batch, other, names)) < 1e-9
    assert first.count == (2 if last_only else 2 * len(RATES))  # below the first LoRA factor nothing changes


# Outputs that are not linear in the logit, one of them not even on its tape: a clamp's slope is read off its values.
OUTPUTS = {
    "default": first_logit,
    "log-sigmoid": lambda returned: F.logsigmoid(returned.logits[:, 0]),
    "clamp": lambda returned: returned.logits[:, 0].clamp(-0.3, 0.3),
    "branch": lambda returned: returned.logits[:, 0] * (2 if float(returned.logits.detach().sum()) > 0 else 1),
}


@pytest.mark.parametrize("head", ["linear", "biased", "two layers"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_under_a_head_the_backbone_runs_once(tmp_path, head, output):
    torch.manual_seed(8)
    model = tiny_llama(9)
    if head == "biased":
        model.score = nn.Linear(24, 1).double()
    elif head == "two layers":
        model.score = nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    names = names_of(model, "score")
    store = fk.CheckpointStore(tmp_path)
    model.requires_grad_(False)
    model.score.requires_grad_(True)
    own = {name: p.detach().clone() for name, p in model.score.named_parameters()}
    for step in range(20):
        for parameter in model.score.parameters():
            nn.init.normal_(parameter, std=0.1 * (step % 7))
        store.save(model, step=step, learning_rate=0.1 + step)
    for name, p in model.score.named_parameters():
        p.data.copy_(own[name])
    engine = fk.Influence(model, "head", output=OUTPUTS[output])
    batch, other = batch_of([5, 9, 1], 10), batch_of([4, 7], 11)
    if output == "branch":  # it looks at the whole batch
        batch, other = ({key: value[:1] for key, value in b.items()} for b in (batch, other))
    engine.gram(batch, other)  # looks at the model
    backbone = Passes(model.model.layers[0].mlp)
    for checkpoints in (list(store)[:1], store):
        backbone.count = 0
        out = fk.tracin(engine, checkpoints, batch, other)
        assert backbone.count == 2
        assert error(out, explicit(model, checkpoints, batch, other, names, OUTPUTS[output])) < 1e-9
    if output != "branch":
        alike = batch_of([3, 9, 2, 8], 11)
        expected = engine.gram(batch, alike)  # of a clamped reward it may be zero
        backbone.count = 0
        together = fk.tracin(engine, store, batch, alike)
        assert backbone.count == 1  # batches of the same shapes run as one
        engine.micro_batch = 6
        assert error(fk.tracin(engine, store, batch, alike), together) < 1e-9
        assert torch.allclose(engine.gram(batch, alike), expected, rtol=1e-9)
        engine.micro_batch = None
    backbone.count = 0
    fk.tracin(engine, store, batch)
    assert backbone.count == 1
    engine.micro_batch = 1
    backbone.count = 0
    assert error(fk.tracin(engine, store, batch, other), out) < 1e-9
    assert backbone.count == len(batch["input_ids"]) + len(other["input_ids"])
    assert "forward" not in vars(model.model)


class Tied(nn.Module):
    """A head that is the embedding's transpose, read at one id."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.score = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.score.weight = self.embed.weight

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.score(self.mix(self.embed(input_ids)).tanh().mean(1)))


def test_tied_weights(tmp_path):
    torch.manual_seed(12)
    model, store = Tied().double(), fk.CheckpointStore(tmp_path)
    model.mix.requires_grad_(False)
    for step in range(3):
        nn.init.normal_(model.embed.weight)
        assert store.save(model, step=step, learning_rate=1 + step).names == ("embed.weight",)
    batch, other = ({"input_ids": torch.randint(11, (n, 5))} for n in (3, 2))
    out = fk.tracin(fk.Influence(model, ["score.weight", "mix.*"], first_logit), store, batch, other)
    names = ["embed.weight", "mix.weight", "mix.bias"]
    assert error(out, explicit(model, store, batch, other, names)) < 1e-10


def test_checkpoints_of_different_parameters(tmp_path):
    """What a checkpoint does not hold stays as the model has it, not as another checkpoint left it."""
    model = tiny_llama(15)
    store = fk.CheckpointStore(tmp_path)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, part in enumerate(["score", "layers.1", "", "layers.0", "score"]):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part in name)
            parameter.data.normal_(std=0.3)
        store.save(model, step=step, learning_rate=1)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(kept[name])
    batch, other = batch_of([5, 9], 16), batch_of([4], 17)
    out = fk.tracin(fk.Influence(model), store, batch, other)
    assert error(out, explicit(model, store, batch, other, names_of(model))) < 1e-9


def test_other_precisions_are_rounded_to_the_model_s(tmp_path):
    model = tiny_llama(18, torch.float32)
    store = trained(model, tmp_path / "fp32", names_of(model))
    batch = batch_of([5, 9], 19)
    low = copy.deepcopy(model).bfloat16()
    rounded = fk.CheckpointStore(tmp_path / "bf16")
    for checkpoint in store:
        for name, tensor in checkpoint.load().items():
            low.get_parameter(name).data.copy_(tensor)
        rounded.save(low, step=checkpoint.step, learning_rate=checkpoint.learning_rate)
    engine = fk.Influence(low)
    out = fk.tracin(engine, store, batch)
    assert out.dtype == torch.float32
    assert torch.equal(out, fk.tracin(engine, rounded, batch))
    wide = copy.deepcopy(model).double()
    truth = explicit(wide, rounded, batch, batch, names_of(model))
    assert error(fk.tracin(fk.Influence(wide), rounded, batch), truth) < 1e-9


def test_autocast_does_not_remember_the_weights_before(tmp_path):
    model = tiny_llama(20, torch.float32)
    store = trained(model, tmp_path, ["score.weight"])
    engine = fk.Influence(model, "head", fallback="per_example")
    model.score = Odd(model.score.weight)
    batch = batch_of([5, 9], 21)
    with torch.autocast("cpu", torch.bfloat16):
        whole = fk.tracin(engine, store, batch)
    parts = []
    for checkpoint in store:
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(fk.tracin(engine, [checkpoint], batch))
    assert torch.equal(whole, sum(p.double() for p in parts).float())


class Odd(nn.Module):
    """A head without a rule, not linear in its weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return F.linear(F.linear(x, self.weight).tanh(), self.weight[:, :1])


class Stops(TorchFunctionMode):
    """Raises at the nth call of a torch function."""

    def __init__(self, name, nth, problem):
        super().__init__()
        self.name, self.left, self.problem = name, nth, problem

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == self.name:
            self.left -= 1
            if self.left == 0:
                raise self.problem("stopped")
        return function(*args, **(kwargs or {}))


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def as_found(model, before, flags):
    own = dict(model.named_parameters())
    return (
        all(torch.equal(own[name].view(torch.int64), before[name].view(torch.int64)) for name in before)
        and [p.requires_grad for p in own.values()] == flags
        and not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    )


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["copy_", "linear", "isfinite", "clone"])
def test_the_model_is_as_it_was_wherever_it_stops(tmp_path, name, problem):
    model = tiny_llama(22)
    store = trained(model, tmp_path, names_of(model, "layers.1"), RATES[:2])
    model.model.layers[0].requires_grad_(False)
    for parameter in model.model.layers[1].parameters():
        parameter.data.normal_()
    model.model.layers[1].mlp.down_proj.weight.data[0, :2] = torch.tensor([-0.0, 5e-324])
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    engine, batch = fk.Influence(model, "head"), batch_of([3, 2], 23)
    expected = fk.tracin(engine, store, batch)
    counter = Stops(name, 0, problem)
    with counter:
        fk.tracin(engine, store, batch)
    calls, stored = -counter.left, sum("layers.1" in n for n in before)
    # a copy back that fails for good cannot be mended; one that is interrupted is
    last = calls - stored if name == "copy_" and problem is RuntimeError else calls
    assert last > 0
    for nth in sorted({1, 2, last // 2, last - 1, last, calls if problem is KeyboardInterrupt else last}):
        with pytest.raises(problem, match="stopped"), Stops(name, nth, problem):
            fk.tracin(engine, store, batch)
        assert as_found(model, before, flags), nth
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert torch.equal(fk.tracin(engine, store, batch), expected)


def test_callers_without_gradients(tmp_path):
    model = tiny_llama(24)
    store = trained(model, tmp_path / "all", names_of(model))
    engine, batch = fk.Influence(model), batch_of([4, 6], 25)
    expected, before = fk.tracin(engine, store, batch), bits(model)
    with torch.no_grad():
        assert torch.equal(fk.tracin(engine, store, batch), expected)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        fk.tracin(engine, store, batch)
    assert as_found(model, before, [True] * len(before))
    head, store = fk.Influence(model, "head"), trained(model, tmp_path / "head", ["score.weight"])
    with torch.inference_mode():
        made = {key: value.clone() for key, value in batch.items()}
    assert torch.equal(fk.tracin(head, store, made), fk.tracin(head, store, batch))


def test_other_engines_of_the_model_wait(tmp_path):
    model = tiny_llama(26)
    store = trained(model, tmp_path, ["score.weight"])
    batch = batch_of([4, 6], 27)
    swapped, seen = threading.Event(), []

    def output(returned):
        swapped.set()
        return returned.logits[:, 0]

    other = fk.Influence(model, output=lambda returned: returned.logits[:, 0])
    expected = other.norms(batch)
    worker = threading.Thread(target=lambda: seen.append(fk.tracin(fk.Influence(model, output=output), store, batch)))
    worker.start()
    assert swapped.wait(60)
    got = other.norms(batch)
    worker.join()
    assert torch.equal(got, expected)
    assert len(seen) == 1


def test_refuses_before_anything_is_touched(tmp_path):
    model = tiny_llama(28)
    engine, batch, before = fk.Influence(model, "head"), batch_of([4, 6], 29), bits(model)
    with pytest.raises(ValueError, match=r"at least one checkpoint, got none in CheckpointStore\('.*empty'\)"):
        fk.tracin(engine, fk.CheckpointStore(tmp_path / "empty"), batch)

    store = fk.CheckpointStore(tmp_path / "first")
    store.save(model, step=0, learning_rate=1)
    wider = tiny_llama(30)
    wider.score = nn.Linear(24, 2, bias=False).double()
    stranger = nn.ModuleDict({"model": nn.ModuleDict({"norm": nn.Linear(24, 24)})})
    for name, odd, message in [
        ("shape", wider, r"1\.safetensors: 'score.weight' is floating point \(2, 24\), the model's is .* \(1, 24\)"),
        ("name", stranger, r"'model.norm.bias' is not a parameter of LlamaForSequenceClassification"),
    ]:
        other = fk.CheckpointStore(tmp_path / name)
        other.save(model, step=0, learning_rate=1)
        other.save(odd, step=1, learning_rate=1)
        with pytest.raises(ValueError, match=message), Stops("copy_", 1, AssertionError):
            fk.tracin(engine, other, batch)

    apart = Tied()
    apart.score.weight = nn.Parameter(apart.score.weight.detach().clone())
    other = fk.CheckpointStore(tmp_path / "apart")
    other.save(apart, step=0, learning_rate=1)
    with pytest.raises(ValueError, match=r"'score\.weight' and 'embed\.weight' are stored apart"):
        fk.tracin(fk.Influence(Tied(), ["mix.*"]), other, {"input_ids": torch.ones(1, 1, dtype=torch.long)})

    half = tiny_llama(31, torch.float16)
    large = tiny_llama(31, torch.float32)
    large.score.weight.data[0, 3] = 1e6
    other = fk.CheckpointStore(tmp_path / "large")
    other.save(large, step=0, learning_rate=1)
    kept = bits(half)
    with pytest.raises(ValueError, match=r"'score\.weight' is not finite in torch\.float16"):
        fk.tracin(fk.Influence(half, "head"), other, batch)
    assert all(torch.equal(p, kept[name]) for name, p in half.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
