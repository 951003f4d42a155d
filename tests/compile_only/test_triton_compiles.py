"""Every Triton kernel at every launch configuration for real targets, without a GPU.

Matrix instructions present, no TF32, no register spills, shared memory within the chip. In a process of its own, since
a process that interprets Triton cannot compile it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": "gfx942"}
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
# What two programs on one processor may take; on gfx942, and of the tiles that were measured, one alone.
SHARED = {"sm_80": 160 * 1024 // 2, "sm_90": 224 * 1024 // 2, "sm_100": 224 * 1024 // 2, "gfx942": 64 * 1024}


class Constant(NamedTuple):
    """A constexpr argument."""

    value: Any


class Job(NamedTuple):
    """A kernel with the types and constants of one launch; names may hold tuples of both."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    warps: int
    stages: int
    aligned: bool  # strides are multiples of 16, as the launcher tells the compiler


def jobs(target: str) -> Iterator[Job]:
    """Rows of 577 elements are read one by one, which takes most registers, on sm_80 and sm_100 more than on sm_90."""
    for aligned in (True, False) if target in ("sm_80", "sm_100") else (True,):
        for dtype in ("bf16", "fp32"):
            yield from tokens(dtype, aligned, target)
            yield from formed(dtype, aligned)
            if aligned:  # entries are gathered one by one, rows aligned or not
                yield from sketch(dtype, target)
    if target == "sm_90":
        yield from ones()
    yield from list(sketch("fp16", target))[-2:]
    yield from list(tokens("fp16", True, target))[:1]


