"""Oracles against hand-written sums on a tiny Llama, and the labels bought from them."""

import math

import pytest
import torch

from fpo_train.config import OracleConfig, PolicyConfig, RunConfig, UpdateConfig
from fpo_train.errors import RunError
from fpo_train.oracle import BaseOracle, Labels, Oracle
from fpo_train.policy import load_policy
from fpo_train.processes import Processes
from fpo_train.rollout import Readings, Rollout

LENGTHS = ((3, 7, 1, 5), (6, 2, 4, 4))  # tokens of the replies to each prompt, the reference last
CLOSED = {0, 1, 4, 7}  # rows whose reply ends with its own EOS


@pytest.fixture
def rollout(policy, prompts):
    """Two prompts, three candidates and a reference each, of several lengths."""
    generator = torch.Generator().manual_seed(3)
    replies = []
    for row, length in enumerate(length for lengths in LENGTHS for length in lengths):
        reply = torch.randint(3, 300, (length,), generator=generator).tolist()
        replies.append([*reply[:-1], policy.eos] if row in CLOSED else reply)
    return spoken(policy, prompts.batch(0, 2), replies, candidates=3)


def spoken(policy, prompts, replies, candidates):
    return Rollout.of(policy, prompts, replies, candidates)


@pytest.fixture
def base64(tiny):
    """The base by itself in float64."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float64).eval()


def log_likelihoods(model, prompt, reply):
    """log p of each token of the reply, one at a time, in float64."""
    terms = []
    with torch.no_grad():
        for n, token in enumerate(reply):
            logits = model(input_ids=torch.tensor([[*prompt.ids, *reply[:n]]])).logits[0, -1]
            terms.append(float(logits[token] - torch.log(logits.exp().sum())))
    return terms


def truths(model, rollout, padding=lambda row: 0, eos=2):
    out = []
    for row, reply in enumerate(rollout.replies):
        terms = log_likelihoods(model, rollout.prompts[row // 4], reply + [eos] * padding(row))
        out.append(sum(terms) / len(terms))
    return torch.tensor(out)


def config(tiny, logits_at_once=1024, **oracle):
    update = UpdateConfig(logits_at_once=logits_at_once)
    return RunConfig(policy=PolicyConfig(model=str(tiny)), oracle=OracleConfig(**oracle), update=update)


def every(rollout):
    return torch.ones(len(rollout.prompts), rollout.candidates, dtype=torch.bool)


ROWS = torch.tensor([6, 0, 3, 3, 7, 1, 2, 5, 4])


def test_utility_is_the_base_s_mean_log_likelihood_of_the_reply(tiny, policy, rollout, base64):
    truth = truths(base64, rollout)
    for at_once, kept in ((0, False), (3, True), (2, False)):
        readings = Readings(policy, rollout, at_once)
        if kept:
            readings.of()
        utility = BaseOracle(policy, config(tiny)).utility(rollout, readings, ROWS)
        assert utility.dtype == torch.float32
        assert torch.allclose(utility, truth[ROWS], atol=2e-5)
    shifted = BaseOracle(policy, config(tiny, offset=5.0, utility_range=(-1.5, 0.0)))
    utility = shifted.utility(rollout, Readings(policy, rollout), ROWS)
    assert torch.allclose(utility, (truth[ROWS] + 5).clamp(-1.5, 0.0), atol=2e-5)
    assert (utility == -1.5).any() != (utility == -1.5).all()
    assert shifted.counts == {"scored": 9}


def test_logits_exist_for_a_few_tokens_at_a_time(tiny, policy, rollout, monkeypatch):
    seen, project = [], policy.project
    readings = Readings(policy, rollout)
    whole = BaseOracle(policy, config(tiny)).utility(rollout, readings, ROWS)
    monkeypatch.setattr(policy, "project", lambda states: (seen.append(len(states)), project(states))[1])
    parts = BaseOracle(policy, config(tiny, logits_at_once=5)).utility(rollout, readings, ROWS)
    assert torch.allclose(parts, whole, atol=1e-6)
    assert max(seen) == 5
    assert sum(seen) == sum(len(rollout.replies[row]) for row in ROWS)


def test_an_adapter_on_the_output_embedding_does_not_speak_for_the_base(tiny, prompts, base64):
    policy = load_policy(PolicyConfig(model=str(tiny), lora_targets=("q_proj", "lm_head")), 0, torch.device("cpu"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.normal_(std=0.1)
    rollout = spoken(policy, prompts.batch(0, 1), [[9, 8], [7, 6, 5], [4], [11, 12]], candidates=3)
    utility = BaseOracle(policy, config(tiny)).utility(rollout, Readings(policy, rollout), torch.arange(4))
    assert torch.allclose(utility, truths(base64, rollout), atol=2e-5)


def test_a_mean_over_padding_counts_eos_up_to_the_longest_candidate(tiny, policy, rollout, base64):
    def padding(row):
        return 0 if row % 4 == 3 else max(LENGTHS[row // 4][:3]) - len(rollout.replies[row])

    truth = truths(base64, rollout, padding)
    assert not torch.allclose(truth, truths(base64, rollout), atol=0.1)
    oracle = BaseOracle(policy, config(tiny, mean_over="padded", offset=5.0))
    for rows in (ROWS, torch.tensor([2])):  # whichever are asked for
        for at_once in (0, 3):
            utility = oracle.utility(rollout, Readings(policy, rollout, at_once), rows)
            assert torch.allclose(utility, truth[rows] + 5, atol=2e-5)


@pytest.mark.parametrize("mean_over", ["reply", "padded"])
def test_a_reply_without_tokens_has_no_utility(tiny, policy, prompts, mean_over):
    rollout = spoken(policy, prompts.batch(0, 1), [[], [9, 8], [7]], candidates=2)
    oracle = BaseOracle(policy, config(tiny, mean_over=mean_over, utility_range=(-15.0, 5.0)))
    labels = Labels(oracle, rollout, Readings(policy, rollout))
    p = labels.preferences(every(rollout))[0]
    assert p.isnan().tolist() == [True, False]
    assert (labels.calls, labels.failures) == (2, 1)
    assert oracle.counts == {"scored": 2, "empty": 1}


def test_int8_wants_bitsandbytes_and_a_second_copy(tiny, policy, rollout, monkeypatch, tmp_path):
    from transformers import LlamaForCausalLM

    wanted = config(tiny, quantization="int8")
    monkeypatch.setattr("fpo_train.oracle.likelihood.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"oracle\.quantization: int8 needs bitsandbytes"):
        BaseOracle(policy, wanted)

    asked = []

    def other(policy_config, seed, device):  # a rounded copy, in place of what bitsandbytes would round
        asked.append(policy_config)
        copy = load_policy(PolicyConfig(model=str(tiny)), seed, device)
        with torch.no_grad():
            for parameter in copy.lm.parameters():
                parameter.copy_((parameter * 20).round() / 20)
        copy.lm.save_pretrained(tmp_path / "rounded")
        return copy

    monkeypatch.setattr("fpo_train.oracle.likelihood.find_spec", lambda name: object())
    monkeypatch.setattr("fpo_train.oracle.likelihood.load_policy", other)
    oracle = BaseOracle(policy, wanted)
    (policy_config,) = asked
    assert (policy_config.model, policy_config.quantization) == (str(tiny), "int8")
    utility = oracle.utility(rollout, Readings(policy, rollout, 3), ROWS)
    mine = BaseOracle(policy, config(tiny)).utility(rollout, Readings(policy, rollout), ROWS)
    assert not torch.allclose(utility, mine, atol=1e-2)
    rounded = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_((parameter.float() * 20).round() / 20)
    assert torch.allclose(utility, truths(rounded, rollout)[ROWS], atol=2e-5)


class Scripted(Oracle):
    """Preferences by row, with a record of what was asked."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.asked = answers, []

    def preference(self, rollout, readings, rows, references):
        self.asked += list(zip(rows.tolist(), references.tolist(), strict=True))
        return self.answers[rows]


