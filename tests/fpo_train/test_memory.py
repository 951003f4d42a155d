"""The guard: rows by the plan, halved when memory runs out; what it measures."""

import gc
import sys
import weakref

import pytest
import torch

from fpo_train.errors import RunError
from fpo_train.memory.guard import FIRST_TRY, Guard, _Process
from fpo_train.memory.plan import Phase, Plan

CPU = torch.device("cpu")
CPU_FAILURE = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


def plan(rows=16, budget=None, total=1000):
    phases = {name: Phase(name, {"weights": total}, rows, 16) for name in ("generate", "score", "update", "retrain")}
    return Plan(phases, budget, smallest=total, notes=())


def hungry(most, error):
    """Work that runs out of memory with more than `most` rows, and the rows it was called with."""
    calls = []

    def work(rows):
        calls.append(rows)
        if rows == 0 or rows > most:
            raise error
        return rows

    return work, calls


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(CPU_FAILURE),
        MemoryError(),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"),  # asked for by another than PyTorch
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_rows_are_halved_until_they_fit_and_stay_so(error, capsys):
    guard = Guard(plan(), CPU)
    work, calls = hungry(5, error)
    assert guard("score", work) == 4
    assert guard("score", work) == 4
    assert calls == [16, 8, 4, 4]
    assert guard("update", lambda rows: rows) == 16  # other phases are left alone
    assert "score ran out with 16 rows" in capsys.readouterr().err
    again = Guard(plan(), CPU)
    again.load_state_dict(guard.state_dict())
    assert again.rows == {"generate": 16, "score": 4, "update": 16, "retrain": 16}
    other = Guard(plan(rows=8), CPU)  # another budget: its own plan counts
    other.load_state_dict(guard.state_dict())
    assert other.rows["score"] == 8


def test_without_a_plan_all_rows_come_first():
    guard = Guard(None, CPU)
    work, calls = hungry(40, MemoryError())
    assert guard("generate", work) == FIRST_TRY // 2
    assert calls == [0, FIRST_TRY, FIRST_TRY // 2]
    again = Guard(None, CPU)
    again.load_state_dict(guard.state_dict())
    assert again.rows == {"generate": FIRST_TRY // 2}


def test_one_row_that_does_not_fit_is_an_error_that_says_so():
    guard = Guard(plan(budget=2**30), CPU)
    work, calls = hungry(0, MemoryError())
    with pytest.raises(RunError, match=r"^update: .*one row.*memory\.budget 1\.00 GiB.*0\.0 MiB were planned"):
        guard("update", work)
    assert calls == [16, 8, 4, 2, 1]


def test_other_errors_go_through_at_once():
    guard = Guard(plan(), CPU)
    work, calls = hungry(0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        guard("update", work)
    assert calls == [16]


def test_a_plan_that_does_not_fit_is_refused():
    with pytest.raises(RunError, match="smallest budget that works"):
        Guard(plan(budget=500), CPU)


def test_what_the_broken_call_held_is_let_go_before_the_next():
    held = []

    def work(rows):
        assert not held or held[-1]() is None
        tensor = torch.empty(1000)
        cycle = [tensor]
        cycle.append(cycle)  # as autograd graphs with hooks have them
        held.append(weakref.ref(tensor))
        if rows > 8:
            try:
                raise MemoryError
            except MemoryError as cause:
                raise torch.OutOfMemoryError("out of memory") from cause
        return rows

    assert Guard(plan(), CPU)("score", work) == 8
    assert len(held) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="resets the resident set's mark through /proc")
def test_measured_is_the_mark_of_the_phase():
    guard = Guard(plan(), CPU)

    def fill(mebibytes):
        return lambda rows: torch.ones(mebibytes, 2**18).sum()

    gc.collect()  # what earlier tests left would stand in the first mark, and be gone from the second
    guard("score", fill(1))
    guard("update", fill(600))
    guard("retrain", fill(1))
    assert guard.measured["update"] - guard.measured["score"] > 250 * 2**20
    if _Process().reset():
        assert guard.measured["update"] - guard.measured["retrain"] > 250 * 2**20