def tokens(dtype: str, aligned: bool, target: str) -> Iterator[Job]:
    """The grouped kernel takes no integer but through its tables: there is nothing to compile as 1."""
    from fpo_kernels.products import config_triton as config
    from fpo_kernels.products.triton_grouped import grouped_products_kernel

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    chip = {"gfx942": "amd", "sm_80": "sm_80"}.get(target, "sm_90")
    tiles = {config.tokens(kind, longest, aligned, chip): longest for longest in (256, 128, 64)}
    for tile, longest in tiles.items():
        arguments: dict[str, Any] = dict.fromkeys(("ids_base", "layers", "streams", "extents"), "*i64")
        arguments |= {"base": f"*{dtype}", "items": "*i32", "leak": "*i32", "sums": "*fp32"}
        arguments |= {"T": Constant(tile.tokens), "F": Constant(tile.features), "INTERPRETED": Constant(False)}
        arguments |= {"UNIT": Constant(16 // kind.itemsize if aligned else 1)}
        arguments |= {"PRECISION": Constant(config.PRECISION[kind])}
        name = f"tokens {dtype} {longest}"
        yield Job(name, grouped_products_kernel, arguments, tile.warps, tile.stages, aligned)


def formed(dtype: str, aligned: bool) -> Iterator[Job]:
    from fpo_kernels.products import config_triton as config
    from fpo_kernels.products.triton_formed import formed_products_kernel

    for narrow in (8, 576):
        tile = config.formed(narrow)
        arguments: dict[str, Any] = dict.fromkeys(("x_ptr", "y_ptr", "x2_ptr", "y2_ptr"), f"*{dtype}")
        arguments |= dict.fromkeys(("offsets_ptr", "offsets2_ptr", "units_ptr", "twins_ptr"), "*i64")
        arguments |= dict.fromkeys(("rows_ptr", "held_ptr", "within_ptr"), "*i32") | {"sums_ptr": "*fp32"}
        arguments |= {"M": Constant(576 if aligned else 577), "N": Constant(narrow), "MIRRORED": Constant(True)}
        arguments |= {"ROWS": Constant(config.ROWS), "HELD": Constant(config.HELD), "T": Constant(tile.tokens)}
        arguments |= {"TM": Constant(tile.wide), "TN": Constant(tile.narrow)}
        name = f"formed {dtype} {narrow}"
        yield Job(name, formed_products_kernel, arguments, tile.warps, tile.stages, aligned)


def ones() -> Iterator[Job]:
    """Forming with integers of 1, which Triton makes constants: each alone, then all. Else they are 16s or odd."""
    job = next(formed("bf16", False))
    given = ("first_tile", "tiles", "blocks", "x_stride", "y_stride", "x2_stride", "y2_stride")
    for some in (*((name,) for name in given), given):
        name = f"formed bf16 {'all' if len(some) > 1 else some[0]} 1"
        yield job._replace(name=name, arguments=job.arguments | dict.fromkeys(some, 1))


def sketch(dtype: str, target: str) -> Iterator[Job]:
    """Every tile; streams narrower than the sketch, whose buckets 16-bit products take as they are, and wider."""
    from fpo_kernels.sketch import config_triton as config
    from fpo_kernels.sketch.triton import add_chunks_kernel, grad_sketch_kernel

    for k in (64, 128, 256, 512, 1024, 2048, 4096, 16384):
        tile = config.tile(k, amd=target == "gfx942")
        wide, siblings = k in (64, 1024), config.MOST_SIBLINGS if k >= 1024 else 1
        arguments: dict[str, Any] = {"a_ptr": f"*{dtype}", "table_a_ptr": "*i32", "sums_ptr": "*fp32"}
        arguments |= {"ds": (f"*{dtype}",) * siblings, "tables_d": ("*i32",) * siblings}
        arguments |= {"offsets_ptr": "*i64", "d_strides": ("i32",) * siblings}
        arguments |= {"A_ROWS": Constant(3 if wide else 1), "D_ROWS": Constant((2 if wide else 1,) * siblings)}
        arguments |= {"C": Constant(tile.blocks), "M": Constant(tile.rows), "N": Constant(tile.columns)}
        arguments |= {"T": Constant(tile.tokens), "CHUNK": Constant(config.CHUNK), "INTERPRETED": Constant(False)}
        name = f"sketch {dtype} {k}"
        yield Job(name, grad_sketch_kernel, arguments, tile.warps, tile.stages, True)
    arguments = {"sums_ptr": "*fp32", "offsets_ptr": "*i64", "out_ptr": "*fp32", "scale": "fp32"}
    arguments |= {"K": Constant(1024), "CHUNK": Constant(config.CHUNK), "BUCKETS": Constant(config.SUM_BUCKETS)}
    if dtype == "fp32":
        yield Job("adding fp32", add_chunks_kernel, arguments, 4, 3, True)


def compile_one(job: Job, target: str) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}

    def declare(argument: Any, path: tuple[int, ...]) -> Any:
        if isinstance(argument, tuple) and not isinstance(argument, Constant):
            return tuple(declare(part, (*path, n)) for n, part in enumerate(argument))
        if not isinstance(argument, str):
            constants[path] = argument.value if isinstance(argument, Constant) else argument
            return "constexpr"
        if argument.startswith("*") or job.aligned:
            attributes[path] = [["tt.divisibility", 16]]
        return argument

    for n, name in enumerate(job.kernel.arg_names):
        signature[name] = declare(job.arguments.get(name, "i32"), (n,))
    architecture = TARGETS[target]
    chip = GPUTarget("hip", architecture, 64) if target == "gfx942" else GPUTarget("cuda", architecture, 32)
    options = {"num_warps": job.warps, "num_stages": job.stages}
    done = triton.compile(ASTSource(job.kernel, signature, constants, attributes), target=chip, options=options)
    code = done.asm["amdgcn" if target == "gfx942" else "ptx"]
    found = {"matrix": MATRIX[target] in code, "tf32": "tf32" in code, "shared": done.metadata.shared}
    if target == "gfx942":
        counts = (".vgpr_spill_count", ".private_segment_fixed_size")
        spilled = [int(n) for count in counts for n in re.findall(rf"\{count}:\s*(\d+)", code)]
        assert len(spilled) == 2, "the AMD assembly names no spills"
        return found | {"spilled": sum(spilled), "vectors": code.count("load_dwordx4"), "copies": 0}
    # 16 bytes a thread and instruction, from global to shared memory, without a register between
    copies = len(re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?, 0x10,", code))
    return found | {"spilled": stack(done.asm["cubin"]), "vectors": copies, "copies": copies}


def stack(cubin: bytes) -> int | None:
    """Bytes a thread keeps outside its registers; None if this triton ships no cuobjdump."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    match = re.search(r"STACK:(\d+)", usage)
    assert match, usage
    return int(match[1])


def compile_all(target: str) -> dict[str, dict[str, Any]]:
    found = {f"{job.name} {'aligned' if job.aligned else 'odd'}": compile_one(job, target) for job in jobs(target)}
    assert len(found) == len(list(jobs(target))), "two jobs of one name"
    return found


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, dict[str, Any]]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", TARGETS)
def test_instructions_registers_and_memory(compiled: dict, target: str) -> None:
    kernels = compiled[target]
    assert {name.split()[0] for name in kernels} == {"tokens", "formed", "sketch", "adding"}
    for name, kernel in kernels.items():
        if "fp32" not in name:
            assert kernel["matrix"], name
        assert not kernel["tf32"], name
        alone = name.startswith("tokens") and target != "gfx942"
        assert kernel["shared"] <= SHARED[target] * (2 if alone else 1), name
        assert not kernel["spilled"], name
    if None in {kernel["spilled"] for kernel in kernels.values()}:
        pytest.skip("this triton ships no cuobjdump: spills not checked")


@pytest.mark.parametrize("target", TARGETS)
def test_the_grouped_products_stream_through_shared_memory(compiled: dict, target: str) -> None:
    """Addresses from a table: loads are vectors, copied ahead by as many stages as were asked for."""
    from fpo_kernels.products import config_triton as config

    aligned = {
        name: found for name, found in compiled[target].items() if name.startswith("tokens") and "odd" not in name
    }
    assert aligned
    for name, found in aligned.items():
        assert found["matrix"], name  # fp32 too
        assert found["vectors"], name
        if target == "gfx942":
            continue
        _, dtype, longest, _ = name.split()
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        tile = config.tokens(kind, int(longest), True, "sm_80" if target == "sm_80" else "sm_90")
        ahead = 2 * tile.tokens * tile.features * kind.itemsize * (tile.stages - 1)
        assert found["shared"] >= ahead, name


def main() -> None:
    from multiprocessing import Pool

    # two targets at a time, the slowest first
    with Pool(2) as pool:
        print(json.dumps(dict(zip(reversed(TARGETS), pool.map(compile_all, reversed(TARGETS), 1), strict=True))))


if __name__ == "__main__":
    main()
