"""A program that imports fastattn, frozen by PyInstaller without options, runs where there is no fastattn."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
from oracle import HANG_SECONDS

PROGRAM = """
import sys
import numpy as np
import fastattn

assert sys.frozen and fastattn.__file__.startswith(sys._MEIPASS)
x = np.ones((1, 2, 5, 8), np.float32)
out, weights = fastattn.attention(x, x, x, return_weights=True)
assert fastattn.plan(x, x, x).flops > 0
cache = fastattn.KVCache(2, 8, num_pages=1)
cache.attention(x[0], cache.add(x[0], x[0]))
fastattn.MultiHeadAttention(*np.ones((4, 8, 8), np.float32), num_heads=2)(x[0])
view = fastattn.AttentionView(weights[0], ["a"] * 5)
print(view)
view.save(sys.argv[1])
"""


@pytest.mark.slow
def test_a_frozen_program_runs(tmp_path):
    pytest.importorskip("PyInstaller")
    if '"editable": true' in (importlib.metadata.distribution("fastattn").read_text("direct_url.json") or ""):
        pytest.skip("PyInstaller does not find what is installed as editable")
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYINSTALLER_CONFIG_DIR": str(tmp_path / "cache")}
    # Takes half a minute; the limit is for what hangs.
    frozen = subprocess.run(
        [sys.executable, "-P", "-m", "PyInstaller", "program.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False,
    )  # fmt: skip
    assert frozen.returncode == 0, frozen.stderr
    ran = subprocess.run(
        [tmp_path / "dist" / "program" / "program", "page.html"],
        cwd=tmp_path, env={}, capture_output=True, text=True, timeout=HANG_SECONDS, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert '"a" attends to' in ran.stdout
    page = (tmp_path / "page.html").read_text()
    assert "</html>" in page
    assert "<style>" in page
