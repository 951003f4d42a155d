"""What a model's folder says of generation: its end tokens count, in replies and answers, and nothing else does."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from fpo_train.evaluate.answers import Answerer, Speaker
from fpo_train.policy.generation import end_tokens, ended

from .variants import PROMPTS, TOKENS, by_hand, loaded, replies, says_what_it_thinks, variant

TURN = 70  # a token of the tiny tokenizer that is no special one


def answerer(folder):
    speaker = Speaker(model=str(folder), dtype="float32", quantization="none", adapter=None)
    return Answerer({"left": speaker}, TOKENS, torch.device("cpu"))


def asking(folder, settings):
    """The folder with these settings in its generation_config.json."""
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def said(tiny, tmp_path_factory):
    """What the tiny model says by itself: drawn replies, answers."""
    folder = variant(tiny, tmp_path_factory.mktemp("plain"))
    (folder / "generation_config.json").unlink()
    return replies(loaded(folder), top_k=50).replies, answerer(folder).answer("left", [list(p.ids) for p in PROMPTS])


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 1, "encoder_no_repeat_ngram_size": 1, "min_length": 99, "sequence_bias": [[[5], 9.0]]},
        {
            "do_sample": True,
            "typical_p": 0.1,
            "epsilon_cutoff": 0.3,
            "eta_cutoff": 0.3,
            "min_p": 0.9,
            "temperature": 9.0,
        },
        {"forced_bos_token_id": 9, "token_healing": True, "renormalize_logits": True, "remove_invalid_values": True},
        {"watermarking_config": {"bias": 9.0}, "penalty_alpha": 0.6, "dola_layers": "low", "use_cache": False},
        {"output_scores": True, "return_dict_in_generate": True, "output_hidden_states": True, "prefill_chunk_size": 2},
        {"num_return_sequences": 3, "compile_config": {"mode": "none such"}, "cache_implementation": "none such"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_folder_s_settings_have_no_say(tiny, tmp_path, said, settings):
    folder = asking(variant(tiny, tmp_path), settings)
    assert replies(loaded(folder), top_k=50).replies == said[0]
    assert answerer(folder).answer("left", [list(p.ids) for p in PROMPTS]) == said[1]


def test_nor_have_those_that_a_model_s_config_held_once(tiny, tmp_path, said):
    folder = variant(tiny, tmp_path)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_cache": False, "num_beams": 4, "suppress_tokens": list(range(5, 200)), "repetition_penalty": 3.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert replies(loaded(folder), top_k=50).replies == said[0]
    assert answerer(folder).answer("left", [list(p.ids) for p in PROMPTS]) == said[1]


def test_a_model_s_own_settings_come_back_after_generation(tiny, tmp_path):
    policy = loaded(variant(tiny, tmp_path))
    own = policy.lm.generation_config
    own.top_k, own.max_time = 1, 1e-9
    says_what_it_thinks(policy)
    assert policy.lm.generation_config is own
    assert (own.top_k, own.max_time) == (1, 1e-9)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (2, None, (2,)),
        (2, TURN, (2, TURN)),
        ([2, 5], [TURN, 9], (2, 5, 9, TURN)),
        ([TURN, 5], None, (2, 5, TURN)),
        (None, [], (2,)),
        (-1, [2, 400, 10**6, -1], (2,)),
        (None, ["<|im_end|>", True, 3.0], (2,)),
    ],
)
def test_what_ends_a_reply(config, generation, ends):
    text = SimpleNamespace(vocab_size=400, eos_token_id=config)
    lm = SimpleNamespace(
        config=SimpleNamespace(eos_token_id=config, get_text_config=lambda: text),
        generation_config=GenerationConfig(eos_token_id=generation),
    )
    assert end_tokens(lm, SimpleNamespace(eos_token_id=2)) == ends


def test_a_reply_is_cut_behind_its_first_end():
    assert ended([5, TURN, 2, 7], (2, TURN)) == [5, TURN]
    assert ended([5, 6], (2, TURN)) == [5, 6]
    assert ended([], (2,)) == []


def likely(model):
    """TURN is said often."""
    model.lm_head.weight[TURN] = 0  # a logit of 0, among many below it


@pytest.mark.parametrize("place", ["generation_config", "config"])
def test_replies_and_answers_end_with_any_end_token(tiny, tmp_path, place):
    ends = [2, TURN] if place == "config" else 2
    folder = variant(tiny, tmp_path, change=likely, eos_token_id=ends)
    asking(folder, {"eos_token_id": [TURN]} if place == "generation_config" else {})
    policy = loaded(folder)
    assert (policy.eos, policy.ends) == (2, (2, TURN))
    rollout = replies(policy, candidates=40, max_new_tokens=24, min_new_tokens=3, top_k=400, top_p=1.0, temperature=2.0)
    by_turn = [row for row, reply in enumerate(rollout.replies) if reply[-1] == TURN]
    assert by_turn
    assert not [reply for reply in rollout.replies if set(reply[:-1]) & {2, TURN}]
    assert min(map(len, rollout.replies)) >= 3
    rows = rollout.sequences
    assert TURN not in policy.tokenizer.all_special_ids
    for row in by_turn:
        reply = rollout.replies[row]
        assert rows.ids[row][rows.reply[row]].tolist() == reply  # the end is among what is learnt
        assert rows.ids[row][rows.mask[row]].tolist()[-2:] == [TURN, 2]  # and the row ends as all rows do
        assert rollout.texts[row] == policy.decode(reply[:-1])  # an end is not part of the text, special token or not


def test_greedy_answers_end_with_any_end_token(tiny, tmp_path):
    plain = loaded(variant(tiny, tmp_path / "plain"))
    whole = by_hand(plain, PROMPTS[0], base=True, least=0)
    end = whole[2]
    folder = asking(variant(tiny, tmp_path / "ending"), {"eos_token_id": [2, end]})
    (answer,) = answerer(folder).answer("left", [list(PROMPTS[0].ids)])
    assert answer == whole[: whole.index(end)]
    says_what_it_thinks(loaded(folder))
