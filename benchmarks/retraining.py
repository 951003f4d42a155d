"""Reward models small enough to be trained to their optimum over and over, in float64: what `exact` foretells."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.models import Batch, reward_model, rows, token_batch

SHARP = 8.0  # times the head's random weight, so that rewards differ by about 1 from text to text
NOISE = 0.5  # of the labels' margins, which are spread by about 1
RANK = 4  # of the LoRA factors
FIRST, ROUNDS, LAST = 50, 10, 500  # iterations of L-BFGS: on the way, how often with a new scale, at the end
SLOPE = 1e-8  # the greatest of ∇L at the optimum, in units that make the Gauss–Newton matrix 1
RELATIVE = 3e-5  # the same for a pair counted ε times more, as a part of ε: leaves 1e-4 of what retraining changes
ROUGH = 1e-6  # the same on the way there
STEP = 1e-4  # of the central differences that give Hessian-vector products

Map = Callable[[Tensor], Tensor]


class PairedModel:
    """A reward model and N preference pairs, the first of which it is trained on; the others are new.

    L(φ) = Σ_j counted_j BCE(σ(Δ_j), p*_j) + λ/2‖φ‖², φ being the trained parameters one after the other. Labels p*
    come from another reward model, with noise: the optimum leaves every pair a residual, as preferences do.
    """

    def __init__(
        self, kind: str, layers: int, trained: int, new: int, tokens: int, ridge: float, seed: int = 0
    ) -> None:
        """`kind` "head" trains the score head, "lora" rank-4 LoRA factors of all blocks' Linear layers."""
        self.pairs, self.trained, self.ridge = trained + new, trained, ridge
        device = torch.device("cpu")
        # the z's before the refs; of full length, as what is kept of a text is the hidden state at the last place
        self.batch = token_batch(2 * self.pairs, tokens, device, seed, full=True)
        self.model, self.names = _model(kind, layers, seed)
        teacher, _ = _model("lora", layers, seed + 1)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, parameter in teacher.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
            taste = self.differences(teacher(**self.batch).logits[:, 0])
            self.label = torch.sigmoid(taste + NOISE * torch.randn_like(taste))
            self.hidden = self.model(**self.batch, output_hidden_states=True).hidden_states[-1][:, -1]
        self.kind = kind
        self.phi = torch.cat([self.model.get_parameter(name).detach().flatten() for name in self.names])
        self.once = (torch.arange(self.pairs) < trained).double()

    def differences(self, x: Tensor) -> Tensor:
        """x(z) − x(ref), (2N, …) → (N, …): Δ of rewards, u of gradients."""
        return x[: self.pairs] - x[self.pairs :]

    def rewards(self, phi: Tensor, batch: Batch | None = None) -> Tensor:
        """(2N,), or of another batch, differentiable in φ."""
        if self.kind == "head" and batch is None:
            return self.hidden @ phi
        shapes = [self.model.get_parameter(name).shape for name in self.names]
        parts = phi.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(self.names, parts, shapes, strict=True)}
        return torch.func.functional_call(self.model, values, (), batch or self.batch).logits[:, 0]

    def gradients(self) -> Tensor:
        """∇r at φ, formed, (2N, P): one forward and backward a sequence."""
        phi = self.phi.clone().requires_grad_()
        ones = [rows(self.batch, slice(n, n + 1)) for n in range(2 * self.pairs)]
        return torch.stack([torch.autograd.grad(self.rewards(phi, one).sum(), phi)[0] for one in ones])

    def loss(self, phi: Tensor, counted: Tensor) -> Tensor:
        """L(φ)."""
        margin = self.differences(self.rewards(phi))
        each = binary_cross_entropy_with_logits(margin, self.label, reduction="none")
        return counted @ each + self.ridge / 2 * phi @ phi

    def slope(self, phi: Tensor) -> Tensor:
        """∇L(φ), (P,), every trained pair counted once."""
        phi = phi.detach().requires_grad_()
        return torch.autograd.grad(self.loss(phi, self.once), phi)[0]

    def margins(self) -> Tensor:
        """Δ (N,) at φ."""
        with torch.no_grad():
            return self.differences(self.rewards(self.phi))

    def residuals(self) -> Tensor:
        """c = σ(Δ) − p*, (N,), at φ."""
        return torch.sigmoid(self.margins()) - self.label

    def mean_reward(self, phi: Tensor) -> float:
        """Of the policy's candidates, which are the z's of the new pairs."""
        with torch.no_grad():
            return float(self.rewards(phi)[self.trained : self.pairs].mean())

    def hessian_product(self, v: Tensor) -> Tensor:
        """∇²L(φ)·v, (P,), with what Gauss–Newton leaves out, by central differences."""
        step = STEP * v / v.norm()
        return (self.slope(self.phi + step) - self.slope(self.phi - step)) * (v.norm() / (2 * STEP))

    def train(self) -> None:
        """Bring φ to its optimum, and the model with it."""
        self.phi, _ = self._descend(self.phi, self.once, lambda y: y, FIRST, ROUGH, "strong_wolfe")
        for _ in range(ROUNDS):
            self._whiten = self._whitening()
            self.phi, slope = self._descend(self.phi, self.once, self._whiten, FIRST, SLOPE, "strong_wolfe")
            if slope <= ROUGH:
                break
        self.phi = self._polished(self.once, SLOPE)
        at = 0
        for name in self.names:
            parameter = self.model.get_parameter(name)
            parameter.data.copy_(self.phi[at : at + parameter.numel()].view_as(parameter))
            at += parameter.numel()

    def retrained(self, pair: int, epsilon: float) -> Tensor:
        """The optimum (P,) with one pair's loss counted ε times more."""
        counted = self.once.clone()
        counted[pair] += epsilon
        return self._polished(counted, RELATIVE * epsilon)

    def _polished(self, counted: Tensor, target: float) -> Tensor:
        """The optimum (P,) from close by. By slopes alone: values of L agree to rounding long before."""
        phi, slope = self._descend(self.phi, counted, self._whiten, LAST, target)
        if not slope <= target:
            raise RuntimeError(f"no optimum of the {self.kind}: slope {slope:.1e} after {LAST} iterations")
        return phi

    def _whitening(self) -> Map:
        """v → F^(−½)v of the Gauss–Newton matrix F at φ, of rows or one vector."""
        u = self.differences(self.gradients())[: self.trained]
        q = torch.sigmoid(self.margins())[: self.trained]
        _, s, v = torch.linalg.svd(u * (q * (1 - q)).sqrt()[:, None], full_matrices=False)
        gain = (s.square() + self.ridge) ** -0.5 - self.ridge**-0.5
        return lambda y: y * self.ridge**-0.5 + (gain * (y @ v.T)) @ v

    def _descend(
        self, start: Tensor, counted: Tensor, whiten: Map, iterations: int, target: float, search: str | None = None
    ) -> tuple[Tensor, float]:
        """φ = start + whiten(y) after L-BFGS in y to the target, and the greatest slope in y."""
        y = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [y],
            max_iter=iterations,
            max_eval=2 * iterations,
            history_size=100,
            tolerance_grad=target,
            tolerance_change=0.0,
            line_search_fn=search,
        )

        def value() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(start + whiten(y), counted)
            loss.backward()
            return loss

        optimizer.step(value)
        value()
        assert y.grad is not None
        return (start + whiten(y)).detach(), float(y.grad.abs().max())


def _model(kind: str, layers: int, seed: int) -> tuple[nn.Module, list[str]]:
    """A reward model with random weights and the names of what is trained of it."""
    model = reward_model("tiny", layers, torch.float64, torch.device("cpu"))
    model.get_parameter("score.weight").data *= SHARP
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":  # rounds to fp32 in float64 models too; torch's does not
            exact = nn.RMSNorm(module.weight.shape, module.variance_epsilon, dtype=torch.float64)
            model.set_submodule(name, exact)
    if kind == "head":
        return model, ["score.weight"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        factors = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=".*_proj")
        model = get_peft_model(model, factors).double().eval()
    return model, [name for name, _ in model.named_parameters() if "lora_" in name]
