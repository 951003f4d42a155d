"""The Triton kernel for real targets without a GPU: matrix instructions present, no register spills.

In a process of its own, since a process that interprets Triton cannot compile it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = [(capability, dtype) for capability in (80, 90) for dtype in ("fp32", "bf16", "fp16")]
STREAMS = ("a_ptr", "d_ptr", "a2_ptr", "d2_ptr")


def compile_one(capability: int, dtype: str, folder: str) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fpo_kernels.products import config
    from fpo_kernels.products.triton import grad_products_kernel as kernel

    constants = {"P": 576, "Q": 1536, "MIRRORED": True, "PRECISION": "ieee"}
    constants |= {"T": config.BLOCK_TOKENS, "F": config.BLOCK_FEATURES}
    constants |= dict.fromkeys(("a_step", "d_step", "a2_step", "d2_step"), 1)  # what the launcher makes of a 1
    types = dict.fromkeys(STREAMS, f"*{dtype}") | {"sums_ptr": "*fp64"}
    types |= dict.fromkeys(("offsets_ptr", "offsets2_ptr", "pairs_ptr"), "*i64")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(n,): [["tt.divisibility", 16]] for n, t in enumerate(signature.values()) if t != "constexpr"}
    options = {"num_warps": config.NUM_WARPS, "num_stages": config.NUM_STAGES}
    source = ASTSource(kernel, signature, constants, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = Path(folder, f"{capability}_{dtype}.cubin")
    cubin.write_bytes(done.asm["cubin"])
    ptx = done.asm["ptx"]
    found = {name: name in ptx for name in ("wgmma.mma_async", "mma.sync", "tf32", "cp.async")}
    return {**found, "shared": done.metadata.shared, "resources": resources(cubin)}


def resources(cubin: Path) -> str | None:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    return subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("cubins")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("capability", "dtype"), CASES)
def test_instructions_and_registers(compiled: dict, capability: int, dtype: str) -> None:
    kernel = compiled[f"{capability} {dtype}"]
    assert kernel["cp.async"]  # loads run ahead of the products
    assert not kernel["tf32"]
    if dtype != "fp32":
        assert kernel["mma.sync" if capability == 80 else "wgmma.mma_async"]
    assert 2 * kernel["shared"] <= 160 * 1024  # two programs a processor, on either card
    if kernel["resources"] is None:
        pytest.skip("this triton ships no cuobjdump: spills not checked")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", kernel["resources"]).groups()  # type: ignore[union-attr]
    assert int(stack) <= 8  # one spilled value at most: triton 3.7 keeps one in fp32 on sm_90, 3.6 none
    assert int(registers) <= 128


if __name__ == "__main__":
    print(
        json.dumps(
            {f"{capability} {dtype}": compile_one(capability, dtype, sys.argv[1]) for capability, dtype in CASES}
        )
    )
