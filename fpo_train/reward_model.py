"""The reward model: a linear head on the hidden states of the policy's frozen base, r(z) = w·h(z).

Trained on preferences alone, a bias would cancel in every difference, so there is none. Its gradient is
∇r(z) = h(z); the steering product ⟨∇r(z), ∇r(z) − ∇r(ref)⟩ = h(z)·(h(z) − h(ref)) needs no backward.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from .config import RewardModelConfig


class HeadRewardModel:
    """w·h with w trained by AdamW on BCE(σ(r(z) − r(ref)), p*); all in fp32."""

    def __init__(self, width: int, config: RewardModelConfig, device: torch.device) -> None:
        self.head = nn.Linear(width, 1, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    @torch.no_grad()
    def score(self, features: Tensor) -> Tensor:
        """r = w·h for features (…, H) → (…)."""
        return self.head(features).squeeze(-1)

    @staticmethod
    def steering(candidates: Tensor, references: Tensor) -> Tensor:
        """⟨∇r(z), ∇r(z) − ∇r(ref)⟩ over the head, for features (…, H) broadcast against each other → (…).

        Summed in float64: the two norms are large and may cancel.
        """
        z, ref = candidates.double(), references.double()
        return (z * (z - ref)).sum(-1).float()

    def learn(self, chosen: Tensor, references: Tensor, preference: Tensor) -> float:
        """One AdamW step on pairs (B, H), (B, H) with soft labels p* (B,); returns the loss in nats a pair."""
        margin = self.head(chosen - references).squeeze(-1)
        loss = binary_cross_entropy_with_logits(margin, preference)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def fit(self, difference: Tensor, preference: Tensor, ridge: float) -> None:
        """Set w to the minimiser of Σ BCE(σ(w·Δh), p*) + λ/2‖w‖² by Newton's method in float64.

        Args:
            difference: Δh = h(z) − h(ref), (n, H). preference: p*, (n,) in (0, 1).
            ridge: λ relative to the mean diagonal of ΣΔhΔhᵀ.
        """
        x, p = difference.double(), preference.double()
        damping = (ridge * x.square().sum() / x.shape[1]).clamp_min(1e-12)  # pairs may all be alike
        w = x.new_zeros(x.shape[1])
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        for _ in range(50):
            q = torch.sigmoid(x @ w)
            gradient = x.T @ (q - p) + damping * w
            hessian = x.T @ (x * (q * (1 - q))[:, None]) + damping * eye
            step = torch.linalg.solve(hessian, gradient)
            w = w - step
            if step.norm() <= 1e-10 * w.norm():
                break
        with torch.no_grad():
            self.head.weight.copy_(w.to(self.head.weight.dtype)[None])

    def save(self, folder: Path, base: str) -> None:
        """Write the head as `score.weight` (the name of transformers' sequence classifiers) and what it sits on."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"score.weight": self.head.weight.detach().cpu().contiguous()}, folder / "head.safetensors")
        description = {
            "base": base,
            "reads": "last hidden state at the closing token",
            "hidden": self.head.in_features,
        }
        (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
