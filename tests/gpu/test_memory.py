"""The plan against what CUDA's allocator held, on Llama-3 shapes with random weights."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks.phases import Bench
from fpo_train.config import MemoryConfig, PolicyConfig, RewardModelConfig, RolloutConfig, RunConfig
from fpo_train.memory.architecture import SHIPPED, architecture
from fpo_train.memory.guard import Guard
from fpo_train.memory.peaks import PHASES
from fpo_train.memory.plan import make_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

NEEDED = {"llama-3.1-8b": ("meta-llama/Llama-3.1-8B", 40), "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", 12)}


def random_llama(file: str) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**json.loads((SHIPPED / f"{file}.json").read_text()))
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(former)


@pytest.mark.parametrize("file", NEEDED)
def test_measured_peak_is_near_the_plan_and_under_the_budget(file: str) -> None:
    name, gibibytes = NEEDED[file]
    if torch.cuda.mem_get_info()[0] < gibibytes * 2**30:
        pytest.skip(f"{name} in bfloat16 wants {gibibytes} GiB free")
    config = RunConfig(
        policy=PolicyConfig(dtype="bfloat16", gradient_checkpointing=True),
        reward_model=RewardModelConfig(kind="head", fit_pairs=0),
        rollout=RolloutConfig(prompts=8, candidates=8, max_new_tokens=64, min_new_tokens=64),
        memory=MemoryConfig(budget=f"{gibibytes - 4}GiB"),
    )
    bench = Bench(random_llama(file), config, prompt_tokens=256)
    for phase in PHASES:
        getattr(bench, phase)(2)  # optimizers have their states from here on
    bench.forget()
    torch.cuda.empty_cache()
    plan = make_plan(dataclasses.replace(config), architecture(name), 256, "cuda")
    guard = Guard(plan, torch.device("cuda"))
    try:
        for phase in PHASES:
            guard(phase, getattr(bench, phase))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    ratios = {phase: guard.planned[phase] / guard.measured[phase] for phase in PHASES}
    print(ratios)
    assert plan.budget is not None
    assert all(guard.measured[phase] < plan.budget for phase in PHASES)
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios
