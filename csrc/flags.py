"""What the C library is compiled from, and by which flags: for setup.py, the tests in tests/c, and editors.

Needs nothing but Python itself:

    python3 csrc/flags.py make              # the flags as variables for make
    python3 csrc/flags.py compile-commands  # compile_commands.json, on standard output
    python3 csrc/flags.py headers           # those under which every header compiles alone
"""

import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# These come after Python's own flags, and win. -fno-wrapv: where signed overflow wraps, compilers cannot
# simplify the index arithmetic of loops. -ffp-contract=fast: fused multiply-adds, GCC's default but not
# clang's. No -ffast-math: it breaks NaN and infinity, and flushes denormals in the whole process.
CFLAGS = ["-std=gnu11", "-O2", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-wrapv", "-Wall", "-Wextra"]
# A dtype that a switch forgets does not compile.
CFLAGS += ["-Werror=switch", "-Werror=switch-enum"]

# Systems and machines have several names; these are the ones used here.
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def target_system() -> str:
    """Return the system that is built for: "win32", or any that is POSIX."""
    return "win32" if sysconfig.get_platform().startswith("win") else "posix"


def target_machine() -> str:
    """Return the machine that is built for, which in a cross build is not the one that builds."""
    name = sysconfig.get_platform().rsplit("-", 1)[-1]
    return MACHINES.get(name, name)


# On Windows all code can be moved, and threads need no flag.
if target_system() == "posix":
    CFLAGS += ["-fPIC", "-pthread"]
LINK_FLAGS = ["-lm", "-pthread"] if target_system() == "posix" else []

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mprfchw"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {
    "x86_64": {
        # Small rather than fast, for the wheel has a limit: what CPUs of before 2013 run, and what is there for tests.
        "baseline": ["-Os"],
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512bf16": [*AVX512, "-mavx512bf16"],
        "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
        "amxemulated": ["-Os", *AVX512, "-mavx512bf16"],
    },
    "aarch64": {
        "baseline": [],
        "neon": [],
        # As a feature of the generic CPU, which GCC, clang and zig all take.
        "neonbf16": ["-mcpu=generic+bf16"],
    },
}
ELEMENTS = {
    "baseline": ["float32", "float64"],
    "avx2": ["float32", "float64"],
    "avx512": ["float32", "float64"],
    "avx512bf16": ["bf16dot"],
    "amx": ["bf16tile", "split"],
    "amxemulated": ["bf16tile", "split"],
    "neon": ["float32", "float64"],
    "neonbf16": ["bf16dot"],
}

# Compiled for tests alone, on every machine.
TEST_KERNELS: list[tuple[str, str, list[str]]] = [("bf16emulated", "bf16dot", [])]

# What a kernel asks of the CPU, where that is not the instruction set of its name.
RUNS_ON = {"amxemulated": "avx512bf16", "bf16emulated": "baseline"}

# Those that a build with sanitizers watches; of the others, whose algorithm is the same, it would take minutes.
SANITIZED = ["avx2", "avx512bf16", "amxemulated"]

PLATFORM = f"platform_{target_system()}"
FRAMEWORK = ["attend", "bias_gradient", "merge", "run", "measure", "plan", "dispatch", "schedule", "threads", "cpu"]
FRAMEWORK += [PLATFORM]


def kernels() -> Iterator[tuple[str, str, list[str]]]:
    """Instruction set, element type and flags of each kernel of the target machine."""
    for isa, flags in INSTRUCTION_SETS.get(target_machine(), {"baseline": []}).items():
        for element in ELEMENTS[isa]:
            yield isa, element, flags


def make_variables() -> Iterator[str]:
    tested = [*kernels(), *TEST_KERNELS]
    yield f"CFLAGS = {' '.join(CFLAGS)}"
    yield f"LINK_FLAGS = {' '.join(LINK_FLAGS)}"
    yield f"PLATFORM = {PLATFORM}"
    yield f"KERNELS = {' '.join(f'{isa}_{element}' for isa, element, _ in tested)}"
    for isa, element, flags in tested:
        defines = f"-DTEST_ISA={isa} -DTEST_ELEMENT={element} -DTEST_CPU={RUNS_ON.get(isa, isa)}"
        yield f"FLAGS_{isa}_{element} = {' '.join(flags)} {defines}"


def header_flags() -> list[str]:
    """Those of all instruction sets at once."""
    flags = [flag for _, _, flags in kernels() for flag in flags]
    return [*CFLAGS, *dict.fromkeys(flags), "-Wno-unused-function", "-Icsrc"]


def compile_commands() -> list[dict[str, object]]:
    """Entries of compile_commands.json; tests/c/kernel_test.c as for the best instruction set."""
    root = Path(__file__).resolve().parent.parent
    sources: dict[str, list[str]] = {f"csrc/{name}.c": [] for name in FRAMEWORK}
    sources |= {f"tests/c/{path.name}": [] for path in sorted((root / "tests" / "c").glob("*.c"))}
    for isa, element, flags in [*TEST_KERNELS, *kernels()]:
        sources[f"csrc/isa/{isa}_{element}.c"] = flags
        sources["tests/c/kernel_test.c"] = [
            *flags,
            f"-DTEST_ISA={isa}",
            f"-DTEST_ELEMENT={element}",
            "-DTEST_CPU=baseline",
        ]
    for isas in INSTRUCTION_SETS.values():
        for isa in isas.keys() - INSTRUCTION_SETS.get(target_machine(), {"baseline": []}).keys():
            for element in ELEMENTS[isa]:
                machine = "x86_64" if isa in INSTRUCTION_SETS["x86_64"] else "aarch64"
                sources[f"csrc/isa/{isa}_{element}.c"] = [f"--target={machine}-linux-gnu", *isas[isa]]
    return [
        {"directory": str(root), "file": file, "arguments": ["cc", *CFLAGS, *flags, "-Icsrc", "-c", file]}
        for file, flags in sources.items()
    ]


if __name__ == "__main__":
    if sys.argv[1:] == ["make"]:
        print(*make_variables(), sep="\n")
    elif sys.argv[1:] == ["headers"]:
        print(*header_flags())
    elif sys.argv[1:] == ["compile-commands"]:
        print(json.dumps(compile_commands(), indent=1))
    else:
        sys.exit(__doc__)
