"""Weights that are not there, and files of models that are cut short: one sentence, never random numbers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaForSequenceClassification,
)

from fpo_train.cli import main
from fpo_train.data.sources import load_causal_lm, load_sequence_classifier, resolve
from fpo_train.errors import RunError
from fpo_train.evaluate.answers import Answerer, Speaker
from tests.fpo_train.runs import arguments

FILE = "model.safetensors"


def changed(folder, to, change, file=FILE):
    """A copy of a folder whose tensors have gone through `change`."""
    shutil.copytree(folder, to)
    save_file({n: w.contiguous() for n, w in change(load_file(to / file)).items()}, to / file, {"format": "pt"})
    return to


def without(*parts):
    return lambda weights: {name: w for name, w in weights.items() if not any(part in name for part in parts)}


LACKING = {
    "one norm": (without("layers.1.input_layernorm"), "1 of its 21 weights", "model.layers.1.input_layernorm.weight"),
    "both ends": (
        without("embed_tokens", "lm_head"),
        "2 of its 21 weights",
        "lm_head.weight, model.embed_tokens.weight",
    ),
    "the body alone": (
        lambda weights: {n.removeprefix("model."): w for n, w in weights.items() if n != "lm_head.weight"},
        "1 of its 21 weights",
        "lm_head.weight; wanted a whole LlamaForCausalLM",
    ),
    "another prefix": (
        lambda weights: {f"actor.{n}": w for n, w in weights.items()},
        "21 of its 21 weights",
        "and 18 more; wanted a whole LlamaForCausalLM, but the files hold actor.lm_head.weight and 20 more",
    ),
    "another width": (
        lambda weights: {n: w[:-1] if "up_proj" in n else w for n, w in weights.items()},
        "2 of its 21 weights",
        "model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight",
    ),
}


@pytest.mark.parametrize("case", LACKING)
def test_a_policy_s_missing_weights_are_named(case, tiny, tmp_path, capfd):
    change, count, names = LACKING[case]
    folder = changed(tiny, tmp_path / "model", change)
    capfd.readouterr()
    with pytest.raises(RunError) as caught:
        load_causal_lm(str(folder), torch.float32)
    assert str(caught.value).startswith(f"model {folder}: {count} are missing from its files: ")
    assert names in str(caught.value)
    assert "|" not in capfd.readouterr().err  # transformers' table


def test_shards_that_are_gone(tiny, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    load_causal_lm(str(tmp_path), torch.float32)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[2]
    whole = load_file(shard)
    save_file(dict(list(whole.items())[1:]), shard, {"format": "pt"})  # which the index does not know
    with pytest.raises(RunError, match=f"1 of its 21 weights are missing from its files: {next(iter(whole))};"):
        load_causal_lm(str(tmp_path), torch.float32)
    shard.unlink()
    with pytest.raises(RunError, match=shard.name):
        load_causal_lm(str(tmp_path), torch.float32)
    index = tmp_path / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"] = {name: file for name, file in told["weight_map"].items() if file != shard.name}
    index.write_text(json.dumps(told))
    with pytest.raises(RunError, match="are missing from its files"):
        load_causal_lm(str(tmp_path), torch.float32)


def test_tied_weights_need_no_place_of_their_own(tiny, tmp_path):
    folder = changed(tiny, tmp_path / "model", without("lm_head"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model, _ = load_causal_lm(str(folder), torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.fixture(scope="module")
def encoders(tiny, tmp_path_factory):
    """Folders of one BERT, saved with one head or another, or none."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=1, **shape)
    folders = {}
    for kind in (BertModel, BertForMaskedLM, BertForSequenceClassification):
        torch.manual_seed(3)
        folders[kind.__name__] = tmp_path_factory.mktemp("models") / kind.__name__
        kind(config).save_pretrained(folders[kind.__name__])
        tokenizer.save_pretrained(folders[kind.__name__])
    return folders


