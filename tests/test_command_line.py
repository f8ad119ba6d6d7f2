"""The command line: what it prints, what it refuses, and that it ends well where nobody reads on."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
from oracle import HANG_SECONDS, python

import fastattn
from fastattn import bench

SCRIPT = shutil.which("fastattn", path=sysconfig.get_path("scripts"))
COMMANDS = {"module": [sys.executable, "-P", "-m", "fastattn"], "script": [SCRIPT or "fastattn"]}


def run(*arguments, by="module"):
    return subprocess.run(
        [*COMMANDS[by], *arguments], capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )


@pytest.mark.parametrize("by", COMMANDS)
def test_version(by):
    done = run("--version", by=by)
    assert (done.returncode, done.stdout) == (0, f"fastattn {fastattn.__version__}\n")


@pytest.mark.parametrize(("by", "name"), [("module", "python -m fastattn"), ("script", "fastattn")])
def test_alone_it_prints_the_help(by, name):
    done = run(by=by)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {name} ")
    assert done.stdout == run("--help", by=by).stdout
    for command in ("info", "bench", "explain"):
        assert command in done.stdout


def test_the_console_script_is_declared():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="fastattn")
    assert {script.value for script in scripts} == {"fastattn.__main__:main"}


@pytest.mark.slow
def test_info():
    done = run("info")
    assert done.returncode == 0, done.stderr
    assert fastattn.show_config(mode="dicts")["isa"] in done.stdout
    for dtype in bench.FLOATS:
        assert f"{dtype} peak" in done.stdout


@pytest.mark.slow
def test_info_without_ml_dtypes(tmp_path, monkeypatch):
    (tmp_path / "ml_dtypes.py").write_text("raise ImportError('not here', name='ml_dtypes')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = python("-m", "fastattn", "info")
    assert done.returncode == 0, done.stderr
    assert "bfloat16 peak" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        ["--help"],
        ["bench", "--help"],
        ["--version"],
        ["bench", "--shapes", "1,1,1,2,2,2", "--seconds", "0.01"],
    ],
    ids=" ".join,
)
def test_a_reader_that_goes_away(arguments):
    """As `python -m fastattn info | true`: no traceback, and the status of a program that SIGPIPE ends."""
    command = [*COMMANDS["module"], *arguments, *(["--peers", "none"] if "--shapes" in arguments else [])]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # unbuffered, argparse ignores that nobody reads
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        process.stdout.close()
        complaint = process.stderr.read()
    assert "Traceback" not in complaint
    assert "BrokenPipeError" not in complaint
    assert process.returncode == 141


@pytest.mark.parametrize("seconds", ["-1", "0", "nan", "inf", "soon"])
def test_bench_takes_seconds_greater_than_0(seconds):
    done = run("bench", "--seconds", seconds)
    assert done.returncode == 2
    assert f"argument --seconds: got '{seconds}'; it takes a number greater than 0" in done.stderr


@pytest.mark.parametrize("threads", ["abc", "0", "-1", "1.5", "2 3", "٣"])
def test_a_bad_number_of_threads_in_the_environment_is_refused(threads):
    done = python("-c", "import fastattn", FASTATTN_NUM_THREADS=threads)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"RuntimeError: FASTATTN_NUM_THREADS is {threads!r}; accepted is a whole number from 1 up"


@pytest.mark.parametrize("threads", ["", "1", " 2 ", "99999999999999999999"])
def test_a_good_number_of_threads_in_the_environment(threads):
    assert python("-c", "import fastattn", FASTATTN_NUM_THREADS=threads).returncode == 0
