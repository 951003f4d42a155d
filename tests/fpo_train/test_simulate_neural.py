"""The neural environment against a plain loop of autograd, the published figures, and itself played together."""

import re

import numpy as np
import pytest
import torch

from fpo_train.simulate import mlp, neural

SHORT = neural.NeuralSettings(iterations=20)
PUBLISHED = ("none", "relaxed", "practical")


def score(y):
    target = torch.tensor([2.5] * 2 + [0.0] * 8)
    return 10 * torch.exp(-0.2 * ((y - target) ** 2).sum(-1))


def plain(penalty, seed, iterations):
    """θ after every iteration, by the published script's order of random numbers: one global stream a seed."""
    paths = {}
    torch.manual_seed(seed)
    for kind in ("none", penalty):  # the baseline draws first
        net = torch.nn.Sequential(
            torch.nn.Linear(10, 32), torch.nn.Softplus(), torch.nn.Linear(32, 32), torch.nn.Softplus(),
            torch.nn.Linear(32, 1),
        )  # fmt: skip
        for layer in net[::2]:
            torch.nn.init.normal_(layer.weight, 0, 0.1)
            torch.nn.init.normal_(layer.bias, 0, 0)
        adam = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-3)
        theta, points, path = torch.zeros(10), torch.zeros(0, 10), [torch.zeros(10)]
        for t in range(iterations):
            left = 1 - (t / iterations) ** 4
            sigma, rate = 0.001 + 0.099 * left, 0.001 + 0.049 * left
            for _ in range(15):
                y = (theta + sigma * torch.randn(10)).requires_grad_(True)
                reward = net(y)[0]
                objective = reward - 0.01 * (y @ y)
                if kind != "none":
                    parts = torch.autograd.grad(reward, list(net.parameters()), create_graph=True)
                    bracket = reward - score(y).detach() if kind == "relaxed" else 1.0
                    objective = objective - 0.005 * bracket * sum(part.square().sum() for part in parts)
                (gradient,) = torch.autograd.grad(objective, y)
                theta = theta + rate * gradient.clamp(-1, 1)
            points = torch.cat([points, theta + sigma * torch.randn(5, 10)])[-50:]
            adam.zero_grad()
            (net(points)[:, 0] - score(points)).square().mean().backward()
            adam.step()
            path.append(theta)
        paths[kind] = torch.stack(path)
        if penalty == "none":
            break
    return paths[penalty].double().numpy()


@pytest.mark.parametrize("penalty", PUBLISHED)
def test_a_plain_loop_of_autograd(penalty):
    settings = neural.NeuralSettings(iterations=20, kept=1)
    (run,) = neural.simulate([(penalty, 3)], settings)
    np.testing.assert_allclose(run.path, plain(penalty, 3, 20), rtol=1e-3, atol=2e-4)
    assert run.utility[-1] == pytest.approx(float(score(torch.from_numpy(run.path[-1]))))


def test_rows_together_are_rows_alone():
    rows = [(penalty, seed) for penalty in neural.PENALTIES for seed in (0, 1)]
    together = neural.simulate(rows, SHORT)
    for row, run in zip(rows, together, strict=True):
        (alone,) = neural.simulate([row], SHORT)
        np.testing.assert_allclose(run.path, alone.path, rtol=1e-2, atol=1e-3)
        assert run.oracle_calls == alone.oracle_calls
    calls = {row: run.oracle_calls for row, run in zip(rows, together, strict=True)}
    assert calls["none", 0] == calls["practical", 0] == calls["residual", 0] == 20 * 5
    assert calls["relaxed", 0] == calls["tracin", 0] == 20 * 20
    assert calls["exact", 0] == 20 * 20 - 15  # nothing is labelled in the first iteration


@pytest.fixture
def network():
    generator = torch.Generator().manual_seed(0)
    weights = [w.double() for w in mlp.draw(4, 6, 0.5, generator)]
    return weights, torch.randn(1, 5, 4, generator=generator).double()


def formed(weights, points):
    """∇r of each point by autograd, (n, P), and r."""
    leaves = [w.clone().requires_grad_(True) for w in weights]
    rewards = mlp.reward(leaves, points)[0]
    rows = [torch.autograd.grad(r, leaves, retain_graph=True) for r in rewards]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]), rewards.detach()


def test_closed_forms_are_those_of_autograd(network):
    weights, points = network
    gradients, rewards = formed(weights, points)
    passed = mlp.forward(weights, points)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(passed.reward[0], rewards, **close)
    torch.testing.assert_close(passed.square()[0], gradients.square().sum(1), **close)
    torch.testing.assert_close(passed.with_all(passed)[0], gradients @ gradients.T, **close)
    torch.testing.assert_close(passed.gradients()[0], gradients, **close)
    direction = torch.randn(1, gradients.shape[1], dtype=torch.float64)
    torch.testing.assert_close(mlp.along(weights, direction, points)[0], gradients @ direction[0], **close)


