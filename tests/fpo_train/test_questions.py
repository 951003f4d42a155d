"""An evaluation's questions: files, the shipped set, TruthfulQA, and what is refused before anything is written."""

import json
import sys
from types import SimpleNamespace

import pytest

from fpo_train.cli import main
from fpo_train.data.prompts import read_prompts
from fpo_train.evaluate.questions import read_questions


def command(out, questions, tiny):
    return ["eval", "--out", str(out), "--questions", str(questions), "--model", str(tiny)]


def test_question_files(tiny, tmp_path, capfd):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "One?"}\n\n{"prompt": "Two?", "category": "b", "id": "x"}\n', encoding="utf-8-sig")
    found = read_questions(str(path))
    assert [(one.name, one.text, one.category) for one in found] == [("1", "One?", ""), ("x", "Two?", "b")]
    assert [(one.name, one.text) for one in read_questions("questions")] == read_prompts("questions")
    out = tmp_path / "eval"
    for text, told in (
        ("", "holds none"),
        ('{"prompt": "One?"}\n{"prompt": 3}', 'line 2 has no text under "prompt"'),
        ("nonsense", "line 1 is not JSON"),
        ('{"prompt": "a", "id": 2}\n{"prompt": "b"}', "line 2 repeats the id 2"),
        ('{"prompt": "a\\ud800"}', "line 1 is not Unicode text"),
        (json.dumps({"id": "long", "prompt": "word " * 300}), "long takes"),
    ):
        path.write_text(text)
        assert main(command(out, path, tiny)) == 1
        message = capfd.readouterr().err.strip()
        assert told in message
        assert "\n" not in message
        assert not out.exists()
    assert main(command(out, "nowhere.jsonl", tiny)) == 1
    assert "no file nowhere.jsonl" in capfd.readouterr().err


@pytest.mark.parametrize("columns", [("question", "category"), ("Question", "Category")])
def test_truthfulqa(monkeypatch, columns):
    asked = []

    def load_dataset(*name, **options):
        asked.append((name, options))
        return [dict(zip(columns, row, strict=True)) for row in (("Is it?", "Law"), ("Or not?", "Myths"))]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = read_questions("truthfulqa", 5)
    assert [(one.name, one.text, one.category) for one in found] == [("1", "Is it?", "Law"), ("2", "Or not?", "Myths")]
    assert asked == [(("truthfulqa/truthful_qa", "generation"), {"split": "validation"})]


def test_truthfulqa_without_its_package(monkeypatch, tiny, tmp_path, capfd):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(command(tmp_path / "eval", "truthfulqa", tiny)) == 1
    assert "install datasets" in capfd.readouterr().err

    def offline(*_, **__):
        raise ConnectionError("no way to the hub\nat all")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    assert main(command(tmp_path / "eval", "truthfulqa", tiny)) == 1
    assert "cannot be loaded: no way to the hub" in capfd.readouterr().err
