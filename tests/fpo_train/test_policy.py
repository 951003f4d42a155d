"""Policy and rollout on a tiny Llama, against plain one-sequence forwards."""

import contextlib
import dataclasses

import pytest
import torch

from fpo_train.config import PolicyConfig, RolloutConfig
from fpo_train.errors import RunError
from fpo_train.policy import load_policy, prefix
from fpo_train.policy.adapters import POLICY, Speaking, only_in
from fpo_train.rollout import Readings, Rollout, TransformersSampler, sampler

SETTINGS = RolloutConfig(prompts=3, candidates=4, max_new_tokens=8, min_new_tokens=2, temperature=1.0)


def sample(policy, prompts, settings=SETTINGS, seed=2, place=1, first=0, rows_at_once=0):
    return sampler(policy, settings, seed)(prompts, place, first, rows_at_once)


@pytest.fixture
def rollout(policy, prompts):
    return sample(policy, prompts.batch(0, SETTINGS.prompts))


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
    assert len({len(prompt.ids) for prompt in rollout.prompts}) > 1
    for n, (prompt, reply) in enumerate(zip(owners(rollout), rollout.replies, strict=True)):
        whole = rows.ids[n][rows.mask[n]].tolist()
        closing = [] if reply[-1] == policy.eos else [policy.eos]
        assert whole == [*prompt.ids, *reply, *closing]
        assert rows.ids[n][rows.reply[n]].tolist() == reply
        assert whole[-1] == policy.eos
        assert policy.eos not in reply[:-1]
        assert SETTINGS.min_new_tokens <= len(reply) <= SETTINGS.max_new_tokens
        assert rollout.texts[n] == policy.decode(reply)


@pytest.mark.parametrize("way", ["at once", "three at a time", "some rows", "from scratch", "without a prefix"])
def test_the_base_reads_with_the_adapter_off(policy, rollout, way):
    """However it is read, each row's states are those of an unpadded forward of that row alone."""
    every = torch.arange(15)
    if way == "from scratch":
        encoded = policy.encode(rollout.sequences, rows_at_once=4)
    elif way == "without a prefix":
        encoded = Readings(policy, dataclasses.replace(rollout, prefix=None)).of()
    elif way == "some rows":
        every = torch.tensor([7, 0, 14, 3])
        readings = Readings(policy, rollout, rows_at_once=3)
        encoded = readings.of(every)
        again = Readings(policy, rollout)
        again.of()
        for a, b in zip(vars(encoded).values(), vars(again.of(every)).values(), strict=True):
            assert a is b or not isinstance(a, torch.Tensor) or torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    else:
        encoded = Readings(policy, rollout, rows_at_once=3 if way == "three at a time" else 0).of()
    for place, n in enumerate(every.tolist()):
        prompt, reply = owners(rollout)[n], rollout.replies[n]
        closed = reply if reply[-1] == policy.eos else [*reply, policy.eos]
        truth = alone(policy, prompt, closed, adapter=False).hidden_states[-1][0]
        assert torch.allclose(encoded.closing[place], truth[-1], rtol=1e-4, atol=1e-5)
        start = len(prompt.ids) - 1
        own = slice(encoded.offsets[place], encoded.offsets[place + 1])
        assert torch.allclose(encoded.predicting[own], truth[start : start + len(reply)], rtol=1e-4, atol=1e-5)
        assert encoded.tokens[own].tolist() == reply
        moved = alone(policy, prompt, closed, adapter=True).hidden_states[-1][0, -1]
        assert not torch.allclose(encoded.closing[place], moved, rtol=1e-2)


