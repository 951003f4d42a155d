"""What `fpo-train attribute` reads and refuses, which reward models it asks, and what it sets beside influence."""

import json
import math
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

import fpo_kernels as fk
from fpo_train.attribute import baselines, inputs, model
from fpo_train.attribute.influence import State, influences
from fpo_train.cli import main
from fpo_train.config import AttributeConfig, ReadModelConfig, RewardModelConfig, RunConfig
from fpo_train.data.sources import load_sequence_classifier
from fpo_train.processes import Processes
from fpo_train.reward_model.classifier import ClassifierRewardModel

PAIR = {"prompt": "Name a river.", "chosen": "The Danube.", "rejected": "Water flows."}
OTHER = {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "Goodbye."}
ONE = ("--prompt", "Name a lake.", "--reply", "Geneva.")


@pytest.fixture
def ask(classifiers, tmp_path, monkeypatch, capfd):
    """Code and stderr of a command in a folder of its own, with a file of two pairs there."""
    monkeypatch.chdir(tmp_path)
    write("pairs.jsonl", PAIR, OTHER)

    def asked(*words, pairs="pairs.jsonl", name="bert", out="out"):
        known = ["--reward_model.model", str(classifiers.get(name, name)), "--pairs", pairs, "--out", out]
        code = main(["attribute", *known, "--embedder", "reward_model", *map(str, words)])
        said = capfd.readouterr()
        return code, said.err, said.out

    return asked


def write(path, *rows):
    with open(path, "w") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def rows(out="out"):
    with open(f"{out}/attributions.jsonl") as file:
        return [json.loads(line) for line in file]


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ((PAIR, "{"), "pairs: bad.jsonl line 2 is not JSON"),
        (
            (PAIR, without(OTHER, "rejected")),
            'pairs: bad.jsonl line 2 has no text under "rejected", it has prompt, chosen',
        ),
        ((without(PAIR, "prompt"),), 'pairs: bad.jsonl line 1 has no text under "prompt", it has chosen, rejected'),
        (({**PAIR, "preference": 2},), "bad.jsonl line 1: preference: wanted a number from 0 to 1, got 2"),
        ((), "pairs: bad.jsonl holds none"),
    ],
)
def test_pairs_that_are_none_are_named_before_a_model_is_loaded(ask, monkeypatch, content, told):
    monkeypatch.setattr("fpo_train.attribute.model.load", lambda *_: pytest.fail("loaded"))
    write("bad.jsonl", *content)
    code, err, _ = ask(*ONE, pairs="bad.jsonl")
    assert code == 1
    assert told in err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (({"prompt": "Hello"},), 'replies: bad.jsonl line 1 has no text under "reply", it has prompt'),
        (({"reply": "Hello"},), 'replies: bad.jsonl line 1 has no text under "prompt", it has reply'),
        (({"messages": [{"role": "user", "content": "Hi"}]},), 'bad.jsonl line 1 has no reply under "messages"'),
        ((), "replies: bad.jsonl holds none"),
    ],
)
def test_replies_that_are_none_are_named(ask, monkeypatch, content, told):
    monkeypatch.setattr("fpo_train.attribute.model.load", lambda *_: pytest.fail("loaded"))
    write("bad.jsonl", *content)
    code, err, _ = ask("--replies", "bad.jsonl")
    assert code == 1
    assert told in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "replies: wanted a file, or prompt and reply in its place, got neither"),
        ((*ONE, "--replies", "pairs.jsonl"), "got both"),
        (("--reply", "Geneva."), "prompt: reply needs it"),
        ((*ONE, "--dim", "100"), "dim: wanted 0 or a power of two from 64 to 16384, got 100"),
        ((*ONE, "--top", "-1"), "top: wanted 0 or more"),
        ((*ONE, "--damping", "1"), "damping: nothing here has a use for it; it goes with curvature true"),
        ((*ONE, "--seed", "1"), "seed: nothing here has a use for it"),
        ((*ONE, "--curvature", "--checkpoints", "kept"), "wanted curvature or checkpoints, got both"),
        ((*ONE, "--curvature", "--damping", "0"), "damping: wanted a number above 0"),
        ((*ONE, "--rows_at_once", "0"), "rows_at_once: wanted a number above 0"),
        ((*ONE, "--pairs", ""), "pairs: wanted a name"),
    ],
)
def test_what_makes_no_sense_is_wrong_usage(ask, words, told):
    code, err, _ = ask(*words)
    assert code == 2
    assert told in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--pairs", "nowhere.jsonl"), "pairs: no file nowhere.jsonl"),
        (("--split", "test"), "split: pairs.jsonl has none, got 'test'"),
        (("--parameters", "lora"), "parameters: the reward model has no lora weights"),
        (("--parameters", "no.*"), "parameters: 'no.*' names no weight of the reward model"),
        (("--parameters", "classifier.bias"), "parameters: the score head's bias alone, which cancels in every pair"),
        (("--checkpoints", "nowhere"), "checkpoints: nowhere holds none"),
        (("--checkpoints", "."), "checkpoints: .: wanted a folder of checkpoints alone"),
        (("--out", "pairs.jsonl"), "out: pairs.jsonl is a file; wanted a folder"),
        (("--reward_model.model", "./nowhere"), "reward_model.model ./nowhere: no such file or folder"),
    ],
)
def test_what_is_not_there_is_named(ask, words, told):
    code, err, _ = ask(*ONE, *words)
    assert code == 1
    assert told in err


