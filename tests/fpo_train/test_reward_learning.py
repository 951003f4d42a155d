"""What FPOReward learns from, and what must not reach it: pairs, modes, formats, other people's settings."""

import math
import warnings

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaForSequenceClassification

from fpo_train import FPOReward, OnBase
from fpo_train.config import PenaltyConfig, RewardModelConfig
from fpo_train.errors import RunError
from fpo_train.integrations.groups import Scored, best, doubled

from .test_reward_function import PROMPTS, REFERENCES, REPLIES, classifier, tokenizer, worth  # noqa: F401


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_each_groups_best_by_what_is_left_is_labelled_and_learnt(classifier, tokenizer):  # noqa: F811
    settings = RewardModelConfig(learning_rate=1e-2, steps=3)
    reward = FPOReward(classifier, tokenizer, "practical", 3.0, oracle=worth, settings=settings, oracle_temperature=0.1)
    left = reward(PROMPTS, REPLIES, reference=REFERENCES)
    scored = reward.score(PROMPTS, REPLIES, reference=REFERENCES)
    groups = [[n for n, prompt in enumerate(PROMPTS) if prompt == one] for one in dict.fromkeys(PROMPTS)]
    chosen = [max(rows, key=lambda n: left[n]) for rows in groups]
    assert chosen != [max(rows, key=lambda n: scored.reward[n]) for rows in groups]
    found = {pair["chosen_text"]: pair for pair in reward.state_dict()["replay"]}
    assert list(found) == [REPLIES[n] for n in chosen]
    for n in chosen:
        pair = found[REPLIES[n]]
        own, other = worth(PROMPTS[:2], [REPLIES[n], REFERENCES[n]])
        assert (pair["prompt"]["text"], pair["reference_text"]) == (PROMPTS[n], REFERENCES[n])
        assert pair["preference"] == pytest.approx(sigmoid((own - other) / 0.1), rel=1e-5)

    def loss():
        now = reward.score(PROMPTS, REPLIES, reference=REFERENCES)
        margins = (now.reward - now.reference_reward)[chosen]
        labels = torch.tensor([found[REPLIES[n]]["preference"] for n in chosen])
        return float(torch.nn.functional.binary_cross_entropy_with_logits(margins, labels))

    before = loss()
    told = reward.update()
    assert loss() < told <= before * (1 + 1e-5)
    assert reward.update() is None  # nothing has come since
    assert reward.state_dict()["counts"]["updates"] == 1


def test_only_new_pairs_and_the_replay_that_was_asked_for_are_learnt(classifier, tokenizer):  # noqa: F811
    def seen(replay_pairs):
        settings = RewardModelConfig(replay_pairs=replay_pairs)
        reward, batches = FPOReward(classifier, tokenizer, oracle=worth, settings=settings), []
        gradient = reward.model.gradient

        def noted(batch, rows, gradient=gradient, batches=batches):
            batches.append([pair.iteration for pair in batch])
            return gradient(batch, rows)

        reward.model.gradient = noted
        for n in range(3):
            reward(PROMPTS[:2], REPLIES[n : n + 2], reference=REFERENCES[:2])
            reward.update()
        return batches

    assert seen(0) == [[1, 1], [2, 2], [3, 3]]
    assert [len(batch) for batch in seen(3)] == [2, 4, 5]


def test_best_and_doubled():
    scored = [Scored("a", 1.0, 0.0, 1.0), Scored("b", 5.0, 9.0, -4.0), Scored("a", 3.0, 1.0, 2.0)]
    assert best([*scored, Scored("b", 0.0, 0.0, -math.inf), Scored("c", 0.0, 0.0, -math.inf)]) == [2, 1]
    some = [Scored("a", r, p, 0.0) for r, p in ((0.0, 0.0), (1.0, 3.0), (2.0, 1.0))]

    def advantages(gamma):
        left = torch.tensor([one.reward - gamma * one.penalty for one in some])
        return (left - left.mean()) / left.std(unbiased=False)

    once, twice = advantages(2.0), advantages(4.0)
    assert doubled(some, 2.0) == pytest.approx(float((twice - once).norm() / once.norm()), rel=1e-5)
    assert doubled(some, 0.1) is None


