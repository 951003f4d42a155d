"""The same questions put to a policy while it learns: when, what is kept of it, and that nothing else changes."""

import json

import pytest

from fpo_train.cli import main
from tests.fpo_train.runs import arguments, rows

FIVE = ("--iterations", 5, "--logging.watched", 2)


def watched(folder):
    return [json.loads(line) for line in (folder / "watched.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def _no_reports():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpo_train.running.run.write_report", lambda out: out / "report.html")
        yield


@pytest.fixture(scope="module")
def asked(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("watched") / "run"
    assert main(arguments(tiny, out, *FIVE)) == 0
    return out


def test_they_are_asked_at_powers_of_four_and_at_the_end(asked):
    found = watched(asked)
    assert [row["iteration"] for row in found] == [1, 1, 4, 4, 5, 5]
    first, second = found[0::2], found[1::2]
    for one in (first, second):
        assert len({(row["id"], row["prompt"], row["reference"], row["reference_utility"]) for row in one}) == 1
        assert len({row["reference_reward"] for row in one}) == 3  # the reward model has learnt between them
        assert one[0]["utility"] != one[-1]["utility"]
    assert first[0]["id"] != second[0]["id"]
    assert all(isinstance(row[key], float) for row in found for key in ("reward", "penalty", "utility"))


def test_the_base_s_own_greedy_reply_is_what_a_policy_that_has_not_learnt_says(tiny, tmp_path):
    more = ("--iterations", 1, "--update.learning_rate", 0)
    assert main(arguments(tiny, tmp_path / "a", *more)) == 0
    for row in watched(tmp_path / "a"):
        assert row["reply"] == row["reference"]
        assert row["utility"] == pytest.approx(row["reference_utility"], abs=1e-5)
        assert row["reward"] == pytest.approx(row["reference_reward"], abs=1e-5)
        assert row["penalty"] == pytest.approx(0, abs=1e-3)


def test_nothing_else_changes(asked, tiny, tmp_path):
    out = tmp_path / "unwatched"
    assert main(arguments(tiny, out, "--iterations", 5, "--logging.watched", 0)) == 0
    assert not (out / "watched.jsonl").exists()
    assert rows(asked) == rows(out)
    assert all(row["audit_calls"] == 1 for row in watched(asked))
    for part in ("policy/adapter_model.safetensors", "reward_model/head.safetensors", "samples.jsonl"):
        assert (out / part).read_bytes() == (asked / part).read_bytes()


def test_a_run_that_goes_on_forgets_what_was_its_last(asked, tiny, tmp_path):
    out = tmp_path / "run"
    assert main(arguments(tiny, out, *FIVE[2:], "--iterations", 3)) == 0
    assert rows(out) == rows(asked)[:3]
    assert [row["iteration"] for row in watched(out)] == [1, 1, 3, 3]
    assert main(arguments(tiny, out, *FIVE, "--resume", "true")) == 0
    assert (out / "watched.jsonl").read_bytes() == (asked / "watched.jsonl").read_bytes()


@pytest.mark.parametrize("audit", ["false", "true"])
def test_an_oracle_elsewhere_is_asked_with_an_audit_alone(tiny, tmp_path, audit, monkeypatch):
    (tmp_path / "lengths.py").write_text(
        "def utility(prompts, completions, **more):\n    return [float(len(c)) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    more = ("--oracle.kind", "function", "--oracle.function", "lengths:utility", "--iterations", 1)
    assert main(arguments(tiny, tmp_path / "a", *more, "--penalty.kind", "relaxed", "--logging.audit", audit)) == 0
    assert all(
        (row["utility"] is not None) == (row["penalty"] is not None) == (audit == "true")
        for row in watched(tmp_path / "a")
    )
    assert all(row["reward"] is not None for row in watched(tmp_path / "a"))
    (row,) = rows(tmp_path / "a")
    assert row["audit_calls"] == 0  # relaxed has bought them all
    assert [row["audit_calls"] for row in watched(tmp_path / "a")] == [audit == "true"] * 3
    assert row["audit_utility"] is not None
