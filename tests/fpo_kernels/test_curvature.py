"""Curvature against explicit inverses in float64, and `exact` steering against retraining the reward model."""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits as bce

import fpo_kernels as fk
from tests.fpo_kernels.tiny import batch_of, tiny_llama

F64, F32 = torch.float64, torch.float32


def pairs_of(n, k, seed=0, dtype=F64):
    """Correlated features (n, k) whose directions differ by three orders of magnitude, and weights (n,)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=F64) * torch.logspace(0, -1.5, k, dtype=F64)[:, None]
    x = torch.randn(n, k, generator=generator, dtype=F64) @ mix
    return x.to(dtype), torch.rand(n, generator=generator, dtype=F64).to(dtype) / 4


def explicit(x, w, damping):
    """F with an absolute λ, in float64, as the formula says."""
    x, w = x.double(), w.double()
    return torch.einsum("n,ni,nj->ij", w, x, x) + damping * torch.eye(x.shape[1], dtype=F64)


def close(got, F, x, dtype=F64):
    """Whether got is F⁻¹x up to the condition number times rounding."""
    truth = x.double() @ torch.linalg.inv(F).T
    slack = 4 * len(F) ** 0.5 * torch.linalg.cond(F) * torch.finfo(dtype).eps
    return bool((got.double() - truth).norm() <= slack * truth.norm())


SHAPES = st.tuples(st.integers(1, 40), st.integers(0, 50), st.integers(0, 2**20))


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.sampled_from([F64, F32]), st.sampled_from([0.01, 0.3, 20.0]), st.booleans())
def test_solve_is_the_explicit_inverse(shape, dtype, damping, relative):
    k, n, seed = shape
    x, w = pairs_of(n, k, seed, dtype)
    curvature = fk.Curvature(k, damping, relative and n > 0, dtype)
    curvature.update(x, w)
    plain = explicit(x, w, 0)
    absolute = damping * float(plain.trace()) / k if relative and n else damping
    assert curvature.damping == pytest.approx(absolute, rel=1e-5)
    F = explicit(x, w, absolute)
    assert (curvature.matrix.double() - F).norm() <= 10 * (n + 1) * torch.finfo(dtype).eps * F.norm()
    y = torch.randn(2, 3, k, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    got = curvature.solve(y)
    assert got.shape == y.shape
    assert got.dtype == dtype
    assert close(got, F, y, dtype)
    assert close(curvature.solve(x), F, x, dtype)  # vectors of the pairs themselves, where their span matters most


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.lists(st.integers(0, 50), max_size=4))
def test_blocks_and_their_order_matter_only_to_rounding(shape, cuts):
    k, n, seed = shape
    x, w = pairs_of(n, k, seed)
    y = torch.randn(k, generator=torch.Generator().manual_seed(seed), dtype=F64)
    whole, parts = fk.Curvature(k, 0.5, relative=False), fk.Curvature(k, 0.5, relative=False)
    whole.update(x, w)
    edges = [0, *sorted(min(cut, n) for cut in cuts), n]
    for start, end in reversed(list(itertools.pairwise(edges))):
        parts.update(x[start:end], w[start:end])
        parts.solve(y)  # a factor that the next block has to renew
    F = explicit(x, w, 0.5)
    assert parts.count == whole.count == n
    assert close(whole.solve(y), F, y)
    assert close(parts.solve(y), F, y)


@pytest.mark.parametrize("n", [3, 7, 30])  # vectors kept; kept, then folded into the matrix; the matrix throughout
def test_removed_pairs_might_never_have_been_there(n):
    (x, w), y = pairs_of(n + 4, 16, 5), torch.ones(16, dtype=F64)
    curvature = fk.Curvature(16)
    curvature.update(x, w)
    curvature.solve(y)
    curvature.remove(x[1:5], w[1:5])
    kept = torch.tensor([0, *range(5, n + 4)])
    F = explicit(x[kept], w[kept], curvature.damping)
    assert curvature.count == n
    assert close(curvature.solve(y), F, y)


def test_removing_what_is_not_there_is_refused():
    x, w = pairs_of(4, 16)
    curvature = fk.Curvature(16)
    curvature.update(x[:3], w[:3])
    before = curvature.matrix
    with pytest.raises(ValueError, match="pair 1 is not among the 3"):
        curvature.remove(x[[0, 3]], w[[0, 3]])
    with pytest.raises(ValueError, match="pair 1 is not among the 3"):
        curvature.remove(x[[0, 0]], w[[0, 0]])
    with pytest.raises(ValueError, match="4 pairs, of 3"):
        curvature.remove(x, w)
    assert torch.equal(curvature.matrix, before)
    folded = fk.Curvature(16)
    folded.update(*pairs_of(20, 16))
    folded.remove(100 * x, w)
    with pytest.raises(ValueError, match="removed that had not been added"):
        folded.solve(x)


def test_pairs_alike_and_pairs_of_nothing():
    x, w = pairs_of(2, 30)
    curvature = fk.Curvature(30)
    curvature.update(torch.cat([x, x, 0 * x]), torch.cat([w, w, w]))
    F = explicit(x, 2 * w, curvature.damping)
    assert close(curvature.solve(x), F, x)
    assert curvature.damping == pytest.approx(0.1 * 2 * float((w[:, None] * x.square()).sum()) / 30)


def test_without_pairs_an_absolute_damping_is_all_there_is():
    y = torch.randn(3, 5, dtype=F64)
    assert torch.equal(fk.Curvature(5, 0.25, relative=False).solve(y), 4 * y)
    with pytest.raises(ValueError, match="nothing but zeros yet"):
        fk.Curvature(5).solve(y)


def test_a_sound_default_bounds_the_condition_and_moves_with_the_pairs():
    x, w = pairs_of(9, 64)
    curvature = fk.Curvature(64)
    curvature.update(x, w)
    first = curvature.damping
    assert torch.linalg.cond(curvature.matrix) <= 1 + 10 * 64
    curvature.update(x, w)
    assert curvature.damping == pytest.approx(2 * first)


@pytest.mark.parametrize("n", [10, 60])
def test_too_little_damping_is_refused_and_the_least_that_does_is_named(n):
    x, w = pairs_of(n, 32, 3, F32)
    x[:, -4:] = 0  # directions that no pair determines
    greatest = float(torch.linalg.eigvalsh(explicit(x, w, 0))[-1])
    small = fk.Curvature(32, 1e-9 * greatest, relative=False, dtype=F32)
    small.update(x, w)
    with pytest.raises(ValueError, match=r"damping λ = .* is too small to solve in torch.float32") as refused:
        small.solve(x)
    least, ratio = (
        float(v) for v in re.search(r"about (\S+) at least, (\S+) of the mean", str(refused.value)).groups()
    )
    assert 0.3 < least / (100 * torch.finfo(F32).eps * greatest) < 1.1
    for damping, relative in ((1.1 * least, False), (1.1 * ratio, True)):
        enough = fk.Curvature(32, damping, relative, F32)
        enough.update(x, w)
        F = explicit(x, w, enough.damping)
        y = torch.ones(32)
        truth = torch.linalg.solve(F, y.double())
        assert (enough.solve(y).double() - truth).norm() <= 0.03 * truth.norm()


def test_no_damping_is_enough_where_the_pairs_determine_every_direction():
    x, w = pairs_of(80, 8)
    y = torch.randn(2, 8, dtype=F64)
    curvature = fk.Curvature(8, 0.0)
    curvature.update(x[:6], w[:6])
    with pytest.raises(ValueError, match="λ = 0 is too small"):
        curvature.solve(y)
    curvature.update(x[6:], w[6:])
    assert close(curvature.solve(y), explicit(x, w, 0), y)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fk.Curvature(0), ValueError, "dim=0"),
        (lambda: fk.Curvature(4, -1.0), ValueError, "damping=-1.0"),
        (lambda: fk.Curvature(4, float("nan")), ValueError, "damping=nan"),
        (lambda: fk.Curvature(4, dtype=torch.bfloat16), TypeError, "bfloat16"),
        (lambda: fk.Curvature(4).update(torch.ones(2, 3), torch.ones(2)), ValueError, r"\(n, 4\), got \(2, 3\)"),
        (
            lambda: fk.Curvature(4).update(torch.ones(2, 4), torch.ones(3)),
            ValueError,
            r"\(2,\), one a pair",
        ),
        (lambda: fk.Curvature(4).update(torch.ones(2, 4), -torch.ones(2)), ValueError, "none below 0, got -1"),
        (lambda: fk.Curvature(4).update(torch.ones(2, 4).int(), torch.ones(2)), TypeError, "int32"),
        (lambda: fk.Curvature(4).update(torch.full((1, 4), torch.nan), torch.ones(1)), ValueError, "not finite"),
        (lambda: fk.Curvature(4).update(torch.ones(2, 4, device="meta"), torch.ones(2)), ValueError, "wanted on cpu"),
        (lambda: fk.Curvature(4).solve(torch.ones(3)), ValueError, r"\(…, 4\), got \(3,\)"),
        (lambda: fk.logistic_weights(torch.ones(3).int()), TypeError, "int32"),
        (
            lambda: fk.exact_steering(fk.Curvature(4), torch.ones(3), torch.ones(2, 4), torch.ones(2)),
            ValueError,
            r"mean_gradient: wanted \(4,\)",
        ),
        (
            lambda: fk.exact_steering(fk.Curvature(4), torch.ones(4), torch.ones(2, 3), torch.ones(2)),
            ValueError,
            r"features: wanted \(n, 4\)",
        ),
        (
            lambda: fk.exact_steering(fk.Curvature(4), torch.ones(4), torch.ones(2, 4), torch.ones(1)),
            ValueError,
            r"overconfidence: wanted \(2,\)",
        ),
    ],
)
def test_wrong_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_caller_s_modes_leave_no_mark():
    x, w = pairs_of(20, 8)
    curvature = fk.Curvature(8, 0.5, relative=False)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        curvature.update(x[:15], w[:15])
        curvature.solve(x)
    curvature.update(x[15:].requires_grad_(), w[15:])
    got = curvature.solve(x)
    assert not got.requires_grad
    assert close(got, explicit(x.detach(), w, 0.5), x.detach())
    single = fk.Curvature(8, 0.5, relative=False, dtype=F32)
    with torch.autocast("cpu", torch.bfloat16):
        single.update(x, w)
        got = single.solve(x)
    assert close(got, explicit(x.detach(), w, 0.5), x.detach(), F32)


def test_vectors_of_any_dtype_come_in():
    x, w = pairs_of(12, 8, dtype=torch.bfloat16)
    curvature = fk.Curvature(8, 0.5, relative=False)
    curvature.update(x, w)
    got = curvature.solve(x)
    assert got.dtype == F64
    assert close(got, explicit(x, w, 0.5), x)


def test_logistic_weights_are_the_loss_s_second_derivative():
    margin = torch.linspace(-20, 20, 41, dtype=F64, requires_grad=True)
    for label in (0.0, 0.3, 1.0):
        loss = bce(margin, torch.full_like(margin, label), reduction="sum")
        (slope,) = torch.autograd.grad(loss, margin, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), margin)
        assert torch.allclose(fk.logistic_weights(margin.detach()), second, rtol=1e-6, atol=0)
    far = torch.tensor([-60.0, 60.0], dtype=F32)  # σ(60) is 1 in fp32, and 1 − σ(60) nothing
    assert torch.allclose(fk.logistic_weights(far).double(), torch.tensor([-60.0], dtype=F64).exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [5, 40])
def test_exact_steering_is_its_formula(n):
    (x, w), (u, c) = pairs_of(n, 16, 1), pairs_of(7, 16, 2)
    mean = torch.randn(16, dtype=F64)
    curvature = fk.Curvature(16)
    curvature.update(x, w)
    inverse = torch.linalg.inv(explicit(x, w, curvature.damping))
    truth = torch.stack([(c[i] - 0.1) * mean @ inverse @ u[i] for i in range(7)])
    got = fk.exact_steering(curvature, mean.float().double(), u, c - 0.1)
    assert torch.allclose(got, truth, rtol=1e-5, atol=1e-6 * float(truth.norm()))
    assert fk.exact_steering(curvature, mean, u[:0], c[:0]).shape == (0,)


class Head:
    """r(z) = w·h(z) + b over hidden states of a Llama, fitted to soft labels with a ridge on the weight."""

    def __init__(self, pairs, ridge):
        generator = torch.Generator().manual_seed(11)
        model, batch = tiny_llama(7), batch_of([9] * (2 * pairs), seed=8)
        with torch.no_grad():
            h = model.model(**batch).last_hidden_state[:, -1]
        self.z, self.ref = h[:pairs], h[pairs:]
        taste = torch.randn(h.shape[1], generator=generator, dtype=F64) / 3
        noise = torch.randn(pairs, generator=generator, dtype=F64)
        self.label = torch.sigmoid((self.z - self.ref) @ taste + noise)
        self.ridge = ridge

    def margins(self, phi):
        """Δ of every pair, from rewards of which each has the bias."""
        w, b = phi[:-1], phi[-1]
        return (self.z @ w + b) - (self.ref @ w + b)

    def optimum(self, counted):
        """The minimiser of Σ counted·BCE + ridge/2‖w‖² by Newton's method, all derivatives by autograd."""

        def loss(phi):
            each = bce(self.margins(phi), self.label, reduction="none")
            return counted @ each + self.ridge / 2 * phi[:-1] @ phi[:-1] + phi[-1] ** 2  # b is free: held at 0

        phi = self.z.new_zeros(self.z.shape[1] + 1)
        for _ in range(12):
            slope = torch.func.grad(loss)(phi)
            if slope.norm() <= 1e-12:
                return phi
            phi = phi - torch.linalg.solve(torch.func.hessian(loss)(phi), slope)
        raise AssertionError("no optimum in 12 steps")


