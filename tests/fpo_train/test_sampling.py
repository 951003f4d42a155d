"""Sampling by streams of their own: the distribution is transformers', the draw is the stream's."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fpo_train.config import RolloutConfig
from fpo_train.rollout.sampling import RowSampler, kept, uniforms


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.8, 50, 0.9), (1.0, 5, 0.5), (2.0, 100, 1.0), (0.3, 7, 0.01)]
)
def test_the_kept_set_is_transformers(temperature, top_k, top_p):
    torch.manual_seed(top_k)
    scores = 3 * torch.randn(20, 60)
    warped = TemperatureLogitsWarper(temperature)(None, scores)
    warped = (
        TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, warped))
        if top_p < 1
        else TopKLogitsWarper(min(top_k, 60))(None, warped)
    )
    settings = RolloutConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    probability, tokens = kept(scores, settings)
    ours = torch.zeros(20, 60, dtype=torch.float64).scatter(1, tokens, probability / probability.sum(1, keepdim=True))
    assert torch.allclose(ours, warped.double().softmax(-1), atol=1e-6)


def test_draws_follow_the_distribution():
    torch.manual_seed(1)
    scores, settings, count = torch.randn(1, 12), RolloutConfig(temperature=0.7, top_k=8, top_p=0.95), 20_000
    probability, tokens = kept(scores, settings)
    draws = uniforms(0, 0, [(0, n) for n in range(count)], 1)
    out = RowSampler(settings, draws)(0, torch.arange(count), scores.expand(count, -1))
    seen = torch.bincount(out, minlength=12).double()
    expected = torch.zeros(12, dtype=torch.float64).scatter(0, tokens[0], probability[0] / probability.sum())
    assert (seen[expected == 0] == 0).all()
    chosen = expected > 0
    chi = ((seen - count * expected)[chosen].square() / (count * expected[chosen])).sum()
    assert chi < 27.9  # the 0.1 % point of χ² with 9 degrees of freedom, more than there are
    assert chosen.sum() < 10


def test_streams_belong_to_their_place():
    one = uniforms(5, 7, [(0, 1), (3, 2)], 6)
    assert one.shape == (2, 6)
    assert torch.equal(uniforms(5, 7, [(3, 2)], 9)[0, :6], one[1])
    others = [(6, 7, 3, 2), (5, 8, 3, 2), (5, 7, 2, 3), (5, 7, 2, 2), (5, 7, 3, 1), (7, 5, 3, 2)]
    assert len({float(uniforms(seed, place, [(b, n)], 1)) for seed, place, b, n in others} | {float(one[1, 0])}) == 7


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval(u):
    scores = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]])
    settings = RolloutConfig(temperature=1.0, top_k=50, top_p=1.0)
    out = RowSampler(settings, torch.tensor([[u]], dtype=torch.float64))(0, torch.arange(1), scores)
    assert int(out) == (1 if u == 0 else 0)
