"""Units, statistics and what cannot be judged: penalties on plain numbers, through a reward model that is a table."""

from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fpo_train.config import PenaltyConfig
from fpo_train.errors import RunError
from fpo_train.penalty.base import Penalty, within
from fpo_train.penalty.gradients import mean_of
from fpo_train.penalty.residual import expected_overconfidence
from fpo_train.processes import Processes
from fpo_train.reward_model import Reading, State
from fpo_train.reward_model.replay import Replay

N = 4


class Table:
    """A reward model of a head on given features."""

    def __init__(self, features, weight):
        self.reading = Reading(None, features)
        self.weight = weight
        self.history = deque([State(0.1, {"w": weight})])
        self.asked = []

    def names(self, parameters):
        return ["w"]

    def score(self, reading, rows_at_once=0, dropout=False):
        self.asked.append(dropout)
        return reading.features @ self.weight

    def checked(self, reward):
        return reward

    @contextmanager
    def at(self, state):
        self.weight, now = state.weights["w"], self.weight
        yield
        self.weight = now


class Half(Processes):
    """One of two processes; totals are told by the other's numbers, which it is given beforehand."""

    def __init__(self, others):
        super().__init__()
        self.others = others
        self.asked = []

    def total(self, tensor):
        self.asked.append(tensor)
        return tensor + self.others.pop(0) if self.others else tensor


def rollout(prompts, usable=None):
    first = torch.arange(prompts)[:, None] * (N + 1)
    rows = first + torch.arange(N)
    pairs = rows.flatten(), (first + N).expand(prompts, N).flatten()
    usable = torch.ones(prompts, N, dtype=torch.bool) if usable is None else usable
    return SimpleNamespace(usable=usable, pairs=lambda: pairs)


def ask(penalty, prompts=3, seed=0, usable=None, preference=None, features=None, calls=None):
    torch.manual_seed(seed)
    drawn = torch.randn(prompts * (N + 1), 6)
    model = Table(drawn if features is None else features, torch.randn(6))
    preference = torch.rand(prompts, N) if preference is None else preference

    def preferences(wanted):
        if calls is not None:
            calls.append(wanted)
        return preference.masked_fill(~wanted, torch.nan)

    labels = SimpleNamespace(preferences=preferences)
    return penalty(model, model.reading, labels, Replay(4), rollout(prompts, usable)), model


def make(kind, processes=None, dropout=False, **settings):
    return Penalty(PenaltyConfig(kind=kind, **settings), processes or Processes(), 0, dropout)


@pytest.mark.parametrize("kind", ["none", "practical", "relaxed", "tracin", "exact", "residual"])
def test_who_asks_the_oracle(kind):
    calls = []
    judged, model = ask(make(kind), calls=calls)
    assert len(calls) == (kind in ("relaxed", "tracin", "exact")) == PenaltyConfig(kind=kind).labels_all
    assert judged.effective.isfinite().all()
    assert judged.mean_product is not None  # over a head it costs nothing
    if kind in ("none", "exact", "residual"):  # no pair is labelled yet
        assert not judged.penalty.any()
        assert torch.equal(judged.effective, judged.reward)
    assert model.asked == [False]


def test_dropout_is_for_plain_rlhf_alone():
    assert ask(make("none", dropout=True))[1].asked == [True]
    assert ask(make("practical", dropout=True))[1].asked == [False]


def test_gamma_in_units_of_the_reward_s_spread_within_prompts():
    penalty = make("practical", gamma=3.0)
    judged, _ = ask(penalty)
    spread = [(values - values.mean(1, keepdim=True)).square().mean() for values in (judged.reward, judged.penalty)]
    assert spread[1] == pytest.approx(float(spread[0]), rel=1e-5)
    assert torch.allclose(judged.effective, judged.reward - 3 * judged.penalty)
    raw, _ = ask(make("practical", gamma_units="raw"))
    own = [(values - values.mean(1, keepdim=True)).square().sum() ** 0.5 for values in (raw.reward, raw.penalty)]
    assert raw.spread == judged.spread == pytest.approx(float(own[1] / own[0]), rel=1e-5)
    follow = [ask(penalty, seed=s)[0].penalty for s in range(1, 4)]
    again = make("practical", gamma=3.0)
    ask(again)
    other = make("practical", gamma=3.0)
    other.restore(again.state())
    for seed, expected in enumerate(follow, start=1):
        assert torch.equal(ask(other, seed=seed)[0].penalty, expected)
    assert not torch.allclose(follow[0], ask(make("practical"), seed=1)[0].penalty)  # the past counts


def test_a_prompt_s_own_level_does_not_count():
    torch.manual_seed(0)
    values, judged = torch.randn(3, N), torch.rand(3, N) > 0.3
    shifted = within(values + torch.tensor([[0.0], [50.0], [-7.0]]), judged)
    assert torch.allclose(shifted, within(values, judged), atol=1e-5)
    assert not shifted[~judged].any()


@pytest.mark.parametrize("kind", ["practical", "relaxed", "tracin"])
def test_what_cannot_be_judged_is_not_chosen_and_not_counted(kind):
    usable = torch.ones(3, N, dtype=torch.bool)
    usable[0, 1] = False
    torch.manual_seed(0)
    features = torch.randn(15, 6)
    features[5 + 2] = torch.nan  # candidate 2 of prompt 1 has no score
    features[10 + N] = torch.nan  # prompt 2's reference has none
    preference = torch.rand(3, N)
    preference[1, 0] = torch.nan  # a label that could not be had
    judged, _ = ask(make(kind), usable=usable, preference=preference, features=features)
    lost = torch.zeros(3, N, dtype=torch.bool)
    lost[0, 1] = lost[1, 2] = True
    lost[2] = True
    lost[1, 0] = kind != "practical"
    assert torch.equal(judged.effective.isneginf(), lost)
    assert judged.effective[~lost].isfinite().all()
    features[1] = 1e3  # what is not usable does not matter to the others
    other, _ = ask(make(kind), usable=usable, preference=preference, features=features)
    assert torch.equal(other.effective[~lost], judged.effective[~lost])
    assert other.spread == judged.spread


