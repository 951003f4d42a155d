"""The figures of an iteration against plain loops over candidates, alone and over several ranks; the JSONL files."""

import json
import math
import threading
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_train.processes import Processes
from fpo_train.report import records
from fpo_train.report.metrics import Clock, measure, repetition, samples_of

NAN, INF = float("nan"), float("inf")
N = 4


class Judged(NamedTuple):
    reward: torch.Tensor
    reference_reward: torch.Tensor
    penalty: torch.Tensor
    effective: torch.Tensor
    spread: float
    mean_product: torch.Tensor | None


class Rollout:
    """Prompts with replies of tokens and texts, rows as in a real one."""

    def __init__(self, prompts, replies, usable):
        self.prompts, self.replies, self.usable, self.candidates = prompts, replies, usable, N
        self.texts = [" ".join(map(str, reply)) for reply in replies]

    def chosen(self, best):
        return best + torch.arange(len(best)) * (N + 1)

    def references(self, like):
        return torch.arange(len(like)) * (N + 1) + N


class Labels:
    """All labels are there; only those wanted are given, and each that was not before is a call."""

    at_hand = False

    def __init__(self, preference, utility, reference_utility, has_utilities, calls):
        self._preference, self._utility, self._reference = preference, utility, reference_utility
        self._has, self.calls, self.failures = has_utilities, calls, int(preference.isnan().sum())

    def covers(self, wanted):
        return self.at_hand

    def known(self):
        return self._utility, self._reference

    def preferences(self, wanted):
        return self._preference.masked_fill(~wanted, NAN)

    def utilities(self, wanted):
        if not self._has:
            return None
        return self._utility.masked_fill(~wanted, NAN), self._reference


def iteration_of(seed, prompts, has_utilities=True, mean_product=True, left_out=0.2, failed=0.2):
    """A made-up iteration: candidates left out, labels that failed, one prompt without any candidate."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    usable = torch.rand(prompts, N, generator=g) >= left_out
    usable[0] = usable[0] & (prompts < 2)
    reward, penalty = normal(prompts, N), normal(prompts, N)
    effective = torch.where(usable, reward - 0.5 * penalty, -INF)
    preference = torch.rand(prompts, N, generator=g)
    preference[torch.rand(prompts, N, generator=g) < failed] = NAN
    replies = [torch.randint(0, 3, (length,), generator=g).tolist() for length in range(2, 2 + prompts * (N + 1))]
    owners = [SimpleNamespace(name=f"p{b}", text=f"prompt {b}") for b in range(prompts)]
    judged = Judged(reward, normal(prompts, 1), penalty, effective, 2.5, normal(prompts, N) if mean_product else None)
    labels = Labels(preference, normal(prompts, N), normal(prompts, 1), has_utilities, calls=10 + prompts)
    return judged, labels, effective.argmax(1), Rollout(owners, replies, usable)


def part(made, rows):
    """The same iteration as the rank with these prompts sees it."""
    judged, labels, best, rollout = made
    cut = Judged(*(x[rows] if isinstance(x, torch.Tensor) else x for x in judged))
    some = Labels(labels._preference[rows], labels._utility[rows], labels._reference[rows], labels._has, labels.calls)
    replies = rollout.replies[rows.start * (N + 1) : rows.stop * (N + 1)]
    return cut, some, best[rows], Rollout(rollout.prompts[rows], replies, rollout.usable[rows])


def spread_of(penalties, rewards):
    """The one's standard deviation around each prompt's mean over the other's."""

    def square(rows):
        return sum((x - sum(row) / len(row)) ** 2 for row in rows for x in row)

    return math.sqrt(square(penalties) / square(rewards)) if square(rewards) else None


def by_hand(made):
    """The row by a loop over prompts and candidates."""
    judged, labels, best, rollout = made
    kept = [(b, n) for b in range(len(best)) for n in range(N) if judged.effective[b, n] > -INF]
    learnt = [(b, int(best[b])) for b in range(len(best)) if (b, int(best[b])) in kept]

    def mean(values):
        values = [float(v) for v in values if not math.isnan(v)]
        return sum(values) / len(values) if values else None

    def margin(b, n):
        return float(judged.reward[b, n] - judged.reference_reward[b, 0])

    def c(b, n):
        return 1 / (1 + math.exp(-margin(b, n))) - float(labels._preference[b, n])

    utility = [labels._utility[b, n] if labels._has else labels._preference[b, n] for b, n in learnt]
    gap = [margin(b, n) - float(labels._utility[b, n] - labels._reference[b, 0]) for b, n in learnt]
    candidates = [reply for row, reply in enumerate(rollout.replies) if row % (N + 1) < N]
    return {
        "reward": mean(judged.reward[b, n] for b, n in kept),
        "penalty": mean(judged.penalty[b, n] for b, n in kept),
        "effective_reward": mean(judged.effective[b, n] for b, n in kept),
        "chosen_reward": mean(judged.reward[b, n] for b, n in learnt),
        "oracle_utility": mean(utility),
        "oracle_gain": mean(
            labels._utility[b, n] - labels._reference[b, 0] if labels._has else labels._preference[b, n] - 0.5
            for b, n in learnt
        ),
        "scaled_penalty_to_reward_std": spread_of(
            *(
                [[float(values[b, n]) for n in range(N) if (b, n) in kept] for b in range(len(best))]
                for values in (0.5 * judged.penalty, judged.reward)
            )
        ),
        "proxy_gap": mean(gap if labels._has else [c(b, n) for b, n in learnt]),
        "overconfidence": mean(c(b, n) for b, n in learnt),
        "steering": None
        if judged.mean_product is None
        else mean(c(b, n) * judged.mean_product[b, n] for b, n in learnt),
        "reply_tokens": mean(len(reply) for reply in candidates),
        "repetition": mean(repetition(reply) for reply in candidates),
    }


