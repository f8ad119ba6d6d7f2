"""The benchmark runs from an installed package, checks before it times, and prints its table and its JSON."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
from oracle import python

import fastattn
from fastattn import bench, reference
from fastattn.bench.baselines import STEPS

SMALL = ("--shapes", "1,2,1,16,16,8", "1,2,2,8,24,16,causal", "--seconds", "0.01", "--peers", "none", "--threads", "1")


TINY = bench.Case("tiny", 2, 4, 2, 1, 70, 16, dtypes=bench.DTYPES)
EQUAL = bench.Case("equal", 3, 4, 2, 8, 8, 16, causal=True, layout="swapaxes")


def measured(*cases, dtypes=("float32",)):
    return bench.run(cases, dtypes, [], fastattn.get_num_threads(), seconds=0.001)


def run_bench(*arguments):
    done = python("-m", "fastattn", "bench", *arguments)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
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


def test_numpy_is_a_baseline():
    done = run_bench("--shapes", "1,2,1,16,16,8", "--seconds", "0.01", "--peers", "numpy", "--dtypes", "float32")
    assert "numpy" in done.stdout.lower()


@pytest.mark.parametrize(
    "arguments", [["--shapes", "no-such-shape"], ["--dtypes", "float8"], ["--peers", "abacus"], ["--threads", "0"]]
)
def test_unknown_words_are_refused(arguments):
    done = python("-m", "fastattn", "bench", *arguments)
    assert done.returncode == 2
    assert arguments[1] in done.stderr


def test_peers_agree_on_causal_with_more_keys_than_queries():
    """Their causal begins at the top left, ours ends at the last key; a wrong result has no ratio."""
    peers = [name for name in ("numpy", "torch") if importlib.util.find_spec(name)]
    shapes = ("1,4,2,3,70,16,causal", "1,4,2,1,70,16,causal")
    done = run_bench(
        "--shapes", *shapes, "--seconds", "0.01", "--peers", ",".join(peers), "--dtypes", "float32", "--json", "-"
    )
    rows = json.loads(done.stdout)["rows"]
    assert [sorted(row["peers"]) for row in rows] == [sorted(peers)] * 2
    assert all(peer["ratio"] > 0 for row in rows for peer in row["peers"].values())


@pytest.mark.slow
def test_share_of_the_read_bandwidth():
    done = run_bench(
        "--shapes", "1,4,2,1,8192,64", "1,4,2,1,70,16", "1,2,2,17,8192,64",
        "--seconds", "0.01", "--peers", "none", "--dtypes", "float32", "--json", "-",
    )  # fmt: skip
    read, small, many_rows = json.loads(done.stdout)["rows"]
    assert read["bandwidth_share"] > 0
    assert read["gbytes"] == pytest.approx(2 * 2 * 8192 * 64 * 4 / (1e6 * read["best_ms"]))
    for row in (small, many_rows):
        assert row["bandwidth_share"] is row["gbytes"] is None


def test_int8_is_a_cache_under_float32_queries():
    problem = bench.Problem(TINY, np.dtype(np.int8))
    assert problem.kv_bytes == 2 * 2 * 2 * 70 * (16 + 4)
    query, key, _ = problem.arrays
    kept, _ = problem.stored
    assert query.dtype == kept.dtype == np.float32
    assert 0 < abs(kept - key).max() < 0.05
    (row,) = measured(TINY, dtypes=["int8"]).rows
    assert row.error < 1e-5


def test_int8_is_skipped_where_there_is_no_cache():
    run = measured(EQUAL, TINY, dtypes=["int8"])
    assert [row.name for row in run.rows] == ["tiny"]
    assert [note for note in run.notes if "int8 skipped for equal" in note]


def test_packed_sequences_are_timed_per_flop():
    lengths = (3, 1, 20, 6)
    case = EQUAL.packs("packed", lengths)
    assert case.shape == "4,4,2,1-20,1-20,16,causal"
    run = measured(case)
    (row,) = run.rows
    assert row.flops == 4 * 16 * 4 * sum(n * (n + 1) // 2 for n in lengths)
    assert row.per_flop
    assert row.baseline_ratio > 0
    assert "of equal, per flop" in bench.report(run)


def test_the_table_has_no_column_that_says_nothing():
    run = measured(EQUAL)
    assert "of peak" in bench.report(run)
    assert "of read" not in bench.report(run)
    read = [dataclasses.replace(row, bandwidth_share=0.5) for row in run.rows]
    assert "of read" in bench.report(dataclasses.replace(run, rows=read))
    assert "of read" in bench.report(dataclasses.replace(run, rows=[]))


def test_packed_sequences_are_checked_one_by_one():
    problem = bench.Problem(EQUAL.packs("packed", (3, 1, 20, 6)), np.dtype(np.float32))
    packed = [x[0].swapaxes(0, 1) for x in problem.arrays]
    bounds = [0, 3, 4, 24, 30]
    out = reference.attention_varlen(*packed, bounds, bounds, causal=True).swapaxes(0, 1)[None]
    assert problem.error(out) < 1e-6
    for b in range(4):
        wrong = out.copy()
        wrong[..., bounds[b + 1] - 1, :] += 1
        assert problem.error(wrong) > 0.01


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_decoding_step_appends_and_attends(dtype):
    step = TINY.costs("step", through="cache")
    problem = bench.Problem(step, np.dtype(dtype))
    cache, ids = problem.cache
    (make,) = bench.FastAttn(fastattn.get_num_threads()).variants(problem)
    variant = make()
    for turn in range(2 * STEPS):
        out = variant.run()
        length = 70 + turn % STEPS
        assert [cache.lengths[sequence] for sequence in ids] == [length] * 2
        if length == 70:
            assert problem.error(out) <= problem.tolerance
    (row,) = measured(step, dtypes=[dtype]).rows
    assert row.baseline == "tiny"
    assert row.baseline_ratio > 0


def test_shapes_are_named_with_commas():
    cases = bench.find_cases(["decode,cache", "varlen", "1,2,2,8,8,8"])
    assert {case.name for case in cases} == {
        case.name for group in ("decode", "cache", "varlen") for case in bench.GROUPS[group]
    } | {"given"}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_layer_is_checked_and_timed(dtype):
    case = bench.Case("layer", 2, 2, 2, 9, 9, 8, through="layer")
    problem = bench.problem_for(case, np.dtype(dtype))
    (row,) = measured(case, dtypes=(dtype,)).rows
    assert row.error <= problem.tolerance
    # Four products of 16 × 16 matrices for 18 tokens, and two of attention to 9 keys.
    assert row.flops == 18 * (4 * 2 * 16 * 16 + 2 * 2 * 9 * 16)
    wrong = problem.result.copy()
    wrong[1, 2, 3] += 1
    assert problem.error(wrong) > problem.tolerance


@pytest.mark.slow
def test_sentences_are_real_and_different():
    case = bench.CASES["sentences-256"]
    if needed := bench.absence(case):
        pytest.skip(f"the model is not installed: {needed}")
    sentences = bench.problem_for(case, np.dtype(np.float32)).sentences
    assert len(set(sentences)) == 256
    assert all(len(sentence.split()) >= 4 for sentence in sentences)
    problem = bench.problem_for(dataclasses.replace(case, batch=5), np.dtype(np.float32))
    assert problem.error(problem.encoder(problem.sentences)) <= problem.tolerance
    assert problem.error(np.roll(problem.result, 1, axis=0)) > problem.tolerance


@pytest.mark.skipif(not bench.PEERS["torch"].available(), reason="needs torch")
def test_torch_agrees_on_a_layer():
    case = bench.Case("layer", 2, 2, 2, 9, 9, 8, through="layer")
    (row,) = bench.run([case], ["float32"], ["torch"], 1, seconds=0.001).rows
    assert row.peers["torch"].rejected == []
    assert row.peers["torch"].ratio > 0