def test_a_prompt_is_read_once_for_all_its_candidates(policy, prompts, monkeypatch):
    body, read = policy.lm.base_model, []
    inner = body.forward

    def forward(*args, **kwargs):
        read.append(tuple(kwargs["input_ids"].shape))
        return inner(*args, **kwargs)

    monkeypatch.setattr(body, "forward", forward)
    rollout = sample(policy, prompts.batch(0, 3))
    Readings(policy, rollout).of()
    width = max(len(prompt.ids) for prompt in rollout.prompts)
    assert [shape for shape in read if shape[1] == width] == [(3, width)] * 2  # by the policy, by the base
    assert all(tokens == 1 for rows, tokens in read[1:-1] if (rows, tokens) != (3, width))
    assert max(tokens for rows, tokens in read if rows > 3) <= SETTINGS.max_new_tokens + 1


def test_models_that_cannot_share_a_prompt_read_it_again(policy, prompts, rollout, monkeypatch):
    from fpo_train.policy import prefix

    expected = Readings(policy, rollout).of()
    monkeypatch.setattr(prefix, "_layers", lambda cache, width: None)
    again = sample(policy, prompts.batch(0, 3))
    assert again.replies == rollout.replies
    assert again.prefix.layers is None
    encoded = Readings(policy, again).of()
    assert torch.allclose(encoded.predicting, expected.predicting, rtol=1e-4, atol=1e-5)


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
    base = sampler(policy, greedy, 0).base_replies(rollout.prompts, 2, 0, 0)
    assert base == [rollout.replies[row] for row in (2, 2, 5, 5)]


def test_a_reply_depends_on_its_own_place_alone(policy, prompts, rollout):
    batch = prompts.batch(0, 3)
    for rows_at_once in (1, 2, 7):
        assert sample(policy, batch, rows_at_once=rows_at_once).replies == rollout.replies
    assert sample(policy, batch[1:], first=1).replies == rollout.replies[5:]  # as a second process would
    assert sample(policy, batch, place=2).replies != rollout.replies
    assert sample(policy, batch, seed=3).replies != rollout.replies
    assert len({tuple(reply) for reply in rollout.replies}) == 15


def test_dropout_while_generating_is_an_option(tiny, prompts):
    policy = load_policy(PolicyConfig(model=str(tiny), lora_dropout=0.5), 0, torch.device("cpu"))
    for parameter in policy.trainable.values():
        parameter.data.normal_(std=0.1)
    batch, on = prompts.batch(0, 2), dataclasses.replace(SETTINGS, lora_dropout=True)
    assert sample(policy, batch).replies == sample(policy, batch).replies
    assert sample(policy, batch, on).replies != sample(policy, batch).replies
    assert not any(module.training for module in policy.model.modules())
    policy.lm.model.other = torch.nn.Dropout().eval()  # the base's own
    with sampler(policy, on, 2)._dropout():
        trained = [name for name, module in policy.model.named_modules() if module.training]
    assert trained
    assert all(name.endswith("lora_dropout.default") for name in trained)


def test_blank_replies_are_not_usable(policy, prompts):
    space = policy.tokenizer("  ", add_special_tokens=False)["input_ids"]
    word = policy.tokenizer("yes", add_special_tokens=False)["input_ids"]
    replies = [space, word, [policy.eos], word]
    for skip, expected in ((True, [[False, True, False]]), (False, [[True, True, True]])):
        rollout = Rollout.of(policy, prompts.batch(0, 1), replies, candidates=3, skip_blank=skip)
        assert rollout.usable.tolist() == expected


def test_rows_of_candidates_and_references(policy, prompts):
    rollout = Rollout.of(policy, prompts.batch(0, 2), [[5], [6], [7], [8], [9], [10]], candidates=2)
    candidates, references = rollout.pairs()
    assert candidates.tolist() == [0, 1, 3, 4]
    assert references.tolist() == [2, 2, 5, 5]
    best = torch.tensor([1, 0])
    assert rollout.chosen(best).tolist() == [1, 3]
    assert rollout.references(best).tolist() == [2, 5]


