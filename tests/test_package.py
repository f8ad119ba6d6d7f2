"""The installed package: its names, what importing it brings, its types and its command line."""

import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from oracle import run_script

import fastattn


def test_public_names():
    expected = {"attention", "plan", "show_config", "get_num_threads", "set_num_threads", "reference", "__version__"}
    assert expected <= set(fastattn.__all__) | {"__version__", "reference"}
    for name in [*fastattn.__all__, *expected]:
        assert hasattr(fastattn, name)
    assert fastattn.__version__ == importlib.metadata.version("fastattn")


def test_numpy_is_the_only_requirement():
    required = [r for r in importlib.metadata.requires("fastattn") or [] if "extra ==" not in r]
    assert [re.match(r"\w+", r).group() for r in required] == ["numpy"]


def test_import_brings_nothing_but_numpy():
    printed = run_script(
        "import sys, numpy; before = set(sys.modules); import fastattn; print(*(set(sys.modules) - before))"
    )
    foreign = {name.split(".")[0] for name in printed.split()} - sys.stdlib_module_names - {"fastattn", "numpy"}
    foreign -= {"threadpoolctl"}  # where it is installed, it is told of the pool
    assert not {name for name in foreign if not name.startswith(("_cython", "cython_runtime", "_virtualenv"))}


def test_importing_does_not_change_the_floating_point_mode():
    assert run_script("import fastattn; print(5e-324 * 1.0 > 0, 1e-310 / 10 > 0)").split() == ["True", "True"]


def test_typed():
    files = importlib.resources.files("fastattn")
    assert files.joinpath("py.typed").is_file()
    assert files.joinpath("_core.pyi").is_file()


def test_type_checker_knows_the_results(tmp_path):
    pytest.importorskip("mypy")
    source = tmp_path / "use.py"
    source.write_text(
        "import numpy as np\n"
        "import fastattn\n"
        "x = np.zeros((2, 3, 4, 8), np.float32)\n"
        "reveal_type(fastattn.attention(x, x, x))\n"
        "reveal_type(fastattn.attention(x, x, x, return_lse=True))\n"
        "reveal_type(fastattn.attention(x, x, x, return_lse=True, return_weights=True))\n"
        "reveal_type(fastattn.plan(x, x, x).flops)\n"
        "fastattn.attention(x, x, x, no_such_keyword=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(source)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert len(revealed) == 4, done.stdout + done.stderr
    assert revealed[0].count("ndarray[") == 1
    assert [r.lower().startswith("tuple[") for r in revealed[:3]] == [False, True, True]
    assert revealed[1].count("ndarray[") == 2
    assert revealed[2].count("ndarray[") == 3
    assert revealed[3].endswith("int")
    assert "no_such_keyword" in done.stdout or "No overload" in done.stdout


def test_show_config(capsys):
    config = fastattn.show_config(mode="dicts")
    assert {"version", "isa", "isas", "threads", "numpy", "compiler"} <= set(config)
    assert config["version"] == fastattn.__version__
    assert config["threads"] == fastattn.get_num_threads()
    assert config["numpy"] == np.__version__
    assert capsys.readouterr().out == ""
    assert fastattn.show_config() is None
    printed = capsys.readouterr().out
    assert config["isa"] in printed
    assert config["version"] in printed
    with pytest.raises(ValueError, match="mode"):
        fastattn.show_config(mode="no such mode")


def test_measurements_are_plausible():
    for dtype in (np.float32, np.float64, "bfloat16"):
        peak = fastattn.measure_peak(dtype, num_threads=1)
        assert 1e8 < peak < 1e13
    assert 1e8 < fastattn.measure_bandwidth(2**24, num_threads=1) < 1e13


def test_read_bandwidth_is_not_less_than_what_numpy_reads():
    data = np.ones(1 << 18, np.float32)  # within L2, where a loop that is itself the limit shows
    times = []
    for _ in range(200):
        start = time.perf_counter()
        data.max()
        times.append(time.perf_counter() - start)
    assert fastattn.measure_bandwidth(data.nbytes, num_threads=1) > 0.8 * data.nbytes / min(times)
