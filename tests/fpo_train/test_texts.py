"""Texts that are none, odd ones that are, and chat templates that cannot be used: one sentence each."""

import json

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from fpo_train.cli import main
from fpo_train.config import DataConfig
from fpo_train.data.prompts import check_template, read_prompts, render_prompts
from fpo_train.errors import RunError
from fpo_train.evaluate.questions import read_questions
from fpo_train.oracle.preferences import FileOracle, read_preferences

from .conftest import TEMPLATE
from .runs import arguments

NO_TEXTS = {
    '"a\\ud800"': "line 2 is not Unicode text: U+D800",
    '"\\udc00 b"': "line 2 is not Unicode text: U+DC00",
    '"a\\u0000b"': "line 2 holds a NUL character",
    "7": "line 2 has no text",
    "null": "line 2 has no text",
    '["a"]': "line 2 has no text",
    '"\\t\\r \\u2003"': "line 2 has no text",
    '"\\u0007\\u200b\\ufeff"': 'line 2 has no text under "prompt", but characters alone that cannot be seen',
    "[" * 100_000: "line 2 is not JSON",
    "1" * 5000: "line 2 is not JSON",
    "NaN": "line 2 has no text",
}


def readers():
    return (read_prompts, "data.prompts"), (read_questions, "questions"), (read_preferences, "oracle.file")


@pytest.mark.parametrize("value", NO_TEXTS, ids=range(len(NO_TEXTS)))
def test_what_is_no_text(tmp_path, value):
    path = tmp_path / "texts.jsonl"
    other = '"chosen": "a", "rejected": "b"}'
    path.write_text(f'{{"prompt": "fine", {other}\n{{"prompt": {value}, {other}\n')
    for read, setting in readers():
        with pytest.raises(RunError) as caught:
            read(path if read is read_preferences else str(path))
        told = str(caught.value)
        assert told.startswith(f"{setting}: {path} {NO_TEXTS[value]}")
        assert "\n" not in told
        told.encode()


def test_ids_and_kinds_that_no_file_can_hold(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"prompt": "a", "id": "\\ud800"}')
    for read in (read_prompts, read_questions):
        with pytest.raises(RunError, match=r'line 1 is not Unicode text: U\+D800 under "id"'):
            read(str(path))
    path.write_text('{"prompt": "a", "category": "\\udfff"}')
    with pytest.raises(RunError, match=r'U\+DFFF under "category"'):
        read_questions(str(path))


def test_files_of_other_systems_and_odd_texts_are_read(policy, tmp_path):
    texts = ["\U0001f468\u200d\U0001f469", "שלום \u202eabc", "e\u0301\u0323" * 9, "x" * 150, "a<|im_end|>b", "\ue000"]
    path = tmp_path / "texts.jsonl"
    rows = [
        json.dumps({"prompt": text, "chosen": "a", "rejected": ""}, ensure_ascii=n % 2 > 0)
        for n, text in enumerate(texts)
    ]
    path.write_bytes("\r\n".join(rows).encode("utf-8-sig"))
    assert [text for _, text in read_prompts(str(path))] == texts
    assert [one.text for one in read_questions(str(path))] == texts
    assert [one[0] for one in read_preferences(path)] == texts
    prompts = render_prompts(read_prompts(str(path)), 0, policy.tokenizer, 250, rows=400)
    assert len(prompts) == len(texts)
    for encoding in ("utf-16", "latin-1"):
        path.write_bytes('{"prompt": "é"}'.encode(encoding))
        for read, setting in readers():
            with pytest.raises(RunError, match=rf"{setting}: .* is not UTF-8 text"):
                read(path if read is read_preferences else str(path))


def test_what_a_model_said_comes_back_from_the_unlabelled_pairs(tmp_path):
    path = tmp_path / "people.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b\0\ufffd", "rejected": ""}) + "\n")
    assert FileOracle(path, path).pairs() == [("a", "b\0\ufffd", "", 1.0)]


def test_a_prompt_of_no_tokens(policy, monkeypatch):
    monkeypatch.setattr(policy.tokenizer, "chat_template", None)
    with pytest.raises(RunError, match=r"prompt 1 comes to no token at all under the tokenizer of policy\.model"):
        render_prompts([("1", "")], 0, policy.tokenizer, 200, rows=400)


