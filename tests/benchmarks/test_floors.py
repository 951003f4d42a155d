"""What questions take at the least: the counts, the rates, and what a run makes of both."""

import dataclasses
import gc
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cases, floors, peers, results
from benchmarks.__main__ import main
from benchmarks.cases import packages
from benchmarks.floors import Rates
from benchmarks.models import reward_model, token_batch
from benchmarks.packages.work import made
from benchmarks.registry import Case, Competitor, Contest, Floor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return reward_model("tiny", 2, torch.float32, CPU)


def test_a_pass_is_what_torch_counts(model):
    batch = token_batch(3, 7, CPU, full=True)
    with FlopCounterMode(display=False) as counted, peers.embeddings_on_tape(model):
        peers.rewards(model, batch).sum().backward()
    hidden, tokens = 48, 21
    linear = counted.get_flop_counts()["Global"][torch.ops.aten.mm]
    scores = 4 * hidden * tokens  # of all tokens; the floor has the last ones', which are read, and no way back
    floor = floors.whole(model, [7] * 3)
    seen = 2 * 3 * 7 * 8 / 2  # layers, texts, queries and keys up to them
    assert floor.flops == linear - scores + 2 * hidden * 3 + 12 * hidden * seen
    assert floor.dtype == "float32"
    weights = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    assert floor.bytes == 4 * (weights + tokens * hidden)


def test_what_is_asked_of_a_pass_comes_on_top(model):
    lengths = [5, 1, 9]
    forward = floors.whole(model, lengths, backward=False)
    both = floors.whole(model, lengths)
    steering = floors.listed(2, "steering")
    head = floors.whole(model, lengths, backward=False, pairs=steering, head_alone=True)
    assert head.flops - forward.flops == 2 * 49 * (2 / 2 + 2)  # tokens: (1, 1) of each z counts half
    of_layers = [floors.products(lengths, steering, p, q, "float32").flops for p, q in ((48, 80), (48, 48), (48, 192))]
    of_layers.append(floors.products(lengths, steering, 96, 48, "float32").flops)
    over_all = floors.whole(model, lengths, pairs=steering)
    assert over_all.flops - both.flops == 2 * sum(of_layers) + 2 * 49 * 3
    assert floors.whole(model, lengths, dim=64).flops > both.flops


def test_products_take_the_cheaper_way():
    pairs = floors.listed(2, "gram")
    assert pairs == [(0, 0), (0, 1), (1, 1)]
    short = floors.products([3, 2], pairs, 10, 20, "float32")
    assert short.flops == 2 * 30 * (9 / 2 + 6 + 4 / 2)
    assert short.bytes == 4 * (5 * 30 + 3)
    long = floors.products([300, 200], pairs, 10, 20, "bfloat16")
    assert long.flops == 2 * 200 * (500 + 3)
    assert long.bytes == 2 * 500 * 30 + 4 * 3
    assert floors.listed(2, "cross", 3) == [(0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4)]
    assert floors.listed(2, "norms") == [(0, 0), (1, 1)]


def test_directions_and_sketches():
    assert floors.direction([3, 2], 10, 20, "float32") == Floor(bytes=4 * (5 * 30 + 200 + 2), flops=2 * 5 * 200)
    wide = floors.sketches([3, 2], 500, 500, 64, "float32")
    assert wide == Floor(bytes=4 * (5 * 1000 + 2 * 64), flops=5 * (1000 + 2 * 64 * 6 + 2 * 64))
    narrow = floors.sketches([3, 2], 10, 1, 64, "float32")
    assert narrow.flops == 2 * 5 * 10 + 2 * 10, "forming is cheaper than transforming"
    a = torch.zeros(5, 10)
    assert floors.read([a, torch.zeros(5, 2), a], torch.zeros(4)) == Floor(bytes=4 * (50 + 10 + 4), flops=0)


@pytest.mark.parametrize("work", packages.settings(True, CPU), ids=lambda work: work.question)
def test_every_question_to_a_package_has_a_floor(work):
    task = made(work, CPU)
    floor, both = packages.least(task), floors.whole(task.model, floors.lengths_of(task.batch))
    assert (floor.flops > both.flops) == (work.question != "sketch")


WITH_FLOORS = ("products", "ways", "direction", "grad_sketch", "sketch", "head", "influence", "engine_sketch")


@pytest.mark.parametrize("name", WITH_FLOORS)
def test_every_answer_of_these_cases_has_a_floor(name):
    case = cases.cases()[name]
    contest = case.build(case.settings(True, CPU)[0], CPU)
    assert {one.answers for one in contest.competitors.values()} == set(contest.floors)
    assert all(floor.bytes > 0 and (floor.flops > 0 or name == "sketch") for floor in contest.floors.values())