@pytest.fixture(scope="module")
def processes():
    return Processes()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), prompts=st.integers(1, 6), has=st.booleans(), product=st.booleans(),
    failed=st.sampled_from([0.0, 0.3, 1.0]), left_out=st.sampled_from([0.0, 0.4]),
)  # fmt: skip
def test_the_row_is_what_a_loop_gives(processes, seed, prompts, has, product, failed, left_out):
    made = iteration_of(seed, prompts, has, product, left_out, failed)
    row = measure(7, *made, processes)
    for key, value in by_hand(made).items():
        assert row[key] == (value if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)), key
    assert row["oracle_scale"] == ("utility" if has else "preference")
    assert row["prompts_left_out"] == sum(bool((e == -INF).all()) for e in made[0].effective)
    assert (row["iteration"], row["oracle_calls"]) == (7, 10 + prompts)
    assert row["oracle_failures"] == made[1].failures
    assert json.loads(json.dumps(row, allow_nan=False)) == row


@pytest.mark.parametrize("has_utilities", [True, False])
@pytest.mark.parametrize(("audit", "at_hand"), [(True, False), (False, True), (False, False)])
def test_the_policy_s_own_worth_where_it_is_asked_for_or_takes_no_question(processes, has_utilities, audit, at_hand):
    made = judged, labels, _, _ = iteration_of(4, 5, has_utilities)
    labels.at_hand = at_hand
    row = measure(1, *made, processes, seconds={"score": 1.0}, audit=audit)
    if not (audit or at_hand):
        assert not {"audit_utility", "audit_gain", "audit_calls"} & set(row)
        assert row["seconds"] == {"score": 1.0}
        return
    means = []  # over the candidates of each prompt
    for b in range(5):
        kept = [n for n in range(N) if judged.effective[b, n] > -INF]
        known = labels._utility[b] if has_utilities else labels._preference[b]
        values = [float(known[n]) for n in kept if not math.isnan(known[n])]
        base = float(labels._reference[b, 0]) if has_utilities else 0.5
        means += [(sum(values) / len(values), sum(values) / len(values) - base)] if values else []
    worth, gain = (sum(column) / len(means) for column in zip(*means, strict=True))
    assert (row["audit_utility"], row["audit_gain"]) == (pytest.approx(worth), pytest.approx(gain))
    assert row["audit_calls"] == 0  # this oracle's labels count none
    assert set(row["seconds"]) == {"score", "audit"}


class Threads:
    """Ranks as threads: what each brings is laid out, then joined in rank order."""

    def __init__(self, world):
        self.brought, self.wait, self.local = [None] * world, threading.Barrier(world), threading.local()

    def _all(self, mine):
        self.brought[self.local.rank] = mine
        self.wait.wait(10)
        everyone = list(self.brought)
        self.wait.wait(10)
        return everyone

    def gather(self, tensor):
        return torch.cat(self._all(tensor))

    def gather_objects(self, items):
        return [item for part in self._all(items) for item in part]


