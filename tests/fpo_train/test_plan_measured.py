"""The plan's arithmetic against a meter of live tensors, phase by phase."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from benchmarks.phases import Bench
from fpo_train.config import (
    MemoryConfig,
    OracleConfig,
    PenaltyConfig,
    PolicyConfig,
    RewardModelConfig,
    RolloutConfig,
    RunConfig,
    UpdateConfig,
)
from fpo_train.memory.architecture import from_config
from fpo_train.memory.peaks import PHASES
from fpo_train.memory.plan import make_plan
from fpo_train.rollout.packing import packed_bytes
from tests.fpo_train.meter import Meter


@pytest.mark.parametrize("checkpointed", [False, True])
def test_meter_counts_what_a_backward_pass_holds(checkpointed):
    n, h, m = 16, 32, 64
    up, down, x = nn.Linear(h, m, bias=False), nn.Linear(m, h, bias=False), torch.randn(n, h)
    held = [x, up.weight, down.weight]

    def block(x):
        return down(up(x).exp().sin())  # keeps exp's result and sin's; the last layer's input is sin's

    with Meter(held) as meter:
        before = meter.live
        assert before == 4 * (n * h + 2 * h * m)
        y = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        kept = 0 if checkpointed else 2 * n * m * 4
        assert meter.live - before == n * h * 4 + kept
        # without a tape each is let go after the next, but for the argument that Python still holds
        y.sum().backward()
        del y
    assert meter.live - before == 2 * h * m * 4  # the gradients
    assert meter.peak - before >= n * h * 4 + 2 * n * m * 4 + h * m * 4


def run_config(**sections):
    """A short run: 4 prompts, 4 candidates, replies of 16 tokens."""
    rollout = RolloutConfig(prompts=4, candidates=4, max_new_tokens=16, min_new_tokens=16)
    return RunConfig(**{"rollout": rollout, "update": UpdateConfig(logits_at_once=16)} | sections)


def compare(lm, config, rows, prompt_tokens):
    """Planned over measured peak of each phase of an iteration, `rows` by phase, or all at once."""
    bench = Bench(lm, config, prompt_tokens)
    for phase in PHASES:  # optimizers have their states from here on
        getattr(bench, phase)(0)
    bench.forget()
    memory = MemoryConfig(**{f"{phase}_rows": some for phase, some in rows.items()})
    model = from_config("policy", bench.parts.policy.lm.config.to_dict())
    plan = make_plan(dataclasses.replace(config, memory=memory), model, prompt_tokens)
    ratios = {}
    with Meter(bench.held(), packed_bytes(bench.parts.policy.model)) as meter:
        for phase in PHASES:
            meter.peak = meter.live
            getattr(bench, phase)(plan.rows[phase])
            planned = plan.phases[phase]
            ratios[phase] = planned.total / meter.peak
            print(f"{phase} rows={planned.rows}/{planned.whole} {planned.total} {meter.peak} {ratios[phase]:.3f}")
    return ratios


def small(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


CHECKPOINTING = PolicyConfig(gradient_checkpointing=True)
HALF = PolicyConfig(dtype="bfloat16")
LORA = RewardModelConfig(kind="lora", fit_pairs=0)
HEAD = RewardModelConfig(kind="head", fit_pairs=0)
OVER_ALL = PenaltyConfig(kind="practical", parameters="all")
RLOO = UpdateConfig(kind="rloo", logits_at_once=16)
FEW = {"generate": 8, "score": 10, "update": 2, "retrain": 4}
ONE = {"generate": 1, "score": 1, "update": 1, "retrain": 2}
CASES = {
    "head": {"reward_model": HEAD},
    "checkpointing": {"policy": CHECKPOINTING, "reward_model": LORA},
    "rloo": {"update": RLOO, "reward_model": HEAD},
    "half": {"policy": HALF, "reward_model": LORA},
    "padded": {
        "oracle": OracleConfig(mean_over="padded"),
        "penalty": PenaltyConfig(kind="relaxed"),
        "reward_model": HEAD,
    },
}


@pytest.mark.parametrize("rows", [{}, FEW, ONE], ids=["all", "few", "one"])
@pytest.mark.parametrize("case", CASES)
def test_small_llama(case, rows):
    config = run_config(**CASES[case])
    ratios = compare(small(getattr(torch, config.policy.dtype)), config, rows, prompt_tokens=24)
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios


def encoder():
    config = BertConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        num_labels=1,
    )
    return BertForSequenceClassification(config)


def decoder():
    config = small().config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize("rows", [{}, FEW], ids=["all", "few"])
@pytest.mark.parametrize(("made", "dtype"), [(encoder, "float32"), (decoder, "float32"), (decoder, "bfloat16")])
def test_small_classifier(made, dtype, rows, tiny, tmp_path):
    """All its weights are trained, and the penalty is over all of them."""
    made().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    settings = RewardModelConfig(
        kind="classifier", model=str(tmp_path), train="all", max_tokens=40, fit_pairs=0, dtype=dtype
    )
    config = run_config(reward_model=settings, penalty=OVER_ALL)
    ratios = compare(small(), config, rows, prompt_tokens=24)
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios


@pytest.fixture(scope="module")
def smollm2():
    from fpo_train.data.sources import load_causal_lm

    return load_causal_lm("smollm2", torch.float32)[0]


LONG = {"rollout": RolloutConfig(prompts=2, candidates=4, max_new_tokens=24, min_new_tokens=24)}
REAL = {
    "head": ({"reward_model": HEAD} | LONG, {}),
    "lora": (
        {"reward_model": LORA, "policy": CHECKPOINTING} | LONG,
        {"generate": 4, "score": 5, "update": 1, "retrain": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REAL)
def test_smollm2(case, smollm2):
    sections, rows = REAL[case]
    ratios = compare(copy.deepcopy(smollm2), run_config(**sections), rows, prompt_tokens=40)
    assert all(0.97 < ratio < 1.10 for ratio in ratios.values()), ratios
