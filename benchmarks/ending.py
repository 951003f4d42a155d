"""Reward models that are cheap to train to their optimum: the end of a frozen encoder, at a text's first token.

What MiniLM's pooler and score head read is the first token's state alone. Before the last layer norm that is what the
residual holds, plus the last block's second feed-forward matrix times what it reads: both are read once, and everything
that is trained lies behind them. That is the score head, or that and LoRA factors of that matrix,

    r = w · tanh(V LN(outer + B A inter) + v)

in float64, by the loss Σ_j counted_j BCE(σ(Δ_j), p_j) + λ/2‖φ‖² over all trained weights φ.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, layer_norm

import fpo_kernels as fk
from fpo_train.attribute.inputs import Text
from fpo_train.reward_model.base import fit_logistic
from fpo_train.reward_model.classifier import ClassifierRewardModel

RANK = 8  # of the LoRA factors, scaled by 1
FINE, ROUGH = 1e-6, 1e-3  # the greatest slope at the optimum of all pairs, and at that of some
ITERATIONS, TRIES = 3000, 5  # of L-BFGS, at most; where its line search finds no way on it begins anew
ROWS = 16  # texts that the encoder reads at once


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What lies before all that is trained, float64.

    Attributes:
        inter: (R, p) what the last matrix reads of each text. outer: (R, h) that matrix's frozen product, and the
            residual. gain, shift, eps: of the layer norm. pool: V (h, h). bias: v (h,).
    """

    inter: Tensor
    outer: Tensor
    gain: Tensor
    shift: Tensor
    eps: float
    pool: Tensor
    bias: Tensor


def seen(model: ClassifierRewardModel, texts: Sequence[Text]) -> Seen:
    """Of texts by MiniLM, or another BERT with a pooler."""
    body: Any = model.module.get_submodule("bert")
    layer = body.encoder.layer[-1].output
    inter: list[Tensor] = []
    outer: list[Tensor] = []
    handles = [
        layer.dense.register_forward_pre_hook(lambda _, given: inter.append(given[0][:, 0].cpu().double())),
        layer.LayerNorm.register_forward_pre_hook(lambda _, given: outer.append(given[0][:, 0].cpu().double())),
    ]
    with torch.no_grad():
        for start in range(0, len(texts), ROWS):
            model.head_inputs(model.read_texts(texts[start : start + ROWS]))
    for handle in handles:
        handle.remove()
    norm, pool = layer.LayerNorm, body.pooler.dense
    kept = (norm.weight, norm.bias, pool.weight, pool.bias)
    gain, shift, matrix, bias = (one.detach().cpu().double() for one in kept)
    found = {"gain": gain, "shift": shift, "eps": norm.eps, "pool": matrix, "bias": bias}
    return Seen(inter=torch.cat(inter), outer=torch.cat(outer), **found)


