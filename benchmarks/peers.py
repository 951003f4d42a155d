"""Plain ways to what fpo_kernels computes, written as a careful user would write them without it.

The steering product of candidate z is ⟨g_z, g_z − g_ref⟩ with g the gradient of an example's own reward. Model
batches hold the candidates first and the one reference last, padded on the right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.models import Batch, rows

CACHED = 1 << 20  # numbers


class Checkpoint(Protocol):
    """What TracIn sums over: weights by name, and the rate they are weighed with."""

    @property
    def learning_rate(self) -> float: ...

    @property
    def names(self) -> Sequence[str]: ...

    def load(self) -> Mapping[str, Tensor]: ...


def wide(x: Tensor) -> Tensor:
    """fp32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def formed_gradients(a: Tensor, d: Tensor, lengths: Sequence[int]) -> Tensor:
    """(B, q, p): every G_i = Σ_t d_t a_tᵀ with einsum."""
    examples = len(lengths)
    if len(set(lengths)) == 1:
        shape = (examples, lengths[0], -1)
        return torch.einsum("btq,btp->bqp", d.view(shape), a.view(shape))
    parts = zip(d.split(list(lengths)), a.split(list(lengths)), strict=True)
    return torch.stack([torch.einsum("tq,tp->qp", d_i, a_i) for d_i, a_i in parts])


def formed_products(a: Tensor, d: Tensor, lengths: Sequence[int], pairs: Tensor) -> Tensor:
    """⟨G_i, G_j⟩ for pairs (n, 2) → (n,): form every G_i = Σ_t d_t a_tᵀ with einsum, then one Gram matrix."""
    G = formed_gradients(a, d, lengths)
    flat = wide(G).flatten(1)  # (B, q·p)
    return (flat @ flat.T)[pairs[:, 0], pairs[:, 1]]


def formed_direction(a: Tensor, d: Tensor, lengths: Sequence[int], V: Tensor) -> Tensor:
    """⟨G_i, V⟩ → (B,): form every G_i with einsum, multiply."""
    G = formed_gradients(a, d, lengths)
    return wide(G).flatten(1) @ wide(V).flatten()


def plain_direction(a: Tensor, d: Tensor, offsets: Tensor, V: Tensor) -> Tensor:
    """⟨G_i, V⟩ → (B,): all tokens times V at once, multiplied and summed."""
    return torch.segment_reduce(wide((a @ V.T) * d).sum(1), "sum", lengths=offsets.diff(), unsafe=True)


def rewards(model: nn.Module, batch: Batch) -> Tensor:
    """(B,)"""
    return model(**batch).logits[:, 0]


@contextmanager
def embeddings_on_tape(model: nn.Module) -> Iterator[list[Tensor]]:
    """The embeddings' outputs require grad: with all weights frozen, backward still runs through every block."""
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output.requires_grad_())

    embeddings = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    handle = embeddings.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


def forward_and_backward(model: nn.Module, batch: Batch) -> Tensor:
    """∂ Σ_i r_i / ∂ embeddings, (B, T, hidden): forward and activation-only backward, nothing else."""
    with torch.enable_grad(), embeddings_on_tape(model) as embedded:
        (gradient,) = torch.autograd.grad(rewards(model, batch).sum(), embedded)
    return gradient


