"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a library and a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from tests.toolchain import COMPILER, NO_COMPILER

pytestmark = pytest.mark.slow  # it compiles every C++ source anew

CSRC = Path(__file__).parents[1] / "csrc"
FLAGS = ["-O1", "-g", "-std=c++20", "-fPIC", "-ffp-contract=fast", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# every report ends the process; vptr wants type information that torch's libraries keep to themselves
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]


def runtime(name: str) -> str | None:
    """Where the compiler keeps one of its libraries."""
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = found.stdout.strip()
    return path if os.path.isabs(path) and os.path.exists(path) else None


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    if NO_COMPILER:
        pytest.skip(NO_COMPILER)
    # libstdc++ too: the sanitizer looks for its throw before Python loads it
    libraries = [runtime("libasan.so"), runtime("libstdc++.so.6")]
    if None in libraries:
        pytest.skip(f"{COMPILER} has no libasan.so to load first")
    # leaks are Python's own; a second thread, so that the schedule is exercised
    loaded = {"LD_PRELOAD": " ".join(map(str, libraries)), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    return {**os.environ, **loaded, "UBSAN_OPTIONS": "print_stacktrace=1"}


@pytest.fixture(scope="module")
def library(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    headers = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    sources = [CSRC / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [
        [COMPILER, *FLAGS, *SANITIZED, *headers, "-c", source, "-o", made]
        for source, made in zip(sources, objects, strict=True)
    ]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in started:
        _, log = process.communicate()
        assert process.returncode == 0, log
    out = folder / "_native.so"
    lib = cpp_extension.library_paths()[0]
    link = [COMPILER, "-shared", *SANITIZED, *objects, f"-L{lib}", "-ltorch_cpu", "-o", out]
    linked = subprocess.run(link, capture_output=True, text=True, check=False)
    assert linked.returncode == 0, linked.stderr
    return out


def child(environment: dict[str, str], library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, str(library), *arguments]
    folders = os.pathsep.join([str(CSRC.parent), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        command, env=environment | {"PYTHONPATH": folders}, capture_output=True, text=True, check=False
    )


def test_nothing_to_report(environment: dict[str, str], library: Path) -> None:
    done = child(environment, library)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "calls without a report" in done.stdout
    assert "runtime error" not in done.stderr, done.stderr


def test_reports_what_lies_outside(environment: dict[str, str], library: Path) -> None:
    """An example past the end of the offsets is read outside them: what is meant to be looked for is found."""
    done = child(environment, library, "outside")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


def products(library: torch._ops._OpNamespace) -> int:
    from fpo_kernels.testing import random_streams

    calls = 0
    for dtype in (torch.float32, torch.float64):
        for p, q in ((1, 3), (33, 70), (130, 16), (64, 32)):
            for lengths in ([3, 0, 1, 65, 18], [1], [0, 0], [150, 4]):
                a, d, offsets = random_streams(lengths, p, q, dtype)
                wide = torch.cat([a, a], 1)[:, p:]  # rows lie apart
                more = random_streams(lengths, p, 5, dtype, seed=1)[1]
                a2, d2, offsets2 = random_streams([2, 0, 7], p, q, dtype, seed=2)
                own = torch.cartesian_prod(*[torch.arange(len(lengths))] * 2)
                cross = torch.cartesian_prod(torch.arange(len(lengths)), torch.arange(3))
                library.grad_products(wide, [d, more], offsets, own, wide, [d, more], offsets, True)
                library.grad_products(a, [d], offsets, cross, a2, [d2], offsets2, False)
                library.grad_products(a, [d], offsets, own[:0], a, [d], offsets, True)
                calls += 3
    return calls


def sketches(library: torch._ops._OpNamespace) -> int:
    from fpo_kernels.testing import random_streams
    from tests.fpo_kernels.sketches import CPU, siblings, tables

    calls = 0
    for dtype in (torch.float32, torch.float64):
        for k in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384):
            for p, widths in ((1, [3]), (33, [5, 290, 67]), (64, [128]), (1500, [k + 1, 9])):
                for lengths in ([3, 0, 1, 37, 18], [0, 0], [150]) if k <= 512 else ([1, 0, 2],):
                    a, _, offsets = random_streams(lengths, p, 1, dtype)
                    ds = [random_streams(lengths, 1, q, dtype, seed=q)[1] for q in widths]
                    table_a, tables_d = tables(siblings(p, widths, k), CPU)
                    wide = torch.cat([a, a], 1)[:, p:]  # ends where the memory ends
                    library.grad_sketch(wide, table_a, ds, list(tables_d), offsets, k)
                    calls += 1
    return calls


def main() -> None:
    torch.ops.load_library(sys.argv[1])
    library = torch.ops.fpo_native
    if sys.argv[2:] == ["outside"]:
        rows, offsets, pairs = torch.ones(4, 8), torch.tensor([0, 4]), torch.tensor([[0, 1]])
        library.grad_products(rows, [rows], offsets, pairs, rows, [rows], offsets, True)
    else:
        print(products(library) + sketches(library), "calls without a report")


if __name__ == "__main__":
    main()
