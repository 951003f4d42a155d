"""Other packages beside ours: one work for all, answers by their definitions, processes that tell what goes wrong."""

import sys

import pytest
import torch

from benchmarks.cases import packages as case
from benchmarks.floors import Rates
from benchmarks.packages import hooks, ours, processes
from benchmarks.packages.work import OTHERS, Cannot, Work, made, read, write
from benchmarks.registry import Told
from benchmarks.runner import Options, run_contest

CPU = torch.device("cpu")
EXACT = ("norms", "gram", "cross", "steering")


def work(question, **more):
    return Work(name="w", question=question, shape="tiny", layers=2, examples=5, tokens=9, full=False, **more)


def gradients(task):
    """Every text's, by autograd in float64, one vector each."""
    model = task.model.double()
    weights = [model.get_parameter(name).requires_grad_(True) for name in task.names]
    found = []
    for n in range(task.work.texts):
        output = model(**{key: value[n : n + 1] for key, value in task.batch.items()}).logits.sum()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(output, weights)]))
    return torch.stack(found)


def definition(question, g, n):
    return {
        "norms": lambda: g.square().sum(1),
        "gram": lambda: g @ g.T,
        "cross": lambda: g[:n] @ g[n:].T,
        "steering": lambda: (g[:n] * (g[:n] - g[n])).sum(1),
    }[question]()


@pytest.mark.parametrize("question", EXACT)
def test_what_is_right_is_right_by_its_definition(question):
    task = made(work(question), CPU)
    assert task.work.texts == 5 + {"cross": OTHERS, "steering": 1}.get(question, 0)
    expected = case.expected(task)["product"]
    truth = definition(question, gradients(made(work(question), CPU)), 5)
    assert expected.shape == truth.shape
    assert float((expected - truth).norm() / truth.norm()) < 1e-6  # norms of blocks round to fp32 in float64 models too


@pytest.mark.parametrize("question", EXACT)
@pytest.mark.parametrize(("module", "way"), [(ours, "fpo_kernels"), (hooks, "torch hooks"), (hooks, hooks.WAYS[1])])
def test_ours_and_plain_torch_answer_and_hold_nothing(module, way, question):
    task = made(work(question), CPU)
    expected, run = case.expected(task)["product"], module.ready(task, way)
    for _ in range(2):
        assert float((run() - expected).norm() / expected.norm()) < 1e-5


def test_inputs_travel_by_file(tmp_path):
    task = made(work("gram"), CPU)
    with torch.no_grad():
        task.model.get_parameter("score.weight").add_(1.0)  # what no seed says
    write(task, tmp_path)
    again = read(tmp_path, CPU)
    assert again.work == task.work
    assert all(torch.equal(again.batch[key], value) for key, value in task.batch.items())
    assert torch.equal(again.model.get_parameter("score.weight"), task.model.get_parameter("score.weight"))


def test_a_process_answers_and_tells_what_goes_wrong(tmp_path):
    package = processes.Package.start("hooks", sys.executable, CPU)
    task = made(work("norms"), CPU)
    write(task, tmp_path)
    assert package.ask(do="begin", folder=str(tmp_path))["ways"] == list(hooks.WAYS)
    told = package.run("torch hooks")
    assert isinstance(told, Told)
    assert told.seconds > 0
    expected = case.expected(task)["product"]
    assert float((told.answer - expected).norm() / expected.norm()) < 1e-5
    with pytest.raises(processes.Failed, match="KeyError"):
        package.run("another way")
    write(made(work("sketch", numbers=64), CPU), tmp_path)
    began = package.ask(do="begin", folder=str(tmp_path))
    assert began["ways"] == []
    assert began["cannot"] == dict.fromkeys(hooks.WAYS, "a projection is what the packages are for")
    package.process.kill()
    with pytest.raises(processes.Failed, match="its process has ended"):
        package.run("torch hooks")
    with pytest.raises(processes.Failed, match=r"No module named .benchmarks"):
        processes.Package.start("nobody", sys.executable, CPU).ask(do="begin", folder=str(tmp_path))
    with pytest.raises(Cannot):
        hooks.ready(made(work("sketch", numbers=64), CPU), "torch hooks")


def test_without_the_environment_ours_is_still_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "PEERS", tmp_path / "python")
    processes.forget()
    contest = case.build(work("steering"), CPU)
    assert set(contest.competitors) == {"fpo_kernels", *hooks.WAYS}
    assert set(contest.cannot.values()) == {"not installed: make peers"}
    rows = run_contest(contest, case.OURS, Options(device=CPU, repeats=1), Rates(CPU))
    assert {rows[way]["status"] for way in contest.competitors} == {"timed"}
    assert rows["Opacus"] == {"status": "cannot run", "reason": "not installed: make peers"}
    processes.forget()


def test_packages_that_a_checkout_brings_are_asked_by_this_interpreter(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "PEERS", tmp_path / "python")
    monkeypatch.setattr(processes, "CARRIED", tmp_path)
    (tmp_path / "opacus.py").write_text("raise ImportError('brought along')")
    processes.forget()
    write(made(work("norms"), CPU), tmp_path / "work")
    with pytest.raises(processes.Failed, match="brought along"):
        processes.package("opacus", CPU).ask(do="begin", folder=str(tmp_path / "work"))
    processes.forget()


@pytest.mark.slow
@pytest.mark.parametrize("question", EXACT)
def test_every_package_that_is_installed_is_right(question):
    """With `make peers`; each answer within the gate, twice."""
    if not processes.PEERS.is_file():
        pytest.skip("not installed: make peers")
    contest = case.build(work(question), CPU)
    assert set(contest.competitors) == set(case.CASE.competitors)
    rows = run_contest(contest, case.OURS, Options(device=CPU, repeats=1), Rates(CPU))
    assert {name: row["reason"] for name, row in rows.items() if row["status"] != "timed"} == {}
