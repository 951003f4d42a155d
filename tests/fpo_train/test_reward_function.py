"""FPOReward as anybody's trainer calls it: numbers by their definitions, groups, references, state, refusals."""

import copy
import math
import warnings

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

from fpo_train import BaseReplies, FPOReward, OnBase
from fpo_train.config import PenaltyConfig, RewardModelConfig
from fpo_train.errors import RunError

PROMPTS = ["Name a bird.", "Name a fish, please.", "Name a bird.", "Why?", "Name a fish, please.", "Name a bird."]
REPLIES = ["A wren", "Cod, or perhaps a trout", "An owl, I should say", "", "Carp", "A wren!"]
REFERENCES = ["Tit.", "Eel, as ever", "Tit.", "Because", "Eel, as ever", "Tit."]


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def classifier(tiny):
    """A tiny reward model with a head that says something."""
    model = LlamaForSequenceClassification.from_pretrained(tiny, num_labels=1)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    return model.eval()


def worth(prompts, completions, **columns):
    """An oracle: the share of vowels."""
    said = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [sum(letter in "aeiou" for letter in text) / (len(text) or 1) for text in said]


def messages(texts, role):
    return [[{"role": role, "content": text}] for text in texts]


def truth(model, tokenizer, texts, references, names):
    """r(z), r(ref) and ⟨∇r(z), ∇r(z) − ∇r(ref)⟩ in float64, one autograd call a text."""
    model = model.double()
    weights = [p.requires_grad_(True) for name, p in model.named_parameters() if any(n in name for n in names)]

    def gradient(text):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
        reward = (model.score.weight @ hidden)[0]
        parts = torch.autograd.grad(reward, weights)
        return reward.detach(), torch.cat([part.flatten() for part in parts])

    own, other = [gradient(text) for text in texts], [gradient(text) for text in references]
    product = torch.stack([g @ (g - h) for (_, g), (_, h) in zip(own, other, strict=True)])
    return torch.stack([r for r, _ in own]), torch.stack([r for r, _ in other]), product


def close(got, wanted, within=1e-5):
    return float((got.double() - wanted).norm()) <= within * float(wanted.norm())


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("parameters", ["head", "all"])
def test_what_it_says_is_what_the_paper_says(classifier, tokenizer, parameters, chat):
    reward = FPOReward(classifier, tokenizer, "relaxed", 10.0, "raw", parameters, oracle=worth, train="head")
    prompts, completions = (messages(PROMPTS, "user"), messages(REPLIES, "assistant")) if chat else (PROMPTS, REPLIES)
    found = reward.score(prompts, completions, reference=REFERENCES)

    def written(prompt, reply):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        return tokenizer.apply_chat_template(turns, tokenize=False) if chat else prompt + reply

    texts, others = ([written(*one) for one in zip(PROMPTS, some, strict=True)] for some in (REPLIES, REFERENCES))
    names = ["score"] if parameters == "head" else ["score", "model"]
    r, r_ref, product = truth(classifier, tokenizer, texts, others, names)
    u, u_ref = (torch.tensor(worth(PROMPTS, some)).double() for some in (REPLIES, REFERENCES))
    penalty = (torch.sigmoid(r - r_ref) - torch.sigmoid(u - u_ref)) * product
    assert close(found.reward, r)
    assert close(found.reference_reward, r_ref)
    assert close(found.penalty, penalty, 1e-4)
    assert close(found.effective, r - 10 * penalty, 1e-4)


def test_a_call_gives_trainers_one_number_and_logs_its_parts(classifier, tokenizer):
    reward = FPOReward(classifier, tokenizer, oracle=worth)
    assert not isinstance(reward, torch.nn.Module)
    metrics, extra = {}, {}
    found = reward(
        prompts=PROMPTS, completions=REPLIES, reference=REFERENCES, completion_ids=[[1]] * 6, trainer_state=object(),
        log_metric=metrics.__setitem__, log_extra=extra.__setitem__,
    )  # fmt: skip
    scored = reward.score(PROMPTS, REPLIES, reference=REFERENCES)
    assert all(type(one) is float for one in found)
    assert torch.allclose(torch.tensor(extra["fpo/penalty"]), scored.penalty, rtol=1e-5)
    assert torch.allclose(torch.tensor(extra["fpo/reward"]), scored.reward, rtol=1e-5)
    assert torch.allclose(torch.tensor(found), scored.reward - scored.penalty, rtol=1e-5, atol=1e-6)
    assert metrics["fpo/reward"] == pytest.approx(float(scored.reward.mean()), rel=1e-5)
    assert metrics["fpo/pairs"] == 3  # one a prompt, not one a place


