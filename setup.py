"""Builds fastattn._core from the C library in csrc.

Kernels are compiled once per instruction set and element type, each with the flags of its instruction
set (csrc/flags.py), chosen by the platform that is built for; which of them runs is decided at run time.

FASTATTN_SANITIZE=address,undefined builds with those sanitizers, FASTATTN_WERROR=1 with warnings of the C library
as errors.
"""

import os
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_clib import build_clib
from setuptools.errors import PlatformError

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "csrc"))
import flags

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
SANITIZE = os.environ.get("FASTATTN_SANITIZE")

CFLAGS = [*flags.CFLAGS]
SANITIZER_FLAGS = []
MODULE_FLAGS = ["-O2", "-g0", "-fvisibility=hidden"]
LINK_FLAGS = [*flags.LINK_FLAGS]
if SANITIZE:
    SANITIZER_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-g", "-O1", "-fno-omit-frame-pointer"]
    # With calls instead of code in place, kernels compile in half the time.
    SANITIZER_FLAGS += ["--param", "asan-instrumentation-with-call-threshold=0"]
    MODULE_FLAGS += SANITIZER_FLAGS
    LINK_FLAGS += [f"-fsanitize={SANITIZE}"]
if os.environ.get("FASTATTN_WERROR"):
    CFLAGS += ["-Werror"]

HEADERS = glob("csrc/**/*.h", recursive=True)


def library(name, sources, isa_flags):
    build_info = {
        "sources": [f"csrc/{source}" for source in sources],
        "obj_deps": {"": HEADERS},
        "cflags": [*CFLAGS, *isa_flags],
    }
    return (f"fastattn_{name}", build_info)


def kernel_libraries():
    return [
        library(
            f"{element}_{isa}",
            [f"isa/{isa}_{element}.c"],
            [*isa_flags, *(SANITIZER_FLAGS if isa in flags.SANITIZED else [])],
        )
        for isa, element, isa_flags in flags.kernels()
    ]


def check_what_is_needed(compiler):
    """Say in one line what is missing, before hundreds of lines that do not."""
    if os.name == "nt":
        raise PlatformError(
            "fastattn cannot be compiled on Windows, whose compilers lack vector types or align them wrongly: install "
            "a wheel, or build one elsewhere (make wheels)"
        )
    if not shutil.which(compiler):
        raise PlatformError(
            f"fastattn is compiled from C, and there is no C compiler {compiler!r}: install gcc and libc6-dev "
            "(Debian), or set CC to another compiler"
        )
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        raise PlatformError(
            "fastattn is compiled from C, and Python's headers (Python.h) are missing: install python3-dev (Debian)"
        )


class parallel_build_clib(build_clib):
    """Compiles the libraries side by side: on two CPUs a wheel takes 47 seconds instead of 77."""

    def build_libraries(self, libraries):
        check_what_is_needed(getattr(self.compiler, "compiler", ["cc"])[0])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(super().build_libraries, ([library] for library in libraries)):
                pass


class abi3_wheel(bdist_wheel):
    """One wheel for every Python from 3.11 on; free-threaded builds have no stable ABI and get their own."""

    def finalize_options(self):
        if not FREE_THREADED:
            self.py_limited_api = "cp311"
        super().finalize_options()


macros = [("NPY_NO_DEPRECATED_API", "NPY_1_25_API_VERSION"), ("NPY_TARGET_VERSION", "NPY_1_25_API_VERSION")]
if not FREE_THREADED:
    macros += [("Py_LIMITED_API", "0x030B0000")]

# The linker resolves symbols from left to right: the framework needs the kernels.
framework = library("framework", [f"{name}.c" for name in flags.FRAMEWORK], SANITIZER_FLAGS)

setup(
    libraries=[framework, *kernel_libraries()],
    ext_modules=cythonize(
        Extension(
            "fastattn._core",
            ["fastattn/_core.pyx"],
            depends=[*HEADERS, *glob("csrc/**/*.c", recursive=True)],
            include_dirs=["csrc", numpy.get_include()],
            define_macros=macros,
            extra_compile_args=MODULE_FLAGS,
            extra_link_args=LINK_FLAGS,
            # For the suffix .abi3.so; Windows has .pyd for every ABI.
            py_limited_api=not FREE_THREADED and flags.target_system() == "posix",
        ),
    ),
    cmdclass={"bdist_wheel": abi3_wheel, "build_clib": parallel_build_clib},
)
