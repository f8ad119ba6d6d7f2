"""The benchmark runs from an installed package, checks before it times, and prints its table and its JSON."""

import json

from oracle import python

SMALL = ("--shapes", "1,2,1,16,16,8", "1,2,2,8,24,16,causal", "--seconds", "0.01", "--peers", "none", "--threads", "1")


def run_bench(*arguments):
    done = python("-m", "fastattn", "bench", *arguments, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_table():
    done = run_bench(*SMALL, "--dtypes", "float32,float64")
    for word in ("float32", "float64", "%"):
        assert word in done.stdout


def test_json():
    done = run_bench(*SMALL, "--dtypes", "float32", "--json", "-")
    assert json.loads(done.stdout)


def test_json_file(tmp_path):
    path = tmp_path / "figures.json"
    run_bench(*SMALL, "--dtypes", "float16", "--json", str(path))
    assert json.loads(path.read_text())


def test_numpy_is_a_contender():
    done = run_bench("--shapes", "1,2,1,16,16,8", "--seconds", "0.01", "--peers", "numpy", "--dtypes", "float32")
    assert "numpy" in done.stdout.lower()


def test_unknown_words_are_refused():
    for arguments in (["--shapes", "no-such-shape"], ["--dtypes", "float8"], ["--peers", "abacus"], ["--threads", "0"]):
        done = python("-m", "fastattn", "bench", *arguments)
        assert done.returncode == 2
        assert arguments[1] in done.stderr
