"""The package under other interpreters, settings and systems, as far as this one can play them."""

import pytest
from oracle import run_script

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
