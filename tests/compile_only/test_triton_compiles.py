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

triton = pytest.importorskip("triton")

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
    aligned: bool  # integers are multiples of 16, as the launcher tells the compiler
    registers: int | None = None  # a thread's, at most


def jobs(target: str) -> Iterator[Job]:
    """Rows of 577 elements are read one by one, which takes most registers, on sm_80 and sm_100 more than on sm_90."""
    for aligned in (True, False) if target in ("sm_80", "sm_100") else (True,):
        for dtype in ("bf16", "fp32"):
            yield from tokens(dtype, aligned, target)
            yield from formed(dtype, aligned)
            yield from sketch(dtype, target, every=aligned)
            if aligned and target not in ("sm_80", "sm_100"):
                yield from sketch(dtype, target, every=False)
    yield from scaled_rows()
    if target == "sm_90":
        yield from ones()
    yield from list(sketch("fp16", target))[-2:]
    yield from (job for job in integers() if target == "sm_90" or job.name.startswith("adding"))
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


def scaled_rows() -> Iterator[Job]:
    """Rows of 16 bytes and others; one feature, in rows one after another."""
    from fpo_kernels.remake_triton import FEATURES, scaled_rows_kernel

    arguments = {"x": "*fp32", "rows": "*fp32", "weight": "*bf16", "out": "*bf16", "FEATURES": Constant(FEATURES)}
    for some in ((), ("width",), ("x_stride", "width")):
        for aligned in (True, False):
            name = f"remade bf16 {' '.join(some)} 1" if some else "remade bf16 integers"
            yield Job(name, scaled_rows_kernel, arguments | dict.fromkeys(some, 1), 4, 1, aligned)


def ones() -> Iterator[Job]:
    """Forming with integers of 1, which Triton makes constants: each alone, then all. Else they are 16s or odd."""
    job = next(formed("bf16", False))
    given = ("first_tile", "tiles", "blocks", "x_stride", "y_stride", "x2_stride", "y2_stride")
    for some in (*((name,) for name in given), given):
        name = f"formed bf16 {'all' if len(some) > 1 else some[0]} 1"
        yield job._replace(name=name, arguments=job.arguments | dict.fromkeys(some, 1))


