"""Numbers that are none, wherever a run may meet them: one sentence that says where, and nothing moved or written."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fpo_train.cli import main
from fpo_train.config import PenaltyConfig, RewardModelConfig, RolloutConfig, RunConfig, UpdateConfig
from fpo_train.errors import NotFinite, RunError
from fpo_train.oracle import Labels
from fpo_train.oracle.base import UtilityOracle
from fpo_train.penalty.base import Penalty
from fpo_train.penalty.gradients import HeadGradients
from fpo_train.policy import NO_STATES
from fpo_train.policy.optimizers import largest, move
from fpo_train.processes import Processes
from fpo_train.reward_model import load_reward_model
from fpo_train.reward_model.replay import Pair, Replay
from fpo_train.rollout import Readings, sampler
from fpo_train.rollout.sampling import RowSampler, uniforms
from fpo_train.update import load_update

from .runs import arguments

NAN, INF = torch.nan, torch.inf


@pytest.fixture
def rollout(policy, prompts):
    return sampler(policy, RolloutConfig(prompts=2, candidates=3, max_new_tokens=5), 0)(prompts.batch(0, 2), 1, 0)


def reward_model(policy, **settings):
    model = load_reward_model(RunConfig(reward_model=RewardModelConfig(**settings)), policy, Processes(), policy.device)
    torch.manual_seed(0)
    with torch.no_grad():
        model.head.weight.normal_()
    return model


@pytest.mark.parametrize(
    ("row", "drawn"),
    [
        ([1.0, NAN, 2.0], False),
        ([NAN] * 3, False),
        ([1.0, INF, 2.0], False),
        ([-INF] * 3, False),
        ([1.0, -INF, 2.0], True),  # a token that may not be said
        ([3e38, -3e38, 1.0], True),
    ],
)
def test_what_tokens_are_drawn_from(row, drawn):
    scores = torch.tensor([[1.0, 2.0, 3.0], row])
    draw = RowSampler(RolloutConfig(temperature=1.0), uniforms(0, 0, [(0, 0), (0, 1)], 1))
    if drawn:
        assert scores.gather(1, draw(0, torch.arange(2), scores)[:, None]).isfinite().all()
        draw.check()
        return
    draw(0, torch.arange(2), scores)
    with pytest.raises(NotFinite, match=r"rollout: .*logits are not finite numbers.*update.learning_rate"):
        draw.check()


def test_a_run_that_diverges_says_when_and_keeps_what_was_whole(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(tiny, out, "--update.learning_rate", 1e30)) == 1
    said = capsys.readouterr().err
    assert "fpo-train run: error: iteration 2: rollout: the policy's logits are not finite numbers" in said
    assert [json.loads(line)["iteration"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1]
    assert {json.loads(line)["iteration"] for line in (out / "samples.jsonl").read_text().splitlines()} == {1}
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["1"]
    assert not [*out.rglob("*.tmp"), *out.glob("policy")]


def test_a_step_that_leaves_no_numbers_is_said_at_once(policy, rollout):
    update = load_update(policy, RunConfig(update=UpdateConfig(learning_rate=1e39, weight_decay=0.0)), Processes())
    effective = SimpleNamespace(effective=torch.rand(2, 3))
    update.gradient(rollout, Readings(policy, rollout), effective)
    with pytest.raises(NotFinite, match=r"update: the step has left weights .*update.learning_rate"):
        update.step()


def test_hidden_states(policy, rollout):
    policy.lm.model.norm.weight.data[3] = NAN
    for one in (Readings(policy, rollout), Readings(policy, dataclasses.replace(rollout, prefix=None))):
        with pytest.raises(NotFinite, match="score: the base's hidden states are not finite"):
            one.of()
    with pytest.raises(NotFinite, match=NO_STATES):
        policy.encode(rollout.sequences)


def test_scores(policy, rollout):
    for choice in ("fail", "drop"):
        model = reward_model(policy, nan_scores=choice)
        reading = model.read(rollout, Readings(policy, rollout))
        reading.features[1, 0] = INF
        if choice == "fail":
            with pytest.raises(NotFinite, match="1 of 8 scores are not numbers"):
                model.score(reading)
        else:
            assert (~model.score(reading).isfinite()).nonzero().tolist() == [[1]]
        with torch.no_grad():
            model.head.weight[0, 0] = NAN
        with pytest.raises(NotFinite, match="8 scores are not numbers" if choice == "fail" else "not one of 8 scores"):
            model.score(reading)


def test_the_reward_model_s_training(policy, rollout):
    model = reward_model(policy, learning_rate=1e39, weight_decay=0.0)
    pair = Pair(
        prompt=rollout.prompts[0], chosen=tuple(rollout.replies[0]), reference=tuple(rollout.replies[3]),
        chosen_text="a", reference_text="b", preference=0.9, iteration=1, features=None,
    )  # fmt: skip
    model.gradient([pair])
    before = model.weights()
    gradient = model.head.weight.grad.clone()
    for bad in (NAN, INF):
        model.head.weight.grad[0, 2] = bad
        with pytest.raises(NotFinite, match="retrain: the reward model's gradient is not finite"):
            model.step()
        assert all(torch.equal(before[name], weight) for name, weight in model.weights().items())
        model.head.weight.grad.copy_(gradient)
    with pytest.raises(NotFinite, match=r"retrain: the step has left weights .*reward_model.learning_rate"):
        model.step()
    features = (torch.full((32,), NAN), torch.zeros(32))
    with pytest.raises(NotFinite, match="its score head reads of the first pairs"):
        model.fit([Pair(**{**vars(pair), "features": features})])


class Numbers(UtilityOracle):
    """U as given, row by row."""

    def __init__(self, values):
        super().__init__(temperature=1.0)
        self._values = values

    def utility(self, rollout, readings, rows):
        return self._count(self._values[rows], silent="not_a_number")


def test_utilities(policy, rollout):
    oracle = Numbers(torch.tensor([0.0, INF, 1.0, 0.0, NAN, -INF, 2.0, 1.0]))
    labels = Labels(oracle, rollout, Readings(policy, rollout))
    preference = labels.preferences(torch.ones(2, 3, dtype=torch.bool))
    assert preference.isnan().tolist() == [[False, True, False], [True, True, False]]
    assert oracle.counts == {"scored": 5, "not_a_number": 3}
    labels = Labels(Numbers(torch.full((8,), -INF)), rollout, Readings(policy, rollout))
    labels.preferences(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(RunError, match="oracle: not one of the iteration's 6 labels could be had"):
        labels.check(Processes())


@pytest.mark.parametrize(("kind", "choice"), [("practical", "fail"), ("relaxed", "fail"), ("relaxed", "drop")])
def test_penalties(policy, rollout, monkeypatch, kind, choice):
    model = reward_model(policy, nan_scores=choice)
    steering = HeadGradients.steering

    def overflowing(self, rows, references):
        product, *rewards = steering(self, rows, references)
        product[4] = INF
        return product, *rewards

    monkeypatch.setattr(HeadGradients, "steering", overflowing)
    readings = Readings(policy, rollout)
    values = torch.linspace(0, 1, 8)
    values[1] = NAN  # a label that could not be had is no fault of the penalty's

    def judged():
        labels = Labels(Numbers(values), rollout, readings)
        penalty = Penalty(PenaltyConfig(kind=kind), Processes(), 0)
        return penalty(model, model.read(rollout, readings), labels, Replay(4), rollout)

    if choice == "fail":
        with pytest.raises(NotFinite, match="penalty: 1 of 6 are not finite numbers though their scores are"):
            judged()
    else:
        assert judged().effective.isfinite().tolist() == [[True, False, True], [True, False, True]]


def test_an_answer_of_a_broken_adapter(tiny, policy, tmp_path, capsys):
    policy.model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0] = NAN
    save_file(weights, path)
    out = tmp_path / "eval"
    words = ["eval", "--left", "base", "--right", tmp_path / "adapter", "--model", tiny, "--out", out]
    assert main([*map(str, words), "--limit", "2", "--max_new_tokens", "3"]) == 1
    assert "fpo-train eval: error: right: its logits are not finite numbers" in capsys.readouterr().err
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [row["policy"] for row in rows] == ["left", "left"]


def test_a_step_onto_no_number():
    """A weight is finite, and so is the way it is to go."""
    weight = torch.nn.Parameter(torch.tensor([-3e38, 1.0]))
    weight.grad = torch.tensor([1.0, 0.0])
    with pytest.raises(NotFinite, match="too far"):
        move(torch.optim.SGD([weight], lr=1e38), [weight], "too far")
    assert weight.isinf().tolist() == [True, False]
    with pytest.raises(RuntimeError, match="other"):
        move(SimpleNamespace(step=lambda: raise_("other")), [weight], "too far")


def raise_(said):
    raise RuntimeError(said)


def test_the_largest_of_each():
    tensors = [torch.tensor([1.0, -3.0]), torch.tensor([[NAN, 1.0]]), torch.zeros(0), torch.tensor([6e4]).half()]
    assert largest(tensors).nan_to_num(-1).tolist() == [3.0, -1.0, 60000.0]
    assert largest([]).isfinite().all()


def test_the_module_that_made_it_is_named(policy, rollout):
    model = reward_model(policy, kind="lora")
    reading = model.read(rollout, Readings(policy, rollout))
    name, module = next((n, m) for n, m in model.module.named_modules() if n.endswith("layers.1.mlp.up_proj"))
    weight = getattr(module, "base_layer", module).weight
    before = weight[0, 0].item()
    try:
        with torch.no_grad():
            weight[0, 0] = INF
        with pytest.raises(NotFinite, match=rf"the first of row 1, where {name}(\.base_layer)? makes such a one; rew"):
            model.score(reading)
    finally:
        with torch.no_grad():
            weight[0, 0] = before
