"""A score head that comes trained is kept; a fresh one is fitted; the log, the folder and the report say which."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from fpo_train.cli import main
from fpo_train.errors import RunError
from fpo_train.reward_model.kept import load_classifier

from .runs import arguments


@pytest.fixture(scope="module")
def encoders(tiny, tmp_path_factory):
    """Folders of one BERT with a head that is somebody's, and without any."""
    tokenizer, folders = AutoTokenizer.from_pretrained(tiny), {}
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=1, **shape)
    for name, kind in (("trained", BertForSequenceClassification), ("bare", BertModel)):
        torch.manual_seed(3)
        folders[name] = tmp_path_factory.mktemp("encoders") / name
        kind(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def head_after(tiny, out, model, *more):
    """The score head that a run begins with: it is never trained in this one."""
    options = ["--reward_model.kind", "classifier", "--reward_model.model", model, "--reward_model.input", "pair"]
    options += ["--reward_model.every", "9", "--penalty.kind", "none", "--iterations", "1", *more]
    assert main(arguments(tiny, out, *options)) == 0
    return load_file(out / "reward_model" / "trained.safetensors")["classifier.weight"]


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("trained", (), "trained, from {model}; taken as it is; reward_model.fit always fits it anew"),
        ("trained", ("--reward_model.fit", "always"), "trained, from {model}; fitted anew on 6 pairs"),
        ("trained", ("--reward_model.fit_pairs", "0"), "trained, from {model}; taken as it is"),
        ("bare", (), "fresh; fitted on 6 pairs"),
        ("bare", ("--reward_model.fit_pairs", "0"), "fresh; taken as it is"),
    ],
)
def test_whose_score_head_a_run_begins_with(tiny, encoders, tmp_path, capfd, name, more, says):
    model, out = encoders[name], tmp_path / "run"
    head, says = head_after(tiny, out, model, *more), says.format(model=model)
    if name == "trained":
        own = load_file(model / "model.safetensors")["classifier.weight"]
        assert torch.equal(head, own) == ("fitted" not in says)
    assert f"reward model: its score head is {says}\n" in capfd.readouterr().err
    assert json.loads((out / "environment.json").read_text())["score_head"] == says
    page = (out / "report.html").read_text()
    assert f"before the first iteration: {says}." in page
    assert "The reward model reads prompt and reply as a pair of texts." in page
    assert "The oracle, which stands for the truth here, is how likely the frozen base model finds a reply." in page


def test_what_a_reward_model_without_a_chat_template_reads_is_said(tiny, encoders, tmp_path, capfd, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(encoders["trained"])
    tokenizer.chat_template = None
    model = tmp_path / "rm"
    shutil.copytree(encoders["trained"], model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(model)
    own = tmp_path / "lengths_of_replies.py"
    own.write_text("def score(prompts, replies):\n    return [len(reply) for reply in replies]\n")
    options = ["--reward_model.kind", "classifier", "--reward_model.model", model, "--iterations", "1"]
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            arguments(
                tiny, "run", *options, "--oracle.kind", "function", "--oracle.function", "lengths_of_replies.py:score"
            )
        )
        == 0
    )
    told = capfd.readouterr().err
    assert "reward model: it reads prompt, blank line and reply as one text, since its tokenizer has no chat" in told
    assert "the oracle, which stands for the truth, is the function lengths_of_replies.py:score" in told


def test_a_folder_without_a_tokenizer_is_refused(tiny, encoders, tmp_path, capfd):
    model = tmp_path / "rm"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(encoders["trained"] / name, model / name)
    assert (
        main(arguments(tiny, tmp_path / "run", "--reward_model.kind", "classifier", "--reward_model.model", model)) == 1
    )
    assert "its tokenizer has 5 special tokens and no other, so that it reads no text; put" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_gold_oracle_has_to_come_trained(tiny, encoders, tmp_path, capfd):
    options = ["--oracle.kind", "gold", "--oracle.model", encoders["bare"]]
    assert main(arguments(tiny, tmp_path / "run", *options)) == 1
    assert "its files hold no score head; wanted a trained reward model" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_reward_model_that_another_trained(tiny, encoders, tmp_path, capfd):
    trained, first, second = encoders["trained"], tmp_path / "first", tmp_path / "second"
    shared = ["--reward_model.kind", "classifier", "--reward_model.input", "pair", "--penalty.kind", "none"]
    asked = [*shared, "--reward_model.model", trained, "--iterations", "2", "--reward_model.learning_rate", "0.01"]
    assert main(arguments(tiny, first, *asked)) == 0
    weights = load_file(first / "reward_model" / "trained.safetensors")["classifier.weight"]
    assert not torch.equal(weights, load_file(trained / "model.safetensors")["classifier.weight"])
    head = head_after(tiny, second, first / "reward_model")
    assert torch.equal(head, weights)
    assert f"its score head is trained, from {first / 'reward_model'}; taken as it is" in capfd.readouterr().err
    assert json.loads((second / "reward_model" / "config.json").read_text())["model"] == str(trained)
    lost = ["--reward_model.model", first / "reward_model", "--iterations", "1", "--reward_model.fit_pairs", "0"]
    (first / "reward_model" / "trained.safetensors").write_bytes(b"cut")
    assert main(arguments(tiny, tmp_path / "third", *shared, *lost)) == 1
    assert "its trained.safetensors is damaged" in capfd.readouterr().err


def test_an_adapter_of_pefts_comes_with_its_score_head(tiny, tmp_path, capfd):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tiny)("Name a bird.")["input_ids"]])
    wanted = adapted.eval()(input_ids=ids).logits
    loaded = load_classifier(str(folder), torch.float32)
    assert loaded.trained
    assert torch.allclose(loaded.model.eval()(input_ids=ids).logits, wanted, rtol=1e-4)
    asked = ["--reward_model.kind", "classifier", "--reward_model.model", folder, "--penalty.kind", "none"]
    assert main(arguments(tiny, tmp_path / "run", *asked, "--iterations", "1")) == 0
    assert f"its score head is trained, from {folder}; taken as it is" in capfd.readouterr().err
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(RunError, match="its adapter cannot be put on"):
        load_classifier(str(folder), torch.float32)
