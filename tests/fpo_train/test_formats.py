"""People's own data: every format gives the same prompts, turns reach whoever reads them, bad rows are told apart."""

import csv
import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_train.cli import main
from fpo_train.config import DataConfig
from fpo_train.data.prompts import Prompt, chat, read_prompts, render, render_prompts, shorten
from fpo_train.data.turns import fitted, messages_of
from fpo_train.errors import RunError
from fpo_train.evaluate.questions import read_questions
from fpo_train.oracle.preferences import FileOracle, read_preferences
from fpo_train.reward_model.inputs import TextInputs
from fpo_train.rollout import Written

from .conftest import TEMPLATE
from .runs import arguments, contents, rows

ROWS = [
    {"prompt": 'What is "tea", and why?', "note": "a,b"},
    {"prompt": "Zwei?", "note": ""},
    {"prompt": "三?", "note": "x"},
]
ASKED = [(str(n), row["prompt"]) for n, row in enumerate(ROWS, start=1)]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]},
    {"role": "assistant", "content": "Bye."},
]
TALK = (("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "And now?"))


def table(rows, delimiter=","):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_folder(path):
    path.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), path / "train-00000.parquet")


WRITERS = {
    "rows.jsonl": lambda path: path.write_text("\n".join(json.dumps(row) for row in ROWS)),
    "rows": lambda path: path.write_text("\n".join(json.dumps(row) for row in ROWS)),
    "lines.json": lambda path: path.write_text("\n".join(json.dumps(row) for row in ROWS)),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "texts.json": lambda path: path.write_text(json.dumps([row["prompt"] for row in ROWS])),
    "rows.csv": lambda path: path.write_text("\ufeff" + table(ROWS), encoding="utf-8", newline=""),
    "rows.TSV": lambda path: path.write_text(table(ROWS, "\t"), newline=""),
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "rows.txt": lambda path: path.write_text("\r\n".join(row["prompt"] for row in ROWS), newline=""),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(str(path)),
    "splits": lambda path: datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(path)),
    "folder": as_folder,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_prompts(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / name
    WRITERS[name](path)
    assert read_prompts(str(path)) == ASKED
    assert read_prompts(str(path), limit=2) == ASKED[:2]
    if path.is_file():
        assert [one.text for one in read_questions(str(path))] == [text for _, text in ASKED]


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS.map(lambda text: "a" + text), min_size=1))
def test_a_table_s_fields_come_back_to_the_letter(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("tables") / "prompts.csv"
    path.write_text(table([{"q": text, "other": "x,\n"} for text in texts]), encoding="utf-8", newline="")
    assert [text for _, text in read_prompts(str(path), column="q")] == texts


def test_messages_are_read_up_to_the_user_s_last_turn(tmp_path):
    path = tmp_path / "chats.json"
    single = [{"role": "user", "content": "Alone?"}, {"role": "assistant", "content": ""}]
    path.write_text(json.dumps([{"messages": CHAT, "prompt_id": "a"}, {"messages": single}, {"prompt": CHAT[:4]}]))
    assert read_prompts(str(path)) == [("a", TALK), ("2", "Alone?"), ("3", TALK)]
    asked = dict(read_prompts(str(path), system="Rhyme."))
    assert asked == {"a": TALK, "2": (("system", "Rhyme."), ("user", "Alone?")), "3": TALK}
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([{"talk": CHAT[:3]}, {"talk": CHAT[1:2]}]).save_to_disk(str(saved))
    assert read_prompts(str(saved), column="talk") == [("1", TALK[:2]), ("2", "Hello")]


NO_MESSAGES = {
    "[]": "no message in it is a user's",
    '[{"role": "assistant", "content": "a"}]': "no message in it is a user's",
    '[{"role": "tool", "content": "a"}]': "wanted messages as",
    '[{"from": "human", "value": "a"}]': "wanted messages as",
    '["a"]': "wanted messages as",
    '[{"role": "user", "content": " "}]': 'has no text under "messages"',
    '[{"role": "user", "content": [{"type": "image", "url": "x"}]}]': 'has no text under "messages"',
    '[{"role": "user"}]': 'has no text under "messages"',
}


@pytest.mark.parametrize("value", NO_MESSAGES)
def test_what_is_no_talk(tmp_path, value):
    path = tmp_path / "chats.jsonl"
    path.write_text(f'{{"messages": {value}}}\n')
    with pytest.raises(RunError) as caught:
        read_prompts(str(path))
    assert str(caught.value).startswith(f"data.prompts: {path} line 1 has no text under")
    assert NO_MESSAGES[value] in str(caught.value)


REFUSED = {
    ("a.csv", "question,answer\nWhy?,So.\n"): 'row 1 has no text under "prompt", it has question, answer; which of',
    ("a.csv", "prompt,note\nWhy?,a\nHow?\n"): "row 2, on line 3, has too many or too few fields; wanted",
    ("a.csv", 'prompt\n"Why?\nHow?\n'): "behind row 0 is no table",
    ("a.csv", "prompt\n"): "holds no prompts",
    ("a.csv", 'prompt,id\nWhy?,1\nHow?,1\n'): "row 2 repeats the id 1",
    ("a.json", '[{"prompt": "a"}, 7]'): 'row 2 has no text under "prompt"',
    ("a.json", '[{"prompt": "a"},'): "is not JSON",
    ("a.parquet", "PAR1"): "is no Parquet file",
    ("a.md", "Why?\n"): "line 1 is not JSON (Expecting value), as which it is read for its ending; read are JSON lines",
    ("a.txt", "\n"): "holds no prompts",
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), REFUSED)
def test_refusals_name_the_row_the_column_and_the_formats(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(RunError) as caught:
        read_prompts(str(path))
    assert f"data.prompts: {path} {REFUSED[name, content]}" in str(caught.value)


def test_settings_that_a_source_has_no_use_for(tmp_path):
    (tmp_path / "a.txt").write_text("Why?\n")
    saved = tmp_path / "saved"
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(saved))
    for path, options, told in (
        (tmp_path / "a.txt", {"split": "test"}, r"data\.split: .*a\.txt has none, got 'test'"),
        (tmp_path / "a.txt", {"subset": "main"}, r"data\.subset: .* has none, got 'main'"),
        (tmp_path / "a.txt", {"column": "q"}, 'line 1 has no text under "q", it has prompt'),
        (saved, {}, "saved has no split train; those it has: test"),
    ):
        with pytest.raises(RunError, match=told):
            read_prompts(str(path), **options)
    assert read_prompts(str(saved), "test") == ASKED