def test_groups_are_told_by_their_prompts(classifier, tokenizer):
    order = [4, 0, 3, 5, 1, 2]
    found, start = [], copy.deepcopy(classifier.state_dict())
    for places in (range(6), order):
        classifier.load_state_dict(start)
        reward = FPOReward(classifier, tokenizer, oracle=worth)
        columns = [[column[n] for n in places] for column in (PROMPTS, REPLIES, REFERENCES)]
        said = reward(columns[0], columns[1], reference=columns[2])
        reward.update()
        found.append((dict(zip(places, said, strict=True)), reward.model.head.weight.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-5)


def test_gamma_is_in_units_of_the_spread_within_groups(classifier, tokenizer):
    reward = FPOReward(classifier, tokenizer)
    reward(PROMPTS, REPLIES, reference=REFERENCES)
    found = reward.score(PROMPTS, REPLIES, reference=REFERENCES)

    def spread(values):
        groups = [[n for n, prompt in enumerate(PROMPTS) if prompt == one] for one in dict.fromkeys(PROMPTS)]
        return sum(float((values[rows] - values[rows].mean()).square().sum()) for rows in groups) ** 0.5

    assert spread(found.penalty) == pytest.approx(spread(found.reward), rel=1e-4)


def test_the_group_is_its_own_reference(classifier, tokenizer):
    reward = FPOReward(classifier, tokenizer, "practical", 1.0, "raw", reference="group")
    found = reward.score(PROMPTS, REPLIES)
    every = reward.score(PROMPTS, REPLIES, reference=REFERENCES).reward
    birds = [0, 2, 5]
    assert sorted(found.reference_reward[birds].tolist()) == pytest.approx(sorted(every[birds].tolist()), rel=1e-5)
    assert (found.reference_reward[birds] != found.reward[birds]).all()
    assert found.penalty[3] == 0  # alone: its own reference
    again = reward.score(PROMPTS[::-1], REPLIES[::-1])
    assert torch.allclose(again.penalty.flip(0), found.penalty, rtol=1e-5)


def test_a_frozen_base_replies_for_reference_once_and_whoever_is_asked_beside(tiny, tokenizer, classifier):
    from peft import LoraConfig, get_peft_model

    base = LlamaForCausalLM.from_pretrained(tiny)
    plain = BaseReplies(base, tokenizer, max_new_tokens=6)(["Name a bird.", "Why?"])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny), LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_()
    model.train()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    replies = BaseReplies(model, tokenizer, max_new_tokens=6)
    assert replies(["Why?"]) + replies(["A longer one, that pads?", "Name a bird."])[1:] == plain[::-1]
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training
    assert replies(messages(["Why?"], "user")) != ["Why?"]
    reward = FPOReward(classifier, tokenizer, reference=replies)
    found = reward.score(["Why?"], ["So."])
    assert torch.allclose(found.reference_reward, reward.score(["Why?"], [plain[1]]).reward, rtol=1e-5)
    fresh = BaseReplies(model, tokenizer, max_new_tokens=6, seed=1)
    fresh.load_state_dict(replies.state_dict())
    assert fresh(["Why?"]) == [plain[1]]


def test_what_cannot_be_scored_is_none_and_why_is_said_once(classifier, tokenizer):
    reward = FPOReward(classifier, tokenizer, oracle=worth)
    bad = [*REPLIES[:3], [{"role": "assistant", "content": None}], REPLIES[4], REPLIES[5]]
    with pytest.warns(UserWarning, match="cannot be scored: ") as told:
        found = reward(PROMPTS, bad, reference=[*REFERENCES[:4], None, REFERENCES[5]])
    assert [n for n, one in enumerate(found) if one is None] == [3, 4]
    assert len(told) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = reward.score(PROMPTS, bad, reference=[*REFERENCES[:4], None, REFERENCES[5]])
    assert math.isnan(again.effective[3])
    assert math.isnan(again.reward[4])
    assert reward.pairs == 2


