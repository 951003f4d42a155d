"""The CUDA sources for real targets without a GPU, against whatever torch is installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tests import toolchain

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))
FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xptxas", "-v"]


@pytest.mark.skipif(toolchain.nvcc() is None, reason="nvcc is not at hand")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_warnings_or_spills(source: Path, arch: str, tmp_path: Path) -> None:
    headers = [flag for path in include_paths() for flag in ("-isystem", path)]
    command = [toolchain.nvcc(), *FLAGS, f"-arch={arch}", *headers, "-c", source, "-o", tmp_path / "out.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    assert "warning" not in log, log
    assert "bytes spill stores" in log
    spilling = [line for line in log.splitlines() if "spill" in line and ", 0 bytes spill stores" not in line]
    assert not spilling, log