def test_it_rests_while_it_reads_and_learns(tiny, tokenizer):  # noqa: F811
    """Dropout, of the classifier or of the trainer's own base, is for those who train."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    encoder = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=1, **shape))
    base = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=128))
    policy = get_peft_model(base, LoraConfig(target_modules=["c_attn"], lora_dropout=0.5, fan_in_fan_out=True)).train()
    for given, module in ((encoder.train(), encoder), (OnBase(policy), policy)):
        reward = FPOReward(given, tokenizer, oracle=worth, settings=RewardModelConfig(input="pair"))
        assert module.training == (given is not encoder)  # its own model is nobody else's
        reward.fit(PROMPTS[:2], REPLIES[:2], REFERENCES[:2])
        module.train()
        once, twice = (reward.score(PROMPTS, REPLIES, reference=REFERENCES).reward for _ in range(2))
        assert torch.equal(once, twice)
        reward(PROMPTS, REPLIES, reference=REFERENCES)
        state, losses = reward.state_dict(), []
        for _ in range(2):
            reward.load_state_dict(state)
            losses.append(reward.update())
        assert losses[0] == losses[1]
        assert module.training


def test_scores_do_not_follow_a_trainers_autocast(classifier, tokenizer):  # noqa: F811
    reward = FPOReward(classifier, tokenizer, "practical", 1.0, "raw", "all", train="head")
    plain = reward.score(PROMPTS, REPLIES, reference=REFERENCES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = reward.score(PROMPTS, REPLIES, reference=REFERENCES)
    assert torch.equal(plain.reward, within.reward)
    assert torch.equal(plain.penalty, within.penalty)


def test_a_module_in_half_precision_is_read(classifier, tokenizer):  # noqa: F811
    wide = FPOReward(classifier, tokenizer).score(PROMPTS, REPLIES, reference=REFERENCES).reward
    half = (
        FPOReward(classifier.bfloat16(), tokenizer, oracle=worth).score(PROMPTS, REPLIES, reference=REFERENCES).reward
    )
    assert torch.allclose(wide, half, atol=0.1)


def test_an_oracle_may_say_nothing_of_a_whole_call(classifier, tokenizer):  # noqa: F811
    reward = FPOReward(classifier, tokenizer, oracle=lambda prompts, completions: [None] * len(prompts))
    with pytest.warns(UserWarning, match="could say nothing of a whole call"):
        found = reward(PROMPTS, REPLIES, reference=REFERENCES)
    assert None not in found
    assert reward.pairs == 0
    assert reward.update() is None


def test_equal_texts_with_other_answers_are_asked_about_apart(classifier, tokenizer):  # noqa: F811
    asked = []

    def oracle(prompts, completions, answer, **columns):
        assert "completion_ids" not in columns
        assert "trainer_state" not in columns
        asked.extend(zip(completions, answer, strict=True))
        return [float(said == one) for said, one in zip(completions, answer, strict=True)]

    reward = FPOReward(classifier, tokenizer, oracle=oracle)
    more = {"answer": ["yes", "no"], "completion_ids": [[1], [2, 3]], "trainer_state": object()}
    reward(["Is it? "] * 2, ["yes"] * 2, reference=["maybe"] * 2, **more)
    assert sorted(asked) == [("maybe", "no"), ("maybe", "yes"), ("yes", "no"), ("yes", "yes")]
    assert [pair["preference"] for pair in reward.state_dict()["replay"]] == pytest.approx([sigmoid(1), sigmoid(0)])


def test_one_completion_a_prompt_has_a_penalty(classifier, tokenizer):  # noqa: F811
    reward = FPOReward(classifier, tokenizer, "practical", 1.0)
    prompts = [f"{prompt} {n}" for n, prompt in enumerate(PROMPTS)]
    found = reward.score(prompts, REPLIES, reference=REFERENCES)
    assert float(found.penalty.std()) == pytest.approx(float(found.reward.std()), rel=1e-4)


def test_a_reference_function_is_asked_about_what_can_be_read(classifier, tokenizer):  # noqa: F811
    asked = []
    reward = FPOReward(classifier, tokenizer, reference=lambda prompts: asked.extend(prompts) or ["So."] * len(prompts))
    bad = [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.warns(UserWarning, match="cannot be scored"):
        found = reward.score(["Why?", bad, "Who?"], ["A.", "B.", "C."])
    assert asked == ["Why?", "Who?"]
    assert found.reward.isnan().tolist() == [False, True, False]


def test_a_state_of_another_reward_changes_nothing(classifier, tokenizer):  # noqa: F811
    head, whole = (FPOReward(classifier, tokenizer, oracle=worth, train=train) for train in ("head", "all"))
    before = head.model.weights()
    state = whole.state_dict()
    state["reward_model"]["weights"] = {n: w + 1 for n, w in state["reward_model"]["weights"].items()}
    with pytest.raises(RunError, match="its reward model trains other weights than the 1 of this one"):
        head.load_state_dict(state)
    relaxed = FPOReward(classifier, tokenizer, "relaxed", oracle=worth).state_dict()
    with pytest.raises(RunError, match="it is of the penalty relaxed, this reward's is practical"):
        head.load_state_dict(relaxed)
    assert all(torch.equal(weight, before[name]) for name, weight in head.model.weights().items())


def test_what_is_trained_is_what_the_penalty_is_over(classifier, tokenizer):  # noqa: F811
    everything = len(list(classifier.parameters()))
    for more, count in (
        ({"parameters": "all"}, everything),
        ({"penalty": PenaltyConfig(parameters="all")}, everything),
        ({"settings": RewardModelConfig(kind="classifier", train="all")}, everything),
        ({"parameters": "all", "train": "head"}, 1),
        ({}, 1),
    ):
        assert len(FPOReward(classifier, tokenizer, **more).model.trainable) == count


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule": "linear"}, "settings.schedule: a reward has no use for it, got 'linear'"),
        ({"every": 2}, "settings.every"),
        ({"fit_pairs": 3}, "settings.fit_pairs"),
        ({"dropout_when_scoring": True}, "settings.dropout_when_scoring"),
    ],
)
def test_settings_without_effect_are_refused(classifier, tokenizer, settings, said):  # noqa: F811
    with pytest.raises(RunError, match=said):
        FPOReward(classifier, tokenizer, settings=RewardModelConfig(**settings))


def test_a_base_that_moves_is_refused(tiny, tokenizer):  # noqa: F811
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    moving = get_peft_model(LlamaForCausalLM.from_pretrained(tiny), config)
    with pytest.raises(RunError, match="trains more than its adapters, so that the base"):
        FPOReward(OnBase(moving), tokenizer)
    still = get_peft_model(LlamaForCausalLM.from_pretrained(tiny), LoraConfig(target_modules=["q_proj"]))
    for given, said in (
        (OnBase(still, "Head"), "OnBase.kind: wanted one of head, lora, got 'Head'"),
        (still.get_base_model(), "outputs|no linear layer"),
        (OnBase(still.get_base_model()), "wanted a PEFT model with the adapter 'default'"),
    ):
        with pytest.raises(RunError, match=said):
            FPOReward(given, tokenizer)
    with pytest.raises(RunError, match="OnBase trains its head, got 'all'"):
        FPOReward(OnBase(still), tokenizer, train="all")


def test_a_trained_adapter_comes_back_with_its_own_settings(tiny, tmp_path, tokenizer):  # noqa: F811
    torch.manual_seed(3)
    model = LlamaForSequenceClassification.from_pretrained(tiny, num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "rm")
    settings = RewardModelConfig(lora_alpha=128, lora_rank=4, learning_rate=1e-2, input="reply")
    reward = FPOReward(str(tmp_path / "rm"), parameters="lora", oracle=worth, settings=settings)
    for _ in range(3):
        reward(PROMPTS, REPLIES, reference=REFERENCES)
        reward.update()
    reward.model.save(str(tmp_path / "kept"))
    wanted = reward.score(PROMPTS, REPLIES, reference=REFERENCES)
    again = FPOReward(str(tmp_path / "kept"), parameters="lora").score(PROMPTS, REPLIES, reference=REFERENCES)
    assert torch.allclose(again.reward, wanted.reward, rtol=1e-5)


def test_a_penalty_that_an_earlier_call_has_left_next_to_nothing_is_told(classifier, tokenizer):  # noqa: F811
    reward = FPOReward(classifier, tokenizer, oracle=worth)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(PROMPTS, REPLIES, reference=REFERENCES)
    state = reward.state_dict()
    state["penalty"]["penalty_variance"] *= 1e8
    reward.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"the penalty's spread is 0\.\d% of the reward's in this"):
        reward(PROMPTS, REPLIES, reference=REFERENCES)


def test_a_reward_model_that_nobody_trains_is_told(classifier, tokenizer):  # noqa: F811
    for watched, logged, told in ((False, True, True), (False, False, False), (True, True, False)):
        reward = FPOReward(classifier, tokenizer, "none", oracle=worth)
        if watched:
            reward.watch(torch.nn.Linear(1, 1))
        log = {"log_metric": lambda *_: None} if logged else {}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(9):
                reward(PROMPTS, REPLIES, reference=REFERENCES, **log)
        found = [str(one.message) for one in said if "FPOCallback" in str(one.message)]
        assert len(found) == told
        assert all("has not been trained in 8 calls: there is an oracle" in one for one in found)


def test_a_silent_oracle_is_told_where_its_labels_are_all_that_counts(classifier, tokenizer):  # noqa: F811
    reward = FPOReward(classifier, tokenizer, "relaxed", oracle=lambda prompts, completions: [None] * len(prompts))
    with pytest.warns(UserWarning, match="nothing of a whole call could be scored: the oracle"):
        assert reward(PROMPTS, REPLIES, reference=REFERENCES) == [None] * 6


def test_warnings_are_few(classifier, tokenizer):  # noqa: F811
    reward = FPOReward(classifier, tokenizer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(5):
            reward(PROMPTS, [3] * 6, reference=REFERENCES)
    assert len(told) == 1