def test_it_learns_and_goes_on_from_its_state_bit_for_bit(classifier, tokenizer, tiny):
    def made():
        torch.manual_seed(3)
        model = LlamaForSequenceClassification.from_pretrained(tiny, num_labels=1)
        torch.nn.init.normal_(model.score.weight, std=0.3)
        settings = RewardModelConfig(learning_rate=1e-2, steps=2, replay_pairs=2)
        return FPOReward(model, tokenizer, "residual", parameters="all", oracle=worth, settings=settings)

    def go(reward, turns):
        return [(reward(PROMPTS, REPLIES[n:] + REPLIES[:n], reference=REFERENCES), reward.update()) for n in turns]

    whole, first, second = made(), made(), made()
    start = whole.model.weights()
    everything = go(whole, range(4))
    assert all(not torch.equal(p, start[name]) for name, p in whole.model.weights().items())
    assert everything[0][1] != everything[3][1]
    assert go(first, range(2)) == everything[:2]
    second.load_state_dict(first.state_dict())
    assert go(second, range(2, 4)) == everything[2:]
    assert all(torch.equal(p, second.model.weights()[name]) for name, p in whole.model.weights().items())


def test_scoring_changes_nothing(classifier, tokenizer):
    reward = FPOReward(classifier, tokenizer, oracle=worth)
    reward(PROMPTS, REPLIES, reference=REFERENCES)
    before = reward.state_dict()
    reward.score(PROMPTS[:2], REPLIES[1:3], reference=REFERENCES[:2])
    after = reward.state_dict()
    assert before["penalty"] == after["penalty"]
    assert before["counts"] == after["counts"]
    assert len(before["replay"]) == len(after["replay"])


def test_nothing_is_kept_of_what_a_model_in_eval_mode_said(classifier, tokenizer):
    reward, trained = FPOReward(classifier, tokenizer, oracle=worth), torch.nn.Linear(1, 1)
    reward.watch(trained.eval())
    reward(PROMPTS, REPLIES, reference=REFERENCES)
    assert reward.pairs == 0
    trained.train()
    reward(PROMPTS, REPLIES, reference=REFERENCES)
    assert reward.pairs == 3


def test_an_oracle_is_given_the_columns_that_it_takes(classifier, tokenizer):
    seen = {}

    def oracle(prompts, completions, answer):
        seen.update(zip(completions, answer, strict=True))
        return [1.0 if one in said else 0.0 for said, one in zip(completions, answer, strict=True)]

    reward = FPOReward(classifier, tokenizer, "relaxed", oracle=oracle)
    answers = ["wren", "trout", "owl", "x", "Carp", "robin"]
    reward(PROMPTS, REPLIES, reference=REFERENCES, answer=answers, other=answers)
    assert {reply: seen[reply] for reply in REPLIES} == dict(zip(REPLIES, answers, strict=True))


def test_gamma_that_cancels_is_told(classifier, tokenizer):
    trained = torch.nn.Linear(1, 1)
    loud = FPOReward(classifier, tokenizer, "practical", 1e4, "raw", oracle=worth)
    loud.watch(trained, normalised=True)
    with pytest.warns(UserWarning, match="γ cancels"):
        loud(PROMPTS, REPLIES, reference=REFERENCES)
    for quiet, normalised in ((FPOReward(classifier, tokenizer), True), (loud, False)):
        quiet._said.clear()
        quiet.watch(trained, normalised)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quiet(PROMPTS, REPLIES, reference=REFERENCES)