def test_labels_without_utilities_are_bought_once(rollout):
    oracle = Scripted(torch.tensor([0.1, math.nan, 0.3, 9.0, 0.5, 0.6, 0.7, 9.0]))
    labels = Labels(oracle, rollout, readings=None)
    some = torch.tensor([[True, True, False], [False, False, True]])
    for _ in range(2):
        p = labels.preferences(some)
        assert torch.equal(p.nan_to_num(-1), torch.tensor([[0.1, -1, -1], [-1, -1, 0.7]]))
        assert (labels.calls, labels.failures) == (3, 1)
    assert oracle.asked == [(0, 3), (1, 3), (6, 7)]
    assert labels.utilities(some) is None
    p = labels.preferences(every(rollout))
    assert torch.equal(p.nan_to_num(-1), torch.tensor([[0.1, -1, 0.3], [0.5, 0.6, 0.7]]))
    assert oracle.asked == [(0, 3), (1, 3), (6, 7), (2, 3), (4, 7), (5, 7)]
    assert (labels.calls, labels.failures) == (6, 1)
    assert labels.preferences(~every(rollout)).isnan().all()
    with pytest.raises(ValueError, match=r"wanted: a bool tensor of shape \(2, 3\)"):
        labels.preferences(torch.ones(2, 4, dtype=torch.bool))


def test_labels_with_utilities_read_each_row_once(tiny, policy, rollout, base64):
    oracle = BaseOracle(policy, config(tiny, temperature=0.5))
    seen, inner = [], oracle.utility
    oracle.utility = lambda rollout, readings, rows: (seen.extend(rows.tolist()), inner(rollout, readings, rows))[1]
    labels = Labels(oracle, rollout, Readings(policy, rollout))
    truth = truths(base64, rollout).view(2, 4)
    one = torch.tensor([[False, True, False], [False, False, False]])
    for _ in range(2):
        utility, reference = labels.utilities(one)
        assert torch.allclose(utility[one], truth[:, :3][one], atol=2e-5)
        assert reference[0] == pytest.approx(float(truth[0, 3]), abs=2e-5)
        assert utility[~one].isnan().all()
        assert reference[1].isnan()
    p = labels.preferences(every(rollout))
    assert torch.allclose(p, torch.sigmoid((truth[:, :3] - truth[:, 3:]) / 0.5), atol=5e-5)
    assert sorted(seen) == list(range(8))
    assert seen[:2] == [1, 3]
    assert (labels.calls, labels.failures) == (6, 0)
    rows, references = torch.tensor([0, 5, 5]), torch.tensor([3, 7, 7])
    direct = oracle.preference(rollout, Readings(policy, rollout), rows, references)
    assert torch.allclose(direct, p.flatten()[[0, 4, 4]], atol=1e-5)


def test_labels_all_missing_stop_the_run_unless_another_process_has_some(rollout):
    class Two(Processes):
        world = 1

        def __init__(self, other):
            self.other = torch.tensor(other)

        def total(self, tensor):
            return tensor + self.other

    labels = Labels(Scripted(torch.full((8,), math.nan)), rollout, readings=None)
    labels.check(Two([0, 0]))  # nothing was asked yet
    labels.preferences(every(rollout))
    labels.check(Two([6, 5]))
    with pytest.raises(RunError, match="not one of the iteration's 12 labels could be had"):
        labels.check(Two([6, 6]))