@pytest.mark.parametrize("has_utilities", [True, False])
def test_several_ranks_give_the_row_of_one(processes, has_utilities):
    made = iteration_of(3, 6, has_utilities)
    world = Threads(3)
    found = [None] * 3

    def rank(place, rows, seconds):
        world.local.rank = place
        judged, labels, best, rollout = part(made, rows)
        more = {"seconds": {"score": seconds}, "peak": 100 * place, "memory_measured": {"score": 50 + place}}
        row = measure(1, judged, labels, best, rollout, world, **more)
        found[place] = row, samples_of(rollout, judged, best, 1, world)

    shares = [slice(0, 1), slice(1, 3), slice(3, 6)]
    threads = [threading.Thread(target=rank, args=(i, rows, 2.0 - i)) for i, rows in enumerate(shares)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    row, samples = found[0]
    judged, _, best, rollout = made
    alone = measure(1, *made, processes) | {"oracle_calls": 3 * made[1].calls, "seconds": {"score": 2.0}}
    alone |= {"peak_memory_bytes": 200, "memory_measured": {"score": 52}}
    assert row == {key: pytest.approx(v) if isinstance(v, float) else v for key, v in alone.items()}
    assert samples == samples_of(rollout, judged, best, 1, processes)


def test_what_other_parts_report_is_in_the_row_and_nothing_unknown_is_invented(processes):
    made = iteration_of(1, 3)
    bare = measure(1, *made, processes)
    unknown = ("kl", "policy_loss", "grad_norm", "learning_rate", "reward_model_loss", "reward_model_drift")
    assert all(bare[key] is None for key in unknown)
    assert "memory_planned" not in bare
    assert bare["penalty_to_reward_std"] == 2.5
    told = measure(
        1, *made, processes, learnt=SimpleNamespace(loss=2.0, kl=NAN), grad_norm=INF, learning_rate=1e-4,
        reward_model_loss=0.7, reward_model_drift=0.01, seconds={"score": 1.5}, peak=7,
        memory_planned={"score": 5}, memory_measured={"score": 9, "update": 4},
    )  # fmt: skip
    assert [told[key] for key in unknown] == [None, 2.0, None, 1e-4, 0.7, 0.01]
    assert told["seconds"] == {"score": 1.5}
    assert (told["memory_planned"], told["memory_measured"]) == ({"score": 5}, {"score": 9, "update": 4})
    assert told["peak_memory_bytes"] == 9


def test_samples(processes):
    judged, _, best, rollout = iteration_of(5, 5)
    judged.reward[2, :] = torch.tensor([0.0, 3.0, 1.0, NAN])
    rollout.usable[2] = torch.tensor([True, False, True, True])
    judged.effective[2] = torch.tensor([5.0, -INF, 4.0, -INF])
    best[2] = 0
    found = {sample["id"]: sample for sample in samples_of(rollout, judged, best, 3, processes)}
    assert "p0" not in found  # none of its candidates could be judged
    row = 2 * (N + 1)
    assert found["p2"] == {
        "iteration": 3, "id": "p2", "prompt": "prompt 2", "reply": rollout.texts[row],
        "reference": rollout.texts[row + N], "unpenalised_reply": rollout.texts[row + 2],
        "reward": 0.0, "penalty": pytest.approx(float(judged.penalty[2, 0])), "effective_reward": 5.0,
    }  # fmt: skip
    labels = Labels(*(torch.arange(20.0).view(5, 4) + start for start in (0, 100)), torch.arange(5.0)[:, None], True, 0)
    told = {sample["id"]: sample for sample in samples_of(rollout, judged, best, 3, processes, labels)}
    assert told["p2"] == found["p2"] | {
        "utility": 108.0, "reference_utility": 2.0, "reference_reward": float(judged.reference_reward[2, 0]),
        "unpenalised_reward": 1.0, "unpenalised_penalty": pytest.approx(float(judged.penalty[2, 2])),
        "unpenalised_utility": 110.0,
    }  # fmt: skip
    rollout.texts[row + 2] = rollout.texts[row]
    again = {sample["id"]: sample for sample in samples_of(rollout, judged, best, 3, processes)}
    assert again["p2"]["unpenalised_reply"] is None


@pytest.mark.parametrize(
    ("reply", "share"),
    [([], 0), ([1, 2, 3], 0), ([1, 1, 1, 1], 1 / 2), ([1, 2, 3, 1, 2, 3], 1 / 4), ([1] * 12, 0.9), ([1, 2, 3, 4], 0)],
)
def test_repetition(reply, share):
    assert repetition(reply) == pytest.approx(share)


def test_files_hold_no_nan_and_are_cut_and_read_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"iteration": i, "x": x, "deep": {"y": [x, 1]}, "text": "a\u2028b"} for i, x in enumerate([1.5, NAN, -INF], 1)
    ]
    records.append(path, rows)
    found = records.read(path)
    assert [row["x"] for row in found] == [1.5, None, None]
    assert found[1]["deep"] == {"y": [None, 1]}
    with path.open("a") as file:
        file.write('{"iteration": 4, "x"')
    assert records.read(path) == found
    records.cut(path, 2)
    assert records.read(path) == found[:2]
    assert records.read(tmp_path / "none.jsonl") == []


def test_the_clock_waits_for_a_gpu_once_a_phase(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    clock = Clock(torch.device("cuda", 0))
    for phase in ("score", "update", "score"):
        with clock(phase):
            pass
    assert waits == [torch.device("cuda", 0)] * 3
    assert list(clock.seconds) == ["score", "update"]
    cpu = Clock(torch.device("cpu"))
    with cpu("score"):
        pass
    assert len(waits) == 3
    assert cpu.seconds["score"] >= 0
