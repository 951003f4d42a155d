"""Policy, oracle and rollout on a tiny Llama, against plain one-sequence forwards."""

import pytest
import torch

from fpo_train.config import OracleConfig, PolicyConfig, RolloutConfig
from fpo_train.errors import RunError
from fpo_train.oracle import BaseOracle, Labels
from fpo_train.policy import load_policy
from fpo_train.rollout import sample

SETTINGS = RolloutConfig(prompts=3, candidates=4, max_new_tokens=8, min_new_tokens=2, temperature=1.0)


@pytest.fixture
def rollout(policy, prompts):
    torch.manual_seed(2)
    return sample(policy, prompts.batch(0, SETTINGS.prompts), SETTINGS)


def alone(policy, prompt, reply, adapter):
    """Hidden states and logits of one unpadded sequence through the public model."""
    ids = torch.tensor([[*prompt.ids, *reply]])
    with torch.no_grad():
        if adapter:
            return policy.model(input_ids=ids, output_hidden_states=True)
        with policy.model.disable_adapter():
            return policy.model(input_ids=ids, output_hidden_states=True)


def owners(rollout):
    return [prompt for prompt in rollout.prompts for _ in range(rollout.candidates + 1)]


def test_rows_hold_prompt_reply_and_closing_token(policy, rollout):
    rows = rollout.sequences
    for n, (prompt, reply) in enumerate(zip(owners(rollout), rollout.replies, strict=True)):
        whole = rows.ids[n][rows.mask[n]].tolist()
        closing = [] if reply[-1] == policy.eos else [policy.eos]
        assert whole == [*prompt.ids, *reply, *closing]
        assert rows.ids[n][rows.reply[n]].tolist() == reply
        assert whole[-1] == policy.eos
        assert policy.eos not in reply[:-1]
        assert SETTINGS.min_new_tokens <= len(reply) <= SETTINGS.max_new_tokens


def test_the_base_reads_with_the_adapter_off(policy, rollout):
    encoded = policy.encode(rollout.sequences)
    for n, (prompt, reply) in enumerate(zip(owners(rollout), rollout.replies, strict=True)):
        closed = reply if reply[-1] == policy.eos else [*reply, policy.eos]
        truth = alone(policy, prompt, closed, adapter=False).hidden_states[-1][0, -1]
        assert torch.allclose(encoded.closing[n], truth, rtol=1e-4, atol=1e-5)
        moved = alone(policy, prompt, closed, adapter=True).hidden_states[-1][0, -1]
        assert not torch.allclose(encoded.closing[n], moved, rtol=1e-2)


def test_utility_is_the_mean_log_likelihood_of_the_reply_alone(policy, rollout):
    encoded = policy.encode(rollout.sequences)
    rows = torch.tensor([7, 0, 14, 3])
    utility = BaseOracle(policy, OracleConfig()).utility(encoded, rows, rows_at_once=3)
    for value, n in zip(utility, rows.tolist(), strict=True):
        prompt, reply = owners(rollout)[n], rollout.replies[n]
        log_p = alone(policy, prompt, reply, adapter=False).logits[0].log_softmax(-1)
        start = len(prompt.ids)
        truth = torch.stack([log_p[start - 1 + t, token] for t, token in enumerate(reply)]).mean()
        assert torch.isclose(value, truth, rtol=1e-4)


def test_references_come_from_the_base_and_candidates_from_the_policy(policy, prompts):
    """With temperature near 0 sampling is greedy, and the two models' greedy replies differ."""
    greedy = RolloutConfig(prompts=2, candidates=2, max_new_tokens=6, min_new_tokens=6, temperature=1e-4)
    rollout = sample(policy, prompts.batch(0, 2), greedy)

    def greedy_reply(prompt, adapter):
        reply = []
        for _ in range(6):
            logits = alone(policy, prompt, reply, adapter).logits[0, -1].clone()
            logits[policy.eos] = -torch.inf
            reply.append(int(logits.argmax()))
        return reply

    for b, prompt in enumerate(rollout.prompts):
        first, second, reference = rollout.replies[3 * b : 3 * b + 3]
        assert first == second == greedy_reply(prompt, adapter=True)
        assert reference == greedy_reply(prompt, adapter=False)
        assert reference != first


def test_same_stream_same_replies(policy, prompts, rollout):
    torch.manual_seed(2)
    assert sample(policy, prompts.batch(0, SETTINGS.prompts), SETTINGS).replies == rollout.replies
    torch.manual_seed(3)
    assert sample(policy, prompts.batch(0, SETTINGS.prompts), SETTINGS).replies != rollout.replies


def test_labels_are_bought_once_and_counted(policy, rollout):
    encoded = policy.encode(rollout.sequences)
    oracle, seen = BaseOracle(policy, OracleConfig(temperature=0.5)), []
    whole = oracle.utility(encoded, torch.arange(15)).view(3, 5)
    inner = oracle.utility
    oracle.utility = lambda encoded, rows: (seen.extend(rows.tolist()), inner(encoded, rows))[1]
    labels = Labels(oracle, encoded, prompts=3, candidates=4)
    one = torch.zeros(3, 4, dtype=torch.bool)
    one[[0, 1, 2], [1, 3, 0]] = True
    for _ in range(2):
        p = labels.preferences(one)
        truth = torch.sigmoid((whole[:, :4] - whole[:, 4:]) / 0.5)
        assert torch.allclose(p[one], truth[one], atol=1e-6)
        assert p[~one].isnan().all()
    assert labels.calls == 3
    assert sorted(seen) == [1, 4, 8, 9, 10, 14]
    everything = torch.ones_like(one)
    assert torch.allclose(labels.preferences(everything), truth, atol=1e-6)
    assert labels.calls == 12
    assert sorted(seen) == list(range(15))  # nothing twice


def test_only_the_adapter_is_trainable(policy):
    assert all(p.dtype == torch.float32 for p in policy.trainable.values())
    assert {n.split(".")[-3] for n in policy.trainable} == {"lora_A", "lora_B"}


def test_layers_that_do_not_exist(tiny):
    with pytest.raises(RunError, match=r"policy.lora_targets \['query'\]"):
        load_policy(PolicyConfig(model=str(tiny), lora_targets=("query",)), 0, torch.device("cpu"))


def test_models_that_bend_their_logits_are_refused(tiny, monkeypatch):
    from fpo_train import policy as module

    def bent(name, dtype):
        model, tokenizer = load(name, dtype)
        head = model.lm_head.forward
        model.forward = lambda input_ids: type("Out", (), {"logits": head(model.model(input_ids)[0]).tanh()})
        return model, tokenizer

    load = module.load_causal_lm
    monkeypatch.setattr(module, "load_causal_lm", bent)
    with pytest.raises(RunError, match="not a plain projection"):
        load_policy(PolicyConfig(model=str(tiny)), 0, torch.device("cpu"))
