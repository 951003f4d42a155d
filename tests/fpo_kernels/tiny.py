"""Models small enough for float64 truth: a Llama, plain layers, and one autograd call an example."""

import copy

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


class Plain(nn.Module):
    """A linear layer and a way to use it."""

    def __init__(self, use, **parts):
        super().__init__()
        self.layer, self.use = nn.Linear(3, 2).double(), use
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.use(self, x)


def plain(use, rows=4, tokens=5, chosen=("layer.*",), **parts):
    torch.manual_seed(35)
    engine = fk.Influence(Plain(use, **parts), list(chosen), output=lambda returned: returned)
    return engine.norms({"x": torch.randn(rows, tokens, 3, dtype=torch.float64)})


def rows_of_gradients(model, batch, names=None):
    """One backward an example of a model that returns its scalars: flattened gradients (B, weights), in float64."""
    size = next(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)
    wanted = [p for name, p in model.named_parameters() if names is None or name in names]
    rows = []
    for i in range(size):
        split = {k: isinstance(v, torch.Tensor) and v.ndim > 0 and len(v) == size for k, v in batch.items()}
        (scalar,) = model(**{key: value[i : i + 1] if split[key] else value for key, value in batch.items()})
        got = torch.autograd.grad(scalar, wanted, allow_unused=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(got, wanted, strict=True)])
        )
    return torch.stack(rows).double()