def test_a_package_that_is_absent_is_named(tmp_path, monkeypatch):
    import sys

    WRITERS["rows.parquet"](tmp_path / "rows.parquet")
    WRITERS["saved"](tmp_path / "saved")
    for name, package in (("rows.parquet", "pyarrow"), ("saved", "datasets")):
        for module in [one for one in sys.modules if one.partition(".")[0] == package]:
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(RunError, match=rf"to read .*{name}, install {package} \(pip install {package}"):
            read_prompts(str(tmp_path / name))


def test_bad_rows_are_skipped_and_counted(tiny, tmp_path, capfd):
    path = tmp_path / "mine.csv"
    path.write_text("prompt,note\nWhy?,\n,empty\nHow?\nWho?,fine\n" + "word " * 300 + ",long\n")
    out = tmp_path / "out"
    words = arguments(tiny, out, "--data.prompts", path, "--iterations", "1")
    assert main(words) == 1
    refused = f'data.prompts: {path} row 2 has no text under "prompt" (data.bad_rows skip leaves such rows out)'
    assert refused in capfd.readouterr().err
    assert not out.exists()
    assert main([*words, "--data.bad_rows", "skip"]) == 0
    told = capfd.readouterr().err
    assert f"data.prompts: 3 rows skipped, 2 prompts left; the first: {path} row 2 has no text" in told
    assert json.loads((out / "environment.json").read_text())["rows_skipped"] == 3
    path.write_text("question\nWhy?\n")
    assert main([*words, "--out", str(tmp_path / "none"), "--data.bad_rows", "skip"]) == 1
    assert "holds no prompts that can be read, the first complaint of 1 being" in capfd.readouterr().err