def drawn(texts: int, seed: int, inter: int = 24, hidden: int = 12) -> Seen:
    """The same of random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gain, shift, pool = 1 + 0.1 * normal(hidden), 0.1 * normal(hidden), normal(hidden, hidden) / hidden**0.5
    read = {"inter": normal(texts, inter).relu(), "outer": normal(texts, hidden), "bias": 0.1 * normal(hidden)}
    return Seen(gain=gain, shift=shift, eps=0.1, pool=pool, **read)


class Ending:
    """A reward model over N pairs, rows 2j and 2j + 1 of what is seen; the first n have labels and train it.

    Attributes:
        phi: (P,) the trained weights at the optimum of the n pairs. ridge: λ. labels: (n,) p.
    """

    def __init__(self, kind: str, read: Seen, labels: Tensor, ridge: float | None, seed: int = 0) -> None:
        """`kind` "head": w is trained; "LoRA": A, B and w. `ridge` None: 0.1 × the mean square of the head's inputs.

        A is drawn from `seed`, as PEFT draws it; B begins at 0 and w at its own optimum.
        """
        self.kind, self.read, self.labels = kind, read, labels.double()
        width = len(read.gain)
        bound = read.inter.shape[1] ** -0.5
        generator = torch.Generator().manual_seed(seed)
        down = torch.rand(RANK, read.inter.shape[1], generator=generator, dtype=torch.float64) * 2 - 1
        self._shapes = [(RANK, read.inter.shape[1]), (width, RANK)] if kind == "LoRA" else []
        self._adapter = [(down * bound).flatten(), down.new_zeros(width * RANK)] if kind == "LoRA" else []
        features = self._hidden([], slice(None))
        self._frozen = self.differences(features)[: len(labels)]
        self._square = float(self._frozen.square().sum()) / width
        self.ridge = 0.1 * self._square if ridge is None else ridge
        self.phi = self.optimum(torch.ones(len(labels)), FINE)

    @staticmethod
    def differences(x: Tensor) -> Tensor:
        """Of a pair's first row and its second, (2N, …) → (N, …)."""
        return x[::2] - x[1::2]

    def rewards(self, phi: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """(R,), differentiable in φ."""
        *adapter, head = self._parts(phi)
        return self._hidden(adapter, rows) @ head

    def margins(self, phi: Tensor | None = None) -> Tensor:
        """Δ of all pairs, (N,)."""
        with torch.no_grad():
            return self.differences(self.rewards(self.phi if phi is None else phi))

    def streams(self) -> list[tuple[str, Tensor, Tensor]]:
        """Of every trained matrix at φ: its name, what it reads and ∂r/∂ what it gives, (R, p) and (R, q)."""
        *adapter, head = self._parts(self.phi)
        features = self._hidden(adapter, slice(None))
        found = [("score", features, torch.ones(len(features), 1, dtype=torch.float64))]
        if adapter:
            down, up = adapter
            low = self.read.inter @ down.T
            before = (self.read.outer + low @ up.T).requires_grad_()
            (slope,) = torch.autograd.grad((self._behind(before) @ head).sum(), before)
            found = [("lora_A", self.read.inter, slope @ up), ("lora_B", low, slope), *found]
        return found

    def gradients(self) -> Tensor:
        """u = ∇r(first) − ∇r(second) at φ of all pairs, (N, P)."""
        whole = [(d[:, :, None] * a[:, None]).flatten(1) for _, a, d in self.streams()]
        return self.differences(torch.cat(whole, 1))

    def sketched(self, dim: int, seed: int) -> Tensor:
        """The same by the tensor sketch, all matrices added up, (N, k)."""
        rows = torch.arange(len(self.read.inter) + 1)
        total = torch.zeros(len(self.read.inter), dim, dtype=torch.float64)
        for name, a, d in self.streams():
            sketch = fk.TensorSketch(p=a.shape[1], q=d.shape[1], dim=dim, seed=seed, name=name)
            total += fk.grad_sketch(a.contiguous(), d.contiguous(), rows, sketch)
        return self.differences(total)

    def optimum(self, counted: Tensor, slope: float = ROUGH, start: Tensor | None = None) -> Tensor:
        """φ (P,) that minimises the loss with pairs counted so, (n,) of 0 and 1; from the beginning or from `start`.

        Raises:
            RuntimeError: the slope is not reached.
        """
        index = counted.nonzero()[:, 0]
        if not self._adapter or start is None:
            some = self._frozen[index]
            head = fit_logistic(some, self.labels[index], self.ridge * some.shape[1] / float(some.square().sum()))
            if not self._adapter:
                return head
            start = torch.cat([*self._adapter, head])
        rows = torch.stack([2 * index, 2 * index + 1], 1).flatten()
        phi = start.clone().requires_grad_()

        def loss() -> Tensor:
            phi.grad = None
            margins = self.differences(self.rewards(phi, rows))
            each = binary_cross_entropy_with_logits(margins, self.labels[index], reduction="sum")
            total = each + self.ridge / 2 * phi @ phi
            total.backward()
            return total

        reached = float("inf")
        for _ in range(TRIES):
            optimizer = torch.optim.LBFGS(
                [phi],
                max_iter=ITERATIONS,
                max_eval=2 * ITERATIONS,
                history_size=50,
                tolerance_grad=slope,
                tolerance_change=0.0,
                line_search_fn="strong_wolfe",
            )
            optimizer.step(loss)
            loss()
            assert phi.grad is not None
            reached = float(phi.grad.abs().max())
            if reached <= slope:
                return phi.detach()
        raise RuntimeError(f"no optimum: slope {reached:.1e}, wanted {slope:.1e}")

    def _parts(self, phi: Tensor) -> list[Tensor]:
        """A and B, if they are trained, and w."""
        sizes = [rows * columns for rows, columns in self._shapes]
        *adapter, head = phi.split([*sizes, len(self.read.gain)])
        return [*(part.view(shape) for part, shape in zip(adapter, self._shapes, strict=True)), head]

    def _hidden(self, adapter: Sequence[Tensor], rows: Tensor | slice) -> Tensor:
        """What the head reads, (R, h)."""
        if not adapter:
            return self._plain[rows]
        down, up = adapter
        return self._behind(self.read.outer[rows] + (self.read.inter[rows] @ down.T) @ up.T)

    @functools.cached_property
    def _plain(self) -> Tensor:
        return self._behind(self.read.outer)

    def _behind(self, before: Tensor) -> Tensor:
        normal = layer_norm(before, (before.shape[1],), self.read.gain, self.read.shift, self.read.eps)
        return torch.tanh(normal @ self.read.pool.T + self.read.bias)
