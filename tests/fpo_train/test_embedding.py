"""An input embedding in the host's memory: what is said, learnt and known of a model is the same."""

import pytest
import torch

from fpo_train.config import PenaltyConfig, RewardModelConfig, RunConfig
from fpo_train.data import identity
from fpo_train.errors import RunError
from fpo_train.penalty.gradients import gradients
from fpo_train.policy.embedding import HostEmbedding
from fpo_train.processes import Processes
from fpo_train.reward_model import load_reward_model
from fpo_train.rollout import Readings
from tests.fpo_train.runs import arguments, contents, rows

from .variants import loaded, replies, says_what_it_thinks, variant


def test_replies_and_steering_are_the_same(tiny):
    found = []
    for place in ("device", "host"):
        policy = loaded(tiny, input_embedding=place)
        assert isinstance(policy.lm.get_input_embeddings(), HostEmbedding) == (place == "host")
        assert policy.device.type == "cpu"
        rollout = says_what_it_thinks(policy)
        config = RunConfig(
            reward_model=RewardModelConfig(kind="lora", lora_rank=3), penalty=PenaltyConfig(parameters="lora")
        )
        model = load_reward_model(config, policy, Processes(), policy.device)
        with torch.no_grad():
            model.head.weight.fill_(0.3)
        reading = model.read(rollout, Readings(policy, rollout))
        products, *_ = gradients(model, reading, config.penalty, Processes(), 0).steering(*rollout.pairs())
        found.append((rollout.replies, products, identity.of_model(policy.lm, policy.tokenizer)))
    assert found[0][0] == found[1][0]
    assert found[0][1].abs().min() > 0
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_a_run_is_the_same(tiny, tmp_path, checkpointing):
    from fpo_train.cli import main

    more = ["--policy.gradient_checkpointing", checkpointing]
    for place in ("device", "host"):
        assert main(arguments(tiny, tmp_path / place, *more, "--policy.input_embedding", place)) == 0
    one, other = tmp_path / "device", tmp_path / "host"
    assert rows(one) == rows(other)
    adapters = [contents(folder / "policy", "*.safetensors") for folder in (one, other)]
    assert adapters[0] == adapters[1]


def test_a_table_that_is_the_output_projection_too_is_refused(tiny, tmp_path):
    folder = variant(tiny, tmp_path, tie_word_embeddings=True)
    assert replies(loaded(folder)).replies
    with pytest.raises(RunError, match=r"policy.input_embedding host: .* same table"):
        loaded(folder, input_embedding="host")