def test_statistics_are_over_all_processes():
    whole, _ = ask(make("tracin", gamma_units="reward_std"), prompts=4)
    torch.manual_seed(0)
    features, weight = torch.randn(20, 6), torch.randn(6)
    preference = torch.rand(4, N)

    def part(first, others):
        model = Table(features[first * 5 : (first + 2) * 5], weight)
        labels = SimpleNamespace(preferences=lambda wanted: preference[first : first + 2])
        penalty = make("tracin", Half(others))
        return penalty(model, model.reading, labels, Replay(4), rollout(2)), penalty._processes

    _, probe = part(2, [])
    sums = probe.asked[:2]  # of the gradients and of their number
    _, probe = part(2, part(0, [])[1].asked[:2])
    left, _ = part(0, [*sums, probe.asked[2]])
    assert torch.allclose(left.penalty, whole.penalty[:2], rtol=1e-4)
    assert left.spread == pytest.approx(whole.spread, rel=1e-4)


def test_means_over_nothing():
    assert torch.equal(mean_of(torch.zeros(0, 3), Processes()), torch.zeros(3, dtype=torch.float64))


def test_earlier_states_weigh_their_learning_rates():
    torch.manual_seed(0)
    model = Table(torch.randn(15, 6), torch.randn(6))
    model.history = deque([State(0.5, {"w": torch.randn(6)}), State(2.0, {"w": model.weight})])
    preference = torch.rand(3, N)
    labels = SimpleNamespace(preferences=lambda wanted: preference)
    both = make("relaxed", gamma_units="raw", checkpoints=2)(model, model.reading, labels, Replay(4), rollout(3))
    expected = torch.zeros(3, N)
    for state in model.history:
        with model.at(state):
            one = make("relaxed", gamma_units="raw")(model, model.reading, labels, Replay(4), rollout(3))
        expected += state.learning_rate * one.penalty
    assert torch.allclose(both.penalty, expected, rtol=1e-5)
    assert torch.equal(both.reward, (model.reading.features @ model.weight).view(3, 5)[:, :N])


def test_unknown_weights(policy):
    from fpo_train.config import RunConfig
    from fpo_train.reward_model import load_reward_model

    model = load_reward_model(RunConfig(), policy, Processes(), policy.device)
    for parameters, message in (("lora", "has no lora weights"), ("head,nothing.*", "'head' names no weight")):
        with pytest.raises(RunError, match=message):
            model.names(parameters)
    assert model.names("score.*, body.norm.weight") == ["body.norm.weight", "score.weight"]
    assert not any("lora" in name for name in model.names("all"))


def test_overconfidence_is_foretold_where_it_is_smooth():
    torch.manual_seed(0)
    known = torch.rand(40, 1) * 6
    residuals = torch.sin(known[:, 0]) / 2
    new = torch.linspace(0.5, 5.5, 21)[:, None]
    lengths, noises = (0.25, 0.5, 1.0, 2.0), (1e-4, 1e-3, 1e-2, 1e-1)
    found = expected_overconfidence(new, known, residuals, lengths, noises)
    assert (found.overconfidence - torch.sin(new[:, 0]) / 2).abs().max() < 0.01
    assert found.length in lengths
    assert found.noise == 1e-4
    far = expected_overconfidence(torch.full((1, 1), 1e4), known, residuals, lengths, noises)
    assert far.overconfidence.abs().max() < 1e-12
    noisy = expected_overconfidence(new, known, torch.randn(40), lengths, noises)
    assert noisy.noise == 0.1


def test_too_little_is_known():
    one = expected_overconfidence(torch.ones(2, 3), torch.ones(1, 3), torch.tensor([0.5]), (1.0,), (0.1,))
    assert one.overconfidence.tolist() == pytest.approx([0.5 / 1.1] * 2)
    alike = expected_overconfidence(torch.ones(2, 3), torch.ones(4, 3), torch.full((4,), 0.5), (1.0,), (0.1,))
    assert alike.overconfidence.tolist() == pytest.approx([2.0 / 4.1] * 2)
    assert not expected_overconfidence(
        torch.ones(2, 3), torch.rand(4, 3), torch.zeros(4), (1.0,), (0.1,)
    ).overconfidence.any()


def test_iterations_without_a_penalty_do_not_count():
    torch.manual_seed(0)
    reward, raw, judged = torch.randn(3, N), torch.randn(3, N), torch.ones(3, N, dtype=torch.bool)
    penalty, fresh = make("residual"), make("residual")
    assert penalty._scale(None, reward, torch.zeros(3, N), judged) == (0.0, 0.0)
    assert penalty._scale(None, reward, raw, judged) == fresh._scale(None, reward, raw, judged)
    assert penalty._scale(None, reward, torch.zeros(3, N), judged)[1] == fresh._scale(None, reward, raw, judged)[1]


def test_without_a_score_of_the_reference_nothing_can_be_judged():
    torch.manual_seed(0)
    features = torch.randn(15, 6)
    features[N] = torch.nan
    judged, _ = ask(make("none"), features=features)
    assert judged.effective.isneginf().all(1).tolist() == [True, False, False]
