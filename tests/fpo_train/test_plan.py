"""The plan: architectures, micro-batches under a budget, the table."""

import dataclasses
import json
import random
from types import SimpleNamespace

import pytest
import torch

from fpo_train.cli import build
from fpo_train.config import (
    PENALTY_KINDS,
    DataConfig,
    MemoryConfig,
    OracleConfig,
    PenaltyConfig,
    PolicyConfig,
    RewardModelConfig,
    RolloutConfig,
    RunConfig,
    UpdateConfig,
)
from fpo_train.errors import RunError
from fpo_train.memory.architecture import Architecture, architecture, from_config
from fpo_train.memory.footprint import Tape, layer_bytes, weight_bytes
from fpo_train.memory.plan import MARGIN, format_table, make_plan, plan_command, plan_for

CPU = torch.device("cpu")
EIGHT = "meta-llama/Llama-3.1-8B-Instruct"
WIDTHS = {
    EIGHT: (4096, 14336, 32, 32, 8, 128, 128256, False, 8_030_261_248),
    "meta-llama/Llama-3.2-1B": (2048, 8192, 16, 32, 8, 64, 128256, True, 1_235_814_400),
    "meta-llama/Llama-3.2-3B-Instruct": (3072, 8192, 28, 24, 8, 128, 128256, True, 3_212_749_824),
    "smollm2": (576, 1536, 30, 9, 3, 64, 49152, True, 134_515_008),
    "minilm": (384, 1536, 6, 12, 12, 32, 30522, True, 22_713_216),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_shipped_architectures(name):
    found = architecture(name)
    fields = "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "vocabulary", "tied", "parameters"
    assert tuple(getattr(found, field) for field in fields) == WIDTHS[name]


def described(kind, **values):
    common = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    return {"model_type": kind, "vocab_size": 300, "max_position_embeddings": 64} | common | values


@pytest.mark.parametrize(
    "config",
    [
        described("llama", num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
        described("llama", num_key_value_heads=1, tie_word_embeddings=False, attention_bias=True),
        described("qwen2", num_key_value_heads=2, tie_word_embeddings=False),
        described("bert", type_vocab_size=2),
        described("roberta", type_vocab_size=1),
    ],
    ids=lambda config: config["model_type"],
)
def test_parameters_are_those_of_the_model(config):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    values = dict(config)
    made = AutoConfig.for_model(values.pop("model_type"), **values)
    found = from_config("model", config)
    with torch.device("meta"):
        model = (AutoModelForCausalLM if found.decoder else AutoModel).from_config(made)
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_local_folders_are_read_without_weights(tiny, tmp_path):
    found = architecture(str(tiny))
    assert (found.hidden, found.intermediate, found.kv_heads, found.context) == (32, 48, 2, 256)
    (tmp_path / "config.json").write_text(json.dumps(described("gpt2")))
    with pytest.raises(RunError, match=r"counts models of type llama.*got 'gpt2'"):
        architecture(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}')
    with pytest.raises(RunError, match=r"no 'intermediate_size'"):
        architecture(str(tmp_path))


def test_a_hub_id_that_is_not_at_hand_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RunError, match=r"nobody/nothing: no configuration of it is at hand"):
        architecture("nobody/nothing")


def test_quantised_weights():
    model = architecture(EIGHT)
    assert model.linear_weights == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rest = 2 * (2 * 128256 * 4096 + 65 * 4096)  # embedding, output and norms stay in bf16
    assert weight_bytes(model, 2, "none") == 2 * model.parameters
    assert weight_bytes(model, 2, "nf4") - rest == pytest.approx(model.linear_weights * 4.127 / 8, rel=1e-4)
    assert weight_bytes(model, 2, "int8") - rest == pytest.approx(model.linear_weights, rel=1e-2)


@pytest.mark.parametrize(("budget", "unpacks"), [("24GB", False), ("80GB", True)])
def test_4_bit_weights_stay_unpacked_where_the_budget_holds_both(budget, unpacks):
    config, model = shipped("llama3_8b_24gb.yaml"), architecture(EIGHT)
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, budget=budget))
    plan = make_plan(config, model, config.data.max_tokens, "cuda")
    packed = make_plan(config, model, config.data.max_tokens, "cuda", available=int(24e9)).phases["generate"]
    more = plan.phases["generate"].parts["weights"] - packed.parts["weights"]
    assert plan.unpacks == unpacks
    assert more == (2 * model.linear_weights if unpacks else 0)
    assert any("4-bit weights stay unpacked" in note for note in plan.notes) == unpacks
    assert plan.phases["score"].parts["weights"] == packed.parts["weights"]