@contextmanager
def trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The parameters require grad for a while; what autograd leaves on them is dropped."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def autograd_loop(
    model: nn.Module, names: Sequence[str], batch: Batch, accumulate: torch.dtype | None = None
) -> Tensor:
    """Steering products (N,), one forward and one autograd call an example, multiplied matrix by matrix.

    `flattened_loop` does the same with less care.

    Products are summed in `accumulate`; by default in the gradients' own dtype, fp32 at least.
    """
    parameters = [model.get_parameter(name) for name in names]

    def gradient(n: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(rewards(model, rows(batch, slice(n, n + 1))).sum(), parameters)

    def product(own: tuple[Tensor, ...]) -> Tensor:
        parts = []
        for g, r in zip(own, reference, strict=True):
            # What stays in the cache at a time: whole matrices of an 8B model take several times as long, and
            # many small pieces cost a start each.
            count = max(1, CACHED // g[0].numel())
            for x, y in zip(g.split(count), r.split(count), strict=True):
                x, y = (wide(t) if accumulate is None else t.to(accumulate) for t in (x, y))
                parts.append((x * (x - y)).sum())
        return torch.stack(parts).sum()

    with trainable(parameters):
        last = len(batch["input_ids"]) - 1
        reference = gradient(last)
        return torch.stack([product(gradient(n)) for n in range(last)])


def flattened_loop(model: nn.Module, names: Sequence[str], batch: Batch) -> Tensor:
    """Steering products (N,) as most scripts write them: each example's gradients joined to one vector."""
    parameters = [model.get_parameter(name) for name in names]

    def gradient(n: int) -> Tensor:
        parts = torch.autograd.grad(rewards(model, rows(batch, slice(n, n + 1))).sum(), parameters)
        return wide(torch.cat([part.flatten() for part in parts]))

    def product(own: Tensor) -> Tensor:
        return (own * (own - reference)).sum()  # pairwise; a dot of 10^8 fp32 numbers errs by 3e-4

    with trainable(parameters):
        last = len(batch["input_ids"]) - 1
        reference = gradient(last)
        return torch.stack([product(gradient(n)) for n in range(last)])


def vmap_grad(model: nn.Module, names: Sequence[str], batch: Batch) -> Tensor:
    """Steering products (N,) from torch.func: every example's gradient at once.

    The attention mask is left out: transformers reads its values, which vmap forbids, and padding on the right is
    behind all that a causal model's last token reads, which it finds by the pad id.
    torch warns that fused attention has no batching rule on a CPU; eager attention takes just as long here.
    """
    parameters: dict[str, Tensor] = {name: model.get_parameter(name) for name in names}

    def reward(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (), {"input_ids": ids[None]}).logits[0, 0]

    gradients = torch.func.vmap(torch.func.grad(reward), (None, 0))(parameters, batch["input_ids"])
    flat = [wide(g).flatten(1) for g in gradients.values()]
    return torch.stack([(g[:-1] * (g[:-1] - g[-1])).sum(1) for g in flat]).sum(0)


def vmap_bytes(model: nn.Module, names: Sequence[str], examples: int) -> int:
    """What `vmap_grad` takes at the least: all gradients twice, once in the layout they are computed in."""
    return 2 * examples * sum(model.get_parameter(name).nbytes for name in names)


def hooked_token_products(model: nn.Module, batch: Batch) -> Tensor:
    """Steering products (N,) over all Linear weights: token products in plain torch, from hooks during backward.

    The token-by-token matrices are those of `ghost_norms`; here all weights stay frozen, so no weight gradient
    is computed and inputs live no longer than the tape.
    """
    parts: list[Tensor] = []

    def product(a: Tensor, d: Tensor) -> None:  # (B, T, p), (B, T, q)
        own = wide(a[:-1] @ a[:-1].mT) * wide(d[:-1] @ d[:-1].mT)  # (N, T, T)
        cross = wide(a[:-1] @ a[-1].mT) * wide(d[:-1] @ d[-1].mT)
        parts.append((own - cross).sum((1, 2)))

    hooked_backward(model, batch, product)
    return torch.stack(parts).sum(0)


def hooked_backward(model: nn.Module, batch: Batch, note: Callable[[Tensor, Tensor], None]) -> Tensor:
    """`forward_and_backward` with plain torch hooks on all Linear layers: `note` meets each input and its d."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        a = args[0].detach()
        output.register_hook(lambda d: note(a, d))

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        return forward_and_backward(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def head_closed_form(model: nn.Module, batch: Batch) -> Tensor:
    """Steering products (N,) of a bias-free linear head on feature h: h_z·(h_z − h_ref), one forward, no backward."""
    h = wide(last_hidden(model, batch))
    return (h[:-1] * (h[:-1] - h[-1])).sum(1)


def last_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """(B, hidden): what the bias-free linear head reads at each sequence's last token."""
    with torch.no_grad():
        hidden = model.get_submodule("model")(**batch).last_hidden_state  # (B, T, hidden)
    last = batch["attention_mask"].sum(1) - 1
    return hidden[torch.arange(len(last), device=last.device), last]


def head_tracin(model: nn.Module, checkpoints: Sequence[Checkpoint], batch: Batch, other: Batch) -> Tensor:
    """Σ_k η_k ⟨g_i, g_j⟩ (B, M) over checkpoints of a linear head: load each, run both batches, multiply features."""
    joined = {key: torch.cat([batch[key], other[key]]) for key in batch}
    size = len(batch["input_ids"])
    own = {name: p.detach().clone() for name, p in model.named_parameters() if name in checkpoints[0].names}
    total = torch.zeros(())
    for checkpoint in checkpoints:
        model.load_state_dict(checkpoint.load(), strict=False)
        h = wide(last_hidden(model, joined))
        total = checkpoint.learning_rate * (h[:size] @ h[size:].T) + total.to(h)
    model.load_state_dict(own, strict=False)
    return total


def ghost_norms(model: nn.Module, names: Sequence[str], batch: Batch) -> Tensor:
    """Steering products (N,), as ghost clipping in the manner of Opacus finds norms: Li et al. 2022, section 3.

    Its structure is kept: the chosen weights require grad (its hooks pass frozen layers over), so that backward
    also sums the batch's weight gradients; every layer's input is held from its forward to its backward; a full
    backward hook writes a·aᵀ and d·dᵀ to memory as (B, T, T) by einsum, multiplies and sums them. Added is the
    same with the reference. `hooked_token_products` does no more than these products, on frozen weights.
    """
    inputs: dict[nn.Module, Tensor] = {}
    parts: list[Tensor] = []

    def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[module] = args[0].detach()

    def product(module: nn.Module, inner: tuple[Tensor, ...], outer: tuple[Tensor, ...]) -> None:
        a, d = wide(inputs.pop(module)), wide(outer[0].detach())  # (B, T, p), (B, T, q)
        aa, dd = (torch.einsum("nik,njk->nij", x[:-1], x[:-1]) for x in (a, d))  # (N, T, T)
        own = torch.einsum("nij,nij->n", aa, dd)
        aa, dd = (torch.einsum("nik,jk->nij", x[:-1], x[-1]) for x in (a, d))
        parts.append(own - torch.einsum("nij,nij->n", aa, dd))

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_hook(remember) for layer in layers]
    handles += [layer.register_full_backward_hook(product) for layer in layers]
    try:
        # Without a gradient to a first layer's input, torch warns that its full hook has none to hand over.
        with trainable([model.get_parameter(name) for name in names]), embeddings_on_tape(model):
            rewards(model, batch).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(parts).sum(0)


def exact(model: nn.Module, names: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    """In float64 by plain autograd: reward (B,), input_gradient (B, T, hidden), product (N,)."""
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        reward = rewards(double, batch)
    gradient = forward_and_backward(double, batch)
    return {"reward": reward, "input_gradient": gradient, "product": autograd_loop(double, names, batch)}


def trusted(model: nn.Module, names: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    """The same in the model's own dtype, one example at a time by plain autograd; products summed in float64.

    For models whose float64 twin and its gradients (four times a fp32 model's weights, and twice that again) are
    more than a benchmark may take. Examples never meet in one forward, so what a batched competitor mixes up
    shows; what all fp32 autograd gets wrong alike does not.
    """
    examples = [rows(batch, slice(n, n + 1)) for n in range(len(batch["input_ids"]))]
    with torch.no_grad():
        reward = torch.cat([rewards(model, example) for example in examples])
    gradient = torch.cat([forward_and_backward(model, example) for example in examples])
    product = autograd_loop(model, names, batch, accumulate=torch.float64)
    return {"reward": reward, "input_gradient": gradient, "product": product}


def exact_head_tracin(
    model: nn.Module, checkpoints: Sequence[Checkpoint], batch: Batch, other: Batch
) -> dict[str, Tensor]:
    """In float64: reward of both batches (B + M,), and tracin (B, M), one autograd call an example and checkpoint.

    The frozen backbone runs once; autograd goes through the head.
    """
    double = copy.deepcopy(model).double()
    joined = {key: torch.cat([batch[key], other[key]]) for key in batch}
    features = last_hidden(double, joined)
    with torch.no_grad():
        reward = rewards(double, joined)
    weight = double.get_parameter("score.weight")
    size = len(batch["input_ids"])
    total = torch.zeros(size, len(features) - size, dtype=torch.float64, device=features.device)
    for checkpoint in checkpoints:
        double.load_state_dict(checkpoint.load(), strict=False)
        with trainable([weight]):
            scores = [double.get_submodule("score")(h).squeeze() for h in features]
            g = torch.stack([torch.autograd.grad(score, weight)[0].flatten() for score in scores])
        total += checkpoint.learning_rate * (g[:size] @ g[size:].T)
    return {"reward": reward, "tracin": total}
