"""Who may import whom (CONTRIBUTING.md): imports go down only, and rooms of an operation do not know each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def imports(path):
    """Absolute dotted names a file imports anywhere, its own relative imports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", modules("fpo_kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_nothing_above_them(path):
    above = {
        name for name in imports(path) if name.split(".")[0] in ("fpo_train", "benchmarks", "transformers", "peft")
    }
    assert not above
    if path.name != "testing.py":
        assert not {name for name in imports(path) if "fpo_kernels.testing" in name}


@pytest.mark.parametrize("path", modules("fpo_train"), ids=lambda p: str(p.relative_to(ROOT)))
def test_training_sees_the_kernels_root_alone(path):
    names = {name for name in imports(path) if name.startswith("fpo_kernels.")}
    inside = {name.split(".")[1] for name in names}
    assert not inside & {p.stem for p in (ROOT / "fpo_kernels").iterdir()}
    assert not {name for name in imports(path) if name.split(".")[0] == "benchmarks"}


OPERATIONS = [p.parent for p in (ROOT / "fpo_kernels").glob("*/api.py")]
ROOMS = {"reference", "triton", "triton_formed", "native", "blocked", "formed"}


# Each of these may import those after it, none before it.
ENGINE = (
    "checkpoints",
    "influence",
    "blocks",
    "finite",
    "pieces",
    "captured",
    "totals",
    "passes",
    "untapped",
    "entries",
    "fallback",
    "compare",
    "gather",
    "course",
    "tapping",
    "capture",
    "known",
    "uses",
    "reached",
    "remake",
    "layers",
    "gradients",
    "batches",
    "replay",
)


@pytest.mark.parametrize("module", ENGINE)
def test_the_engine_imports_downwards(module):
    above = {f"fpo_kernels.{name}" for name in ENGINE[: ENGINE.index(module) + 1]}
    assert not above & imports(ROOT / "fpo_kernels" / f"{module}.py")


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda p: p.name)
def test_rooms_of_an_operation_do_not_know_each_other(operation):
    here = f"fpo_kernels.{operation.name}"
    for path in operation.glob("*.py"):
        names = imports(path)
        others = {f"fpo_kernels.{o.name}" for o in OPERATIONS if o != operation}
        above = {f"fpo_kernels.{name}" for name in ENGINE}
        assert not {n for n in names for banned in others | above if n == banned or n.startswith(banned + ".")}
        if path.stem in ROOMS:
            assert not {n for n in names for room in ROOMS - {path.stem} if n.startswith(f"{here}.{room}")}


# Rooms of the training layer: each may import itself and those before it, none after it.
TRAINING = (
    "errors",
    "whole",
    "config",
    "data",
    "processes",
    "policy",
    "rollout",
    "reward_model",
    "oracle",
    "penalty",
    "update",
    "memory",
    "report",
    "loop",
    "simulate",
    "running",
    "evaluate",
    "attribute",
    "study",
    "integrations",
    "cli",
    "__main__",
)


def test_every_room_of_the_training_layer_has_its_floor():
    inside = {p.stem for p in (ROOT / "fpo_train").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert inside - {"__init__"} == set(TRAINING)


@pytest.mark.parametrize("room", TRAINING)
def test_rooms_import_downwards(room):
    above = set(TRAINING[TRAINING.index(room) + 1 :])
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in modules("fpo_train")
        if path.relative_to(ROOT / "fpo_train").with_suffix("").parts[0] == room
        for name in imports(path)
        if name.startswith("fpo_train.") and name.split(".")[1] in above
    }
    assert not found


@pytest.mark.parametrize("room", [room for room in TRAINING if (ROOT / "fpo_train" / room).is_dir()])
def test_a_room_fits_a_glance_and_says_what_it_is(room):
    files = list((ROOT / "fpo_train" / room).glob("*.py"))
    assert len(files) <= 11
    assert ast.get_docstring(ast.parse((ROOT / "fpo_train" / room / "__init__.py").read_text(encoding="utf-8")))


def named(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("package", ["fpo_kernels", "fpo_train", "benchmarks"])
def test_no_module_imports_what_imports_it(package):
    """Neither within a function nor for the types alone."""
    files = {named(path): path for path in modules(package)}
    left = {name: (imports(path) & set(files)) - {name} for name, path in files.items()}
    # the room whose contents are imported is not itself asked for
    left = {
        name: {one for one in found if not any(o.startswith(one + ".") for o in found)} for name, found in left.items()
    }
    while leaves := [name for name, found in left.items() if not found & set(left)]:
        for name in leaves:
            del left[name]
    assert not left


@pytest.mark.parametrize("package", ["fpo_kernels", "fpo_train", "fpo_train.config", "fpo_train.cli"])
def test_importing_is_light(package):
    heavy = "{'triton', 'torch._dynamo', 'torch._inductor', 'trl', 'bitsandbytes', 'vllm'}"
    code = f"import sys, {package}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_loop_reads_in_one_page():
    assert len((ROOT / "fpo_train" / "loop.py").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("package", ["fpo_kernels", "fpo_train", "benchmarks", "csrc"])
def test_no_file_outgrows_its_reader(package):
    sources = [p for p in (ROOT / package).rglob("*") if p.suffix in (".py", ".cpp", ".cu", ".h")]
    assert {p.name: n for p in sources if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400} == {}
