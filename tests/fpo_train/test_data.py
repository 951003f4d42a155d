"""Prompts: the shipped set, the order, the rendering, the refusals."""

import json
from collections import Counter

import pytest

from fpo_train.data import read_prompts, render, render_prompts
from fpo_train.errors import RunError


def test_the_shipped_questions():
    rows = read_prompts("questions")
    assert len(rows) >= 150
    assert len({text for _, text in rows}) == len({name for name, _ in rows}) == len(rows)
    kinds = Counter(name.split("-")[0] for name, _ in rows)
    assert set(kinds) == {"misconception", "fact", "instruction"}
    assert all(text.strip() == text and "\n" not in text for _, text in rows)


def test_the_order_follows_from_the_seed_and_the_iteration_alone(policy):
    def names(seed, iterations, size=7):
        prompts = render_prompts(read_prompts("questions"), seed, policy.tokenizer, room=200)
        return [p.name for i in iterations for p in prompts.batch(i, size)]

    assert names(0, range(5)) == names(0, range(5))
    assert names(0, [3]) == names(0, range(5))[21:28]
    assert names(0, range(5)) != names(1, range(5))
    epoch = names(0, range(27))[: len(read_prompts("questions"))]
    assert len(set(epoch)) == len(epoch)


def test_the_chat_template_is_applied_once(policy):
    ids = render(policy.tokenizer, "What is a cat?")
    text = policy.tokenizer.decode(ids)
    assert text == "<|im_start|>user\nWhat is a cat?<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(policy.tokenizer.bos_token_id) == 2  # one a turn, none in front


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ("\n\n", "holds no prompts"),
        ('{"prompt": "fine"}\n{"prompt": \n', "line 2 is not JSON"),
        ('{"text": "no prompt"}\n', 'line 1 has no text under "prompt"'),
        ('{"prompt": "  "}\n', 'line 1 has no text under "prompt"'),
        ("[1]\n", 'line 1 has no text under "prompt"'),
    ],
)
def test_files_that_are_no_prompts(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(RunError, match=message):
        read_prompts(str(path))


def test_a_missing_file():
    with pytest.raises(RunError, match=r"no file nowhere\.jsonl"):
        read_prompts("nowhere.jsonl")


def test_a_prompt_longer_than_the_context(policy, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"id": "long", "prompt": "word " * 300}))
    with pytest.raises(RunError, match=r"prompt long takes \d+ tokens, but the model's context leaves 200"):
        render_prompts(read_prompts(str(path)), 0, policy.tokenizer, room=200)
