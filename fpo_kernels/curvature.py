"""`Curvature`: the damped curvature of a reward model's loss over its training pairs, and `exact` steering on top.

A pair (z, ref) with margin Δ = r(z) − r(ref) has the logistic loss of Δ, whose gradient is c·u and whose second
derivative along u is σ'(Δ), with u = ∇r(z) − ∇r(ref) and c = σ(Δ) − p*. What the loss's curvature is made of is
therefore one vector and one weight a pair, whether u is a linear head's h(z) − h(ref), a sketch, or a whole gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# A solve keeps about −log10(condition number × machine epsilon) digits; with fewer than two it is refused.
ROUNDING = 1e-2
POWER_STEPS = 10  # of the estimates of the greatest and least eigenvalue, which have to be right to a small factor


class Curvature:
    """F = Σ_j w_j x_j x_jᵀ + λI over pairs j, and its inverse products: a sum over the pairs, not their mean.

    With x = h(z) − h(ref) and w = `logistic_weights` of the margins, F is the very Hessian of a linear head's loss
    Σ_j BCE(σ(Δ_j), p*_j) + λ/2‖φ‖²: that loss's second derivative does not depend on the labels. A bias cancels in
    every difference, so features go without it. With x = u = ∇r(z) − ∇r(ref) of any other model, or a sketch of it,
    F is the Gauss–Newton matrix, equal to the Fisher matrix: the Hessian but for Σ_j c_j ∇²Δ_j. With w = 1 it is a
    plain second moment.

    While there are fewer pairs than half of k, their vectors are kept, (n, k), and a solve takes place within
    their span (in an orthonormal basis of it, exactly; F is λ beside it): 2nk numbers, O(n²k) work. From there on
    the (k, k) matrix and its Cholesky factor are kept, 2k² numbers (4 GB in float64 at k = 16384), O(k³/3) work.
    Added pairs drop the factor, and the next solve makes a new one: that costs the same for one pair as for a
    thousand, where updating it takes 2k² steps in a row for each.

    λ has the units of x² times those of w. r is a logit, so with w = σ' the loss is in nats and λ in nats per
    squared unit of the parameter. The natural value is the ridge that the reward model was trained with, λ/2‖φ‖²
    beside a loss summed over the n pairs, which is n times the ridge (SGD's weight decay) beside their mean;
    AdamW's decoupled decay is no term of the loss and fixes no λ. The default, λ = 0.1 × the mean diagonal of the
    undamped sum, is what influence functions usually take (Grosse et al. 2023, arXiv 2308.03296) and holds the
    condition number below 1 + 10k, whatever the data. It moves as pairs are added: in proportion to n, as a ridge
    beside the mean loss does. Give `relative=False` for a λ that stays.

    Args:
        dim: k, the length of the vectors.
        damping: λ, or with `relative` its ratio to the mean diagonal; not negative. 0 is possible where the pairs
            determine every direction.
        relative: whether `damping` is that ratio.
        dtype: float64 or float32, of what is kept, accumulated and returned.
        device: of what is kept; vectors must lie there.

    Raises:
        ValueError, TypeError: arguments other than these.
    """

    def __init__(
        self,
        dim: int,
        damping: float = 0.1,
        relative: bool = True,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if not (isinstance(dim, int) and dim >= 1):
            raise ValueError(f"dim={dim!r}: wanted a positive number of features")
        if not 0 <= damping < float("inf"):
            raise ValueError(f"damping={damping!r}: wanted a finite number, not negative")
        if dtype not in (torch.float64, torch.float32):
            raise TypeError(f"dtype={dtype}: wanted torch.float64 or torch.float32")
        self.dim, self.dtype, self.device = dim, dtype, torch.empty(0, device=device).device
        self.count = 0
        self._given, self._relative = float(damping), relative
        self._rows = torch.empty(0, dim, dtype=dtype, device=self.device)  # √w x of every pair, until they fold into
        self._sum: Tensor | None = None  # (k, k)
        self._factor: _Factor | None = None

    @property
    def damping(self) -> float:
        """λ as it is now, in the units of x²·w."""
        if not self._relative:
            return self._given
        trace = self._rows.square().sum() if self._sum is None else self._sum.trace()
        return self._given * float(trace) / self.dim

    @property
    def matrix(self) -> Tensor:
        """F, (k, k), a copy, damping included."""
        with _plain(self.device):
            total = self._folded() if self._sum is None else self._sum.clone()
            total.diagonal().add_(self.damping)
            return total

    def update(self, features: Tensor, weights: Tensor) -> None:
        """F ← F + Σ_j w_j x_j x_jᵀ; the order in which pairs come matters only to rounding.

        Args:
            features: (n, k) vectors x of any floating point dtype, n = 0 too. weights: (n,) w, not negative.

        Raises:
            ValueError: shapes or devices that do not fit, a negative weight, a number that is not finite.
            TypeError: no floating point numbers.
        """
        with _plain(self.device):
            rows = self._scaled(features, weights)
            if self._sum is None and self.count + len(rows) <= self.dim // 2:
                self._rows = torch.cat([self._rows, rows])
            else:
                if self._sum is None:
                    self._sum, self._rows = self._folded(), self._rows.new_empty(0, self.dim)
                self._sum.addmm_(rows.T, rows)
            self.count += len(rows)
            self._factor = None

    def remove(self, features: Tensor, weights: Tensor) -> None:
        """F ← F − Σ_j w_j x_j x_jᵀ of pairs that were added: the very numbers that `update` was given.

        While vectors are kept their rows are dropped, without a trace. Out of the matrix they are subtracted, which
        leaves rounding of the size of the largest sum there ever was.

        Raises: as `update`; ValueError for pairs that are not there (seen only while vectors are kept), and for
        more of them than there are.
        """
        with _plain(self.device):
            rows = self._scaled(features, weights)
            if len(rows) > self.count:
                raise ValueError(f"remove: {len(rows)} pairs, of {self.count} that were added")
            if self._sum is None:
                self._rows = self._rows[self._without(rows)]
            else:
                self._sum.addmm_(rows.T, rows, alpha=-1)
            self.count -= len(rows)
            self._factor = None

    def solve(self, x: Tensor) -> Tensor:
        """F⁻¹x for vectors (…, k) of any floating point dtype; the same shape, in the curvature's dtype and device.

        The factor is kept for the next call. Carries no autograd graph.

        Raises:
            ValueError: another length or device; damping too small, where F is not positive definite to the
                dtype or so ill-conditioned that fewer than two digits were right: the message has λ and the
                least that does.
            TypeError: no floating point numbers.
        """
        self._check("x", x)
        if not x.ndim or x.shape[-1] != self.dim:
            raise ValueError(f"x: wanted (…, {self.dim}), got {tuple(x.shape)}")
        with _plain(self.device):
            if self._factor is None:
                self._factor = self._factorise()
            return self._factor.solve(x.to(self.dtype).reshape(-1, self.dim)).reshape(x.shape)

    def _folded(self) -> Tensor:
        """Σ w x xᵀ of the vectors kept, (k, k)."""
        return self._rows.T @ self._rows

    def _without(self, rows: Tensor) -> Tensor:
        """Which of the vectors kept remain, (n,) bool, when these are taken out once each."""
        keep = torch.ones(len(self._rows), dtype=torch.bool, device=self.device)
        for n, row in enumerate(rows):
            (same,) = torch.where((self._rows == row).all(1) & keep)
            if not len(same):
                raise ValueError(f"remove: pair {n} is not among the {self.count} that were added")
            keep[same[0]] = False
        return keep

    def _factorise(self) -> _Factor:
        damping = self.damping
        basis, inner = None, self._sum
        if inner is None:
            basis, triangle = torch.linalg.qr(self._rows.T)  # the pairs' span, (k, n), and the pairs in its terms
            inner = triangle @ triangle.T
        if not damping and not bool(inner.any()):
            raise ValueError("solve: nothing but zeros yet, and a damping that is zero or relative to them")
        damped = inner.clone()
        damped.diagonal().add_(damping)
        lower, info = torch.linalg.cholesky_ex(damped)
        factor = _Factor(lower, basis, damping)
        self._judge(factor, inner, failed=bool(info))
        return factor

    def _judge(self, factor: _Factor, inner: Tensor, failed: bool) -> None:
        """Raise where there is no Cholesky factor, or one that solves cannot rely on."""
        greatest = _greatest(lambda v: inner @ v, inner)
        wanted = greatest * torch.finfo(self.dtype).eps / ROUNDING
        least = factor.damping  # at least; the very least eigenvalue where the pairs do not span the space
        if not failed and least < wanted and factor.basis is None:
            least = 1 / _greatest(lambda v: torch.cholesky_solve(v, factor.lower), inner)
        if not failed and least >= wanted:
            return
        if factor.damping >= wanted or bool((inner.diagonal() < -wanted).any()):
            raise ValueError("the sum over pairs is not positive definite: pairs were removed that had not been added")
        relative = f", {wanted * self.dim / float(inner.trace()):.1e} of the mean diagonal"
        raise ValueError(
            f"damping λ = {factor.damping:.2g} is too small to solve in {self.dtype}: the greatest eigenvalue is "
            f"{greatest:.2g}, so λ has to be about {wanted:.2g} at least{relative}"
        )

    def _scaled(self, features: Tensor, weights: Tensor) -> Tensor:
        """√w x, (n, k), after every check."""
        self._check("features", features)
        self._check("weights", weights)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features: wanted (n, {self.dim}), got {tuple(features.shape)}")
        if weights.shape != features.shape[:1]:
            raise ValueError(f"weights: wanted ({len(features)},), one a pair, got {tuple(weights.shape)}")
        if bool((weights < 0).any()):
            raise ValueError(f"weights: wanted none below 0, got {float(weights.min()):.3g}")
        rows = features.detach().to(self.dtype) * weights.detach().to(self.dtype).sqrt()[:, None]
        if not bool(rows.isfinite().all()):
            raise ValueError(f"features, weights: not finite in {self.dtype}")
        return rows

    def _check(self, name: str, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"{name}: wanted floating point, got {x.dtype}")
        if x.device != self.device:
            raise ValueError(f"{name}: wanted on {self.device}, as the curvature is, got {x.device}")


@dataclass(frozen=True, eq=False)
class _Factor:
    """F = Q L Lᵀ Qᵀ + λ(I − Q Qᵀ): L the lower Cholesky factor, Q the orthonormal basis, None for the whole space."""

    lower: Tensor
    basis: Tensor | None
    damping: float

    def solve(self, x: Tensor) -> Tensor:
        """F⁻¹x of rows (m, k)."""
        if self.basis is None:
            return torch.cholesky_solve(x.T, self.lower).T
        inside = x @ self.basis
        solved = torch.cholesky_solve(inside.T, self.lower).T @ self.basis.T
        return solved + (x - inside @ self.basis.T) / self.damping


def logistic_weights(margin: Tensor) -> Tensor:
    """σ'(Δ) = σ(Δ)σ(−Δ), the logistic loss's second derivative in the margin Δ = r(z) − r(ref), whatever the label.

    Any shape and floating point dtype, kept; at most 1/4, accurate to rounding also where σ(Δ) rounds to 1.
    """
    if not margin.is_floating_point():
        raise TypeError(f"margin: wanted floating point, got {margin.dtype}")
    return torch.sigmoid(margin) * torch.sigmoid(-margin)


def exact_steering(curvature: Curvature, mean_gradient: Tensor, features: Tensor, overconfidence: Tensor) -> Tensor:
    """c(z)·⟨ḡ, F⁻¹u(z)⟩ of every candidate z, the `exact` penalty; one solve for ḡ, whatever the number of z.

    Times −ε it is, to first order, how the mean reward changes once the reward model is retrained with the loss of
    (z, ref) counted ε times more: the influence of z on the parameters is −F⁻¹∇ℓ, and ∇ℓ = c·u.

    Args:
        curvature: of the reward model's training pairs, over vectors of length k.
        mean_gradient: (k,) ḡ, the mean of ∇r over the policy's candidates, in the curvature's feature space: a
            head's mean h(z), a mean sketch.
        features: (n, k) u(z) = ∇r(z) − ∇r(ref) in the same space.
        overconfidence: (n,) c(z) = σ(r(z) − r(ref)) − p*.

    Returns:
        (n,) in the units of r, in the curvature's dtype and on its device. Carries no autograd graph.

    Raises: as `Curvature.solve`; ValueError for shapes that do not fit.

    Source: Gauthier, Bach and Jordan 2026 (arXiv 2605.04266), the steering term before it is approximated.
    """
    if mean_gradient.shape != (curvature.dim,):
        raise ValueError(f"mean_gradient: wanted ({curvature.dim},), got {tuple(mean_gradient.shape)}")
    if features.ndim != 2 or features.shape[1] != curvature.dim:
        raise ValueError(f"features: wanted (n, {curvature.dim}), got {tuple(features.shape)}")
    if overconfidence.shape != features.shape[:1]:
        raise ValueError(f"overconfidence: wanted ({len(features)},), got {tuple(overconfidence.shape)}")
    solved = curvature.solve(mean_gradient)
    with _plain(curvature.device):
        return overconfidence.to(solved) * (features.to(solved) @ solved)


def _greatest(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """The greatest eigenvalue, estimated from below, of a positive semi-definite map of (n, 1); `like` is (n, n)."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(like), 1, generator=generator, dtype=torch.float64).to(like)
    size = 0.0
    for _ in range(POWER_STEPS):
        v = apply(v / v.norm().clamp_min(torch.finfo(v.dtype).tiny))
        size = float(v.norm())
    return size


@contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """No graph, no autocast, and tensors that may be changed in place later, whatever the caller's modes."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
