"""The neural environment's reward models, one a row, and what the penalties ask of their gradients in closed form.

r(y) = w₃·a₂ + b₃,  a₂ = softplus(z₂),  z₂ = W₂a₁ + b₂,  a₁ = softplus(z₁),  z₁ = W₁y + b₁.

With δ the derivative of r in each z, the gradient in a layer's weights is δ ⊗ (its input, 1), so that

⟨∇r(x), ∇r(y)⟩ = Σ_layers (δ_x · δ_y)(a_x · a_y + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

Weights = list[Tensor]  # W₁ (R, h, d), b₁ (R, h), W₂ (R, h, h), b₂ (R, h), w₃ (R, 1, h), b₃ (R, 1)


@dataclass(frozen=True)
class Passed:
    """What n points of each of R rows leave behind: inputs and output gradients of the three layers, and r."""

    inputs: tuple[Tensor, Tensor, Tensor]  # (R, n, width)
    slopes: tuple[Tensor, Tensor, Tensor]  # δ, (R, n, width)
    reward: Tensor  # (R, n)

    def square(self) -> Tensor:
        """‖∇r‖² of each point, (R, n)."""
        pairs = zip(self.inputs, self.slopes, strict=True)
        return torch.stack([d.square().sum(-1) * (a.square().sum(-1) + 1) for a, d in pairs]).sum(0)

    def with_all(self, other: Passed) -> Tensor:
        """⟨∇r(x), ∇r(y)⟩ of each point x with each of `other`'s y, (R, n, m)."""
        layers = zip(self.inputs, self.slopes, other.inputs, other.slopes, strict=True)
        return torch.stack([(d @ e.mT) * (a @ b.mT + 1) for a, d, b, e in layers]).sum(0)

    def detached(self) -> Passed:
        """The same as constants."""
        inputs, slopes = (tuple(x.detach() for x in kind) for kind in (self.inputs, self.slopes))
        return Passed(inputs, slopes, self.reward.detach())  # type: ignore[arg-type]

    def gradients(self) -> Tensor:
        """∇r of each point, formed, (R, n, P): weights then bias, layer after layer."""
        parts = []
        for a, d in zip(self.inputs, self.slopes, strict=True):
            parts += [(d[..., None] * a[..., None, :]).flatten(2), d]
        return torch.cat(parts, -1)


def forward(weights: Weights, points: Tensor) -> Passed:
    """r and the factors of its gradients at points (R, n, d); differentiable in the points."""
    W1, b1, W2, b2, w3, b3 = weights
    z1 = torch.baddbmm(b1[:, None], points, W1.mT)
    a1 = softplus(z1)
    z2 = torch.baddbmm(b2[:, None], a1, W2.mT)
    a2 = softplus(z2)
    reward = torch.baddbmm(b3[:, None], a2, w3.mT)
    d2 = w3 * torch.sigmoid(z2)
    d1 = (d2 @ W2) * torch.sigmoid(z1)
    return Passed((points, a1, a2), (d1, d2, torch.ones_like(reward)), reward[..., 0])


def reward(weights: Weights, points: Tensor) -> Tensor:
    """r alone, (R, n)."""
    W1, b1, W2, b2, w3, b3 = weights
    a1 = softplus(torch.baddbmm(b1[:, None], points, W1.mT))
    a2 = softplus(torch.baddbmm(b2[:, None], a1, W2.mT))
    return torch.baddbmm(b3[:, None], a2, w3.mT)[..., 0]


def draw(dimension: int, hidden: int, std: float, generator: torch.Generator) -> Weights:
    """One row's first weights, in the published order of random numbers.

    Each layer's default initialisation is drawn and thrown away; then weights are N(0, std²) and biases 0, which take
    their numbers from the stream too.
    """
    shapes = ((hidden, dimension), (hidden, hidden), (1, hidden))
    for out, inner in shapes:
        torch.empty(out, inner).uniform_(generator=generator)
        torch.empty(out).uniform_(generator=generator)
    found = []
    for out, inner in shapes:
        found.append(torch.empty(1, out, inner).normal_(0.0, std, generator=generator))
        found.append(torch.empty(1, out).normal_(0.0, 0.0, generator=generator))
    return found


def along(weights: Weights, direction: Tensor, points: Tensor) -> Tensor:
    """⟨v, ∇r(y)⟩ for a direction v (R, P) in the order of `Passed.gradients`, (R, n); differentiable in the points.

    It is the derivative of r along v in the weights: one pass forward with tangents.
    """
    W1, b1, W2, b2, w3, b3 = weights
    shapes = [W1.shape[1:], b1.shape[1:], W2.shape[1:], b2.shape[1:], w3.shape[1:], b3.shape[1:]]
    parts = direction.split([shape.numel() for shape in shapes], -1)
    V1, c1, V2, c2, v3, c3 = (part.view(len(part), *shape) for part, shape in zip(parts, shapes, strict=True))
    z1 = torch.baddbmm(b1[:, None], points, W1.mT)
    a1 = softplus(z1)
    z2 = torch.baddbmm(b2[:, None], a1, W2.mT)
    a2 = softplus(z2)
    t1 = torch.baddbmm(c1[:, None], points, V1.mT) * torch.sigmoid(z1)
    t2 = (torch.baddbmm(c2[:, None], a1, V2.mT) + t1 @ W2.mT) * torch.sigmoid(z2)
    return (torch.baddbmm(c3[:, None], a2, v3.mT) + t2 @ w3.mT)[..., 0]