def test_layer_of_llama_8b_by_hand():
    """bf16, adapters on q, k, v and o: what a layer keeps a token, tensor by tensor."""
    model, targets = architecture(EIGHT), ("q_proj", "k_proj", "v_proj", "o_proj")
    width = 512
    norms = 2 * (4 * 4096 + 4)  # each input in fp32, and its scale
    attention = 2 * 4 * 4096 + 4 * 32 + 2 * width  # q, k, v, output; a number a head; a row of the mask
    adapters = 4 * (4 * 4096 + 4 * 16)  # inputs in fp32, cast one by one, and what A makes of them
    feed = 2 * 3 * 14336  # gate, its SiLU, up
    tape = Tape(itemsize=2, targets=targets, rank=16)
    assert layer_bytes(model, tape, tokens=width, width=width) == width * (norms + attention + adapters + feed)


def shipped(name):
    from fpo_train.cli import CONFIGS, _config

    options = build().parse_args(["run", "--config", str(CONFIGS / name)])
    return _config(RunConfig, options["run"])


@pytest.mark.parametrize(
    ("name", "size", "weights"),
    [("llama3_8b_24gb.yaml", 24e9, 5.31), ("llama3_8b_16gb.yaml", 16e9, 5.31), ("llama3_8b_8gb.yaml", 8e9, 4.33)],
)
def test_llama_8b_fits_the_shipped_budgets(name, size, weights, capsys):
    config = shipped(name)
    plan = make_plan(config, architecture(EIGHT), config.data.max_tokens, "cuda")
    assert plan.fits
    assert plan.budget == size
    for phase in plan.phases.values():
        assert round(phase.parts["weights"] / 2**30, 2) == weights
        assert sum(phase.parts.values()) == phase.total <= size * (1 - MARGIN)
    assert plan_command(config) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("8.03 billion", "weights", "KV cache", "activations", "logits", "retrain"))


def test_an_embedding_on_the_host_is_not_on_the_device(capsys):
    config = shipped("llama3_8b_8gb.yaml")
    assert (config.data.max_tokens, config.rollout.max_new_tokens) == (256, 256)
    whole = dataclasses.replace(config, policy=dataclasses.replace(config.policy, input_embedding="device"))
    model = architecture(EIGHT)
    apart, together = (make_plan(one, model, 256, "cuda").phases["update"].parts for one in (config, whole))
    assert together["weights"] - apart["weights"] == 2 * model.vocabulary * model.hidden
    on_cpu = [make_plan(one, model, 256, "cpu").phases["update"].parts["weights"] for one in (config, whole)]
    assert on_cpu[0] == on_cpu[1]
    small = dataclasses.replace(config, memory=dataclasses.replace(config.memory, budget="5GiB"))
    assert plan_command(small) == 1
    assert "the smallest budget that works is" in capsys.readouterr().out
    with pytest.raises(RunError, match="same table"):
        make_plan(config, architecture("smollm2"), 256, "cuda")


def small_plan(budget="", rows=0, **sections):
    config = RunConfig(memory=MemoryConfig(budget=budget, update_rows=rows), **sections)
    return make_plan(config, architecture("smollm2"), 128)


