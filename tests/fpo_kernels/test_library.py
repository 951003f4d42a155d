"""The native libraries: there where they can be built; one that fails leaves a note, and does not take the other along.

Builds run in copies of the tree, with compilers that fail or only seem to compile.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import fpo_kernels as fk
from tests import toolchain

ROOT = Path(__file__).parents[2]
# knows its version
FAILS = """case " $* " in
*" -c "*) echo "csrc/bindings.cpp:5:9: error: no compiler ever liked this" >&2; exit 1 ;;
*) echo 13.2.0 ;;
esac"""
# writes what it was asked for, with nothing in it
SEEMS = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done'
# one of a toolkit that knows no Blackwell, and whose compilations fail
NVCC = """case "$1" in
--version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
--list-gpu-arch) printf 'compute_80\\ncompute_86\\ncompute_90\\n' ;;
*) echo "$@" >> "$(dirname "$0")/asked"; echo "grad_sketch.cu(224): error: identifier is undefined" >&2; exit 1 ;;
esac"""
# a torch that says it was built with CUDA, on a machine without a device
CUDA_TORCH = """import torch
torch.version.cuda = "13.0"
torch.cuda._is_compiled = lambda: True
torch.cuda.device_count = lambda: 0
torch.cuda.is_available = lambda: False
"""
needs_compiler = pytest.mark.skipif(toolchain.NO_COMPILER is not None, reason=str(toolchain.NO_COMPILER))


def script(path: Path, body: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout in which nothing has been built."""
    out = tmp_path / "tree"
    ignored = shutil.ignore_patterns("*.so", "_native_build.json", "__pycache__")
    for name in ("csrc", "fpo_kernels", "fpo_train"):
        shutil.copytree(ROOT / name, out / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, out)
    return out


def run(tree: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    unset = ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "FPO_REQUIRE_NATIVE", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    environment = {**kept, "PYTHONPATH": str(tree), **settings}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def build(tree: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    return run(tree, "setup.py", "build_ext", "--inplace", **settings)


def states(tree: Path, **settings: str) -> dict[str, str]:
    done = run(tree, "-c", "import fpo_kernels as fk, json; print(json.dumps(fk.native_libraries()))", **settings)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def built(tree: Path) -> list[str]:
    return sorted(path.name for path in (tree / "fpo_kernels").glob("*.so"))


@needs_compiler
def test_there_where_it_can_be_built() -> None:
    assert fk.native_libraries()["cpu"] == "loads"


@pytest.mark.skipif(toolchain.no_cuda_build() is not None, reason=str(toolchain.no_cuda_build()))
def test_cuda_there_where_it_can_be_built() -> None:
    """With a device or without one: it is opened, and nothing in it is run."""
    assert fk.native_libraries()["cuda"] == "loads"


def test_a_failed_build_leaves_a_note_and_no_older_library(tree: Path, tmp_path: Path) -> None:
    (tree / "fpo_kernels" / "_native.abi3.so").touch()
    done = build(tree, CXX=script(tmp_path / "c++", FAILS))
    assert done.returncode == 0, done.stderr
    assert "fpo-kernels: no fpo_kernels._native: its build failed:" in done.stderr
    assert built(tree) == []
    why = "is not built (its build failed: csrc/bindings.cpp:5:9: error: no compiler ever liked this); build it with"
    done = run(tree, "-m", "fpo_train.cli", "doctor")
    assert done.returncode == 0, done.stderr
    assert f"  native/cpu      the native library {why}" in done.stdout
    assert f"  kernels/native  the native library {why}" in done.stdout
    assert "  native/cuda     " in done.stdout


def test_a_failed_build_is_an_error_where_it_is_required(tree: Path, tmp_path: Path) -> None:
    done = build(tree, CXX=script(tmp_path / "c++", FAILS), FPO_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "error: no compiler ever liked this" in done.stderr
    assert "FPO_REQUIRE_NATIVE=0 installs without" in done.stderr


def test_without_a_compiler_nothing_is_built_and_nothing_fails(tree: Path) -> None:
    done = build(tree, CXX="no-such-compiler", FPO_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert built(tree) == []
    assert "no C++ compiler: no-such-compiler is not on PATH" in states(tree, CXX="no-such-compiler")["cpu"]


@pytest.mark.parametrize("required", ["0", "1"])
def test_failing_cuda_does_not_take_the_cpu_library_with_it(tree: Path, tmp_path: Path, required: str) -> None:
    """Without a device the architectures are those that nvcc knows."""
    home = tmp_path / "cuda"
    script(home / "bin" / "nvcc", NVCC)
    (tree / "sitecustomize.py").write_text(CUDA_TORCH)
    (tree / "fpo_kernels" / "_native_cuda.abi3.so").touch()
    settings = {"CXX": script(tmp_path / "c++", SEEMS), "CUDA_HOME": str(home), "FPO_REQUIRE_NATIVE": required}
    done = build(tree, TORCH_DONT_CHECK_COMPILER_ABI="1", **settings)
    assert (done.returncode == 0) == (required == "0"), done.stderr
    why = "its build failed: grad_sketch.cu(224): error: identifier is undefined"
    assert f"fpo-kernels: no fpo_kernels._native_cuda: {why}" in done.stderr
    assert "no fpo_kernels._native:" not in done.stderr
    assert built(tree) == ["_native.abi3.so"]
    asked = (home / "bin" / "asked").read_text()
    wanted = ("arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90")
    assert all(flag in asked for flag in wanted)
    assert "compute_100" not in asked
    assert json.loads((tree / "fpo_kernels" / "_native_build.json").read_text()) == {"_native_cuda": why}


@needs_compiler
def test_a_cuda_library_that_does_not_load_costs_a_cpu_nothing(tree: Path) -> None:
    for library in (ROOT / "fpo_kernels").glob("_native.*so"):
        shutil.copy(library, tree / "fpo_kernels")
    (tree / "fpo_kernels" / "_native_cuda.abi3.so").write_bytes(b"no library")
    (tree / "sitecustomize.py").write_text(CUDA_TORCH)
    said = states(tree)
    assert said["cpu"] == "loads"
    assert said["cuda"].startswith("_native_cuda.abi3.so does not load (")
    (tree / "sitecustomize.py").write_text("import torch\ntorch.version.cuda = None\n")
    assert states(tree)["cuda"].endswith("was built without CUDA")