def test_exact_takes_the_curvature_s_inverse():
    game = neural.Game([("exact", 0)], SHORT)
    for iteration in range(3):
        game.iterate(iteration)
    G = mlp.forward(game.weights, game._points).gradients()[0].double()
    g = mlp.forward(game.weights, game.theta[:, None]).gradients()[0, 0].double()
    curvature = G.T @ G / len(G) + SHORT.exact_ridge * torch.eye(G.shape[1], dtype=torch.float64)
    truth = torch.linalg.solve(curvature, g)
    assert (game._preconditioned()[0] - truth).norm() <= 1e-5 * truth.norm()


def test_exact_climbs_the_oracle_s_utility():
    """Where one point is all that is labelled and the ridge is small, what r promises is taken back: U is left."""
    settings = neural.NeuralSettings(iterations=20, exact_ridge=1e-6)
    game = neural.Game([("exact", 0)], settings)
    game.iterate(0)
    game._points, game._utility = game.theta[:, None], score(game.theta)[:, None]
    action = game.theta.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(game._objective(action, game._hold()).sum(), action)
    (slope,) = torch.autograd.grad((score(action) - 0.01 * action.square().sum(-1)).sum(), action)
    # c · ∂⟨ḡ, H⁻¹u⟩/∂y: how r's gradient turns along the action
    turn = gradient - slope
    over = (mlp.reward(game.weights, action[:, None])[0] - score(action)).detach()
    ahead = [action.detach() + sign * 1e-2 * torch.eye(10) for sign in (1, -1)]
    held = game._hold()["exact"][0]
    up, down = (mlp.along(game.weights, held, at[None])[0] for at in ahead)
    torch.testing.assert_close(turn[0], -over * (up - down) / 2e-2, rtol=0.05, atol=0.02)
    assert float((gradient * slope).sum()) > 0


@pytest.mark.parametrize("features", ["action", "gradient"])
def test_residual_foretells_the_reward_model_s_errors(features):
    """At the labelled points themselves ĉ is close to r − U, and it is differentiable."""
    settings = neural.NeuralSettings(iterations=20, features=features)
    game = neural.Game([("residual", 0)], settings)
    for iteration in range(12):
        game.iterate(iteration)
    held = game._foretell()
    own = game._points[0, -1:].clone().requires_grad_(True)
    expected = game._expected(mlp.forward(game.weights, own[:, None]), *held)
    errors = mlp.reward(game.weights, game._points)[0] - game._utility[0]
    assert abs(float(expected.detach()) - float(errors[-1])) <= 0.3 * float(errors.std()) + 0.05 * float(
        errors.abs().mean()
    )
    (slope,) = torch.autograd.grad(expected.sum(), own)
    assert slope.isfinite().all()
    assert slope.norm() > 0


def test_wrong_penalties_and_settings(tmp_path):
    with pytest.raises(ValueError, match="got 'brave'"):
        neural.run(["brave"], [0], tmp_path / "out")
    with pytest.raises(ValueError, match="must not be empty"):
        neural.run([], [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="iterations must be a multiple of kept=10; got 15"):
        neural.NeuralSettings(iterations=15)


def test_runs_by_turns_are_counted(tmp_path, capfd):
    neural.run(["none", "practical"], [0], tmp_path / "out", SHORT)
    said = capfd.readouterr()
    lines = [re.sub(r"^\d\d:\d\d:\d\d  |, \d+ s left", "", line) for line in said.err.splitlines()]
    assert [line for line in lines if "done" in line] == [
        "neural: 20 of 40 iterations (none, seed 0: done)",
        "neural: 40 of 40 iterations (practical, seed 0: done)",
    ]
    assert said.out == ""


def test_what_a_run_leaves(tmp_path):
    summary = neural.run(["none", "residual"], [0, 1], tmp_path / "out", SHORT, vectorised=True)
    assert list(summary["neural"]["residual"]["1"]) == ["signal", "noise", "utility", "best_utility", "oracle_calls"]
    rows = (tmp_path / "out" / "curves.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 * 3  # iterations 0, 10 and 20
    assert [row.split(",")[3] for row in rows[1:4]] == ["0", "10", "20"]
    for name in ("phase", "utility", "pca"):
        assert (tmp_path / "out" / "figures" / f"{name}.pdf").stat().st_size > 1000
