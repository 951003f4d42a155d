"""docs/folder.md names every file and every key that runs leave, and none besides."""

import json
import re
from pathlib import Path

import pytest

from fpo_train.cli import main

from .runs import arguments
from .variants import variant

PAGE = (Path(__file__).parent.parent.parent / "docs" / "folder.md").read_text(encoding="utf-8")
FILES = ("metrics.jsonl", "samples.jsonl", "watched.jsonl", "memory.jsonl", "environment.json")


def documented(section):
    """What the first column of a section's table names."""
    whole = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0] if section else PAGE.split("\n## ")[0]
    cells = [line.split("|")[1] for line in whole.splitlines() if line.startswith("| `")]
    found = [one for cell in cells for one in re.findall(r"`([^`]+)`", cell)]
    assert len(found) == len(set(found))
    return set(found)


def keys(row):
    """A row's keys, those of what it holds joined to them by dots."""
    nested = {key: value for key, value in row.items() if isinstance(value, dict)}
    return {key for key in row if key not in nested} | {
        f"{key}.{one}" for key, value in nested.items() for one in keys(value)
    }


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """A run of models of their own with an audit, and one of people's preferences that goes on with its adapter."""
    folder = tmp_path_factory.mktemp("page")
    scorer = variant(tiny, folder / "scorer", model="LlamaForSequenceClassification", num_labels=1, pad_token_id=2)
    people = folder / "people.jsonl"
    people.write_text('{"prompt": "Name a river.", "chosen": "The Danube.", "rejected": "No."}\n')
    models = "--reward_model.kind", "classifier", "--reward_model.model", scorer
    gold = "--oracle.kind", "gold", "--oracle.model", scorer, "--logging.audit", "true"
    file = "--oracle.kind", "file", "--oracle.file", people
    (folder / "asked.csv").write_text("prompt\nName a river.\n \nWhy?\n")
    data = "--data.prompts", folder / "asked.csv", "--data.bad_rows", "skip"
    for base, out, more in ((tiny, "models", (*models, *gold)), (folder / "models/policy", "people", (*file, *data))):
        assert main(arguments(base, folder / out, "--iterations", 1, *more)) == 0
    return folder / "models", folder / "people"


@pytest.mark.parametrize("file", FILES)
def test_every_key_is_documented_and_no_other(folders, file):
    found = set()
    for folder in folders:
        text = (folder / file).read_text(encoding="utf-8")
        for row in [json.loads(text)] if file == "environment.json" else map(json.loads, text.splitlines()):
            found |= keys(row)
    assert found == documented(file)


def test_every_file_is_documented(folders):
    found = {path.name + "/" * path.is_dir() for folder in folders for path in folder.iterdir()}
    assert found == documented("") - {"judge.jsonl"}


def test_links_between_pages_lead_somewhere():
    root = Path(__file__).parent.parent.parent
    for page in (root / "README.md", *(root / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), (page, link)