def test_of_a_classifier_the_head_alone_may_be_drawn(encoders, tiny):
    for folder in (encoders["BertModel"], tiny):  # an encoder, and a decoder that spoke before
        torch.manual_seed(5)
        first, *_ = load_sequence_classifier(str(folder), torch.float32)
        again, *_ = load_sequence_classifier(str(folder), torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    load_sequence_classifier(str(encoders["BertForSequenceClassification"]), torch.float32)


@pytest.mark.parametrize(
    ("kind", "parts", "names"),
    [
        ("BertForMaskedLM", (), "bert.pooler.dense.bias, bert.pooler.dense.weight"),  # its head needs none
        ("BertModel", ("encoder.layer.0.output.LayerNorm.bias",), "bert.encoder.layer.0.output.LayerNorm.bias"),
        ("BertForSequenceClassification", ("classifier",), "classifier.bias, classifier.weight"),
        ("BertForSequenceClassification", ("word_embeddings",), "bert.embeddings.word_embeddings.weight"),
    ],
)
def test_what_a_classifier_s_files_have_to_hold(encoders, tmp_path, kind, parts, names):
    folder = changed(encoders[kind], tmp_path / "model", without(*parts) if parts else dict)
    with pytest.raises(RunError, match="missing from its files") as caught:
        load_sequence_classifier(str(folder), torch.float32)
    assert f": {names}; wanted a whole BertForSequenceClassification" in str(caught.value)


def test_a_head_that_is_there_is_not_drawn_over(encoders, tmp_path):
    """Whatever the configuration says of how the model was trained."""

    def untold(to, change):
        folder = changed(encoders["BertForSequenceClassification"], tmp_path / to, change)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
        return str(folder)

    load_sequence_classifier(untold("whole", dict), torch.float32)
    load_sequence_classifier(untold("none", without("classifier")), torch.float32)
    for to, change, name in (
        ("half", without("classifier.bias"), "classifier.bias"),
        (
            "wide",
            lambda found: {n: w.repeat(3, 1) if n == "classifier.weight" else w for n, w in found.items()},
            "classifier.weight",
        ),
    ):
        with pytest.raises(RunError, match=rf"1 of its \d+ weights are missing from its files: {name};"):
            load_sequence_classifier(untold(to, change), torch.float32)


def test_reward_models_and_oracles_are_named_by_their_settings_and_nothing_is_written(encoders, tiny, tmp_path, capfd):
    bert = changed(encoders["BertForSequenceClassification"], tmp_path / "bert", without("attention.self.query"))
    config = AutoModelForCausalLM.from_pretrained(tiny).config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "scores")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "scores")
    llama = changed(tmp_path / "scores", tmp_path / "llama", without("score"))
    for more, text in (
        (["--reward_model.kind", "classifier", "--reward_model.model", bert], f"reward_model.model {bert}: 2 of its "),
        (["--oracle.kind", "gold", "--oracle.model", llama], f"oracle.model {llama}: 1 of its 21 weights are missing"),
        (
            ["--reward_model.kind", "lora", "--reward_model.lora_targets", '["v_proj","w_proj"]'],
            "lora_targets: 'w_proj'",
        ),
        (["--policy.lora_targets", "[]"], "policy.lora_targets: wanted one name or more"),
    ):
        capfd.readouterr()
        assert main(arguments(tiny, tmp_path / "out", *more)) in (1, 2)
        message = capfd.readouterr().err.strip()
        assert text in message
        assert "\n" not in message
        assert not (tmp_path / "out").exists()


def cuts(raw):
    return sorted({0, len(raw) // 2, len(raw) - 1})


def test_a_model_s_files_cut_short(tiny, tmp_path, capfd):
    whole = {n: w.clone() for n, w in load_causal_lm(str(tiny), torch.float32)[0].state_dict().items()}
    shutil.copytree(tiny, tmp_path / "model")
    refused = {}
    for path in sorted((tmp_path / "model").iterdir()):
        raw = path.read_bytes()
        for cut in cuts(raw):
            path.write_bytes(raw[:cut])
            try:
                model, _ = load_causal_lm(str(tmp_path / "model"), torch.float32)
            except RunError as error:
                refused[path.name, cut] = str(error)
            else:  # without its last line break, or a template that is found out when it is rendered
                assert raw[cut:].isspace() or path.suffix == ".jinja"
                assert all(torch.equal(whole[name], w) for name, w in model.state_dict().items())
        path.write_bytes(raw)
    assert {name for name, _ in refused} == {p.name for p in (tmp_path / "model").iterdir() if p.suffix != ".jinja"}
    for (name, _), told in refused.items():
        assert "cannot be loaded" in told
        assert "put the whole file back" in told
        assert name in told


def test_a_gguf_file_that_lacks_a_tensor_or_its_end(tiny, tmp_path):
    import gguf

    path = tmp_path / "whole.gguf"
    write_gguf(gguf, tiny, path)
    wanted = load_causal_lm(str(tiny), torch.float32)[0].model.layers[1].mlp.up_proj.weight
    assert torch.equal(load_causal_lm(str(path), torch.float32)[0].model.layers[1].mlp.up_proj.weight, wanted)
    write_gguf(gguf, tiny, tmp_path / "lacking.gguf", lacking="blk.1.ffn_up.weight")
    with pytest.raises(
        RunError, match=r"1 of its 21 weights are missing from its files: model\.layers\.1\.mlp\.up_proj"
    ):
        load_causal_lm(str(tmp_path / "lacking.gguf"), torch.float32)
    raw = path.read_bytes()
    for cut in (*cuts(raw), 100):
        path.write_bytes(raw[:cut])
        with pytest.raises(RunError, match=r"if .*whole\.gguf is cut short, put the whole file back"):
            load_causal_lm(str(path), torch.float32)


GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.down_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "model.embed_tokens": "token_embd",
    "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def write_gguf(gguf, folder, path, lacking=""):
    config = json.loads((folder / "config.json").read_text())
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in load_file(folder / FILE).items():
        path_in = name.removesuffix(".weight")
        layer, _, part = path_in.removeprefix("model.layers.").partition(".")
        known = GGUF_NAMES.get(path_in) or f"blk.{layer}.{GGUF_NAMES[part]}"
        if f"{known}.weight" != lacking:
            writer.add_tensor(f"{known}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """Folder of a LoRA adapter on q_proj and v_proj of the tiny model."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapters") / "whole"
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), lora).save_pretrained(folder)
    return folder