def test_reward_models_that_are_none(ask, classifiers, tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(classifiers["bert"])
    shape = BertConfig.from_pretrained(classifiers["bert"]).to_dict()
    two = BertForSequenceClassification(BertConfig(**{**shape, "num_labels": 2}))
    for folder in (tmp_path / "two", tmp_path / "body"):
        tokenizer.save_pretrained(folder)
    two.save_pretrained(tmp_path / "two")
    two.bert.save_pretrained(tmp_path / "body")
    (tmp_path / "on_base").mkdir()
    save_file({"score.weight": torch.ones(1, 4)}, tmp_path / "on_base" / "head.safetensors")
    for name, told in (
        ("two", "has 2 outputs; wanted a reward model with one"),
        ("body", "its files hold no score head; wanted a trained reward model"),
        ("on_base", "is trained on a policy's base; wanted a classifier of its own"),
    ):
        code, err, _ = ask(*ONE, name=tmp_path / name)
        assert code == 1
        assert told in err
    store = fk.CheckpointStore(tmp_path / "kept")
    store.save(AutoModelForSequenceClassification.from_pretrained(classifiers["llama"]), step=1, learning_rate=1.0)
    code, err, _ = ask(*ONE, "--checkpoints", "kept")
    assert code == 1
    assert "kept/1.safetensors: the reward model has no " in err
    assert not (tmp_path / "out").exists()  # nothing is written before what can be refused was read


@pytest.mark.parametrize("train", ["head", "lora", "all"])
def test_the_reward_model_that_a_run_left(classifiers, ask, tmp_path, train):
    settings = RewardModelConfig(
        kind="classifier",
        model=str(classifiers["bert"]),
        train=train,
        input="pair",
        **({"lora_rank": 3, "lora_alpha": 5, "lora_targets": ("query", "value")} if train == "lora" else {}),
    )
    kept = ClassifierRewardModel(RunConfig(reward_model=settings), Processes(), torch.device("cpu"))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in kept.trainable.values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    kept.save(tmp_path / "reward_model")
    reading = kept.read_texts([("Name a lake.", "Geneva.")])
    wanted = float(kept.score(reading))
    said = ("--reward_model.input", "pair") if train == "all" else ()  # transformers' own files do not say
    over = ("--parameters", "trainable") if train == "lora" else ()
    assert ask(*ONE, *over, *said, name=tmp_path / "reward_model")[0] == 0
    assert all(row["reward"] == pytest.approx(wanted, abs=1e-5) for row in rows())
    if train != "all":
        torn = load_file(tmp_path / "reward_model" / model.TRAINED)
        save_file(dict(list(torn.items())[1:]), tmp_path / "reward_model" / model.TRAINED)
        assert "does not fit" in ask(*ONE, name=tmp_path / "reward_model")[1]


def test_numbers_that_are_none_are_said_to_be_the_models(ask, classifiers, tmp_path):
    broken = AutoModelForSequenceClassification.from_pretrained(classifiers["bert"])
    with torch.no_grad():
        broken.bert.embeddings.word_embeddings.weight.fill_(math.nan)
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(classifiers["bert"]).save_pretrained(tmp_path / "broken")
    code, err, _ = ask(*ONE, name=tmp_path / "broken")
    assert code == 1
    assert "what its score head reads is not finite numbers" in err


def test_a_folder_of_something_else_is_left_alone(ask, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "environment.json").write_text("{}")
    code, err, _ = ask(*ONE, out="run")
    assert code == 1
    assert "out: run holds something else; choose another folder" in err


def test_turns_and_messages_are_read(ask):
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Name a river."},
    ]
    said = {"role": "assistant", "content": "The Rhine. "}
    write("pairs.jsonl", {"chosen": [*turns, said], "rejected": [*turns, {**said, "content": "None."}]}, PAIR)
    whole = {"prompt": turns, "reply": "The Rhine."}
    write("replies.jsonl", whole, {"messages": [*turns, said]}, {"completion": [*turns, said], "id": "third"})
    code, err, out = ask("--replies", "replies.jsonl", "--system", "Rhyme.", "--top", "1")
    assert code == 0, err
    found = rows()
    assert [row["id"] for row in found if row["taught"] == "like"] == ["1", "2", "third"]
    assert len({json.dumps([row["prompt"], row["reply"], row["reward"]]) for row in found}) == 1
    assert found[0]["prompt"] == [{"role": "system", "content": "Rhyme."}, *turns]
    assert "The Rhine." in out


