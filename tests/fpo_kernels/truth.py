"""TracIn as its definition says, and a count of a module's runs."""

import copy

import torch


def first_logit(returned):
    return returned.logits[:, 0]


def explicit(model, checkpoints, batch, other, names, output=first_logit):
    """Σ_k η_k ⟨g_i, g_j⟩ from one backward an example and checkpoint, in float64."""
    total = 0.0
    for checkpoint in checkpoints:
        twin = copy.deepcopy(model).double()
        own = dict(twin.named_parameters())
        with torch.no_grad():
            for name, tensor in checkpoint.load().items():
                own[name].copy_(tensor)
        wanted = [own[name].requires_grad_() for name in names]

        def rows(examples, twin=twin, wanted=wanted):
            size = len(next(iter(examples.values())))
            made = []
            for i in range(size):
                one = {k: v[i : i + 1].double() if v.is_floating_point() else v[i : i + 1] for k, v in examples.items()}
                got = torch.autograd.grad(output(twin(**one)).sum(), wanted, allow_unused=True)
                pairs = zip(got, wanted, strict=True)
                made.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
            return torch.stack(made)

        total = total + checkpoint.learning_rate * rows(batch) @ rows(other).T
    return total


class Passes:
    """Counts how often a module really runs."""

    def __init__(self, module):
        self.count = 0
        module.register_forward_hook(self)

    def __call__(self, *_):
        self.count += 1