def test_turns_are_rendered_and_shortened_with_the_oldest_going_first(policy):
    tokenizer = policy.tokenizer
    wanted = tokenizer.apply_chat_template(messages_of(TALK), add_generation_prompt=True)["input_ids"]
    assert render(tokenizer, TALK) == wanted
    (prompt,) = render_prompts([("a", TALK)], 0, tokenizer, 200)
    assert prompt == Prompt.of("a", TALK, wanted)
    assert prompt.text == "System: Be brief.\n\nUser: Hello\n\nAssistant: Hi.\n\nUser: And now?"
    without = render(tokenizer, (TALK[0], TALK[3]))
    config = DataConfig(truncate="header")
    assert shorten(tokenizer, TALK, wanted, len(wanted) - 1, config) == without
    less = shorten(tokenizer, TALK, wanted, len(without) - 2, config)
    assert less is not None
    text = tokenizer.decode(less)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAnd")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert shorten(tokenizer, TALK, wanted, 3, config) is None
    opened = (("assistant", "Welcome."), *TALK[1:])  # a talk that the assistant opens
    row = fitted(tokenizer, opened, len(render(tokenizer, opened)) - 1, lambda t: {"input_ids": render(tokenizer, t)})
    assert row["input_ids"] == render(tokenizer, opened[1:])


def test_templates_that_do_not_serve_the_turns(policy, monkeypatch):
    tokenizer = policy.tokenizer
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    forgetful = "{{ '<|im_start|>' + messages[-1]['content'] }}"
    for template, told in ((refusing, "TemplateError: no system"), (forgetful, "leaves out what the system says")):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        with pytest.raises(RunError, match=rf"data\.prompts: prompt b: policy\.model .*{told}"):
            render_prompts([("a", "Why?"), ("b", TALK)], 0, tokenizer, 200)
        skipped = []
        assert len(render_prompts([("a", "Why?"), ("b", TALK)], 0, tokenizer, 200, skipped=skipped)) == 1
        assert len(skipped) == 1
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert render(tokenizer, TALK[:2]) == tokenizer("Be brief.\n\nHello")["input_ids"]
    with pytest.raises(RunError, match="prompt b has several turns, and the tokenizer has no chat template"):
        render_prompts([("a", TALK[:2]), ("b", TALK)], 0, tokenizer, 200)


@pytest.mark.parametrize("kind", ["chat", "pair", "reply"])
def test_what_a_reward_model_reads_of_turns(policy, kind):
    tokenizer = policy.tokenizer
    texts = TextInputs(tokenizer, kind, 200)
    texts.check([(TALK, "Now.")])
    row = texts.batch([(TALK, "Now.")], policy.device)["input_ids"][0].tolist()
    flat = "System: Be brief.\n\nUser: Hello\n\nAssistant: Hi.\n\nUser: And now?"
    wanted = {
        "chat": lambda: chat(tokenizer, messages_of(TALK, "Now."), return_dict=True),
        "pair": lambda: tokenizer(flat, "Now."),
        "reply": lambda: tokenizer("Now."),
    }
    assert row == wanted[kind]()["input_ids"]
    assert texts.batch([(TALK[1:2], "Now.")], policy.device)["input_ids"].shape[1] <= len(row)


SCORE = """
seen = []
def score(prompts, completions):
    seen.extend(prompts)
    return [float(len(one)) for one in completions]
"""