def test_micro_batches_are_the_largest_that_fit():
    whole = small_plan()
    assert whole.rows == {"generate": 36, "score": 36, "update": 4, "retrain": 8}
    tight = small_plan(f"{whole.smallest + 2**26}")
    assert tight.fits
    assert tight.rows["update"] < 4
    for name, phase in tight.phases.items():
        if phase.rows < phase.whole:
            more = MemoryConfig(budget=str(tight.budget), **{f"{name}_rows": min(2 * phase.rows, phase.whole)})
            assert not make_plan(RunConfig(memory=more), architecture("smollm2"), 128).fits


def test_the_smallest_budget_works_and_less_does_not(capsys):
    least = small_plan().smallest
    assert small_plan(str(least)).fits
    assert not small_plan(str(least - 2**20)).fits
    config = RunConfig(memory=MemoryConfig(budget="100MiB"))
    assert plan_command(config) == 1
    named = capsys.readouterr().out.strip().splitlines()[-1].split()[-1]
    again = dataclasses.replace(config, memory=MemoryConfig(budget=named))
    assert plan_command(again) == 0


def drawn(rng):
    """A configuration at random, its model's architecture, prompt length and device."""
    model = rng.choice(["smollm2", EIGHT])
    optimizers = "adamw", "paged_adamw_8bit"
    kind = rng.choice(["head", "lora", "classifier"])
    config = RunConfig(
        policy=PolicyConfig(
            model=model,
            dtype=rng.choice(["float32", "bfloat16"]),
            quantization=rng.choice(["none", "nf4", "int8"]),
            gradient_checkpointing=rng.random() < 0.5,
            lora_rank=rng.choice([1, 256]),
        ),
        reward_model=RewardModelConfig(
            kind=kind,
            train=rng.choice(["head", "lora", "all"]) if kind == "classifier" else "head",
            optimizer=rng.choice(optimizers),
        ),
        oracle=OracleConfig(
            quantization=rng.choice(["none", "int8"]),
            mean_over=rng.choice(["reply", "padded"]),
        ),
        rollout=RolloutConfig(
            prompts=rng.choice([1, 2, 16]), candidates=rng.choice([2, 3, 8]), max_new_tokens=rng.choice([8, 256])
        ),
        penalty=PenaltyConfig(kind=rng.choice(PENALTY_KINDS), parameters=rng.choice(["head", "all", "trainable"])),
        update=UpdateConfig(kind=rng.choice(["best_of_n", "rloo"]), optimizer=rng.choice(optimizers)),
        memory=MemoryConfig(update_rows=rng.choice([0, 0, 3]), score_rows=rng.choice([0, 0, 3])),
    )
    return config, architecture(model), rng.choice([1, 32, 512]), rng.choice(["cpu", "cuda"])


def test_whatever_the_run_the_budget_named_works_and_is_the_smallest():
    rng = random.Random(0)
    for _ in range(400):
        config, *rest = drawn(rng)

        def under(budget, config=config, rest=rest):
            memory = dataclasses.replace(config.memory, budget=budget)
            return make_plan(dataclasses.replace(config, memory=memory), *rest)

        with pytest.raises(RunError) as refused:
            under("1MiB").check()
        assert under(str(refused.value).split()[-1]).fits, config
        least = under("1MiB").smallest
        assert under(str(least)).fits, config
        assert not under(str(int(0.9999 * least))).fits, config


def test_a_saved_head_as_the_oracle_adds_no_weights(tmp_path):
    (tmp_path / "head.safetensors").touch()
    (tmp_path / "config.json").write_text('{"base": "smollm2"}')  # not a model's own
    head = small_plan(oracle=OracleConfig(kind="gold", model=str(tmp_path)))
    assert head.phases["score"].parts["weights"] == small_plan().phases["score"].parts["weights"]
    whole = small_plan(oracle=OracleConfig(kind="gold", model="minilm"))
    added = whole.phases["score"].parts["weights"] - head.phases["score"].parts["weights"]
    assert added == 4 * architecture("minilm").parameters


