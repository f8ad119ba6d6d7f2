"""The inner loops of both products on aarch64, by LLVM's models of CPUs: no measurement, for there is no such CPU here.

    python bench/model_aarch64.py

Compiles the kernels of NEON and BF16 (by zig, if the package ziglang is installed, and by aarch64-linux-gnu-gcc, if
that is), cuts out the innermost loops of the micro-kernel, and has llvm-mca (of LLVM 16 or later, which knows Neoverse
N1) tell how many cycles each takes, with all that it reads in L1. Prints the share of the rate at which the same
multiply-adds go with nothing else beside them. Fails where it is below 85 % or a loop keeps vectors in memory, but for
loops of operands that do not lie side by side, and of masked values that are not finite.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import flags  # noqa: E402

# LLVM has one model for all of Apple's CPUs up to the M3, which is Cyclone's: three pipes, where the M1 has four.
CPUS = {
    "neon": ["neoverse-n1", "neoverse-v1", "apple-m1"],
    "neonbf16": ["neoverse-v1", "neoverse-n2", "apple-m2"],
}
LEAST_SHARE = 0.85
ITERATIONS = 200

MULTIPLY_ADD = re.compile(r"(fmla|bfdot)\b")
BRANCH = re.compile(r"(?:b|b\.?(?:eq|ne|lo|hi|hs|ls|lt|gt|le|ge|cc|cs|mi|pl)|cbn?z|tbn?z|bl|blr|br|ret)\b")
TARGET = re.compile(r"(\.L\w+)$")
VECTOR_ON_STACK = re.compile(r"(?:ldu?r|ldp|stu?r|stp)\s+[sdq]\d+.*\[(?:sp|x29)\b")


class Loop(NamedTuple):
    """A loop without a branch in it."""

    product: str
    body: tuple[str, ...]

    @property
    def spills(self) -> int:
        return sum(1 for line in self.body if VECTOR_ON_STACK.match(line))


def compilers() -> dict[str, list[str]]:
    found = {}
    if find_spec("ziglang"):
        found["zig"] = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17"]
    if shutil.which("aarch64-linux-gnu-gcc"):
        found["gcc"] = ["aarch64-linux-gnu-gcc"]
    return found


def llvm_mca() -> str:
    names = [f"llvm-mca-{version}" for version in range(30, 15, -1)] + ["llvm-mca"]
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        sys.exit("needs llvm-mca of LLVM 16 or later: apt-get install llvm-19")
    return found


def innermost_loops(assembly: str) -> Iterator[tuple[str, ...]]:
    lines = [re.sub(r"\s+", " ", re.sub(r"//.*", "", line)).strip() for line in assembly.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("#", ".loc", ".cfi"))]
    labels: dict[str, int] = {}
    for i, line in enumerate(lines):
        if line.endswith(":"):
            labels[line[:-1]] = i
        elif BRANCH.match(line) and (target := TARGET.search(line)) and target[1] in labels:
            body = lines[labels[target[1]] + 1 : i]
            if not any(BRANCH.match(each) or each.endswith(":") for each in body):
                yield tuple(body)


def product_of(body: tuple[str, ...], width: str) -> str | None:
    """What a loop multiplies; None of one that is not of the micro-kernel at its full height and width."""
    sums = sum(1 for line in body if MULTIPLY_ADD.match(line))
    pairs = sum(1 for line in body if re.match(rf"ldu?r {width}\d+", line))
    paired = sum(2 for line in body if re.match(rf"ldp {width}\d+", line))
    if any(line.startswith(("and ", "bic ", "dup ", "ld1r ")) and ".16b" in line for line in body):
        return None  # not finite, or masked
    loads = pairs + paired
    if sums == 48:
        return "scores" if loads >= 8 else "strided"
    return "output" if sums == 24 and loads >= 4 else None


def micro_kernels(compiler: list[str], isa: str, element: str, isa_flags: list[str]) -> set[Loop]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "kernel.s")
        # Compilers warn of flags that -S has no use for.
        command = [*compiler, *flags.CFLAGS, "-w", *isa_flags, "-S", "-o", output, ROOT / f"csrc/isa/{isa}_{element}.c"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        assembly = output.read_text()
    width = "q" if element == "float64" else "d"
    found = ((product_of(body, width), body) for body in innermost_loops(assembly))
    return {Loop(product, body) for product, body in found if product}


def cycles(mca: str, cpu: str, body: tuple[str, ...]) -> float:
    done = subprocess.run(
        [mca, "-mtriple=aarch64-linux-gnu", f"-mcpu={cpu}", f"-iterations={ITERATIONS}"],
        input="\n".join(body) + "\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert total
    return int(total[1]) / ITERATIONS


def share(mca: str, cpu: str, body: tuple[str, ...]) -> float:
    """Of the rate of the same multiply-adds, of which each has a sum of its own, and no load."""
    sums = [line for line in body if MULTIPLY_ADD.match(line)]
    kind, operands = sums[0].split(" ", 1)
    shapes = re.findall(r"v\d+(\.\w+(?:\[\d\])?)", operands)
    alone = tuple(f"{kind} v{i}{shapes[0]}, v30{shapes[1]}, v31{shapes[2]}" for i in range(24))
    return len(sums) / 24 * cycles(mca, cpu, alone) / cycles(mca, cpu, body)


def main() -> None:
    mca = llvm_mca()
    if not compilers():
        sys.exit("needs a compiler for aarch64: pip install ziglang, or apt-get install gcc-aarch64-linux-gnu")
    failed = False
    print(f"{'kernel':<18}{'compiler':<9}{'product':<9}{'loops':>5}{'spills':>7}  share, modelled")
    for isa, isa_flags in flags.INSTRUCTION_SETS["aarch64"].items():
        for element in flags.ELEMENTS[isa] if isa in CPUS else []:
            for name, compiler in compilers().items():
                loops = micro_kernels(compiler, isa, element, isa_flags)
                for product in ("scores", "output", "strided"):
                    kind = [loop for loop in loops if loop.product == product]
                    # Of loops that are compiled several times, for what surrounds them, the best one counts.
                    spills = min((loop.spills for loop in kind), default=0)
                    shares = {cpu: [share(mca, cpu, loop.body) for loop in kind] for cpu in CPUS[isa]}
                    told = ", ".join(
                        f"{cpu} {min(all_):.0%} to {max(all_):.0%}" for cpu, all_ in shares.items() if all_
                    )
                    print(
                        f"{isa + '_' + element:<18}{name:<9}{product:<9}{len(kind):>5}{spills:>7}  {told}", flush=True
                    )
                    is_good = kind and not spills and all(max(all_) >= LEAST_SHARE for all_ in shares.values())
                    failed |= product != "strided" and not is_good
    sys.exit("below 85 %, or vectors in memory" if failed else 0)


if __name__ == "__main__":
    main()
