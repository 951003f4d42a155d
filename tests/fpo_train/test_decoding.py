"""Decoding in place and by groups of heads against transformers' own cache and attention."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fpo_train.config import RolloutConfig
from fpo_train.policy import decoding, prefix
from fpo_train.policy.decoding import GROUPED, Roomy, attend, cache_name, group_heads
from fpo_train.policy.generation import Greedy, generate
from fpo_train.rollout import TransformersSampler
from tests.fpo_train import recording


class Module(torch.nn.Module):
    num_key_value_groups = 3
    is_causal = True


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_attention_is_transformers_own(tokens, masked, groups):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 2 * groups, tokens, 8, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(5, 2, 7, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    module = Module()
    module.num_key_value_groups = groups
    mask = torch.rand(5, 1, tokens, 7, generator=generator) > 0.3 if masked else None
    if mask is not None:
        mask[..., 0] = True
    truth, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    got, nothing = attend(module, query, key, value, mask, scaling=0.3)
    assert nothing is None
    assert got.shape == truth.shape
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)


def test_a_cache_with_room_is_written_in_place_and_grows_beyond_it():
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    layer, plain = Roomy(keys, values, 6), DynamicCache()
    plain.update(keys, values, 0)
    place = layer.keys.data_ptr()
    for step in range(4):
        new = torch.randn(2, 2, 3, 1, 5, generator=generator)
        got = layer.update(*new)
        truth = plain.update(*new, 0)
        assert all(torch.equal(a, b) for a, b in zip(got, truth, strict=True))
        assert layer.get_seq_length() == 5 + step
        assert (layer.keys.data_ptr() == place) == (step < 2)


def test_a_model_of_grouped_heads_says_the_same(policy):
    """Token by token, with padding on the left, against the whole sequence at once by transformers' attention."""
    lm = policy.lm
    assert lm.config._attn_implementation == GROUPED
    ids = torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache()
    said = []
    with torch.no_grad():
        for t in range(9):
            out = lm(
                input_ids=ids[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                position_ids=positions[:, t : t + 1],
                **{cache_name(lm): cache},
            )
            said.append(out.logits)
        other = copy.deepcopy(lm)
        other.set_attn_implementation("eager")
        truth = other(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(said, 1)[seen], truth[seen], rtol=1e-4, atol=1e-4)
    group_heads(other)
    assert other.config._attn_implementation == "eager"  # what was chosen stays


class Drawn(Greedy):
    """Another token in every row."""

    def __init__(self, noise):
        super().__init__("")
        self.noise = noise

    def __call__(self, step, rows, logits):
        return super().__call__(step, rows, logits + 3 * self.noise[rows, step])


def asked(policy, prompts, least):
    """What is asked of both ways of generating, with rows that end at different times; a fresh cache of the prompts."""
    told = prefix.read(policy, prompts.batch(0, 4))
    rows = torch.tensor([0, 0, 1, 2, 2, 3])
    ids, mask, width = told.ids[rows], told.mask[rows], told.ids.shape[1]
    choose = Drawn(torch.randn(6, 24, policy.lm.vocab_size, generator=torch.Generator().manual_seed(3)))
    words = {"pad": policy.eos, "most": 24, "least": least}
    plain = generate(policy.lm, ids, mask, choose, ends=(), **words)[:, width:]
    words["ends"] = tuple({int(plain[0, 4]), int(plain[2, 7]), int(plain[3, 9])})
    return (policy.lm, ids, mask, choose), words, prefix.cache([(told, rows)], width - 1, 24)


@pytest.mark.parametrize("fewer", [1, 8, 10**9])
@pytest.mark.parametrize("least", [0, 3])
def test_rows_that_end_are_dropped_and_the_others_say_the_same(policy, prompts, monkeypatch, fewer, least):
    """Against transformers' own loop, which keeps every row to the end."""
    monkeypatch.setattr(decoding, "FEWER", fewer)
    what, words, known = asked(policy, prompts, least)
    kept = []
    got = generate(*what, **words, known=known, kept=kept.append)
    assert torch.equal(got, generate(*what, **words))
    assert bool(kept) == (fewer > 1)
    said = got[:, what[1].shape[1] :]
    assert not torch.isin(said[:, :least], torch.tensor(words["ends"])).any()


@pytest.mark.parametrize("fewer", [1, 2, 10**9])
@pytest.mark.parametrize("least", [0, 3])
def test_a_recorded_step_says_the_same(policy, prompts, monkeypatch, fewer, least):
    """A step acts on the same tensors whichever token it is of; one that did not would replay another's."""
    monkeypatch.setattr(decoding, "FEWER_RECORDED", fewer)
    monkeypatch.setattr(decoding, "LOOK", 3)
    what, words, known = asked(policy, prompts, least)
    truth = generate(*what, **words)
    recording.act(monkeypatch, decoding)
    kept = []
    got = generate(*what, **words, known=known, kept=kept.append)
    width = what[1].shape[1]
    said = truth.shape[1] - width
    assert torch.equal(got[:, : truth.shape[1]], truth)
    assert (got[:, truth.shape[1] :] == policy.eos).all()  # up to the next look
    assert len(kept) >= (fewer > 1)
    assert recording.CUDAGraph.made == 1 + len(kept)
    assert recording.CUDAGraph.replays >= said - 1 - len(kept)


def test_a_rollout_of_recorded_steps_is_the_same(policy, prompts, monkeypatch):
    """Candidates with the adapter, the reference without, drawn from the rows' streams; some rows are dropped."""
    policy.ends = tuple(range(8))
    sampler = TransformersSampler(policy, RolloutConfig(prompts=3, candidates=3, max_new_tokens=60), seed=1)
    truth = sampler(prompts.batch(0, 3), 1, 0).replies
    assert len({len(reply) for reply in truth}) > 3
    monkeypatch.setattr(decoding, "LOOK", 2)
    recording.act(monkeypatch, decoding)
    assert sampler(prompts.batch(0, 3), 1, 0).replies == truth
    assert recording.CUDAGraph.made > 1
    assert recording.CUDAGraph.replays > 10


def test_a_step_that_cannot_be_recorded_is_launched(policy, prompts, monkeypatch, capsys):
    what, words, known = asked(policy, prompts, 0)
    truth = generate(*what, **words)
    recording.act(monkeypatch, decoding)
    whole = Drawn.__call__
    monkeypatch.setattr(Drawn, "__call__", lambda self, step, *more: whole(self, int(step), *more))
    got = generate(*what, **words, known=known)
    assert torch.equal(got[:, : truth.shape[1]], truth)
    assert "could not be recorded and is launched anew each time" in capsys.readouterr().err
    assert recording.CUDAGraph.replays == 0