def test_an_oracle_in_the_policy_s_own_8_bits_is_no_second_copy():
    eight = PolicyConfig(quantization="int8")
    alone, shared = (
        small_plan(policy=eight, oracle=OracleConfig(quantization=kind)).phases["score"].parts["weights"]
        for kind in ("none", "int8")
    )
    assert alone == shared
    assert small_plan(oracle=OracleConfig(quantization="int8")).phases["score"].parts["weights"] > alone


def test_a_device_with_less_than_the_budget_is_the_bound():
    config = RunConfig(memory=MemoryConfig(budget="8GiB"))
    plan = make_plan(config, architecture("smollm2"), 128, available=2**20)
    assert plan.budget == 2**20
    with pytest.raises(RunError, match=r"^what the device has left, 1\.0 MiB: "):
        plan.check()
    assert make_plan(config, architecture("smollm2"), 128, available=2**40).budget == 2**33


def test_the_plan_of_a_loaded_policy(policy, monkeypatch):
    config = RunConfig(policy=PolicyConfig(model="anything"))
    assert plan_for(config, policy, 64) == make_plan(config, from_config("", policy.lm.config.to_dict()), 64)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 2**30)
    on_cuda = SimpleNamespace(device=torch.device("cuda"), lm=policy.lm)
    assert plan_for(config, on_cuda, 64).budget == 7 * 2**30  # the weights are loaded: they are this process's share
    unknown = SimpleNamespace(device=CPU, lm=SimpleNamespace(config=SimpleNamespace(to_dict=dict)))
    assert plan_for(config, unknown, 64) is None
    with pytest.raises(RunError, match="model anything: the plan counts"):
        plan_for(dataclasses.replace(config, memory=MemoryConfig(budget="1GiB")), unknown, 64)


def test_prompts_end_where_the_context_does(capsys):
    config = RunConfig(data=DataConfig(max_tokens=100_000))
    assert plan_command(config) == 0
    assert f"rows of up to {architecture('smollm2').context} tokens" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"rollout\.max_new_tokens: 8192 leave no prompt in a context of 8192 tokens"):
        plan_command(RunConfig(rollout=RolloutConfig(max_new_tokens=8192)))


def test_rows_that_are_given_are_kept():
    plan = small_plan("800MiB", rows=4)
    assert plan.rows["update"] == 4
    with pytest.raises(RunError, match=r"update takes .* with 4 rows at a time; the smallest budget that works is"):
        plan.check()
    assert plan.smallest > small_plan("800MiB").smallest


def test_what_changes_the_plan():
    base = small_plan()
    paged = small_plan(update=UpdateConfig(optimizer="paged_adamw_8bit"))
    adapter, head = 30 * 16 * (576 + 576 + 2 * (576 + 192) + 576 + 576), 576
    assert base.phases["update"].parts["optimizer"] == 8 * (adapter + head)
    assert paged.phases["update"].parts["optimizer"] == round((2 + 8 / 256) * adapter + 8 * head)
    fewer = small_plan(update=UpdateConfig(logits_at_once=64))
    assert fewer.phases["update"].total <= base.phases["update"].total
    assert small_plan(update=UpdateConfig(kind="rloo")).phases["update"].whole == 32
    halved = make_plan(RunConfig(), architecture("smollm2"), 128, processes=2)
    assert halved.phases["generate"].whole == 18


def test_table_has_a_row_a_phase_and_says_what_is_left():
    plan = small_plan("4GiB")
    lines = format_table(plan).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["generate", "score", "update", "retrain"]
    assert "of budget" in lines[0]
    assert "budget 4.00 GiB; the smallest that works is" in lines[5]
    assert any("5% of the budget" in line for line in lines)


def test_an_encoder_is_no_policy():
    with pytest.raises(RunError, match=r"policy.model minilm: wanted a causal language model"):
        make_plan(RunConfig(), architecture("minilm"), 128)
    assert isinstance(architecture("minilm"), Architecture)