def test_a_run_on_turns_and_what_its_oracle_is_given(tiny, tmp_path, monkeypatch):
    import sys

    (tmp_path / "turns_taste.py").write_text(SCORE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": CHAT[1:2]}) + "\n")
    words = ("--oracle.kind", "function", "--oracle.function", "turns_taste:score", "--iterations", "1")
    assert main(arguments(tiny, tmp_path / "out", "--data.prompts", path, *words)) == 0
    seen = sys.modules.pop("turns_taste").seen
    assert messages_of(TALK) in seen
    assert "Hello" in seen
    assert all(one in ("Hello", messages_of(TALK)) for one in seen)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert "System: Be brief.\n\nUser: Hello\n\nAssistant: Hi.\n\nUser: And now?" in [one["prompt"] for one in samples]


def test_models_that_judge_read_every_turn(tiny, tmp_path, monkeypatch):
    from fpo_train.oracle import gold
    from fpo_train.reward_model import inputs

    from .test_limits import classifier

    read = {"gold": [], "reward_model": []}
    for name, module in (("gold", gold), ("reward_model", inputs)):

        def recorded(tokenizer, messages, *more, name=name, **options):
            read[name].append(messages)
            return chat(tokenizer, messages, *more, **options)

        monkeypatch.setattr(module, "chat", recorded)
    judge = classifier(tiny, tmp_path / "judge", "Llama")
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    words = ["--reward_model.kind", "classifier", "--reward_model.model", judge, "--iterations", "1"]
    words += ["--oracle.kind", "gold", "--oracle.model", judge, "--rollout.prompts", "1", "--data.prompts", path]
    assert main(arguments(tiny, tmp_path / "out", *words)) == 0
    for name, seen in read.items():
        whole = [one for one in seen if len(one) == len(TALK) + 1]
        assert len(whole) > 1, name
        assert all(one[:-1] == messages_of(TALK) and one[-1]["role"] == "assistant" for one in whole)
        assert all(one[0]["content"].startswith("One") for one in seen if one not in whole)  # what both are tried with


def test_preferences_in_conversations_and_tables(tmp_path):
    said = [{"role": "assistant", "content": "Good. "}], [{"role": "assistant", "content": "Bad."}]
    rows = [
        {"prompt": CHAT[:4], "chosen": said[0], "rejected": said[1]},
        {"chosen": CHAT[:4] + said[0], "rejected": CHAT[:4] + said[1], "preference": 0.75},
        {"prompt": "Hello", "chosen": [CHAT[1], *said[0]], "rejected": "Bad."},
    ]
    path = tmp_path / "people.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = [(TALK, "Good.", "Bad.", 1.0), (TALK, "Good.", "Bad.", 0.75), ("Hello", "Good.", "Bad.", 1.0)]
    assert read_preferences(path) == wanted
    assert read_preferences(path, "Rhyme.")[2][0] == (("system", "Rhyme."), ("user", "Hello"))
    lines = [{"prompt": "Hello", "chosen": "Good.", "rejected": "Bad.", "preference": p} for p in ("0.25", "")]
    (tmp_path / "people.csv").write_text(table(lines), newline="")
    assert read_preferences(tmp_path / "people.csv") == [("Hello", "Good.", "Bad.", p) for p in (0.25, 1.0)]
    for row, told in (
        ({**rows[1], "rejected": CHAT[:2] + said[1]}, "its replies stand behind different turns"),
        ({**rows[0], "chosen": CHAT[:4]}, 'has no reply under "chosen"'),
        ({**rows[0], "chosen": []}, 'has no reply under "chosen"'),
        ({"chosen": said[0], "rejected": said[1]}, "no message in it is a user's"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(RunError, match=told):
            read_preferences(path)


def test_unlabelled_turns_come_back_as_they_were_asked(tmp_path):
    import torch

    said = Written.of([TALK], ["Good."], ["Bad."], torch.device("cpu"))
    path = tmp_path / "people.jsonl"
    path.write_text(json.dumps({"prompt": "Hello", "chosen": "a", "rejected": "b"}))
    rows = torch.tensor([0]), torch.tensor([1])
    waiting = tmp_path / "unlabelled.jsonl"
    assert FileOracle(path, waiting, "Rhyme.").preference(said, None, *rows).isnan()
    assert json.loads(waiting.read_text())["prompt"] == messages_of(TALK)
    again = FileOracle(path, waiting, "Rhyme.")
    again.preference(said, None, *rows)
    assert len(waiting.read_text().splitlines()) == 1
    assert float(FileOracle(waiting, tmp_path / "other.jsonl", "Rhyme.").preference(said, None, *rows)) == 1.0


def test_a_run_on_turns_that_was_cut_off_goes_on_to_the_bit(tiny, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"prompt": "Hello"}) + "\n")
    words = ("--data.prompts", path, "--data.system", "Rhyme.", "--reward_model.replay_pairs", "2")
    assert main(arguments(tiny, tmp_path / "whole", *words, "--iterations", "2")) == 0
    assert main(arguments(tiny, tmp_path / "cut", *words, "--iterations", "1")) == 0
    assert main(arguments(tiny, tmp_path / "cut", *words, "--iterations", "2", "--resume")) == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert contents(tmp_path / "cut" / "policy") == contents(tmp_path / "whole" / "policy")
    told = main(arguments(tiny, tmp_path / "cut", "--data.prompts", path, "--iterations", "3", "--resume"))
    assert told == 1  # without the system prompt
