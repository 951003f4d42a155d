"""A frozen reward model as the oracle: a head on the policy's base, and sequence classifiers of their own."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from fpo_train.config import OracleConfig, PolicyConfig, RunConfig
from fpo_train.errors import RunError
from fpo_train.oracle import Labels, load_gold
from fpo_train.rollout import Readings

from .test_oracle import ROWS, every, rollout, spoken  # noqa: F401 (rollout is a fixture)


def config(tiny, model, **oracle):
    return RunConfig(policy=PolicyConfig(model=str(tiny)), oracle=OracleConfig(kind="gold", model=str(model), **oracle))


def save_head(folder, weight, base):
    folder.mkdir()
    save_file({"score.weight": weight}, folder / "head.safetensors")
    (folder / "config.json").write_text(json.dumps({"base": str(base)}))
    return folder


def test_a_head_reads_the_policy_s_frozen_base(tiny, policy, rollout, tmp_path):  # noqa: F811
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(4))
    oracle = load_gold(policy, config(tiny, save_head(tmp_path / "gold", weight, tiny)))
    utility = oracle.utility(rollout, Readings(policy, rollout, 3), ROWS)
    base = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float64).eval()
    for value, row in zip(utility, ROWS.tolist(), strict=True):
        reply = rollout.replies[row]
        closed = reply if reply[-1] == policy.eos else [*reply, policy.eos]
        ids = torch.tensor([[*rollout.prompts[row // 4].ids, *closed]])
        with torch.no_grad():
            state = base.model(input_ids=ids).last_hidden_state[0, -1]
        assert float(value) == pytest.approx(float(weight[0].double() @ state), abs=1e-4)


def test_heads_that_do_not_fit(tiny, policy, tmp_path):
    with pytest.raises(RunError, match=r"sits on smollm2, but policy\.model is"):
        load_gold(policy, config(tiny, save_head(tmp_path / "other", torch.ones(1, 32), "smollm2")))
    with pytest.raises(RunError, match=r"a head of shape \(1, 31\); wanted \(1, 32\)"):
        load_gold(policy, config(tiny, save_head(tmp_path / "narrow", torch.ones(1, 31), tiny)))
    damaged = save_head(tmp_path / "damaged", torch.ones(1, 32), tiny)
    (damaged / "head.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match=r"has no score\.weight"):
        load_gold(policy, config(tiny, damaged))
    (damaged / "config.json").write_text("{}")
    with pytest.raises(RunError, match='names its "base"'):
        load_gold(policy, config(tiny, damaged))
    adapted = save_head(tmp_path / "adapted", torch.ones(1, 32), tiny)
    (adapted / "adapter").mkdir()
    (adapted / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="is a head on an adapter"):
        load_gold(policy, config(tiny, adapted))


def save_decoder(tiny, folder, pad=0, labels=1):
    torch.manual_seed(8)
    base = LlamaForCausalLM.from_pretrained(tiny).config
    base.num_labels, base.pad_token_id, base.attention_dropout, base.initializer_range = labels, pad, 0.5, 0.2
    LlamaForSequenceClassification(base).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad", [0, None])
def test_a_decoder_reads_the_rendered_chat(tiny, policy, rollout, tmp_path, monkeypatch, pad):  # noqa: F811
    folder = save_decoder(tiny, tmp_path / "gold", pad)
    oracle = load_gold(policy, config(tiny, folder))
    model = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    sizes, forward = [], LlamaForSequenceClassification.forward

    def counted(self, input_ids, **others):
        sizes.append(len(input_ids))
        return forward(self, input_ids, **others)

    for at_once, most in ((0, 9), (2, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(LlamaForSequenceClassification, "forward", counted)
            utility = oracle.utility(rollout, Readings(policy, rollout, at_once), ROWS)
        assert max(sizes) == (1 if pad is None else most)  # without a pad id it can only read one by one
        assert sum(sizes) == 9
        sizes.clear()
        assert utility.dtype == torch.float32
        for value, row in zip(utility, ROWS.tolist(), strict=True):
            text = (
                f"<|im_start|>user\n{rollout.prompts[row // 4].text}<|im_end|>\n"
                f"<|im_start|>assistant\n{rollout.texts[row]}<|im_end|>\n"
            )
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                truth = model(input_ids=ids).logits[0, 0]
            assert float(value) == pytest.approx(float(truth), abs=1e-4)
    assert oracle.counts == {"scored": 18}


def test_an_encoder_reads_a_pair_of_texts_and_nothing_too_long(tiny, policy, prompts, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "gold")
    torch.manual_seed(9)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    limits = {"max_position_embeddings": 60, "num_labels": 1, "pad_token_id": 0, "initializer_range": 0.2}
    model = BertForSequenceClassification(BertConfig(vocab_size=400, hidden_dropout_prob=0.5, **shape, **limits))
    model.save_pretrained(tmp_path / "gold")
    model.double().eval()

    replies = [[40, 41, 42, 43], [44], [50] * 100, [60, 61]]
    rollout = spoken(policy, prompts.batch(0, 1), replies, candidates=3)  # noqa: F811
    oracle = load_gold(policy, config(tiny, tmp_path / "gold", temperature=0.1))
    labels = Labels(oracle, rollout, Readings(policy, rollout))
    p = labels.preferences(every(rollout))[0]
    assert p.isnan().tolist() == [False, False, True]
    assert (labels.calls, labels.failures) == (3, 1)
    assert oracle.counts == {"scored": 3, "too_long": 1}
    utility, reference = labels.utilities(every(rollout))

    def truth(row):
        inputs = tokenizer(rollout.prompts[0].text, rollout.texts[row], return_tensors="pt")
        with torch.no_grad():
            return float(model(**inputs).logits[0, 0])

    assert utility[0, :2].tolist() == pytest.approx([truth(0), truth(1)], abs=1e-5)
    assert float(reference) == pytest.approx(truth(3), abs=1e-5)
    assert float(p[0]) == pytest.approx(1 / (1 + math.exp(-(truth(0) - truth(3)) / 0.1)), abs=1e-3)


def test_classifiers_that_are_no_reward_models(tiny, policy, tmp_path):
    with pytest.raises(RunError, match="has 2 outputs; wanted a reward model with one"):
        load_gold(policy, config(tiny, save_decoder(tiny, tmp_path / "two", labels=2)))
    with pytest.raises(RunError, match="no such file or folder"):
        load_gold(policy, config(tiny, "./nowhere/at/all"))
