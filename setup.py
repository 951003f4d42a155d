"""Decides which native code is built; all metadata is in pyproject.toml.

The CPU kernels want a C++ compiler, the CUDA kernels a CUDA build of torch and nvcc. What cannot be built is
left out: the package installs all the same and `impl="native"` then says what is missing.
"""

import os
import shutil
import sys

from setuptools import setup

TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11: one library serves every later version


def native() -> dict:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if sys.platform == "win32" or shutil.which(compiler) is None:
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return {}
    cxx = ["-O3", "-std=c++20", "-ffp-contract=fast", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    sources = ["csrc/bindings.cpp", "csrc/cpu/grad_products.cpp", "csrc/cpu/grad_sketch.cpp"]
    make, flags = cpp_extension.CppExtension, {"cxx": cxx}
    if torch.version.cuda and cpp_extension.CUDA_HOME and shutil.which("nvcc"):
        make = cpp_extension.CUDAExtension
        sources += ["csrc/cuda/grad_products.cu", "csrc/cuda/grad_sketch.cu"]
        flags["nvcc"] = ["-O3", "-std=c++20", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    library = make(
        "fpo_kernels._native",
        sources,
        depends=["csrc/cpu/stream.h", "csrc/cpu/grad_products_tile.h", "csrc/cpu/grad_sketch_tile.h"],
        extra_compile_args=flags,
        py_limited_api=True,  # no Python symbol is used: torch.ops.load_library opens it
    )

    class BuildOrLeaveOut(cpp_extension.BuildExtension):
        """A compiler that cannot build the library costs speed, not the installation."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # whatever the toolchain says: it is printed, and `fpo-train doctor` says so too
                print(f"fpo-kernels: installing without the native library, its build failed: {error}", file=sys.stderr)

    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": BuildOrLeaveOut},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native())
