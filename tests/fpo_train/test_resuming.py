"""A resumed run is the run that was begun: the same day, prompts and models, and no row of it lost."""

import datetime
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification
from transformers import LlamaForSequenceClassification as LlamaScores

from fpo_train.cli import _config, build, main
from fpo_train.config import DataConfig, RunConfig
from fpo_train.data.prompts import read_prompts, render
from fpo_train.data.templates import known, now, pin
from fpo_train.errors import RunError
from fpo_train.report.page import _controlled as controlled
from fpo_train.running.run import run
from fpo_train.study.study import _dated as dated_study
from fpo_train.study.study import read_table
from tests.fpo_train.conftest import TEMPLATE
from tests.fpo_train.runs import arguments, contents, rows

# As Llama 3.2's: the day as a variable that stays free to be given, and the time, which is another at each start.
DATED = (
    "{% if not day is defined %}{% set day = strftime_now('%A, %d %b %Y') %}{% endif %}"
    "Today: {{ day }} {{ strftime_now('%H:%M:%S') }}\n" + TEMPLATE
)
FIRST, LATER = datetime.datetime(2026, 1, 1, 9, 30), datetime.datetime(2027, 5, 17, 23, 59, 58)


def at(moment, patch):
    """Let the clock that chat templates read stand still."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return moment

    patch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


@pytest.fixture(scope="module", autouse=True)
def _no_reports():
    """Drawing the figures would take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpo_train.running.run.write_report", lambda out: out / "report.html")
        yield


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Folders of a policy, a reward model and an oracle, whose chat templates all write day and time."""
    folder = tmp_path_factory.mktemp("dated")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = DATED
    shutil.copytree(tiny, folder / "policy")
    torch.manual_seed(2)
    config = AutoModelForCausalLM.from_pretrained(tiny).config
    config.num_labels = 1
    LlamaScores(config).save_pretrained(folder / "oracle")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=256, num_labels=1, **shape)
    BertForSequenceClassification(bert).save_pretrained(folder / "reward_model")
    for part in folder.iterdir():
        tokenizer.save_pretrained(part)
    return folder


def words(models, out, *more):
    parts = ("--reward_model.kind", "classifier", "--reward_model.model", models / "reward_model")
    parts += ("--oracle.kind", "gold", "--oracle.model", models / "oracle", "--penalty.parameters", "classifier.*")
    return arguments(models / "policy", out, *parts, *more)


@pytest.fixture(scope="module")
def begun(models, tmp_path_factory):
    """A run of two iterations on the first day, and the whole of it."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        at(FIRST, patch)
        assert main(words(models, folder / "whole")) == 0
        assert main(words(models, folder / "begun", "--iterations", 2)) == 0
    return folder


def test_a_run_goes_on_with_the_day_that_it_began_on(begun, models, tmp_path, monkeypatch):
    at(LATER, monkeypatch)
    out = shutil.copytree(begun / "begun", tmp_path / "run")
    assert main(words(models, out, "--resume", "true")) == 0
    assert rows(out) == rows(begun / "whole")
    assert (out / "samples.jsonl").read_bytes() == (begun / "whole" / "samples.jsonl").read_bytes()
    again = tmp_path / "again"  # its own configuration, which keeps the day, is the same run once more
    assert (
        main(["run", "--config", str(begun / "whole" / "config.yaml"), "--out", str(again), "--iterations", "1"]) == 0
    )
    assert rows(again) == rows(begun / "whole")[:1]