def test_of_the_rows_the_first_so_many_a_side(ask):
    write("pairs.jsonl", *[{**PAIR, "chosen": f"River {n}", "rejected": f"{n} other words"} for n in range(12)])
    code, err, out = ask(*ONE, "--top", "2", "--limit", "10")
    assert code == 0, err
    found = rows()
    for side, sign in (("like", 1), ("dislike", -1)):
        some = [row for row in found if row["taught"] == side]
        assert [row["rank"] for row in some] == list(range(1, len(some) + 1))
        assert all(row["influence"] * sign > 0 for row in some)
        assert [abs(row["influence"]) for row in some] == sorted([abs(row["influence"]) for row in some], reverse=True)
    assert 2 <= len(found) <= 4
    assert all(row["pair"] <= 10 and row["where"] == f"pairs.jsonl line {row['pair']}" for row in found)
    assert "of 10 pairs taught the reward model to like it" in out


def test_who_embeds_is_said_and_chosen(ask, monkeypatch, classifiers):
    monkeypatch.setenv("XDG_CACHE_HOME", "nothing")
    assert "what the reward model's head reads" in ask(*ONE, "--embedder", "auto")[2]
    monkeypatch.setattr(
        baselines,
        "load_sequence_classifier",
        lambda name, dtype: load_sequence_classifier(str(classifiers["bert"]), dtype),
    )
    for known in (False, True):
        code, err, out = ask(*ONE, "--embedder", "minilm")
        assert code == 0, err
        assert "MiniLM's means over tokens" in out
        assert known or len(rows()) == 2
    embedder = baselines.Embedder(torch.device("cpu"))
    together = embedder(["One.", "Two, and some more than that."])
    ids = embedder._tokenizer("One.", return_tensors="pt")
    alone = embedder.model(**ids).last_hidden_state[0].mean(0)
    assert torch.allclose(together[0], alone / alone.norm(), atol=1e-5)
    query = baselines.text_of("Name a lake.", "Geneva.")
    texts = [baselines.text_of(pair["prompt"], pair[side]) for pair in (PAIR, OTHER) for side in ("chosen", "rejected")]
    wanted = (embedder([query]) @ embedder(texts).T).view(2, 2).amax(1)
    assert {row["pair"]: row["embedding"] for row in rows()} == pytest.approx(
        dict(enumerate(wanted.tolist(), 1)), abs=1e-4
    )


def test_bm25_by_its_formula():
    documents = ["The Danube is a river.", "A river, a river!", "Hills"]
    words = [["the", "danube", "is", "a", "river"], ["a", "river", "a", "river"], ["hills"]]
    mean, query = 10 / 3, ["a", "danube", "river", "river", "rhine"]
    wanted = []
    for document in words:
        counts, score = Counter(document), 0.0
        for word in query:
            having = sum(word in one for one in words)
            idf = math.log(1 + (3 - having + 0.5) / (having + 0.5))
            score += idf * counts[word] * 2.5 / (counts[word] + 1.5 * (0.25 + 0.75 * len(document) / mean))
        wanted.append(score)
    assert baselines.Lexical(documents).scores("A DANUBE, river river: Rhine").tolist() == pytest.approx(wanted)
    assert baselines.Lexical(["", ""]).scores("word").tolist() == [0, 0]
    assert baselines.ranks(torch.tensor([[0.5, 2.0, 0.5, -1.0]])).tolist() == [[2, 1, 2, 4]]


def test_what_has_no_gradient_has_no_influence_and_no_cosine():
    state = State(
        replies=torch.ones(1, 3), margins=torch.zeros(2), pairs=lambda: iter([torch.eye(3)[:1], torch.zeros(1, 3)])
    )
    found = influences([state], torch.ones(2))
    assert found.influence.tolist() == [[0.5, 0.0]]  # c = −1/2: of use to what points where chosen does
    assert found.cosine[0].tolist() == pytest.approx([3**-0.5, 0])
    with pytest.raises(ValueError, match="states: wanted at least one"):
        influences([], torch.ones(2))


def test_a_pair_is_known_by_its_texts_alone():
    config = AttributeConfig(reward_model=ReadModelConfig(model="x"), pairs="x", reply="a", prompt="b")
    assert (config.sketched, inputs.read_replies(config)[0].prompt) == (0, "b")
    one = inputs.TrainingPair(where="1", prompt="a", chosen="b", rejected="c", preference=1.0)
    same = inputs.TrainingPair(where="2", prompt=(("user", "a"),), chosen="b", rejected="c", preference=0.2)
    other = inputs.TrainingPair(where="1", prompt="a", chosen="c", rejected="b", preference=1.0)
    assert one.digest == same.digest != other.digest