@pytest.mark.parametrize("ridge", [0.3, 3.0])
def test_exact_steering_foretells_what_retraining_does_to_the_mean_reward(ridge):
    head = Head(pairs=110, ridge=ridge)
    counted = torch.ones(110, dtype=F64)
    counted[90:] = 0  # the policy's new candidates, not trained on yet
    judged, candidates = torch.arange(70, 110), head.z[90:]
    phi = head.optimum(counted)

    def mean_reward(phi):
        return float((candidates @ phi[:-1] + phi[-1]).mean())

    u, margin = head.z - head.ref, head.margins(phi)
    curvature = fk.Curvature(u.shape[1], ridge, relative=False)
    curvature.update(u[:90], fk.logistic_weights(margin[:90]))
    overconfidence = (torch.sigmoid(margin) - head.label)[judged]
    exact = fk.exact_steering(curvature, candidates.mean(0), u[judged], overconfidence)
    errors = []
    for epsilon in (1e-2, 1e-3):
        changes = []
        for j in judged:
            more = counted.clone()
            more[j] += epsilon
            changes.append(mean_reward(head.optimum(more)) - mean_reward(phi))
        measured = torch.tensor(changes, dtype=F64)
        foretold = -epsilon * exact
        assert float(torch.corrcoef(torch.stack([foretold, measured]))[0, 1]) >= 0.99
        errors.append(float((foretold - measured).norm() / measured.norm()))
    assert errors[1] <= 0.05
    assert 0.05 < errors[1] / errors[0] < 0.2, "the error is of first order in ε: a tenth of it at a tenth of ε"
