"""A launch configuration is believed once it has agreed with the reference on this device; if not, refused by name."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fpo_kernels import TensorSketch, grad_direction, grad_products, grad_sketch, library, verified
from fpo_kernels.direction import blocked as direction_room
from fpo_kernels.products import native as products_room
from fpo_kernels.products import unchecked_products
from fpo_kernels.sketch import native as sketch_room
from fpo_kernels.testing import random_streams

CPU = torch.device("cpu")
GOOD, BAD = verified.Comparison(0.5, 1.0, "pair 0 of 1"), verified.Comparison(3.0, 1.0, "pair 2 of 4")
native = pytest.mark.skipif(library.why_not("grad_products", torch.empty(0)) is not None, reason="no native library")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own, nothing known yet, and a CPU that is checked as a GPU is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verified, "_found", {})
    monkeypatch.setattr(verified, "needed", lambda device: True)


def counted(result: verified.Comparison):
    calls = []

    def check() -> verified.Comparison:
        calls.append(1)
        return result

    return check, calls


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another process begins."""
    monkeypatch.setattr(verified, "_found", {})


def test_a_right_one_is_checked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check, calls = counted(GOOD)
    for _ in range(3):
        verified.ensure(("op", "triton", 64), CPU, check)
        forget(monkeypatch)
    assert len(calls) == 1
    verified.ensure(("op", "triton", 128), CPU, check)
    assert len(calls) == 2
    (file,) = (tmp_path / "fpo" / "kernels").iterdir()
    kept = json.loads(file.read_text())
    assert set(kept["verdicts"]) == {"op triton 64", "op triton 128"}
    assert kept["circumstances"]["torch"] == torch.__version__


def test_a_wrong_one_is_refused_by_name_here_and_in_the_next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    check, calls = counted(BAD)
    for _ in range(2):
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=r"op triton 64 is wrong on this cpu .* 3 from .* allows 1 .*impl=\"torch\""
            ):
                verified.ensure(("op", "triton", 64), CPU, check)
        forget(monkeypatch)
    assert len(calls) == 1


def test_not_a_number_is_wrong() -> None:
    for error in (float("nan"), float("inf")):
        assert not verified.Comparison(error, 1.0, "").agrees
    ones = torch.ones(3, dtype=torch.float64)
    got = torch.tensor([1.0, float("nan"), 1.0])
    assert not verified.compared(got, ones, ones, "pair").agrees
    assert verified.compared(got, ones, ones, "pair").where == "pair 1 of 3"
    assert not verified.compared(ones, ones * 2, ones * 0, "pair").agrees
    assert verified.compared(ones, ones, ones * 0, "pair").agrees


