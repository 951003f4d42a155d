"""Decides which native code is built; all metadata is in pyproject.toml.

Two libraries, so that one whose build fails does not take the other with it:

- `fpo_kernels._native`: the operators' schemas and their CPU kernels; wants a C++ compiler.
- `fpo_kernels._native_cuda`: the CUDA kernels; wants a CUDA build of torch and nvcc too.

What these want and is absent is no failure. A build that fails is printed, and the installation goes on without that
library, unless FPO_REQUIRE_NATIVE=1 (as in the Makefile) makes it an error. Why a library is not there is written to
`fpo_kernels/_native_build.json`, where `impl="native"` and `fpo-train doctor` find it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup

CPU, CUDA = "fpo_kernels._native", "fpo_kernels._native_cuda"
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11: one library serves every later version
FLAGS = ["-O3", "-std=c++20", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
# What is built for where no device says: a build for each generation of data centre, and what later ones translate.
ARCHITECTURES = ("8.0", "9.0", "10.0")
REQUIRED = os.environ.get("FPO_REQUIRE_NATIVE", "0") not in ("", "0")


def compiler() -> str | None:
    """Where the C++ compiler is, if there is one."""
    return None if sys.platform == "win32" else shutil.which(os.environ.get("CXX", "c++").split()[0])


def answer(*command: str | Path) -> str:
    """What a program prints; nothing where there is none."""
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr
    return ""


def find_toolkit() -> None:
    """Set CUDA_HOME to the toolkit of the nvcc on PATH; torch takes the folder above nvcc, wrong for a wrapper."""
    if not os.environ.get("CUDA_HOME") and not os.environ.get("CUDA_PATH"):
        home = re.search(r"^#\$ TOP=(.+)$", answer("nvcc", "--dryrun", "-E", "-x", "cu", os.devnull), re.MULTILINE)
        if home and Path(home[1], "bin", "nvcc").is_file():
            os.environ["CUDA_HOME"] = str(Path(home[1]).resolve())


def name_architectures(nvcc: Path) -> None:
    """Set TORCH_CUDA_ARCH_LIST, where it does not say what to build for and no device does, to what nvcc knows."""
    import torch

    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.device_count():
        known = re.findall(r"compute_(\d+)(\d)\b", answer(nvcc, "--list-gpu-arch"))
        listed = [arch for arch in ARCHITECTURES if tuple(arch.split(".")) in known] or ARCHITECTURES[:1]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(listed) + "+PTX"


def choose() -> tuple[list[Extension], dict[str, str]]:
    """The libraries to build, and why the others cannot be begun."""
    import torch

    if torch.version.cuda:
        find_toolkit()  # before torch looks for it
    from torch.utils import cpp_extension

    # py_limited_api: no Python symbol is used, torch.ops.load_library opens both
    cpu = cpp_extension.CppExtension(
        CPU,
        ["csrc/bindings.cpp", "csrc/cpu/grad_products.cpp", "csrc/cpu/grad_sketch.cpp"],
        depends=["csrc/cpu/stream.h", "csrc/cpu/grad_products_tile.h", "csrc/cpu/grad_sketch_tile.h"],
        extra_compile_args={"cxx": [*FLAGS, "-ffp-contract=fast"]},
        py_limited_api=True,
    )
    if not torch.version.cuda:
        return [cpu], {CUDA: f"torch {torch.__version__} was built without CUDA"}
    nvcc = Path(cpp_extension.CUDA_HOME or "", "bin", "nvcc")
    if not cpp_extension.CUDA_HOME or not nvcc.is_file():
        return [cpu], {CUDA: "there was no nvcc, neither on PATH nor in CUDA_HOME"}
    name_architectures(nvcc)
    cuda = cpp_extension.CUDAExtension(
        CUDA,
        ["csrc/cuda/grad_products.cu", "csrc/cuda/grad_sketch.cu"],
        depends=["csrc/cuda/launch.h"],
        extra_compile_args={"nvcc": [*FLAGS, "-DUSE_CUDA"]},
        py_limited_api=True,
    )
    return [cpu, cuda], {}


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What this process and its compilers print meanwhile: shown as it comes, and in the list once it is over."""
    said: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        before = os.dup(1), os.dup(2)
        tee = subprocess.Popen(["tee", log], stdin=subprocess.PIPE)
        assert tee.stdin is not None
        for number in (1, 2):
            os.dup2(tee.stdin.fileno(), number)
        tee.stdin.close()
        try:
            yield said
        finally:
            sys.stdout.flush()
            for number, saved in zip((1, 2), before, strict=True):
                os.dup2(saved, number)
                os.close(saved)
            tee.wait()
            said.append(log.read_text(errors="replace"))


def settle(folder: Path, absent: dict[str, str]) -> None:
    """Leave no library of an earlier build beside those of this one, and a note of why one is not there."""
    stems = {name.rpartition(".")[2]: why for name, why in absent.items()}
    for stem in stems:
        for stale in folder.glob(f"{stem}.*so"):
            stale.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_native_build.json").write_text(json.dumps(stems, indent=2) + "\n")


def native() -> dict:
    """What setup() is told of the native code."""
    if compiler() is None:
        return {}
    try:
        extensions, absent = choose()
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        if REQUIRED:
            raise
        print(f"fpo-kernels: no native library: there is no torch to build it against ({error})", file=sys.stderr)
        return {}

    class Build(BuildExtension):
        """Builds each library by itself, and notes why one is not there."""

        def attempt(self, extension: Extension) -> str | None:
            """Why its build failed; None when it did not."""
            problem: Exception | None = None
            with heard() as log:
                try:
                    self.extensions = [extension]
                    super().run()
                except Exception as error:  # whatever the toolchain says
                    problem = error
            if problem is None:
                return None
            complaints = [line.strip() for line in log[0].splitlines() if re.search(r"\berror\b", line, re.IGNORECASE)]
            return f"its build failed: {complaints[0] if complaints else problem}"

        def run(self) -> None:
            wanted, failed = self.extensions, {}
            kind, inplace = self.compiler, self.inplace
            for extension in wanted:
                if why := self.attempt(extension):
                    failed[extension.name] = why
                self.compiler, self.inplace = kind, inplace  # a run changes both, and one that fails leaves them so
            self.extensions = [extension for extension in wanted if extension.name not in failed]
            settle(Path(self.build_lib, "fpo_kernels"), absent | failed)
            if self.inplace:
                settle(Path(self.get_finalized_command("build_py").get_package_dir("fpo_kernels")), absent | failed)
            told = "".join(f"\nfpo-kernels: no {name}: {why}" for name, why in failed.items())
            if failed and REQUIRED:
                raise SystemExit(f"{told}\nfpo-kernels: FPO_REQUIRE_NATIVE=0 installs without what does not build")
            print(told, end="\n" if told else "", file=sys.stderr)

    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native())
