"""Runs that use no penalty are watched: what is logged, when a warning is given, and when none may be."""

import json
import sys
import warnings

import pytest
import torch
from transformers import AutoTokenizer, LlamaForSequenceClassification

from fpo_train import FPOMonitor, FPOReward, MonitorCallback
from fpo_train.errors import RunError
from fpo_train.report.watch import collapse
from tests.pages import RESULTS, ROOT, holds

from .test_reward_function import PROMPTS, REFERENCES, REPLIES, worth


@pytest.fixture
def steering(tiny):
    model = LlamaForSequenceClassification.from_pretrained(tiny, num_labels=1)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    return FPOReward(model, AutoTokenizer.from_pretrained(tiny), "practical", oracle=worth)


def lengths(prompts, completions, log_metric=None, **columns):
    log_metric("own", 1.0)
    return [float(len(text)) for text in completions]


def test_it_hands_on_what_the_function_says_and_logs_what_it_sees(steering):
    asked, logged = [], {}

    def oracle(prompts, completions, answer):
        asked.extend(zip(prompts, completions, answer, strict=True))
        return worth(prompts, completions)

    monitor = FPOMonitor(lengths, oracle, asked=3, steering=steering)
    columns = {"reference": REFERENCES, "answer": list("abcdef"), "log_metric": logged.__setitem__}
    assert monitor(prompts=PROMPTS, completions=REPLIES, **columns) == [len(text) for text in REPLIES]
    assert asked == [(PROMPTS[n], REPLIES[n], "abcdef"[n]) for n in (0, 2, 4)]
    utility = worth(PROMPTS, REPLIES)
    assert logged["own"] == 1.0
    assert logged["fpo/oracle_utility"] == pytest.approx(sum(utility[n] for n in (0, 2, 4)) / 3)
    left = steering.steering(PROMPTS, REPLIES, reference=REFERENCES)
    assert logged["fpo/steering"] == pytest.approx(float(left.mean()), rel=1e-5)
    assert torch.allclose(steering.utility(PROMPTS, REPLIES), torch.tensor(utility))
    assert logged["fpo/collapse"] == 0
    assert monitor.rows[0]["reward"] == pytest.approx(sum(map(len, REPLIES)) / 6)


def test_steering_foretells_what_training_does_to_the_mean_reward(steering):
    """A small step of plain descent on every pair changes the mean reward by −η times the statistic."""
    score = steering.score(PROMPTS, REPLIES, reference=REFERENCES)
    left = steering.steering(PROMPTS, REPLIES, reference=REFERENCES)
    head, eta = steering.model.head.weight, 1e-4
    said, labels, judged = steering._judge(PROMPTS, REPLIES, {"reference": REFERENCES}, learn=False)
    rows, references = said.pairs()
    reading = steering.model.read(said, None)
    margin = judged.reward - judged.reference_reward
    c = torch.sigmoid(margin) - labels.preferences(said.usable)
    with torch.no_grad():
        for z in range(len(rows)):
            head -= eta / len(rows) * c[z] * (reading.features[rows[z]] - reading.features[references[z]])
    moved = steering.score(PROMPTS, REPLIES, reference=REFERENCES).reward.mean() - score.reward.mean()
    assert float(moved) == pytest.approx(-eta * float(left.mean()), rel=0.02)


def drifting(step):
    noise = 0.1 * ((7 * step) % 5 - 2)
    return step + noise, -step + noise


def test_a_reward_that_rises_while_the_truth_falls_is_told():
    now = {"step": 0}
    monitor = FPOMonitor(
        lambda prompts, completions, **columns: [drifting(now["step"])[0]],
        lambda prompts, completions: [drifting(now["step"])[1]],
        window=6,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            now["step"] = step
            monitor(prompts=["a"], completions=["b"])
    again = FPOMonitor(monitor._reward, lambda prompts, completions: [drifting(now["step"])[1]], window=6)
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    now["step"] = 5
    for one in (monitor, again):
        with pytest.warns(UserWarning, match="possible collapse: over iterations 1 to 6 the reward rose"):
            one(prompts=["a"], completions=["b"])


def warned(kind, window):
    """Of the study's ten runs of a penalty, those that a watch would have warned about."""
    found = []
    for path in sorted(RESULTS.glob(f"collapse*/{kind}/*/metrics.jsonl")):
        watch = FPOMonitor(lengths, worth, window=window)
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            watch.note(row["reward"], row["oracle_utility"])
        found.append(any("warning" in row for row in watch.rows))
    return sum(found), len(found)


def fallen(kind):
    """By how much each of these runs' utility falls, from its first five iterations to its last five."""
    found = []
    for path in RESULTS.glob(f"collapse*/{kind}/*/metrics.jsonl"):
        rows = [json.loads(line)["oracle_utility"] for line in path.read_text(encoding="utf-8").splitlines()]
        found.append((sum(rows[:5]) - sum(rows[-5:])) / 5)
    return sorted(found)


def test_false_alarms_on_healthy_runs():
    """docs/embedding.md quotes these: `relaxed` is healthy (its utility falls by 0.77 at most), `none` collapses."""
    assert {w: (warned("relaxed", w), warned("none", w)) for w in (10, 20)} == {
        10: ((0, 10), (2, 10)),
        20: ((1, 10), (2, 10)),
    }
    page, plain = "docs/embedding.md", fallen("none")
    for window in (10, 20):
        holds(page, f"| {window} | {warned('relaxed', window)[0]} | {warned('none', window)[0]} |")
    holds(page, f"its utility falls by {fallen('relaxed')[-1]:.2f} at most")
    holds(page, f"it falls by {plain[0]:.2f} to {plain[-1]:.2f}, on nine of the ten by {plain[1]:.2f} or more")


def test_the_page_has_the_simulated_rates():
    page = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
    rows = [" ".join(line.split()) for line in collapse.__doc__.splitlines() if "%" in line and "|" in line]
    assert len(rows) == 4
    assert all(row in page for row in rows)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
def test_it_travels_with_trls_checkpoints_and_leaves_evaluation_alone(tiny, tmp_path):
    from . import trl_runs as runs

    monitor = FPOMonitor(runs.vowels, runs.vowels)
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    trainer = runs.train("grpo", tiny, tmp_path, monitor, callback=MonitorCallback(monitor), **evaluated)
    assert len(monitor.rows) == 6
    assert [row["rewards/vowels/mean"] for row in trainer.state.log_history if "fpo/collapse" in row] == pytest.approx(
        [row["reward"] for row in monitor.rows], rel=1e-5
    )
    again = FPOMonitor(runs.vowels, runs.vowels)
    resumed = evaluated | {"resume": tmp_path / "checkpoint-3"}
    runs.train("grpo", tiny, tmp_path, again, callback=MonitorCallback(again), **resumed)
    assert again.rows == monitor.rows


def test_what_makes_no_sense_is_refused(steering):
    with pytest.raises(RunError, match="window: wanted 4 steps or more, got 3"):
        FPOMonitor(lengths, worth, window=3)
    blind = FPOReward(steering.model.loaded[0], steering.model.tokenizer)
    with pytest.raises(RunError, match="steering: the reward has no oracle"):
        FPOMonitor(lengths, worth, steering=blind)
    for ask in (blind.steering, blind.utility):
        with pytest.raises(RunError, match="the reward has no oracle"):
            ask(PROMPTS, REPLIES, reference=REFERENCES)