def test_the_day_is_read_wherever_a_template_asks(models, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(models / "policy")
    at(LATER, monkeypatch)
    assert now() == "2027-05-17T23:59:58"
    loose = render(tokenizer, "Hello")
    pin(tokenizer, "2026-01-01T09:30:00")
    pinned = render(tokenizer, "Hello"), render(tokenizer, "Hello", double_bos=True)
    for ids in pinned:
        assert "Thursday, 01 Jan 2026 09:30:00" in tokenizer.decode(ids)
    assert "Monday, 17 May 2027 23:59:58" in tokenizer.decode(loose)
    turns = [{"role": "user", "content": "Hello"}]
    assert "Today: never" in tokenizer.apply_chat_template(turns, tokenize=False, day="never")


@pytest.mark.parametrize(
    "template", [None, TEMPLATE, "{{ date_string | default('26 Jul 2024') }}" + TEMPLATE, {"default": TEMPLATE}]
)
def test_templates_without_a_clock_are_left_alone(tiny, template):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = template
    before = render(tokenizer, "Hello")
    pin(tokenizer, "2026-01-01")
    assert render(tokenizer, "Hello") == before
    assert "apply_chat_template" not in vars(tokenizer)


def test_dates_that_are_none():
    for date in ("", "2026-01-31", "2026-01-31T18:30:00"):
        DataConfig(date=date)
    with pytest.raises(ValueError, match=r"data\.date: wanted a day as 2026-01-31, or .*, got '31 Jan'"):
        DataConfig(date="31 Jan")


def test_runs_of_a_study_share_a_day(tmp_path, monkeypatch):
    at(FIRST, monkeypatch)
    first = dated_study(tmp_path, RunConfig())
    assert first.data.date == "2026-01-01T09:30:00"
    (tmp_path / "study.yaml").write_text(
        "seeds: [0]\npenalties: [none]\nrun:\n  data:\n    date: '2026-01-01T09:30:00'\n"
    )
    at(LATER, monkeypatch)
    assert dated_study(tmp_path, RunConfig()) == first
    assert [known(text) for text in ("2026-02-03", "31 Jan", "", None)] == ["2026-02-03", "", "", ""]
    assert dated_study(tmp_path, RunConfig(data=DataConfig(date="2026-02-03"))).data.date == "2026-02-03"


@pytest.mark.parametrize("told", ["", "seeds: [0]\npenal", "seeds: [0]\npenalties: [no", "- seeds"])
def test_a_study_s_description_cut_short(told, tmp_path):
    (tmp_path / "study.yaml").write_text(told)
    for ask in (lambda: dated_study(tmp_path, RunConfig()), lambda: read_table(tmp_path)):
        with pytest.raises(RunError, match=r"study\.yaml is damaged or cut short; put the whole file back"):
            ask()


def test_an_environment_s_summary_cut_short(tmp_path):
    (tmp_path / "simulate").mkdir()
    (tmp_path / "simulate" / "summary.json").write_text('{"linear": {')
    with pytest.raises(RunError, match=r"summary\.json is damaged; delete .*simulate, it will be made again"):
        controlled(tmp_path)


def refused(words, out, capfd):
    """What `fpo-train` says, in one sentence, that leaves the folder as it is."""
    before = contents(out)
    capfd.readouterr()
    assert main([*words, "--resume", "true"]) == 1
    message = capfd.readouterr().err.strip()
    assert "\n" not in message
    assert contents(out) == before
    return message


def doubled(path):
    """Other weights of the same shapes."""
    save_file({name: 2 * weight for name, weight in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("part", ["policy", "reward_model", "oracle"])
def test_a_model_of_other_weights_is_another_run(part, begun, models, tmp_path, capfd):
    path = models / part / "model.safetensors"
    whole = path.read_bytes()
    out = shutil.copytree(begun / "begun", tmp_path / "run")
    try:
        doubled(path)
        message = refused(words(models, out), out, capfd)
    finally:
        path.write_bytes(whole)
    wanted = f"resume: {part}.model {models / part} has other weights than when {out} began; put the former model back"
    assert message.endswith(wanted)


def test_another_template_or_tokenizer_is_another_run(begun, models, tmp_path, capfd):
    out = shutil.copytree(begun / "begun", tmp_path / "run")
    for part, text in (
        ("policy", f"resume: the prompts are rendered otherwise than when {out} began"),
        (
            "reward_model",
            f"resume: reward_model.model {models / 'reward_model'} has another tokenizer or chat template",
        ),
    ):
        path = models / part / "chat_template.jinja"
        whole = path.read_text()
        try:
            path.write_text(whole.replace("Today", "Now"))
            assert text in refused(words(models, out), out, capfd)
        finally:
            path.write_text(whole)


def test_the_runs_of_a_comparison_begin_on_one_model(tiny, tmp_path, capfd):
    model, out = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "run"
    more = "--compare", "none,practical", "--iterations", 1
    assert main(arguments(model, out, *more)) == 0
    shutil.rmtree(out / "practical")  # as if stopped before it began
    doubled(model / "model.safetensors")
    assert "policy.model" in refused(arguments(model, out, *more), out, capfd)
    shutil.copy(tiny / "model.safetensors", model)
    facts = json.loads((out / "environment.json").read_text())
    assert facts["models"].keys() == {"policy.model"}
    for folder in (out, out / "none"):  # of a version that knew nothing of models, days and heads that are kept
        (folder / "environment.json").write_text(json.dumps({"prompts_sha256": facts["prompts_sha256"]}))
        asked = yaml.safe_load((folder / "config.yaml").read_text())
        del asked["data"]["date"], asked["data"]["chat_template"], asked["reward_model"]["fit"]
        asked["reward_model"]["model"] = "minilm"
        (folder / "config.yaml").write_text(yaml.safe_dump(asked))
    assert main(arguments(model, out, *more, "--resume", "true")) == 0
    assert "models" not in json.loads((out / "environment.json").read_text())


def test_files_of_a_run_that_are_cut_short(begun, models, tmp_path, monkeypatch):
    monkeypatch.setattr("fpo_train.running.run.Workshop", None)  # all of this is found before a model is loaded
    out = shutil.copytree(begun / "begun", tmp_path / "run")
    config = _config(RunConfig, build().parse_args(words(models, out, "--resume", "true"))["run"])

    def told():
        before = contents(out)
        with pytest.raises(RunError) as caught:
            run(config)
        assert contents(out) == before
        return str(caught.value)

    for name in ("metrics.jsonl", "samples.jsonl", "config.yaml", "environment.json"):
        path = out / name
        whole = path.read_bytes()
        last = len(whole.splitlines(keepends=True)[-1])
        # a configuration's last two sections are a resumed run's to choose
        chosen = len(whole) - whole.find(b"\nmemory:") - 1
        ends = {".jsonl": (1, last, last // 2), ".json": (last,), ".yaml": range(chosen, len(whole), 29)}[path.suffix]
        for cut in (0, len(whole) // 2, *(len(whole) - end for end in ends)):
            path.write_bytes(whole[:cut])
            message = told()
            assert f"resume: {path} " in message
            assert "put the whole file back" in message
        path.write_bytes(whole)
    path = out / "memory.jsonl"
    path.write_bytes(b'{"iteration"\n' + path.read_bytes())
    assert f"{path} line 1 is not JSON; put the whole file back" in told()


@pytest.mark.parametrize("kind", ["none", "practical"])
def test_a_misspelt_parameter_of_the_penalty_writes_nothing(kind, tiny, tmp_path, capfd):
    out = tmp_path / "out"
    (tmp_path / "penalty.yaml").write_text(f"penalty: {{kind: {kind}, parameters: 'score.*,scor.weight'}}\n")
    assert main(arguments(tiny, out, "--config", tmp_path / "penalty.yaml")) == 1
    assert "penalty.parameters: 'scor.weight' names no weight" in capfd.readouterr().err
    assert not out.exists()


def test_answers_go_on_with_the_day_and_the_base_that_they_began_with(tiny, tmp_path, capfd):
    model, out = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "eval"
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}" + template)
    settings = {"out": out, "model": model, "max_new_tokens": 6, "limit": 4, "rows_at_once": 3}
    command = ["eval", *[word for key, value in settings.items() for word in (f"--{key}", str(value))]]
    assert main(command) == 0
    path, environment = out / "answers.jsonl", out / "environment.json"
    whole, facts = path.read_bytes(), json.loads(environment.read_text())
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    environment.write_text(json.dumps(facts | {"date": "2001-02-03T04:05:06"}))
    assert main(command) == 0
    assert path.read_bytes() != whole  # another second would have been read
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    environment.write_text(json.dumps(facts))
    assert main(command) == 0
    assert path.read_bytes() == whole
    doubled(model / "model.safetensors")
    path.write_bytes(b"")
    capfd.readouterr()
    assert main(command) == 1
    assert f"out: {model} has other weights or another tokenizer than when the answers" in capfd.readouterr().err
    assert path.read_bytes() == b""


def test_prompts_are_iterated_in_their_order(prompts):
    assert [prompt.text for prompt in prompts] == [text for _, text in read_prompts("questions")]