@pytest.mark.parametrize("kind", ["head", "lora"])
def test_it_sits_on_a_trainers_own_model_and_leaves_that_alone(tiny, tokenizer, kind):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny), LoraConfig(target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    settings = RewardModelConfig(learning_rate=1e-2)
    made = {"oracle": worth, "parameters": kind, "settings": settings}
    reward = FPOReward(OnBase(model, kind), tokenizer, **made)
    with pytest.warns(UserWarning, match="every reward is 0: the score head is all zeros"):
        assert reward.score(PROMPTS, REPLIES, reference=REFERENCES).reward.eq(0).all()
    with torch.no_grad():
        torch.manual_seed(1)
        reward.model.head.weight.normal_(std=0.3)
    model.train()
    ids = torch.tensor([tokenizer("Name a bird.")["input_ids"]])
    before = model(ids).logits.detach()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    first = reward(PROMPTS, REPLIES, reference=REFERENCES)
    assert len(set(first)) == 6
    reward.update()
    assert reward(PROMPTS, REPLIES, reference=REFERENCES) != first
    assert torch.equal(model(ids).logits, before)
    assert model.training
    assert all(module.training for module in model.modules())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    assert all(".reward." in name for name in changed)
    assert (not changed) == (kind == "head")


def test_a_reward_model_that_peft_has_wrapped(classifier, tokenizer):
    from peft import LoraConfig, get_peft_model

    scored = FPOReward(classifier, tokenizer, "practical", 1.0, "raw").score(PROMPTS, REPLIES, reference=REFERENCES)
    model = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    reward = FPOReward(model, tokenizer, "practical", 1.0, "raw", parameters="lora", oracle=worth)
    assert torch.allclose(reward.score(PROMPTS, REPLIES, reference=REFERENCES).reward, scored.reward, rtol=1e-5)
    trained = set(reward.model.trainable)
    assert sum("lora_" in name for name in trained) == 4
    assert len(trained) == 5
    reward(PROMPTS, REPLIES, reference=REFERENCES)
    assert reward.update() is not None


def test_folders_are_loaded(classifier, tokenizer, tmp_path, tiny):
    classifier.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    asked = {"penalty": "practical", "gamma": 1.0, "gamma_units": "raw"}
    direct = FPOReward(classifier, tokenizer, **asked).score(PROMPTS, REPLIES, reference=REFERENCES)
    found = FPOReward(str(tmp_path / "rm"), **asked).score(PROMPTS, REPLIES, reference=REFERENCES)
    assert torch.equal(direct.effective, found.effective)
    fresh = FPOReward(str(tiny), **asked)
    with pytest.raises(RunError, match=r"hold no score head; fit\(prompts, chosen, rejected\) sets one"):
        fresh.score(PROMPTS, REPLIES, reference=REFERENCES)
    with pytest.raises(RunError, match="fit: pair 1: wanted a text or one message of the assistant, got 3"):
        fresh.fit(PROMPTS[:2], REPLIES[:2], [REFERENCES[0], 3])
    fresh.fit(PROMPTS, REPLIES, REFERENCES)
    found = fresh.score(PROMPTS, REPLIES, reference=REFERENCES)
    assert (found.reward > found.reference_reward).all()
    assert fresh.pairs == 6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"penalty": "relaxed"}, "penalty relaxed: it asks an oracle about every completion; wanted oracle=…"),
        ({"penalty": "practicle"}, "practicle"),
        ({"gamma": -1.0}, "penalty.gamma"),
        ({"parameters": "nothing"}, "penalty.parameters: 'nothing' names no weight"),
        ({"oracle": 3}, "oracle: wanted a function of prompts and completions, got a int"),
        ({"oracle": worth, "oracle_temperature": 0.0}, "oracle.temperature"),
        ({"tokenizer": None}, "tokenizer: wanted the reward model's"),
        ({"reward_model": 3}, "reward_model: wanted a model, a folder, a hub id or OnBase, got a int"),
        ({"penalty": PenaltyConfig(kind="exact")}, "penalty exact"),
        ({"tokenizer": "practical"}, "tokenizer: wanted the reward model's tokenizer, or None, got 'practical'"),
        ({"settings": {"steps": 2}}, "settings: wanted a RewardModelConfig, got a dict"),
        ({"gamma": "big"}, "penalty.gamma: wanted 0 or more, got 'big'"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_made(classifier, tokenizer, given, said):
    with pytest.raises(RunError, match=said):
        FPOReward(**{"reward_model": classifier, "tokenizer": tokenizer} | given)


def test_two_labels_and_missing_columns_are_refused(tiny, classifier, tokenizer):
    with pytest.raises(RunError, match="2 outputs"):
        FPOReward(LlamaForSequenceClassification.from_pretrained(tiny, num_labels=2), tokenizer)
    reward = FPOReward(classifier, tokenizer)
    with pytest.raises(RunError, match='no column "reference"; those passed on: answer'):
        reward(PROMPTS, REPLIES, answer=REPLIES)
    with pytest.raises(RunError, match="holds 2 values for 6 completions"):
        reward(PROMPTS, REPLIES, reference=REFERENCES[:2])
    with pytest.raises(RunError, match="wanted one for each of 6 prompts, got 5"):
        reward(PROMPTS, REPLIES[:5], reference=REFERENCES)
    with pytest.raises(RunError, match="state: it does not fit this reward: it has no 'penalty_kind'"):
        reward.load_state_dict({"reward_model": {}})


def test_an_oracle_that_fails_is_named(classifier, tokenizer):
    def worse(prompts, completions):
        raise ValueError("no")

    reward = FPOReward(classifier, tokenizer, oracle=worse)
    with pytest.raises(RunError, match="oracle: worse raised ValueError: no"):
        reward(PROMPTS, REPLIES, reference=REFERENCES)
