"""What vLLM is asked, by a stand-in that answers with tokens made of each request's seed."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fpo_train.config import RolloutConfig
from fpo_train.errors import RunError
from fpo_train.rollout import sampler
from fpo_train.rollout.sampling import row_seed

SETTINGS = RolloutConfig(engine="vllm", prompts=3, candidates=2, max_new_tokens=6, temperature=0.7, top_p=0.8, top_k=9)


@pytest.fixture
def stand_in(monkeypatch):
    """The modules `vllm` and `vllm.lora.request`, and the calls they got."""
    calls = []

    class LLM:
        def __init__(self, **arguments):
            calls.append(arguments)

        def generate(self, prompts, sampling_params, lora_request, use_tqdm):
            weights = load_file(Path(lora_request.path) / "adapter_model.safetensors") if lora_request else None
            calls.append((prompts, sampling_params, lora_request, weights))
            tokens = [(3 + p.seed % 90, 2, 50) for p in sampling_params]  # something behind the EOS, too
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=t)]) for t in tokens]

    vllm, request = ModuleType("vllm"), ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams = LLM, lambda **arguments: SimpleNamespace(**arguments)
    request.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)
    for module in (vllm, ModuleType("vllm.lora"), request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_requests_adapter_and_replies(policy, prompts, stand_in, tiny):
    three = prompts.batch(0, 3)
    sample = sampler(policy, SETTINGS, seed=5)
    (engine,) = stand_in
    assert engine["model"] == str(tiny)
    assert engine["enable_lora"] is True
    assert engine["max_lora_rank"] == 16
    assert engine["dtype"] == "float32"
    assert engine["quantization"] is None
    assert engine["generation_config"] == "vllm"
    stand_in.clear()

    rollout = sample(three, place=4, first=6)
    (asked, how, adapter, weights), (asked_base, how_base, no_adapter, _) = stand_in
    assert [request["prompt_token_ids"] for request in asked] == [list(p.ids) for p in three for _ in range(2)]
    assert [request["prompt_token_ids"] for request in asked_base] == [list(p.ids) for p in three]
    assert [p.seed for p in how] == [row_seed(5, 4, 6 + b, n) for b in range(3) for n in range(2)]
    assert [p.seed for p in how_base] == [row_seed(5, 4, 6 + b, 2) for b in range(3)]
    for p in (*how, *how_base):
        assert (p.temperature, p.top_p, p.top_k, p.min_tokens, p.max_tokens) == (0.7, 0.8, 9, 5, 6)
        assert p.stop_token_ids == [policy.eos]
    assert no_adapter is None
    own = {name.replace(".default", ""): p for name, p in policy.trainable.items()}
    assert set(weights) == set(own)
    assert all(torch.equal(weights[name], own[name]) for name in own)
    assert not Path(adapter.path).exists()  # handed over, then gone
    seeds = [row_seed(5, 4, 6 + b, n) for b in range(3) for n in range(3)]
    assert rollout.replies == [[3 + seed % 90, 2] for seed in seeds]
    assert rollout.usable.shape == (3, 2)


def test_each_iteration_s_adapter_has_a_number_of_its_own(policy, prompts, stand_in):
    sample = sampler(policy, SETTINGS, seed=5)
    stand_in.clear()
    for place in (1, 2):
        sample(prompts.batch(place, 3), place, 0)
    numbers = [call[2].number for call in stand_in if call[2]]
    assert len(numbers) == len(set(numbers)) == 2
    assert min(numbers) >= 1
    stand_in.clear()
    assert len(sample.base_replies(prompts.batch(0, 3), 4, place=0, first=0)) == 12
    assert stand_in[0][2] is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_dropout": True}, "rollout.lora_dropout true"),
        ({"attention_mask": False}, "rollout.attention_mask false"),
    ],
)
def test_what_vllm_cannot_do(policy, stand_in, more, message):
    with pytest.raises(RunError, match=message):
        sampler(policy, RolloutConfig(engine="vllm", **more), seed=5)


def test_without_vllm(policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RunError, match="vLLM is not installed: `pip install vllm`"):
        sampler(policy, SETTINGS, seed=5)
