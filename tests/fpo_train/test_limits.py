"""What models can read: contexts, tokens without a row, padding; told, or right, and never an IndexError."""

import json

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from fpo_train.cli import main
from fpo_train.config import OracleConfig, RewardModelConfig, RunConfig
from fpo_train.data.limits import check_tokens, context_of, pad_id
from fpo_train.data.sources import load_causal_lm
from fpo_train.errors import RunError
from fpo_train.oracle import load_gold
from fpo_train.processes import Processes
from fpo_train.reward_model import load_reward_model
from fpo_train.reward_model.inputs import TextInputs
from fpo_train.rollout import Readings, Rollout

from .runs import arguments

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.mark.parametrize(
    ("kind", "settings", "wanted"),
    [
        ("GPT2", {"n_positions": 33, "n_embd": 16, "n_layer": 1, "n_head": 2}, 33),
        ("Mpt", {"max_seq_len": 40, "d_model": 16, "n_layers": 1, "n_heads": 2}, 40),
        ("Bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
        ("XLNet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}, None),
        ("OPT", {**SHAPE, "ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 30}, 30),
        ("Roberta", {**SHAPE, "max_position_embeddings": 34}, 32),
        ("MPNet", {**SHAPE, "max_position_embeddings": 34}, 32),
        ("Bert", {**SHAPE, "max_position_embeddings": 34}, 34),
    ],
)
def test_the_context_wherever_it_is_stated(kind, settings, wanted):
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings))
    assert context_of(model) == wanted


def test_padding_takes_what_has_a_row():
    assert pad_id(5, 3, rows=4) == 3
    assert pad_id(-1, None, rows=4) == 0
    assert pad_id(None, 0, rows=4) == 0


def classifier(tiny, folder, kind, config=None, template=True, special=None, **settings):
    """A folder of a tiny classifier; `config` is written over its configuration, `special` over its tokenizer's."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    if not template:
        tokenizer.chat_template = None
    settings = {"vocab_size": 400, "num_labels": 1, "initializer_range": 0.3, **SHAPE, **settings}
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(
        getattr(transformers, f"{kind}Config")(**settings)
    )
    for p in model.parameters():
        p.data.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.add_special_tokens(special or {})
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    return folder


def scores(policy, folder, texts, **settings):
    """Of the reward model: all texts in a batch, and each alone."""
    settings = {"kind": "classifier", "model": str(folder), "input": "reply", **settings}
    model = load_reward_model(RunConfig(reward_model=RewardModelConfig(**settings)), policy, Processes(), policy.device)
    model.check([("q", texts[0])])
    whole = model.read_texts([("q", text) for text in texts], 0)
    alone = [model.read_texts([("q", text)], 0) for text in texts]
    return model.score(whole), torch.cat([model.score(one) for one in alone]), model


def gold(policy, folder):
    return load_gold(policy, RunConfig(oracle=OracleConfig(kind="gold", model=str(folder))))


def utilities(policy, prompts, oracle, replies):
    rollout = Rollout.of(policy, prompts.batch(0, 1), [*replies, [50]], candidates=len(replies))
    return oracle.utility(rollout, Readings(policy, rollout), torch.arange(len(replies) + 1)), rollout


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"special": {"pad_token": "<pad>"}}),  # 400, of 400 rows
        ("Llama", {"config": {"pad_token_id": 400}}),  # torch would not make such a table
        ("Llama", {"config": {"pad_token_id": -1}, "special": {"pad_token": "<pad>"}}),
        ("Bert", {"config": {"pad_token_id": 4000}, "special": {"pad_token": "<pad>"}}),
        ("Roberta", {"pad_token_id": 1}),  # the tokenizer pads with 2; positions are counted over what is not 1
        ("MPNet", {"pad_token_id": 1, "special": {"pad_token": "<pad>"}}),
    ],
)
def test_padding_changes_no_score(tiny, policy, prompts, tmp_path, kind, changes):
    folder = classifier(tiny, tmp_path / "model", kind, **changes)
    texts = ["Yes.", "A longer one, <|im_start|>with a token that pads, and 1 2 3", ""]
    together, alone, _ = scores(policy, folder, texts)
    assert together.tolist() == pytest.approx(alone.tolist(), abs=1e-5)
    assert len(set(together.tolist())) == 3
    oracle = gold(policy, folder)
    found, rollout = utilities(policy, prompts, oracle, [[40, 41, 42, 43], [44] * 9])
    for value, text in zip(found.tolist(), rollout.texts, strict=True):
        ids = oracle._tokens(rollout.prompts[0].text, text)["input_ids"]
        with torch.no_grad():
            assert value == pytest.approx(float(oracle._model(input_ids=torch.tensor([ids])).logits), abs=1e-5)


def test_encoders_whose_positions_begin_behind_padding(tiny, policy, prompts, tmp_path, capfd):
    folder = classifier(tiny, tmp_path / "model", "Roberta", max_position_embeddings=34, pad_token_id=1)
    texts = ["word " * 100, "other " * 100, "short"]
    together, alone, model = scores(policy, folder, texts)
    assert together.tolist() == pytest.approx(alone.tolist(), abs=1e-5)
    assert model.read_texts([("q", texts[0])], 0).batch["input_ids"].shape[1] == 32
    assert "is cut to 32, as all longer ones are" in capfd.readouterr().err
    scores(policy, folder, texts, input="pair")
    scores(policy, folder, texts, input="chat")
    oracle = gold(policy, folder)
    utilities(policy, prompts, oracle, [[44] * 3, [44] * 60])
    assert oracle.counts["too_long"] >= 1


def test_models_that_read_padding_or_score_tokens(tiny, policy, prompts, tmp_path):
    small = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
    folder = classifier(tiny, tmp_path / "model", "XLNet", **small)
    with pytest.raises(RunError, match=r"^reward_model\.model \S+: reads padding behind a text, in spite of the mask"):
        scores(policy, folder, ["One"])
    oracle = gold(policy, folder)
    oracle.check(["q"])  # it is then read one text at a time
    found, rollout = utilities(policy, prompts, oracle, [[40, 41], [44] * 9])
    for value, text in zip(found.tolist(), rollout.texts, strict=True):
        ids = oracle._tokens(rollout.prompts[0].text, text)["input_ids"]
        with torch.no_grad():
            assert value == pytest.approx(float(oracle._model(input_ids=torch.tensor([ids])).logits), abs=1e-5)
    folder = classifier(tiny, tmp_path / "other", "CTRL", n_embd=16, n_layer=1, n_head=2, dff=16, pad_token_id=2)
    with pytest.raises(RunError, match="scores every token and not the text; wanted one score a text"):
        scores(policy, folder, ["One"])


def test_no_bound_and_too_small_a_bound(tiny, policy, tmp_path):
    folder = classifier(tiny, tmp_path / "model", "Bloom", hidden_size=16)
    together, alone, _ = scores(policy, folder, ["word " * 300, "short"])
    assert together.tolist() == pytest.approx(alone.tolist(), abs=1e-4)
    with pytest.raises(RunError, match=r"reward_model\.max_tokens: 1 tokens .* beside its 1 special tokens; wanted 2"):
        TextInputs(policy.tokenizer, "pair", 1, policy.eos)
    scores(policy, folder, ["word " * 300, "short"], max_tokens=1)


@pytest.fixture(scope="module")
def zebra(tiny, tmp_path_factory):
    """The tiny model with a token that its tokenizer was given later, and the model was not."""
    folder = tmp_path_factory.mktemp("models") / "zebra"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["zebra"])
    transformers.LlamaForCausalLM.from_pretrained(tiny).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("who", ["prompt", "chosen", "reward", "gold", "question"])
def test_a_token_without_a_row_is_named_before_anything_is_written(tiny, zebra, tmp_path, capfd, who):
    out, model = tmp_path / "run", tiny if who in ("reward", "gold") else zebra
    plain, odd = {"prompt": "a horse"}, {"prompt": "a zebra"}
    prompts = lines(tmp_path / "prompts.jsonl", plain, plain if who == "chosen" else odd)
    people = lines(tmp_path / "people.jsonl", {**plain, "chosen": "yes", "rejected": "a zebra"})
    more = {
        "prompt": ("data.prompts: prompt 2",),
        "chosen": ("oracle.file: pair 1", "--oracle.kind", "file", "--oracle.file", people),
        "reward": ("reward_model.model", "--reward_model.kind", "classifier", "--reward_model.model"),
        "gold": ("oracle.model", "--oracle.kind", "gold", "--oracle.model"),
        "question": ("questions: 2",),
    }[who]
    if who in ("reward", "gold"):
        folder = classifier(tiny, tmp_path / "model", "Llama")
        AutoTokenizer.from_pretrained(zebra).save_pretrained(folder)
        more = (*more, str(folder))
    words = arguments(model, out, "--data.prompts", prompts, *more[1:])
    if who == "question":
        words = ["eval", "--model", str(model), "--questions", prompts, "--out", str(out)]
    assert main(words) == 1
    told = capfd.readouterr().err.strip().splitlines()[-1]
    assert "error:" in told
    assert more[0] in told
    assert "the token 'zebra' (400), but the embedding of" in told
    assert not out.exists()


def test_tokens_that_nobody_says_are_no_harm(tiny, zebra, policy, tmp_path):
    _, tokenizer = load_causal_lm(str(zebra), torch.float32)
    assert len(tokenizer) == 401
    check_tokens([399], 400, tokenizer, "it")
    with pytest.raises(RunError, match="it comes to no token at all"):
        check_tokens([], 400, tokenizer, "it")
    folder = classifier(tiny, tmp_path / "model", "Llama")
    AutoTokenizer.from_pretrained(zebra).save_pretrained(folder)
    scores(policy, folder, ["horse", "mule"])
    with pytest.raises(RunError, match=r"the text 'a zebra' holds the token 'zebra' .* of reward_model\.model"):
        scores(policy, folder, ["horse", "a zebra"])


def test_a_reply_that_the_gold_model_cannot_read_has_no_utility(tiny, zebra, policy, prompts, tmp_path):
    folder = classifier(tiny, tmp_path / "model", "Llama")
    AutoTokenizer.from_pretrained(zebra).save_pretrained(folder)
    oracle = gold(policy, folder)
    found, _ = utilities(policy, prompts, oracle, [policy.tokenizer("a zebra")["input_ids"], [44]])
    assert found.isnan().tolist() == [True, False, False]
    assert oracle.counts == {"scored": 2, "unknown_token": 1}


def test_a_gold_model_that_overflows_has_said_nothing(tiny, policy, prompts, tmp_path, monkeypatch):
    oracle = gold(policy, classifier(tiny, tmp_path / "model", "Llama"))
    monkeypatch.setattr(oracle, "_score", lambda inputs, device: torch.full((len(inputs),), torch.inf))
    found, _ = utilities(policy, prompts, oracle, [[40], [44]])
    assert found.isnan().all()
    assert (oracle.counts["scored"], oracle.counts["not_a_number"]) == (0, 3)


def test_an_end_without_a_row(tiny, tmp_path):
    transformers.LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RunError, match=r"end-of-sequence token is '<end>' \(400\), but the embedding has 400 rows"):
        load_causal_lm(str(tmp_path), torch.float32)


def test_replies_that_are_half_a_character(policy, prompts, tiny, tmp_path):
    half = policy.tokenizer("é")["input_ids"][:1]
    folder = classifier(tiny, tmp_path / "model", "Llama")
    found, rollout = utilities(policy, prompts, gold(policy, folder), [half, [44]])
    assert rollout.texts[0] == "\ufffd"
    assert found.isfinite().all()
    rollout.texts[0].encode()
    assert scores(policy, folder, rollout.texts)[0].isfinite().all()