TEMPLATES = {
    "{{ raise_exception('a system message is needed') }}": "TemplateError: a system message is needed",
    "{% for m in messages %}{{ m.content }": "TemplateSyntaxError",
    "{{ messages[0].content + 3 }}": "TypeError",
    "{{ tools.names }}{{ messages[7].content }}": "UndefinedError",
    "{% if add_generation_prompt %}{{ 1 // 0 }}{% endif %}": "ZeroDivisionError",
    "": "its chat template renders nothing",
    "{% for m in messages %}<|im_start|>{{ m.role }}{% for c in m.content %}{{ c['text'] }}{% endfor %}{% endfor %}": (
        "leaves out what the user says"
    ),
}


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_templates_that_cannot_be_used(policy, monkeypatch, template):
    monkeypatch.setattr(policy.tokenizer, "chat_template", template)
    with pytest.raises(RunError, match=r"^policy\.model \S+/tiny.*: its chat template") as caught:
        render_prompts([("1", "Why?")], 0, policy.tokenizer, 200, DataConfig(double_bos=True))
    assert TEMPLATES[template] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_templates_by_name(policy, monkeypatch):
    monkeypatch.setattr(policy.tokenizer, "chat_template", {"tool_use": TEMPLATE, "rag": TEMPLATE})
    with pytest.raises(RunError, match="no chat template named default; those it has: rag, tool_use"):
        check_template(policy.tokenizer, ["user"])
    monkeypatch.setattr(policy.tokenizer, "chat_template", {"default": TEMPLATE, "rag": "{{ nothing[3].at }}"})
    check_template(policy.tokenizer, ["user"])


def test_a_template_that_serves_users_alone_is_none_for_a_reward_model(policy, monkeypatch):
    users = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    monkeypatch.setattr(policy.tokenizer, "chat_template", users)
    check_template(policy.tokenizer, ["user"])
    with pytest.raises(RunError, match=r"^oracle\.model .* leaves out what the assistant says"):
        check_template(policy.tokenizer, ["user", "assistant"], "oracle.model")


@pytest.mark.parametrize("who", ["run", "eval", "reward_model", "oracle"])
def test_whoever_renders_says_so_before_anything_is_written(tiny, tmp_path, capfd, who):
    from .test_limits import classifier

    out = tmp_path / "out"
    if who in ("run", "eval"):
        broken = tmp_path / "broken"
        LlamaForCausalLM.from_pretrained(tiny).save_pretrained(broken)
    else:
        broken = classifier(tiny, tmp_path / "broken", "Llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{{ raise_exception('wanted\\nmore') }}"
    tokenizer.save_pretrained(broken)
    kind = "classifier" if who == "reward_model" else "gold"
    words = {
        "run": arguments(broken, out),
        "eval": ["eval", "--model", str(broken), "--out", str(out), "--limit", "2"],
    }.get(who, arguments(tiny, out, f"--{who}.kind", kind, f"--{who}.model", broken))
    assert main(words) == 1
    told = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"model {broken}: its chat template cannot render" in told
    assert "TemplateError: wanted" in told
    assert not out.exists()


def test_a_chat_template_of_ones_own(tiny, tmp_path, capfd):
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    )
    asked = ["--data.chat_template", tmp_path / "own.jinja", "--iterations", "1", "--logging.watched", "0"]
    seen = []
    from fpo_train.running import run as running

    whole = running.render_prompts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "render_prompts", lambda *given: seen.append((whole(*given), given[2])) or seen[0][0])
        assert main(arguments(tiny, tmp_path / "run", *asked)) == 0
    prompts, tokenizer = seen[0]
    first = next(iter(prompts))
    assert tokenizer.decode(first.ids) == f"[user] {first.text}\n[assistant]"
    assert main(arguments(tiny, tmp_path / "other", "--data.chat_template", tmp_path / "none.jinja")) == 1
    assert "none.jinja cannot be read; wanted auto, none or a Jinja file" in capfd.readouterr().err
