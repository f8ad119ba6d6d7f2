"""The build, and a package that is not whole: one line says what is missing."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastattn

SOURCE = Path(os.environ.get("FASTATTN_SOURCE", Path(__file__).parent.parent))
PACKAGE = Path(fastattn.__file__).parent

needs_source = pytest.mark.skipif(not (SOURCE / "setup.py").exists(), reason="the source tree is not there")


@pytest.mark.slow
@needs_source
def test_a_build_without_a_compiler_says_so(tmp_path):
    for package in ("Cython", "setuptools"):
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_clib", "-b", str(tmp_path), "-t", str(tmp_path)],
        cwd=SOURCE, env={**os.environ, "CC": "/no/such/cc"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "no C compiler '/no/such/cc'" in last
    assert "install gcc" in last
    assert not list(tmp_path.iterdir())


@needs_source
def test_every_source_is_compiled_and_known_to_editors(tmp_path):
    script = SOURCE / "csrc" / "flags.py"
    done = subprocess.run(
        [sys.executable, "-I", script, "compile-commands"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    commands = json.loads(done.stdout)
    known = {command["file"] for command in commands}
    assert all((SOURCE / file).exists() for file in known)
    on_disk = [
        *(SOURCE / "csrc").glob("*.c"),
        *(SOURCE / "csrc" / "isa").glob("*.c"),
        *(SOURCE / "tests/c").glob("*.c"),
    ]
    of_other_systems = {f"csrc/platform_{system}.c" for system in ("posix", "win32")} - known
    assert len(of_other_systems) == 1
    assert known == {path.relative_to(SOURCE).as_posix() for path in on_disk} - of_other_systems


@needs_source
@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
@pytest.mark.parametrize(
    ("source", "forgetful"),
    [
        ("csrc/dispatch.c", ["csrc/dtypes.h"]),
        ("csrc/isa/baseline_float32.c", ["csrc/dtypes.h", "csrc/kernel/stored.h", "csrc/kernel/specialise.h"]),
        ("tests/c/kernel_test.c", ["tests/c/kernel_test.c"]),
    ],
    ids=["dispatch", "kernel", "test"],
)
def test_a_dtype_that_is_forgotten_does_not_compile(source, forgetful, tmp_path):
    shutil.copytree(SOURCE / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(SOURCE / "tests" / "c", tmp_path / "tests" / "c")
    header = tmp_path / "csrc" / "fastattn.h"
    text = header.read_text()
    assert "FA_INT8 }" in text
    header.write_text(text.replace("FA_INT8 }", "FA_INT8, FA_FORGOTTEN }"))
    script = "import flags; print(*flags.CFLAGS)"
    flags = subprocess.run(
        [sys.executable, "-c", script], cwd=SOURCE / "csrc", capture_output=True, text=True, check=True
    ).stdout.split()
    defines = ["-DTEST_ISA=baseline", "-DTEST_ELEMENT=float32", "-DTEST_CPU=baseline"]
    done = subprocess.run(
        ["gcc", *flags, *defines, "-fsyntax-only", "-Icsrc", source],
        cwd=tmp_path, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    told = re.sub(r"\w+/\.\./", "", done.stderr)
    assert "enumeration value 'FA_FORGOTTEN' not handled in switch" in told
    for file in forgetful:
        assert file in told


def complaint_of(folder, before=""):
    """Import fastattn from a folder, in a process of its own, and return the last line that it prints."""
    # -S: in an editable installation, site would make the compiled module of the source tree known to any fastattn.
    path = os.pathsep.join([str(folder), str(Path(np.__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", f"{before}\nimport fastattn"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def uncompiled(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "fastattn", ignore=shutil.ignore_patterns("_core.*.so", "_core.so", "*.pyc"))
    return tmp_path


def test_without_numpy_it_says_so():
    said = complaint_of(PACKAGE.parent, "import sys; sys.modules['numpy'] = None")
    assert said.startswith("ImportError: fastattn needs NumPy")
    assert "pip install numpy" in said
    assert "-P" not in said


def test_in_a_source_tree_that_is_not_built_it_says_so(uncompiled):
    said = complaint_of(uncompiled)
    assert said.startswith(f"ImportError: fastattn is not compiled in {uncompiled / 'fastattn'}")
    assert f"pip install -e {uncompiled}" in said
    assert "NumPy" not in said


def test_what_else_is_the_case_is_told_as_it_is(uncompiled):
    (uncompiled / "fastattn" / "_core.abi3.so").write_bytes(b"no library")
    said = complaint_of(uncompiled)
    assert said.startswith("ImportError: fastattn's compiled module cannot be imported: ")
    assert "_core.abi3.so" in said
    assert "pip install" not in said