def sketch(dtype: str, target: str, every: bool = True) -> Iterator[Job]:
    """Every kind of tile, for streams within a span and wider ones; or two for streams that are read one by one."""
    import torch

    from fpo_kernels.sketch import config_triton as config
    from fpo_kernels.sketch.triton_grouped import grouped_sketch_kernel

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    major = 0 if target == "gfx942" else int(target[3:]) // 10
    for k in (64, 256, 1024, 2048, 4096, 16384) if every else (1024, 4096):
        for wide in (False, True) if every else (False,):
            sides, tile = config.sides(k), config.tile(k, wide, kind, major)
            arguments = sketch_arguments(dtype) | {"C": Constant(sides.blocks)}
            arguments |= {"M": Constant(sides.rows), "N": Constant(sides.columns), "CHUNK": Constant(config.CHUNK)}
            arguments |= {"ENTRIES": Constant(config.ENTRIES), "SPAN": Constant(config.SPAN)}
            span = config.wide_span(k, kind, major) if wide else config.SPAN
            arguments |= {"TOKENS": Constant(sides.tokens), "ROUNDS": Constant(config.rounds(k, span))}
            arguments |= {"WIDE": Constant(span), "JOINED": Constant(sides.joined)}
            arguments |= {"ALIGN": Constant(16 // kind.itemsize if every else 1), "INTERPRETED": Constant(False)}
            name = f"sketch {dtype} {k}{' wide' if wide else ''}"
            yield Job(name, grouped_sketch_kernel, arguments, tile.warps, config.STAGES, every, tile.registers)


def sketch_arguments(dtype: str) -> dict[str, Any]:
    pointers = dict.fromkeys(("rows_base", "runs", "members", "pieces"), "*i64")
    return pointers | {"base": f"*{dtype}", "entries": "*i16", "sums": "*fp32"}


def integers() -> Iterator[Job]:
    """Every integer that the sketch's kernels are called with, as 1, which is made a constant, as a multiple of 16 and
    as neither."""
    import torch

    from fpo_kernels.sketch import config_triton as config
    from fpo_kernels.sketch.triton import add_chunks_kernel
    from fpo_kernels.sketch.triton_grouped import add_runs_kernel, grouped_sketch_kernel

    sides, tile = config.sides(128), config.tile(128, False, torch.bfloat16, 9)
    for name, kernel, counts in (
        ("adding", add_runs_kernel, ("examples",)),
        ("sketch", grouped_sketch_kernel, ("examples", "chunks")),
    ):
        arguments: dict[str, Any] = dict.fromkeys(("runs", "slots"), "*i64") | {"out": "*fp32", "scale": "fp32"}
        arguments |= {"sums": "*fp32", "K": Constant(1024), "BUCKETS": Constant(config.SUM_BUCKETS)}
        arguments |= {"STEP": Constant(config.SUM_CHUNKS)}
        if kernel is grouped_sketch_kernel:
            arguments = sketch_arguments("bf16") | {"C": Constant(sides.blocks), "M": Constant(sides.rows)}
            arguments |= {"N": Constant(sides.columns), "CHUNK": Constant(config.CHUNK), "ALIGN": Constant(8)}
            arguments |= {"ENTRIES": Constant(config.ENTRIES), "INTERPRETED": Constant(False)}
            arguments |= {"SPAN": Constant(config.SPAN), "WIDE": Constant(config.SPAN)}
            arguments |= {"TOKENS": Constant(sides.tokens), "ROUNDS": Constant(1), "JOINED": Constant(sides.joined)}
        warps, registers = (tile.warps, tile.registers) if name == "sketch" else (4, None)
        for ones in dict.fromkeys(((), *((one,) for one in counts), counts)):
            for aligned in (True, False):
                given = arguments | dict.fromkeys(ones, 1)
                label = f"{name} bf16 {' '.join(ones)} 1" if ones else f"{name} bf16 integers"
                yield Job(label, kernel, given, warps, 1, aligned, registers)
    arguments = {"sums_ptr": "*fp32", "offsets_ptr": "*i64", "out_ptr": "*fp32", "scale": "fp32"}
    arguments |= {"K": Constant(1024), "CHUNK": Constant(config.CHUNK), "BUCKETS": Constant(config.SUM_BUCKETS)}
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
    options |= {} if job.registers is None else {"maxnreg": job.registers}
    done = triton.compile(ASTSource(job.kernel, signature, constants, attributes), target=chip, options=options)
    code = done.asm["amdgcn" if target == "gfx942" else "ptx"]
    found = {"matrix": MATRIX[target] in code, "tf32": "tf32" in code, "shared": done.metadata.shared}
    # the older products, which every chip has, do where a tile has too few rows for the newer ones
    # and what a plan says is 64 bits: a load of fewer reads a stream or a table one by one
    found |= {"interleaved": interleaved(done.asm["ttgir"])}
    found |= {"older": "mma.sync" in code, "vectors": not re.search(r"ld\.global\.b(16|32) ", code)}
    if target == "gfx942":
        counts = (".vgpr_spill_count", ".private_segment_fixed_size")
        spilled = [int(n) for count in counts for n in re.findall(rf"\{count}:\s*(\d+)", code)]
        assert len(spilled) == 2, "the AMD assembly names no spills"
        return found | {"spilled": sum(spilled), "wide": code.count("load_dwordx4")}
    # 16 bytes a thread and instruction, from global to shared memory, without a register between
    copies = len(re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?, 0x10,", code))
    return found | {"spilled": stack(done.asm["cubin"]), "wide": copies}


def interleaved(ttgir: str) -> list[str]:
    """Layouts in which sums run across warps that their axis shares with another, bit by bit in turn.

    Triton 3.6 and 3.7 add up other warps' numbers there: for (2, 2048) on warps [[0, 1024], [1, 0], [0, 32]], those of
    the third bit.
    """
    warps = dict(re.findall(r"^(#\w+) = #ttg\.linear<\{.*?warp = \[(.*?)\], block", ttgir, re.MULTILINE))
    found = []
    for summed in re.findall(r'"tt\.reduce".*?\}\) : \(tensor<[^,>]*, (#\w+)>', ttgir, re.DOTALL):
        bases = [json.loads(base) for base in re.findall(r"\[[-\d, ]+\]", warps.get(summed, ""))]
        axes = [axis for base in bases for axis, size in enumerate(base) if size]
        turns = [axis for n, axis in enumerate(axes) if axis != axes[n - 1] or n == 0]
        if len(turns) > len(set(turns)):
            found.append(summed)
    return found


def stack(cubin: bytes) -> int:
    """Bytes a thread keeps outside its registers."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
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
    assert {name.split()[0] for name in kernels} == {"tokens", "formed", "sketch", "adding", "remade"}
    for name, kernel in kernels.items():
        kind, dtype, k, *_ = name.split()
        older = kind == "sketch" and (not k.isdigit() or int(k) < 1024) and target != "gfx942"
        if dtype != "fp32" and kind not in ("adding", "remade"):
            assert kernel["older" if older else "matrix"], name
        if kind == "sketch" and target != "gfx942":
            assert kernel["vectors"] == ("odd" not in name or "integers" in name or " 1 " in name), name
        assert not kernel["tf32"], name
        alone = name.startswith("tokens") and target != "gfx942"
        assert kernel["shared"] <= SHARED[target] * (2 if alone else 1), name
        assert not kernel["spilled"], name
        assert not kernel["interleaved"], name


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
        assert found["wide"], name
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