def test_rates_are_the_best_that_was_seen(monkeypatch):
    monkeypatch.setitem(floors.COPIED, "cpu", 2**16)
    monkeypatch.setitem(floors.SIZES, "cpu", (64,))
    rates = Rates(CPU)
    rates.measure(set())
    assert rates.found() == {}
    rates.measure({"float32"})
    first = rates.found()
    assert first["copy_bytes_per_second"] > 0
    assert list(first["matmul_flops_per_second"]) == ["float32"]
    rates.copy, rates.matmul["float32"] = 0.0, 0.0
    rates.measure({"float32"})
    assert rates.copy == 0.0, "measured so soon again"
    monkeypatch.setattr(floors, "PAUSE_SECONDS", 0.0)
    rates.measure({"float32"})
    assert rates.copy > 0
    rates.copy, rates.matmul["float32"] = 2.0**60, 2.0**60
    rates.measure({"float32"})
    assert rates.found() == {"copy_bytes_per_second": 2.0**60, "matmul_flops_per_second": {"float32": 2.0**60}}


def test_rates_are_measured_without_tf32(monkeypatch):
    seen = []
    monkeypatch.setattr(Rates, "_multiplies", lambda *given: seen.append(torch.get_float32_matmul_precision()) or 1.0)
    monkeypatch.setattr(Rates, "_copies", lambda rates: 1.0)
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        Rates(CPU).measure({"float32"})
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(usual)
    assert set(seen) == {"highest"}


@dataclasses.dataclass(frozen=True)
class Setting:
    name: str = "small"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a case of one floor from the command line at rates of 1e9; gives the file."""
    exact = torch.tensor([3.0, 4.0])
    contest = Contest(
        competitors={
            "right": Competitor(run=lambda: exact, budget=1e-6),
            "wrong": Competitor(run=lambda: -exact, budget=1e-6),
            "other": Competitor(run=lambda: exact, budget=1e-6, answers="without"),
        },
        expected=lambda: {"product": exact, "without": exact},
        floors={"product": Floor(bytes=2e9, flops=3e9)},
    )
    case = Case(
        name="fake",
        description="a fake",
        competitors=("right", "wrong", "other"),
        baseline="right",
        settings=lambda quick, device: [Setting(), Setting("large")],
        build=lambda setting, device: contest,
    )
    monkeypatch.setattr(cases, "cases", lambda: {"fake": case})
    monkeypatch.setattr(gc, "collect", lambda: 0)  # twenty of them take seconds, and nothing is measured here
    monkeypatch.setattr(Rates, "_multiplies", lambda *given: 1e9)
    monkeypatch.setattr(Rates, "_copies", lambda rates: 1e9)

    def run(*more):
        main(["run", "fake", "--device", "cpu", "--out", str(tmp_path), "--repeats", "1", *more])
        (path,) = tmp_path.rglob("fake.json")
        return path, json.loads(path.read_text())

    return run


def test_timed_rows_say_how_near_they_are(run, capsys):
    _, result = run()
    assert result["rates"] == {"copy_bytes_per_second": 1e9, "matmul_flops_per_second": {"float32": 1e9}}
    right, wrong, other, *_ = result["rows"]
    assert right["floor"] == {"bytes": 2e9, "flops": 3e9, "dtype": "float32"}
    assert right["floor_seconds"] == 3.0
    assert right["of_floor"] == 3.0 / right["seconds"]["median"]
    assert not {"floor", "floor_seconds", "of_floor"} & {*wrong, *other}
    assert "of the floor" in capsys.readouterr().out


def test_rows_that_are_kept_say_when_and_at_which_rates(run):
    path, result = run()
    path.write_text(json.dumps({**result, "finished": "then", "rates": {"old": 1}}))
    _, again = run("--setting", "large")
    small, large = again["rows"][0], again["rows"][3]
    assert (small["finished"], small["rates"]) == ("then", {"old": 1})
    assert not {"finished", "rates"} & {*large}
    path.write_text(json.dumps({**result, "commit": "newer", "rates": {"old": 1}}))
    _, again = run("--setting", "large")
    assert not {"finished", "rates"} & {*again["rows"][0]}, "what is said of a newer commit is not said of this row"


def test_files_from_before_are_read():
    row = {"setting": {"name": "x"}, "competitor": "y", "status": "timed", "commit": "a"}
    assert results._named(row, {"commit": "b", "finished": "now", "rows": [row]}) == row
    assert "of the floor" in results.table([row])