def test_other_versions_or_kernels_are_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    check, calls = counted(GOOD)
    facts = verified.circumstances(CPU)
    for other in ({}, {"kernels": "changed"}, {"torch": "9"}, {"device": "another"}):
        monkeypatch.setattr(verified, "circumstances", lambda device, other=other: facts | other)
        verified.ensure(("op",), CPU, check)
        forget(monkeypatch)
    assert len(calls) == 4


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"verdicts": {"op": 3}}', '{"verdicts": []}'])
def test_a_damaged_cache_means_checking_again(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, calls = counted(GOOD)
    path = verified.cache_file(verified.circumstances(CPU))
    path.parent.mkdir(parents=True)
    path.write_text(damage)
    for _ in range(2):
        verified.ensure(("op",), CPU, check)
        forget(monkeypatch)
    assert len(calls) == 1  # and mended by that


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    check, calls = counted(GOOD)
    for expected in (1, 1):
        verified.ensure(("op",), CPU, check)
        assert len(calls) == expected
    forget(monkeypatch)
    verified.ensure(("op",), CPU, check)
    assert len(calls) == 2


def test_a_check_may_come_by_its_own_door() -> None:
    def check() -> verified.Comparison:
        verified.ensure(("op",), CPU, check)
        return GOOD

    verified.ensure(("op",), CPU, check)


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    facts = verified.circumstances(CPU) | {"device": "a GPU"}
    monkeypatch.setattr(verified, "circumstances", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check, calls = counted(GOOD)
    with pytest.raises(RuntimeError, match=r"op has not been checked on this a GPU .* call it once"):
        verified.ensure(("op",), gpu, check)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    verified.ensure(("op",), gpu, check)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    forget(monkeypatch)
    verified.ensure(("op",), gpu, check)  # known from the cache
    assert len(calls) == 1


def test_a_known_one_costs_a_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    key, (check, calls) = ("grad_products", "triton", "tokens", torch.bfloat16, (64, 128, 8, 3)), counted(GOOD)
    verified.ensure(key, CPU, check)
    for name in ("needed", "circumstances", "cache_file", "_lock"):  # no device, no file and no lock is asked
        monkeypatch.setattr(verified, name, None)
    verified.ensure(key, CPU, check)
    assert len(calls) == 1


def test_on_a_cpu_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    check, calls = counted(BAD)
    verified.ensure(("op of a CPU",), CPU, check)
    assert not calls


def _one_process(n: int) -> None:
    verified.needed = lambda device: True  # type: ignore[assignment]
    for k in range(5):
        verified.ensure(("op", n, k), CPU, lambda: GOOD)


def test_several_processes_at_once_leave_a_whole_file() -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(_one_process, range(4))
    path = verified.cache_file(verified.circumstances(CPU))
    kept = json.loads(path.read_text())["verdicts"]
    assert 0 < len(kept) <= 20
    assert [p.name for p in path.parent.iterdir()] == [path.name]


STREAMS = random_streams([5, 0, 1], 12, 8)
PAIRS = torch.tensor([[0, 0], [0, 2]])


def half(function):
    return lambda *given, **named: function(*given, **named) / 2


@native
def test_products_by_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = grad_products(*STREAMS, PAIRS, impl="native")
    forget(monkeypatch)
    monkeypatch.setattr(verified, "circumstances", lambda device: {"device": "d", "torch": "t", "triton": "t"})
    monkeypatch.setattr(products_room, "grad_products", half(products_room.grad_products))
    a, d, offsets = STREAMS
    for impl in ("native", "auto"):
        with pytest.raises(RuntimeError, match="grad_products native tokens float32 is wrong on this d"):
            grad_products(*STREAMS, PAIRS, impl=impl, way="tokens")
    with pytest.raises(RuntimeError, match="grad_products native tokens"):
        unchecked_products(a, (d,), offsets, PAIRS, None, None, "native", "tokens")  # type: ignore[arg-type]
    torch.testing.assert_close(grad_products(*STREAMS, PAIRS, impl="torch"), right)


@native
def test_sketches_by_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    sketch = TensorSketch(12, 8, 64)
    grad_sketch(*STREAMS, sketch, impl="native")
    forget(monkeypatch)
    monkeypatch.setattr(verified, "circumstances", lambda device: {"device": "d", "torch": "t", "triton": "t"})
    monkeypatch.setattr(sketch_room, "grad_sketch", half(sketch_room.grad_sketch))
    with pytest.raises(RuntimeError, match=r"grad_sketch native k=64 float32 .* is wrong on this d"):
        grad_sketch(*STREAMS, sketch)


def test_direction_by_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    grad_direction(*STREAMS, torch.ones(8, 12))
    forget(monkeypatch)
    monkeypatch.setattr(verified, "circumstances", lambda device: {"device": "d", "torch": "t", "triton": "t"})
    monkeypatch.setattr(direction_room, "grad_direction", half(direction_room.grad_direction))
    with pytest.raises(RuntimeError, match="grad_direction torch float32 float32 is wrong on this d"):
        grad_direction(*STREAMS, torch.ones(8, 12))


def test_the_next_process_reads_the_verdict(tmp_path: Path) -> None:
    code = (
        "import torch; from fpo_kernels import verified; verified.needed = lambda device: True\n"
        "def check():\n    print('checked'); return verified.Comparison(9.0, 1.0, 'pair 0 of 1')\n"
        "try:\n    verified.ensure(('op',), torch.device('cpu'), check)\n"
        "except RuntimeError as error:\n    print(error)"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
        ).stdout
        for _ in range(2)
    ]
    assert said[0].startswith("checked\nop is wrong")
    assert said[1].startswith("op is wrong")
