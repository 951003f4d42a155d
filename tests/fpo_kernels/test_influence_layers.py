"""Every kind of layer and every way a module is called, against one backward an example."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fpo_kernels as fk
from tests.fpo_kernels.tiny import error, rows_of_gradients


class Model(nn.Module):
    """Parts, and a forward that uses them."""

    def __init__(self, use, **parts):
        super().__init__()
        self.use = use
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x, **kwargs):
        return self.use(self, x, **kwargs)


class GemmaNorm(nn.Module):
    """A scale that counts from one, as Gemma's RMSNorm."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Shifted(nn.Embedding):
    """Looks up ids of its own making, and scales what it finds, as OPT's and Gemma's embeddings."""

    embed_scale = 3.0

    def forward(self, x):
        return super().forward((x > 0).cumsum(1).sum(2) + 1) * self.embed_scale


class Conv1D(nn.Module):
    """transformers' linear layer with a (p, q) weight."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


def tokens(x):
    """Ids 0–6 made from the inputs, (B, T)."""
    return (x.abs().sum(-1) * 10).long() % 7


def tie(model):
    model.out.weight = model.table.weight
    return model


def build(use, **parts):
    torch.manual_seed(1)
    model = Model(use, **parts).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model


CASES = {
    "linear without tokens": lambda: build(lambda m, x: m.l(x.mean(1)).tanh().sum(1), l=nn.Linear(3, 4)),
    "linear over many dimensions": lambda: build(
        lambda m, x: m.l(x[:, :, None] * torch.ones(2, 1).double()).tanh().sum((1, 2, 3)), l=nn.Linear(3, 4)
    ),
    "folded": lambda: build(
        lambda m, x: m.l(x.flatten(0, 1)).tanh().unflatten(0, x.shape[:2]).sum((1, 2)), l=nn.Linear(3, 4)
    ),
    "siblings": lambda: build(
        lambda m, x: (m.k(x).tanh() * m.q(x)).sum((1, 2)) + m.v(x).square().sum((1, 2)),
        q=nn.Linear(3, 4), k=nn.Linear(3, 4, bias=False), v=nn.Linear(3, 2),
    ),
    "siblings of which one leads nowhere": lambda: build(
        lambda m, x: (m.k(x), m.q(x))[1].square().sum((1, 2)), q=nn.Linear(3, 4), k=nn.Linear(3, 4)
    ),
    "called thrice": lambda: build(
        lambda m, x: m.l(m.l(x).tanh() + m.l(x[:, :2]).mean(1, keepdim=True)).square().sum((1, 2)), l=nn.Linear(3, 3)
    ),
    "conv1d": lambda: build(lambda m, x: m.l(x).tanh().square().sum((1, 2)), l=Conv1D(4, 3)),
    "layer norm": lambda: build(lambda m, x: (m.n(x) ** 3).sum((1, 2)), n=nn.LayerNorm(3)),
    "layer norm without bias": lambda: build(lambda m, x: (m.n(x) ** 3).sum((1, 2)), n=nn.LayerNorm(3, bias=False)),
    "rms norm": lambda: build(lambda m, x: (m.n(x) ** 3).sum((1, 2)), n=nn.RMSNorm(3)),
    "norm that counts from one": lambda: build(lambda m, x: (m.n(x) ** 3).sum((1, 2)), n=GemmaNorm(3)),
    "norm of heads before tokens": lambda: build(
        lambda m, x: (m.n(x[:, None] * torch.tensor([1.0, 2.0, -1.0, 0.5])[:, None, None]) ** 3).sum((1, 2, 3)),
        n=nn.RMSNorm(3),
    ),
    "embedding": lambda: build(lambda m, x: m.e(tokens(x)).square().sum((1, 2)), e=nn.Embedding(7, 3)),
    "embedding with padding": lambda: build(
        lambda m, x: m.e(tokens(x)).square().sum((1, 2)), e=nn.Embedding(7, 3, padding_idx=2)
    ),
    "embedding with ids of its own": lambda: build(lambda m, x: m.e(x).square().sum((1, 2)), e=Shifted(19, 3)),
    "embedding read twice": lambda: build(
        lambda m, x: (m.e(tokens(x)) * m.e(tokens(2 * x))).sum((1, 2)), e=nn.Embedding(7, 3)
    ),
    "position ids of one row": lambda: build(
        lambda m, x: (x + m.place(torch.arange(x.shape[1])[None])).square().sum((1, 2)), place=nn.Embedding(9, 3)
    ),
    "broadcast linear": lambda: build(
        lambda m, x: (x * m.l(torch.linspace(0, 1, 15).double().view(1, 5, 3)[:, : x.shape[1]])).tanh().sum((1, 2)),
        l=nn.Linear(3, 3),
    ),
    "tied to the output": lambda: tie(
        build(
            lambda m, x: m.out(m.table(tokens(x)).tanh()).log_softmax(-1)[..., 1].sum(1),
            table=nn.Embedding(7, 3), out=nn.Linear(3, 7, bias=False),
        )
    ),
}  # fmt: skip


def inputs(rows, length, seed):
    return {"x": torch.randn(rows, length, 3, generator=torch.Generator().manual_seed(seed)).double()}


def check(model, batch, other, **options):
    g, h = rows_of_gradients(model, batch), rows_of_gradients(model, other)
    names = [name for name, _ in model.named_parameters()]
    v = torch.randn(g.shape[1], generator=torch.Generator().manual_seed(4)).double()
    parts = dict(zip(names, v.split([p.numel() for p in model.parameters()]), strict=True))
    vectors = {name: parts[name].view_as(p) for name, p in model.named_parameters()}
    engine = fk.Influence(model, "all", output=lambda returned: returned, **options)
    assert error(engine.gram(batch), g @ g.T) < 1e-12
    assert error(engine.gram(batch, other), g @ h.T) < 1e-12
    assert error(engine.norms(batch), g.square().sum(1)) < 1e-12
    assert error(engine.direction(batch, vectors), g @ v) < 1e-12
    partner = torch.arange(len(g)) % len(h)
    got = engine.steering(batch, other, partner)
    assert error(got.product, (g * (g - h[partner])).sum(1)) < 1e-12
    with torch.no_grad():
        assert torch.allclose(got.reward, model(**batch), atol=1e-12)
    return engine


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("case", CASES)
def test_exact(case, micro_batch):
    model = CASES[case]()
    engine = check(model, inputs(5, 4, 2), inputs(2, 3, 3), micro_batch=micro_batch)
    assert {row.rule for row in engine.coverage()} <= {
        "linear weight", "conv1d weight", "embedding", "norm weight", "bias",
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_as_many_tokens_as_examples_and_examples_of_one_token(case):
    check(CASES[case](), inputs(4, 4, 5), inputs(1, 1, 6))


REFUSED = {
    "a convolution": lambda: build(
        lambda m, x: m.l(m.c(x.mT).mT).tanh().sum((1, 2)), c=nn.Conv1d(3, 3, 2, padding=1), l=nn.Linear(3, 2)
    ),
    "a bare parameter": lambda: build(
        lambda m, x: (m.l(x) * m.scale).tanh().sum((1, 2)), scale=nn.Parameter(torch.ones(2)), l=nn.Linear(3, 2)
    ),
    "a weight used beside its module": lambda: build(
        lambda m, x: (m.l(x).tanh() + x @ m.l.weight.T).square().sum((1, 2)) + m.k(x).sum((1, 2)),
        l=nn.Linear(3, 2), k=nn.Linear(3, 2),
    ),
    "one row for all": lambda: build(
        lambda m, x: m.l(x + m.place(torch.arange(x.shape[1])[None])[0]).square().sum((1, 2)),
        place=nn.Embedding(9, 3), l=nn.Linear(3, 2),
    ),
    "no batch": lambda: build(
        lambda m, x: m.l(x + m.place(torch.arange(x.shape[1]))).square().sum((1, 2)),
        place=nn.Embedding(9, 3), l=nn.Linear(3, 2),
    ),
    "a module that spoils the shapes when expanded": lambda: build(
        lambda m, x: (m.l(x) * m.r(torch.ones(1, 1, 3).double()).view(1, 2)).tanh().sum((1, 2)),
        l=nn.Linear(3, 2),
        r=nn.Linear(3, 2),
    ),
    "norm with a condition": lambda: build(
        lambda m, x: m.n(x).square().sum((1, 2)), n=type("OddNorm", (GemmaNorm,), {
            "forward": lambda self, x: (x * self.weight).tanh()})(3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_and_exact_one_by_one(case, micro_batch):
    model, batch = REFUSED[case](), inputs(5, 4, 7)
    engine = check(model, batch, inputs(2, 3, 8), fallback="per_example", micro_batch=micro_batch)
    refused = {row.parameter: row.reason for row in engine.coverage() if row.rule == "per_example"}
    assert refused
    assert all(refused.values())
    assert len(refused) < len(engine.coverage()) or case == "norm with a condition"
    with pytest.raises(ValueError) as told:
        fk.Influence(model, "all", output=lambda returned: returned).gram(batch)
    assert all(name in str(told.value) for name in refused)


def test_unused_parameters_count_nothing_and_are_named():
    model = CASES["siblings"]()
    model.spare = nn.Linear(3, 3).double()
    engine = check(model, inputs(3, 4, 9), inputs(2, 3, 10))
    assert {row.parameter for row in engine.coverage() if "zero" in row.reason} == {"spare.weight", "spare.bias"}


def test_an_error_of_the_model_s_own_is_not_blamed_on_a_parameter():
    model = build(lambda m, x: (x + m.place(torch.arange(x.shape[1])[None])).view(-1, 7), place=nn.Embedding(9, 3))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        fk.Influence(model, "all", output=lambda returned: returned).gram(inputs(4, 4, 11))


@pytest.mark.parametrize("within", [True, False])
def test_autocast(within):
    """A bf16 forward: gradients as bf16 autograd makes them; the sums of ours are not taken in bf16."""
    first, second = nn.Linear(48, 32), nn.Linear(32, 8)
    for module in (first, second):
        nn.init.normal_(module.weight, std=0.1, generator=torch.Generator().manual_seed(12))

    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16) if within else nullcontext():
            return m.second(m.first(x).tanh()).float().square().sum((1, 2))

    model = Model(forward, first=first, second=second)
    x = torch.randn(6, 5, 48, generator=torch.Generator().manual_seed(13))
    with nullcontext() if within else torch.autocast("cpu", torch.bfloat16):
        g = rows_of_gradients(model, {"x": x})
        engine = fk.Influence(model, "all", output=lambda returned: returned)
        got, same = engine.gram({"x": x}), engine.gram({"x": x})
    assert got.dtype == torch.float32
    assert torch.equal(got, same)
    assert error(got, g @ g.T) < 2**-8  # each entry of autograd's own gradient is rounded to bf16