def put_on(tiny, *folders):
    known = {"model": str(tiny), "dtype": "float32", "quantization": "none"}
    speakers = {f"side{n}": Speaker(**known, adapter=folder) for n, folder in enumerate(folders)}
    return Answerer(speakers, 4, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_has_all_of_its_factors_and_no_more(tiny, adapter, tmp_path):
    put_on(tiny, adapter, adapter)
    file = "adapter_model.safetensors"
    lacking = changed(adapter, tmp_path / "lacking", without("layers.1.self_attn.q_proj.lora_B"), file)
    renamed = changed(
        adapter, tmp_path / "renamed", lambda found: {n.replace("v_proj", "o_proj"): w for n, w in found.items()}, file
    )
    fewer = shutil.copytree(adapter, tmp_path / "fewer")
    told = json.loads((fewer / "adapter_config.json").read_text())
    (fewer / "adapter_config.json").write_text(json.dumps({**told, "target_modules": ["q_proj"]}))
    for folder, text in (
        (lacking, r"1 of 8 weights are missing from it: .*layers\.1\.self_attn\.q_proj\.lora_B\.weight"),
        (renamed, r"4 of 8 weights are missing from it: .*v_proj.* and 1 more"),
        (fewer, r"4 of its weights have no place there: .*v_proj"),
    ):
        for folders in ((folder,), (adapter, folder)):
            with pytest.raises(
                RunError, match=f"^side{len(folders) - 1}: the adapter {folder} does not fit .*: {text}"
            ):
                put_on(tiny, *folders)
    raw = (lacking / file).read_bytes()
    for cut in cuts(raw):
        (lacking / file).write_bytes(raw[:cut])
        with pytest.raises(RunError, match="or a file of it is cut short"):
            put_on(tiny, lacking)


def test_an_adapter_is_no_policy_s_base(tiny, adapter, tmp_path):
    with pytest.raises(RunError, match="holds an adapter; wanted a whole model"):
        resolve(str(adapter))
    both = shutil.copytree(tiny, tmp_path / "both")
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    with pytest.raises(RunError, match="holds an adapter; wanted a whole model"):
        load_causal_lm(str(both), torch.float32)


@pytest.mark.parametrize(
    ("targets", "lost"),
    [
        (("q_proj", "*_proj"), r"'\*_proj'"),
        (("q_proj", "proj", "layers.5.mlp.up_proj"), r"'proj', 'layers\.5\.mlp\.up_proj'"),
        (("up_proj", "base_layer"), "'base_layer'"),
        (("lm_head", "model.lm_head"), r"'model\.lm_head'"),
    ],
)
def test_every_target_names_a_layer(tiny, targets, lost):
    from fpo_train.config import PolicyConfig
    from fpo_train.policy import add_adapter

    lm = AutoModelForCausalLM.from_pretrained(tiny)
    wanted = (
        f"^policy.lora_targets: {lost} names no layer of the model; its layers are down_proj, gate_proj, k_proj, lm_"
    )
    with pytest.raises(RunError, match=wanted):
        add_adapter(lm, PolicyConfig(lora_targets=targets))


def test_targets_that_end_a_path_name_the_layers_that_peft_adapts(tiny):
    from fpo_train.config import PolicyConfig
    from fpo_train.policy import add_adapter

    names = "self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"
    model = add_adapter(AutoModelForCausalLM.from_pretrained(tiny), PolicyConfig(lora_targets=names))
    assert len(model.targeted_module_names) == 4
    with pytest.raises(RunError, match=r"\['q_proj', 'self_attn'\]: Target module LlamaAttention is not supported$"):
        add_adapter(AutoModelForCausalLM.from_pretrained(tiny), PolicyConfig(lora_targets=("q_proj", "self_attn")))
