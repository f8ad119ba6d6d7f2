"""The installed package: its names, what importing it brings, its types and its command line."""

import importlib.metadata
import importlib.resources
import os
import re
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("other", ["cache", "layer", "encoder", "checkpoints"])
@pytest.mark.parametrize(
    "module", ["view", "_page", "_part", "_weights", "_words", "_checks", "_pages", "_cache_file", "rotary"]
)
def test_rooms_do_not_lean_on_what_is_above_them(module, other):
    source = importlib.resources.files("fastattn").joinpath(f"{module}.py").read_text()
    assert not re.search(rf"^\s*(from|import) fastattn\.{other}\b", source, re.MULTILINE)


def test_importing_does_not_change_the_floating_point_mode():
    assert run_script("import fastattn; print(5e-324 * 1.0 > 0, 1e-310 / 10 > 0)").split() == ["True", "True"]


def test_typed():
    files = importlib.resources.files("fastattn")
    assert files.joinpath("py.typed").is_file()
    assert files.joinpath("_core.pyi").is_file()


# Expressions, and their types.
ONE_TO_THREE = "Array | tuple[Array, Array] | tuple[Array, Array, Array]"
ONE_OR_TWO = "Array | tuple[Array, Array]"
BACKWARD = "fastattn.attention_backward(x, x, x, x, x, x, grad_lse=x"
VARLEN_BACKWARD = "fastattn.attention_varlen_backward(x, x, x, x, x, x, [0], [0], grad_lse=x"
TYPES = {
    "fastattn.attention(x, x, x)": "Array",
    "fastattn.attention(x, x, x, return_lse=True)": "tuple[Array, Array]",
    "fastattn.attention(x, x, x, return_lse=True, return_weights=True)": "tuple[Array, Array, Array]",
    "fastattn.attention(x, x, x, return_lse=flag)": ONE_TO_THREE,
    "fastattn.attention(x, x, x, return_weights=flag, causal=flag)": ONE_TO_THREE,
    "fastattn.attention_varlen(x, x, x, [0], [0], return_lse=flag, causal=flag)": ONE_OR_TWO,
    "fastattn.top_keys(x, x, return_totals=flag)": "tuple[Indices, Array] | tuple[Indices, Array, Array]",
    "cache.attention(x, 0)": "Array",
    "cache.attention(x, 0, return_lse=flag, return_weights=flag)": ONE_TO_THREE,
    "layer(x, return_weights=flag)": ONE_OR_TWO,
    "layer.backward(x, layer(x, return_saved=True, dropout=0.1, seed=1)[1]).query": "Array",
    "layer(x, return_saved=True, return_weights=True)[1]": "Array",
    "reference.attention(x, x, x)": "Array",
    "reference.attention(x, x, x, return_weights=True)": "tuple[Array, Array]",
    "reference.attention(x, x, x, return_lse=flag)": ONE_TO_THREE,
    "reference.attention_varlen(x, x, x, [0], [0])": "Array",
    f"{BACKWARD}, grads=(x, None, x))": "tuple[Array, Array, Array]",
    f"{BACKWARD}, return_grad_bias=True)": "tuple[Array, Array, Array, Array]",
    f"{BACKWARD}, return_grad_sinks=True)": "tuple[Array, Array, Array, Array]",
    f"{BACKWARD}, return_grad_bias=True, return_grad_sinks=True)": "tuple[Array, Array, Array, Array, Array]",
    f"{BACKWARD}, return_grad_sinks=flag)": "tuple[Array, ...]",
    f"{VARLEN_BACKWARD}, dropout=0.1, seed=1)": "tuple[Array, Array, Array]",
    f"{VARLEN_BACKWARD}, return_grad_sinks=True)": "tuple[Array, Array, Array, Array]",
    f"{VARLEN_BACKWARD}, return_grad_sinks=flag)": "tuple[Array, ...]",
    f"reference.{BACKWARD.partition('.')[2]}, return_grad_bias=True)": "tuple[Array, Array, Array, Array]",
    f"reference.{VARLEN_BACKWARD.partition('.')[2]})": "tuple[Array, Array, Array]",
    "reference.top_keys(x, x)": "tuple[Indices, Array]",
    "reference.merge([x], [x])": "tuple[Array, Array]",
    "fastattn.plan(x, x, x, dropout=0.1, seed=1, return_weights=True, backward=True).flops": "int",
    "cache.dtype": "np.dtype[Any]",
}
# A type checker knows every keyword, wherever it is taken.
DENSE = "mask=x, bias=x, key_lengths=[1]"
PACKED = "scale=1.0, window=(1, None), alibi_slopes=x, softcap=1.0, sinks=x, num_threads=1"
TYPES |= {
    f"fastattn.attention(x, x, x, causal=True, query_offset=0, {PACKED}, {DENSE})": "Array",
    f"fastattn.plan(x, x, x, causal=True, query_offset=0, {PACKED}, {DENSE}).items": "int",
    f"fastattn.top_keys(x, x, causal=True, query_offset=0, {PACKED}, {DENSE})": "tuple[Indices, Array]",
    f"fastattn.attention_varlen(x, x, x, [0], [0], causal=True, query_offset=0, {PACKED})": "Array",
    f"cache.attention(x, 0, causal=True, query_offset=0, {PACKED})": "Array",
    f"layer(x, causal=True, {PACKED}, {DENSE})": "Array",
    f"reference.attention(x, x, x, causal=True, query_offset=0, {PACKED}, {DENSE})": "Array",
    f"{BACKWARD}, causal=True, query_offset=0, {PACKED}, {DENSE})": "tuple[Array, Array, Array]",
    f"{VARLEN_BACKWARD}, causal=True, query_offset=0, {PACKED})": "tuple[Array, Array, Array]",
}
REFUSED = [
    "fastattn.attention(x, x, x, no_such_keyword=1)",
    "fastattn.attention(x, x, x, x)",
    "fastattn.plan(x, x, x, no_such_keyword=1)",
    "fastattn.plan(x, x, x, x)",
    "cache.attention(x, 0, no_such_keyword=1)",
    "layer(x, no_such_keyword=1)",
    "reference.attention(x, x, x, no_such_keyword=1)",
    "fastattn.attention_varlen(x, x, x, [0], [0], mask=x)",
    f"{BACKWARD}, no_such_keyword=1)",
    f"{VARLEN_BACKWARD}, return_grad_bias=True)",
    "layer(x, query_offset=0)",
]
USE = """from typing import Any, assert_type
import numpy as np
from numpy.typing import NDArray
import fastattn
from fastattn import reference

Array = NDArray[Any]
Indices = NDArray[np.int64]

def use(x: Array, flag: bool, cache: fastattn.KVCache, layer: fastattn.MultiHeadAttention) -> None:
"""


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """What mypy has against each line of a program that uses the package."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("types")
    uses = [*TYPES, *REFUSED]
    lines = [*(f"assert_type({use}, {expected})" for use, expected in TYPES.items()), *REFUSED]
    (folder / "use.py").write_text(USE + "".join(f"    {line}\n" for line in lines))
    environment = dict(os.environ)
    place = Path(fastattn.__file__).parent.parent
    if place.name != "site-packages":  # an editable installation, which mypy does not find by itself
        environment["MYPYPATH"] = str(place)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mypy", "--strict", "--cache-dir", str(folder / "cache"), str(folder / "use.py")],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    first = len(USE.splitlines()) + 1
    found = {int(number) - first: said for number, said in re.findall(r"use\.py:(\d+): error: (.*)", done.stdout)}
    assert min(found, default=0) >= 0, done.stdout
    return {uses[index]: said for index, said in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("use", TYPES)
def test_a_type_checker_knows_the_results(complaints, use):
    assert complaints.get(use) is None


@pytest.mark.slow
@pytest.mark.parametrize("use", REFUSED)
def test_a_type_checker_refuses(complaints, use):
    assert use in complaints


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64, "bfloat16"])
def test_measurements_are_plausible(dtype):
    peak = fastattn.measure_peak(dtype, num_threads=1)
    assert 1e8 < peak < 1e13
    assert 1e8 < fastattn.measure_bandwidth(2**24, num_threads=1) < 1e13
