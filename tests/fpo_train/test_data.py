"""Prompts: the shipped set, the order, the rendering, the refusals."""

import json
import sys
from collections import Counter

import pytest

from fpo_train.config import DataConfig
from fpo_train.data.prompts import read_prompts, render, render_prompts
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


def test_the_first_so_many():
    assert read_prompts("questions", limit=3) == read_prompts("questions")[:3]


def test_long_prompts_are_shortened_with_the_header_kept_or_cut_off_as_published(policy, tmp_path):
    path = tmp_path / "long.jsonl"
    text = " ".join(f"word{n} é" for n in range(200))
    path.write_text(json.dumps({"prompt": text}) + "\n" + json.dumps({"prompt": "short"}))
    ids = {}
    for how in ("header", "right"):
        config = DataConfig(max_tokens=50, truncate=how)
        prompts = render_prompts(read_prompts(str(path)), 0, policy.tokenizer, 200, config)
        ids[how] = {p.name: p.ids for p in prompts.batch(0, 2)}
        assert ids[how]["2"] == tuple(render(policy.tokenizer, "short"))
        assert 40 < len(ids[how]["1"]) <= 50
    whole = policy.tokenizer.decode(render(policy.tokenizer, text))
    header = policy.tokenizer.decode(ids["header"]["1"])
    beginning, end = header.split("<|im_end|>")
    assert whole.startswith(beginning.rstrip("\ufffd"))
    assert end == "\n<|im_start|>assistant\n"
    assert whole.startswith(policy.tokenizer.decode(ids["right"]["1"]).rstrip("\ufffd"))
    with pytest.raises(RunError, match=r"prompt 1 takes \d+ tokens, but data.max_tokens leaves 50"):
        render_prompts(read_prompts(str(path)), 0, policy.tokenizer, 200, DataConfig(max_tokens=50))
    with pytest.raises(RunError, match="leaves 5 beside"):
        render_prompts(read_prompts(str(path)), 0, policy.tokenizer, 200, DataConfig(max_tokens=5, truncate="header"))


def test_the_published_script_s_second_bos(policy, monkeypatch):
    class WithBos:
        """A tokenizer that puts a BOS in front, as Llama's does."""

        chat_template = policy.tokenizer.chat_template
        apply_chat_template = policy.tokenizer.apply_chat_template

        def __call__(self, text):
            return {"input_ids": [policy.tokenizer.bos_token_id, *policy.tokenizer(text)["input_ids"]]}

    once, twice = (render(WithBos(), "What is a cat?", double) for double in (False, True))
    assert twice == [policy.tokenizer.bos_token_id, *once]


def test_prompts_of_a_hub_dataset(monkeypatch):
    module = type(sys)("datasets")
    rows = [{"prompt_id": "a", "prompt": "One?"}, {"prompt_id": "b", "prompt": "Two?"}, {"prompt": "Three?"}]

    def load_dataset(name, split):
        if split != "train_prefs":
            raise ValueError(f"Unknown split {split}")
        return rows

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_prompts("someone/some_set", "train_prefs", limit=2) == [("a", "One?"), ("b", "Two?")]
    with pytest.raises(RunError, match="split test, cannot be loaded: Unknown split"):
        read_prompts("someone/some_set", "test")
    rows[1]["prompt_id"] = "a"
    with pytest.raises(RunError, match="row 2 repeats the id a"):
        read_prompts("someone/some_set", "train_prefs")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RunError, match="install datasets"):
        read_prompts("someone/some_set", "train_prefs")


def test_epochs_and_streams_have_orders_of_their_own(policy):
    prompts = render_prompts(read_prompts("questions"), 0, policy.tokenizer, room=200)
    orders = [
        [p.name for p in prompts.batch(epoch, len(prompts), stream)] for epoch, stream in ((0, 0), (1, 0), (0, 1))
    ]
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1
