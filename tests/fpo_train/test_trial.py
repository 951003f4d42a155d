"""Models whose cache, padding or neighbours change what they say, and what is no causal language model at all."""

import functools

import pytest
import torch
import transformers
from transformers import DynamicCache

from fpo_train.config import PolicyConfig
from fpo_train.errors import RunError
from fpo_train.evaluate.answers import Answerer, Speaker
from fpo_train.policy import load as policy_module
from fpo_train.policy import load_policy, trial
from fpo_train.rollout import Readings

from .variants import PROMPTS, TOKENS, by_hand, loaded, says_what_it_thinks, variant

CACHES = ("cache", "past_key_values")  # as transformers names it now, and as it did
PROJECTED = {"lora_targets": ("in_proj",)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_keeps_its_word_is_not_talked_about(tiny, capsys, dtype):
    before = torch.get_rng_state()
    policy = loaded(tiny, dtype=dtype)
    assert policy.caches
    assert capsys.readouterr().err == ""
    torch.manual_seed(0)
    after = torch.get_rng_state()
    trial.examine(policy.lm, "m")
    trial.cache_serves(policy.lm, "m", policy)
    assert torch.equal(torch.get_rng_state(), after)
    torch.set_rng_state(before)


@pytest.mark.parametrize(
    ("kind", "options", "more"),
    [
        ("Llama", {"use_cache": False}, {}),
        ("Mistral", {"sliding_window": 4}, {}),
        ("GPTNeoX", {"use_cache": False}, {"lora_targets": ("query_key_value",)}),
        ("Gemma3", {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}, {}),
        ("Mamba", {"state_size": 4, "time_step_rank": 4}, PROJECTED),
        ("FalconMamba", {"state_size": 4, "time_step_rank": 4, "use_cache": False}, PROJECTED),
        (
            "Jamba",
            {"mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2, "use_mamba_kernels": False}
            | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
            PROJECTED,
        ),
        ("MiniMax", {"num_local_experts": 2, "head_dim": 8, "block_size": 8}, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_replies_are_those_of_plain_forwards(tiny, tmp_path, kind, options, more):
    if kind == "Gemma3":
        folder = variant(tiny, tmp_path, "Gemma3Text", "Gemma3ForCausalLM", **options)
    else:
        folder = variant(tiny, tmp_path, kind, **options)
    policy = loaded(folder, **more)
    rollout = says_what_it_thinks(policy)
    encoded = Readings(policy, rollout).of()
    for row, reply in enumerate(rollout.replies):
        prompt = PROMPTS[row // 3]
        closed = reply if reply[-1] == policy.eos else [*reply, policy.eos]
        with torch.no_grad(), policy.base():
            ids = torch.tensor([[*prompt.ids, *closed]])
            truth = policy.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        own = encoded.predicting[encoded.offsets[row] : encoded.offsets[row + 1]]
        assert torch.allclose(encoded.closing[row], truth[-1], rtol=1e-3, atol=1e-4)
        assert torch.allclose(own, truth[len(prompt.ids) - 1 :][: len(reply)], rtol=1e-3, atol=1e-4)


def test_logits_that_are_capped_are_compared_as_they_are(tiny, tmp_path, capsys):
    """An answer needs no projection, so a model that bends its logits may give one; its cache is none the worse."""
    folder = variant(tiny, tmp_path, "Gemma2", head_dim=8, sliding_window=5, final_logit_softcapping=2.0)
    speaker = Speaker(model=str(folder), dtype="float32", quantization="none", adapter=None)
    assert Answerer({"left": speaker}, TOKENS, torch.device("cpu"))._caches
    assert capsys.readouterr().err == ""


def goes_on(given):
    """The name of a cache that holds something among what a forward is given; empty where there is none."""
    return next((name for name in CACHES if given.get(name) is not None and given[name].get_seq_length()), "")


def misplaced(inner):
    """What follows a cache is read as if it stood one token further on."""

    @functools.wraps(inner)
    def forward(*args, position_ids=None, **more):
        if goes_on(more):
            position_ids = position_ids + 1
        return inner(*args, position_ids=position_ids, **more)

    return forward


def forgetful(inner):
    """Each call begins with an empty cache."""

    @functools.wraps(inner)
    def forward(*args, **more):
        if name := goes_on(more):
            more[name] = DynamicCache()
            more["attention_mask"] = more["attention_mask"][:, -more["input_ids"].shape[1] :]
        return inner(*args, **more)

    return forward


def ignorant(inner):
    """It knows of no cache."""

    @functools.wraps(inner)
    def forward(*args, **more):
        known = {name: value for name, value in more.items() if name not in (*CACHES, "use_cache")}
        return inner(*args, **known, use_cache=False)

    return forward


@pytest.mark.parametrize("fault", [misplaced, forgetful, ignorant])
def test_a_cache_that_goes_wrong_is_not_used(tiny, monkeypatch, capsys, fault):
    """Not in half precision either, where rounding hides more."""
    load = policy_module.load_causal_lm

    def broken(*arguments):
        model, tokenizer = load(*arguments)
        model.model.forward = fault(model.model.forward)
        return model, tokenizer

    monkeypatch.setattr(policy_module, "load_causal_lm", broken)
    monkeypatch.setattr("fpo_train.evaluate.answers.load_causal_lm", broken)
    policy = loaded(tiny)
    said = capsys.readouterr().err
    assert said.count("with a cache its logits are not those of a plain forward") == 1
    assert f"policy.model {tiny}" in said
    assert not policy.caches
    assert not loaded(tiny, dtype="bfloat16").caches
    rollout = says_what_it_thinks(policy)
    assert rollout.prefix.layers is None
    speaker = Speaker(model=str(tiny), dtype="float32", quantization="none", adapter=None)
    (answer,) = Answerer({"left": speaker}, TOKENS, torch.device("cpu")).answer("left", [list(PROMPTS[0].ids)])
    wanted = by_hand(policy, PROMPTS[0], base=True, least=0)
    assert answer == [token for token in wanted if token not in policy.ends]


def test_windows_are_tried_where_a_run_reaches_beyond_them(tiny, tmp_path, monkeypatch):
    policy = loaded(variant(tiny, tmp_path, "Mistral", sliding_window=70))
    asked, inner = [], trial._tokens
    monkeypatch.setattr(trial, "_tokens", lambda lm, rows, length: asked.append(length) or inner(lm, rows, length))
    trial.beyond_windows(policy, 77)
    assert asked == []
    trial.beyond_windows(policy, 78)
    assert asked == [78]
    assert policy.caches
    policy.lm.model.config.sliding_window = 60  # masks of one window, a cache of another
    monkeypatch.setattr(trial, "_windows", lambda lm: [70])
    read, plain = trial._read, policy.lm.model.forward

    def wide(lm, ids, mask=None):
        lm.model.config.sliding_window = 200
        try:
            return read(lm, ids, mask)
        finally:
            lm.model.config.sliding_window = 60

    monkeypatch.setattr(trial, "_read", wide)
    assert plain == policy.lm.model.forward
    trial.beyond_windows(policy, 200)
    assert not policy.caches


def test_rows_that_depend_on_each_other_are_said_to(tiny, monkeypatch, capsys):
    load = policy_module.load_causal_lm

    def crowded(*arguments):
        model, tokenizer = load(*arguments)
        mlp = model.model.layers[0].mlp
        mlp.register_forward_hook(lambda module, inputs, output: output + output.mean((0, 1)))
        return model, tokenizer

    monkeypatch.setattr(policy_module, "load_causal_lm", crowded)
    with pytest.raises(RunError, match="depends on later tokens"):  # a mean over tokens is worse still
        loaded(tiny)

    def neighbourly(*arguments):
        model, tokenizer = load(*arguments)
        mlp = model.model.layers[0].mlp
        mlp.register_forward_hook(lambda module, inputs, output: output + output.mean(0) * (len(output) > 1))
        return model, tokenizer

    monkeypatch.setattr(policy_module, "load_causal_lm", neighbourly)
    loaded(tiny)
    assert f"policy.model {tiny}: what it says in a row depends on the rows beside it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "model", "options", "message"),
    [
        ("Bert", "BertLMHeadModel", {}, "depends on later tokens"),
        ("Rwkv", None, {"attention_hidden_size": 32, "intermediate_size": 48}, "padding before a row"),
        (
            "T5",
            "T5ForConditionalGeneration",
            {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1},
            "cannot be loaded",
        ),
        ("RecurrentGemma", None, {"lru_width": 32, "head_dim": 8}, "padding before a row"),
        (
            "Bart",
            "BartForCausalLM",
            {"d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 48},
            "padding before a row",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_policy_is_refused_by_name(tiny, tmp_path, kind, model, options, message):
    if kind == "Bart":
        options = {**options, "decoder_attention_heads": 4, "initializer_range": 0.2}
    folder = variant(tiny, tmp_path, kind, model, **options)
    with pytest.raises(RunError, match=message) as found:
        load_policy(PolicyConfig(model=str(folder)), 0, torch.device("cpu"))
    assert "model" in str(found.value)
    assert str(folder) in str(found.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lm: lm.set_output_embeddings(None), "no output embeddings"),
        (lambda lm: setattr(lm.config, "is_encoder_decoder", True), "it is an encoder-decoder"),
        (lambda lm: lm.model.layers[1].mlp.up_proj.weight.fill_(torch.nan), "logits are not finite"),
        (lambda lm: lm.lm_head.weight[5].fill_(torch.inf), "logits are not finite"),
    ],
)
def test_models_that_nothing_can_be_drawn_from(tiny, change, message):
    lm = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        change(lm)
    with pytest.raises(RunError, match=f"policy.model m: .*{message}"):
        trial.examine(lm, "policy.model m")