def test_adapters_take_turns_and_leave_everything_as_it_was(policy, prompts):
    policy.model.add_adapter("reward", policy.model.peft_config["default"])
    for name, parameter in policy.model.named_parameters():
        if ".reward." in name:
            parameter.data.normal_(std=0.3)
    sequences = policy.sequences(prompts.batch(0, 1), [[5, 6, 7]])
    flags = {name: p.requires_grad for name, p in policy.model.named_parameters()}
    own = policy.hidden(sequences)
    with policy.base():
        base = policy.hidden(sequences)
        with policy.adapter("reward"):
            reward = policy.hidden(sequences)
            assert flags == {name: p.requires_grad for name, p in policy.model.named_parameters()}
            with policy.adapter("default"):
                assert torch.equal(policy.hidden(sequences), own)
            assert torch.equal(policy.hidden(sequences), reward)
        assert torch.equal(policy.hidden(sequences), base)
    with pytest.raises(ZeroDivisionError), policy.adapter("reward"):
        raise ZeroDivisionError
    assert torch.equal(policy.hidden(sequences), own)
    assert len({float(states.detach().sum()) for states in (own, base, reward)}) == 3
    assert flags == {name: p.requires_grad for name, p in policy.model.named_parameters()}
    assert not any(".reward." in name for name in policy.trainable)


def test_only_the_adapter_is_trainable(policy):
    assert all(p.dtype == torch.float32 and p.requires_grad for p in policy.trainable.values())
    assert {n.split(".")[-3] for n in policy.trainable} == {"lora_A", "lora_B"}


def test_the_adapter_is_float32_over_a_base_in_half_precision(tiny):
    policy = load_policy(PolicyConfig(model=str(tiny), dtype="bfloat16"), 0, torch.device("cpu"))
    assert {p.dtype for p in policy.trainable.values()} == {torch.float32}
    assert policy.lm.lm_head.weight.dtype == torch.bfloat16


def test_gradient_checkpointing_gives_the_same_gradient(tiny, prompts):
    gradients = []
    for checkpointing in (False, True):
        config = PolicyConfig(model=str(tiny), gradient_checkpointing=checkpointing)
        policy = load_policy(config, 0, torch.device("cpu"))
        policy.model.train()
        policy.hidden(policy.sequences(prompts.batch(0, 2), [[5, 6, 7], [8, 9]])).square().sum().backward()
        gradients.append([p.grad for p in policy.trainable.values()])
        assert any(getattr(one, "gradient_checkpointing", False) for one in policy.lm.modules()) is checkpointing
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-6)


def test_layers_that_do_not_exist(tiny):
    with pytest.raises(RunError, match=r"policy.lora_targets \['query'\]"):
        load_policy(PolicyConfig(model=str(tiny), lora_targets=("query",)), 0, torch.device("cpu"))


def test_models_that_bend_their_logits_are_refused(tiny, monkeypatch):
    from fpo_train.policy import load as module

    def bent(name, dtype, quantization):
        model, tokenizer = load(name, dtype, quantization)
        head = model.lm_head.forward
        model.forward = lambda input_ids: type("Out", (), {"logits": head(model.model(input_ids)[0]).tanh()})
        return model, tokenizer

    load = module.load_causal_lm
    monkeypatch.setattr(module, "load_causal_lm", bent)
    with pytest.raises(RunError, match="not a plain projection"):
        load_policy(PolicyConfig(model=str(tiny)), 0, torch.device("cpu"))


def test_the_base_is_read_at_rest_while_the_policy_learns(tiny, prompts):
    """No dropout of the base's own, and a prompt's keys and values are not dropped for gradient checkpointing."""
    policy = load_policy(PolicyConfig(model=str(tiny), gradient_checkpointing=True), 0, torch.device("cpu"))
    for layer in policy.lm.model.layers:
        layer.self_attn.attention_dropout = 0.5
    rollout = sample(policy, prompts.batch(0, 3))
    expected = Readings(policy, rollout).of()
    policy.model.train()
    for one in (rollout, dataclasses.replace(rollout, prefix=None)):
        encoded = Readings(policy, one).of()
        assert torch.allclose(encoded.closing, expected.closing, rtol=1e-5, atol=1e-5)
        assert torch.allclose(encoded.predicting, expected.predicting, rtol=1e-5, atol=1e-5)
        assert policy.model.training


