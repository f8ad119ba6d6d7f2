"""The package under other interpreters, settings and systems, as far as this one can play them."""

import sys
import zipfile
from pathlib import Path

import pytest
from oracle import python, run_script

import fastattn

# What Python lacks on Windows, of what it has here.
AS_ON_WINDOWS = """
import os, signal
for name in ("register_at_fork", "sysconf", "chown", "geteuid", "fork"):
    if hasattr(os, name):
        delattr(os, name)
if hasattr(signal, "SIGPIPE"):
    del signal.SIGPIPE
"""
USES = {
    "attention": "x = np.ones((2, 4, 8), np.float32); assert (fastattn.attention(x, x, x) == 1).all()",
    "cache": "cache = fastattn.KVCache(1, 8, num_pages=4); assert cache.pages_free == 4",
    "bench": "import fastattn.bench.shapes; assert fastattn.bench.shapes.last_cache_bytes() == 0",
    "command line": "import fastattn.__main__",
}


@pytest.mark.parametrize("use", USES)
def test_without_what_windows_lacks(use):
    run_script(f"{AS_ON_WINDOWS}\nimport numpy as np, fastattn\n{USES[use]}")


def test_a_terminal_without_the_characters():
    """On Windows a pipe has those of a code page."""
    done = python("-m", "fastattn", "explain", "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    printed = run_script(
        "import sys; sys.argv = ['fastattn', '--version']\n"
        "import fastattn.__main__ as cli\ntry:\n    cli.main()\nfinally:\n    print('\\u2026')",
        PYTHONIOENCODING="ascii",
    )
    assert printed.splitlines()[-1] == "?"


@pytest.mark.parametrize("options", [["-O"], ["-OO"], ["-W", "error"], ["-X", "dev", "-W", "error"]], ids=" ".join)
def test_settings_of_python(options):
    source = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "import numpy as np, fastattn, fastattn.view, fastattn.bench, fastattn.__main__\n"
        "x = np.ones((2, 4, 8), np.float32)\n"
        "if (fastattn.attention(x, x, x, causal=True) != 1).any():\n    sys.exit(1)\n"
        "cache = fastattn.KVCache(1, 8, num_pages=4)\n"
        "try:\n    fastattn.attention(x, x, x, window=-1)\nexcept (TypeError, ValueError):\n    print('refused')\n"
    )
    done = python(*options, "-c", source, str(Path(fastattn.__file__).parent.parent))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused"]


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="subinterpreters have a module of their own there")
def test_a_subinterpreter_is_refused_or_served():
    """Never a crash. NumPy itself refuses or warns, first."""
    name = "_xxsubinterpreters" if sys.version_info < (3, 13) else "_interpreters"
    source = (
        "try:\n    import fastattn, numpy as np\n    x = np.ones((1, 2, 4))\n    fastattn.attention(x, x, x)\n"
        "except ImportError:\n    pass"
    )
    done = python("-c", f"import {name} as i\nthis = i.create()\ni.run_string(this, {source!r})\nprint('lives')")
    assert done.stdout.split() == ["lives"], done.stderr


def test_from_a_zip_archive_is_refused(tmp_path):
    package = Path(fastattn.__file__).parent
    with zipfile.ZipFile(tmp_path / "fastattn.zip", "w") as archive:
        for path in package.glob("*.py"):
            archive.write(path, f"fastattn/{path.name}")
    done = python(
        "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'fastattn.zip')!r}); import fastattn"
    )
    assert done.returncode == 1
    assert "ImportError" in done.stderr.splitlines()[-1]
    assert "zip" in done.stderr.splitlines()[-1]
