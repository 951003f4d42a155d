"""People's pairs and the policy's context: served, cut, dropped or refused, and counted."""

import json

import pytest

from fpo_train.cli import main
from fpo_train.config import DataConfig, OracleConfig, RunConfig
from fpo_train.data.prompts import render
from fpo_train.errors import RunError
from fpo_train.oracle.human import human_pairs
from fpo_train.oracle.preferences import FIELDS

from .runs import arguments

LONG = " ".join(f"word{n}" for n in range(200))


@pytest.fixture
def asked(policy, tmp_path):
    """`human_pairs` of rows under the settings of `data`, for a policy of 60 tokens."""
    policy.context = 60

    def ask(*rows, **data):
        path = tmp_path / "people.jsonl"
        named = [dict(zip(FIELDS, row, strict=True)) for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in named))
        config = RunConfig(oracle=OracleConfig(kind="file", file=str(path)), data=DataConfig(**data))
        return human_pairs(config, policy)

    return ask


def longest(pair):
    return len(pair.prompt.ids) + max(len(pair.chosen), len(pair.reference))


def test_a_pair_is_served_to_the_last_token_of_the_context(policy, asked):
    head, tail = len(render(policy.tokenizer, "")), len(policy.tokenizer("x")["input_ids"]) + 1  # the closing token
    fits = "x " * 60
    while head + len(policy.tokenizer(fits)["input_ids"]) + tail > 60:
        fits = fits[:-1]
    found = asked((fits, "x", ""))
    assert longest(found.pairs[0]) == 60
    assert found.counts == {"read": 1, "cut": 0, "dropped": 0}
    assert not found.told()
    with pytest.raises(RunError, match=r"oracle\.file: pair 1 .* prompt of 59 tokens, but .* context leaves 58 beside"):
        asked((fits + "x", "x", ""))
    with pytest.raises(RunError, match=r"pair 2 of .* tokens"):
        asked(("short", "x", "y"), (fits, "x", "x x x"))  # it is the longer reply that counts


def test_long_prompts_are_shortened_and_long_replies_dropped(policy, asked):
    rows = ("fine", "a", "b"), (LONG, "a", "b"), ("fine", "a", LONG)
    for how in ("header", "right"):
        found = asked(*rows, truncate=how)
        assert [pair.prompt.name for pair in found.pairs] == ["human-1", "human-2"]
        assert found.pairs[1].prompt.text == LONG
        assert longest(found.pairs[1]) <= 60
        assert found.pairs[1].chosen[-1] == policy.eos
        assert policy.tokenizer.decode(found.pairs[1].prompt.ids).endswith("assistant\n") == (how == "header")
        assert found.counts == {"read": 3, "cut": 1, "dropped": 1}
        assert found.told() == "oracle.file: of 3 pairs 1 were cut and 1 dropped, as too long"
    with pytest.raises(RunError, match=r"leaves 0 beside its longer reply of \d+; data\.truncate is refuse"):
        asked(rows[2])


def test_no_prompt_is_longer_than_the_data_section_says(asked):
    with pytest.raises(RunError, match=r"data\.max_tokens leaves 15 beside"):
        asked(("one two three four five six", "a", "b"), max_tokens=15)
    found = asked(("one two three four five six", "a", "b"), max_tokens=15, truncate="header")
    assert len(found.pairs[0].prompt.ids) <= 15
    assert found.counts["cut"] == 1


def test_an_end_that_people_wrote_is_not_doubled(policy, asked):
    (pair,) = asked(("q", "yes<|im_end|>", "no")).pairs
    assert pair.chosen.count(policy.eos) == pair.reference.count(policy.eos) == 1
    (other,) = policy.tokenizer("!", add_special_tokens=False)["input_ids"]
    policy.ends = (policy.eos, other)
    (pair,) = asked(("q", "yes!", "no")).pairs
    assert pair.chosen[-1] == other
    assert policy.eos not in pair.chosen
    assert pair.reference[-1] == policy.eos


def test_a_row_is_closed_behind_another_end_too(policy, asked):
    (other,) = policy.tokenizer("!", add_special_tokens=False)["input_ids"]
    policy.ends = (policy.eos, other)
    (pair,) = asked((LONG, "yes!", "no"), truncate="right").pairs
    assert policy.sequences([pair.prompt], [list(pair.chosen)]).mask.sum() == 60


def test_a_run_tells_of_them_or_refuses_before_it_writes(tiny, tmp_path, capfd):
    path, out = tmp_path / "people.jsonl", tmp_path / "run"
    rows = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in (LONG, "fine")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = arguments(tiny, out, "--oracle.kind", "file", "--oracle.file", path, "--iterations", "1")
    assert main(words) == 1
    assert "oracle.file: pair 1" in capfd.readouterr().err
    assert not out.exists()
    assert main([*words, "--data.truncate", "header"]) == 0
    assert "of 2 pairs 1 were cut and 0 dropped" in capfd.readouterr().err
    facts = json.loads((out / "environment.json").read_text())
    assert facts["human_pairs"] == {"read": 2, "cut": 1, "dropped": 0}
