"""A name that leads nowhere is told at once: neither the hub's client nor torch is asked first."""

import subprocess
import sys
from pathlib import Path

import httpx
import huggingface_hub
import huggingface_hub.constants
import pytest

from fpo_train.cli import main
from fpo_train.data import sources
from fpo_train.data.places import look_on_hub, rows_at
from fpo_train.errors import RunError

MODELS = (Path(__file__).parent.parent.parent / "docs" / "models.md").read_text(encoding="utf-8")


class Hub:
    """Answers one short question, and counts them."""

    def __init__(self, answer):
        self.answer, self.asked = answer, 0

    def head(self, url, headers, timeout):
        self.asked, self.url = self.asked + 1, url
        assert timeout <= 10
        if isinstance(self.answer, Exception):
            raise self.answer
        status, code = self.answer
        return httpx.Response(status, headers={"X-Error-Code": code} if code else {})


OTHER = "(another library's)"  # the hub's client has had two


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def answering(answer):
        one = Hub(answer)
        monkeypatch.setattr(huggingface_hub, "get_session", lambda: one)
        return one

    return answering


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (httpx.ConnectError("no way there"), "no such folder here, and the hub cannot be asked for it (no way there)"),
        (OSError(OTHER[1:-1]), f"the hub cannot be asked for it {OTHER}"),
        ((404, "RepoNotFound"), "the hub has none of that id"),
        ((401, ""), "does not show it without a login"),
        ((403, "GatedRepo"), "it is gated; ask for access on its page"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_one_sentence_after_one_question(hub, capfd, tmp_path, answer, says):
    one = hub(answer)
    assert main(["run", "--policy.model", "someone/something", "--out", str(tmp_path / "run")]) == 1
    told = capfd.readouterr().err
    assert "policy.model someone/something: " in told
    assert says in told
    assert told.strip().split("something: ")[1].replace("(no way there)", "(…)").replace(OTHER, "(…)") in MODELS
    assert one.asked == 1
    assert not (tmp_path / "run").exists()


def test_a_revision_is_asked_for(hub, capfd, tmp_path):
    one = hub((404, "RevisionNotFound"))
    assert main(["run", "--policy.model", "someone/something@v9", "--out", str(tmp_path / "run")]) == 1
    assert "something@v9: the hub has someone/something, but no revision v9 of it" in capfd.readouterr().err
    assert "/resolve/v9/config.json" in one.url
    found = sources.resolve("someone/something@v9")
    assert (found.location, found.arguments) == ("someone/something", {"revision": "v9"})


@pytest.mark.parametrize("answer", [(200, ""), (302, ""), (404, "EntryNotFound")])
def test_what_may_be_there_is_left_to_transformers(hub, answer):
    one = hub(answer)
    look_on_hub("someone/something", "someone/something")
    assert one.asked == 1


def test_no_name_of_a_model(hub):
    one = hub((200, ""))
    with pytest.raises(RunError, match="it can be no id on the hub"):
        look_on_hub("someone/some thing", "someone/some thing")
    assert one.asked == 0


def test_a_path_below_a_folder_that_is_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.resolve("models/mine").on_hub
    (tmp_path / "models").mkdir()
    with pytest.raises(RunError, match="model models/mine: no such file or folder"):
        sources.resolve("models/mine")
    with pytest.raises(RunError, match="no file models/mine and no shipped set"):
        rows_at("models/mine", "data.prompts")


def test_a_missing_prompt_file_is_told_before_torch_is_loaded(tmp_path):
    code = (
        "import sys; from fpo_train.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(10 * ('torch' in sys.modules) + code)"
    )
    words = ["run", "--data.prompts", "nowhere.jsonl", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    told = "fpo-train run: error: data.prompts: no file nowhere.jsonl and no shipped set of that name; read are "
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