def test_a_row_is_read_once_whoever_asks(policy, rollout, monkeypatch):
    readings, read, inner = Readings(policy, rollout), [], Readings._encode
    monkeypatch.setattr(Readings, "_encode", lambda self, rows: read.append(rows.tolist()) or inner(self, rows))
    readings.of(torch.tensor([3, 4]))
    both = readings.of(torch.tensor([9, 3, 9, 4]))
    assert read == [[3, 4], [9]]
    whole = readings.of()
    assert torch.allclose(both.closing, whole.closing[[9, 3, 9, 4]], rtol=1e-4, atol=1e-5)
    truth = whole.rows(torch.tensor([9, 3, 9, 4]))
    assert torch.equal(both.tokens, truth.tokens)
    assert torch.equal(both.offsets, truth.offsets)
    assert torch.allclose(both.predicting, truth.predicting, rtol=1e-4, atol=1e-5)


def test_prompts_of_very_different_lengths_share_a_rollout(policy, prompts):
    """One token beside many, and one token alone: each greedy reply is that of the prompt by itself."""
    greedy = RolloutConfig(prompts=1, candidates=1, max_new_tokens=4, min_new_tokens=4, temperature=1e-4)
    long = prompts.batch(0, 1)[0]
    short = dataclasses.replace(long, name="short", ids=(7,))
    together = sample(policy, [long, short], greedy)
    apart = sample(policy, [short], greedy)
    reply = []
    for _ in range(4):
        logits = alone(policy, short, reply, adapter=True).logits[0, -1].clone()
        logits[policy.eos] = -torch.inf
        reply.append(int(logits.argmax()))
    assert together.replies[2] == apart.replies[0] == reply
    for one, row in ((together, 2), (apart, 0)):
        truth = alone(policy, short, [*reply, policy.eos], adapter=False).hidden_states[-1][0]
        encoded = Readings(policy, one).of(torch.tensor([row]))
        assert torch.allclose(encoded.closing[0], truth[-1], rtol=1e-4, atol=1e-5)
        assert torch.allclose(encoded.predicting, truth[:4], rtol=1e-4, atol=1e-5)


def test_sampling_settings_of_the_model_s_folder_have_no_say(policy, prompts, rollout):
    given = policy.model.generation_config
    given.repetition_penalty, given.eos_token_id, given.temperature, given.top_k = 5.0, 9, 0.1, 1
    assert sample(policy, prompts.batch(0, 3)).replies == rollout.replies


def test_rows_without_the_adapter_are_the_base_to_the_bit(policy, prompts):
    ids = torch.tensor([prompts.batch(0, 1)[0].ids[:7]] * 4)
    with torch.no_grad():
        own = policy.model(input_ids=ids).logits
        with policy.base():
            base = policy.model(input_ids=ids).logits
        with only_in(policy.model, POLICY, Speaking(torch.tensor([True, False, True, False]))):
            mixed = policy.model(input_ids=ids).logits
        after = policy.model(input_ids=ids).logits
    assert torch.equal(mixed[1::2], base[1::2])
    assert torch.equal(mixed[::2], own[::2])
    assert not torch.allclose(own, base, atol=1e-3)
    assert torch.equal(after, own)


@pytest.mark.parametrize("rows_at_once", [0, 1, 4, 7])
def test_what_is_decoded_together_is_what_each_model_says_alone(policy, prompts, rows_at_once):
    settings = RolloutConfig(prompts=3, candidates=4, max_new_tokens=8)
    some = prompts.batch(2, 3)
    sampler = TransformersSampler(policy, settings, 5)
    rollout = sampler(some, 2, 6, rows_at_once)
    alone = []
    for b, prompt in enumerate(some):
        for n in range(5):
            with policy.base() if n == 4 else contextlib.nullcontext():
                alone += sampler._generate(prefix.read(policy, [prompt]), [n], 2, 6 + b, 0)
    assert rollout.replies == alone
    assert rollout.prefix.layers is not None
