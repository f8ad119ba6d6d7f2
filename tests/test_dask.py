"""Attention over dask arrays: the results of one call, whatever the chunks, and only the chunks that are seen."""

import doctest
import operator
from pathlib import Path

import numpy as np
import pytest
from oracle import (
    BF16,
    DTYPE_IDS,
    DTYPES,
    F16,
    F32,
    F64,
    assert_close,
    check_backward,
    exact,
    make_rng,
    normal,
    qkv,
    run_script,
    tolerances,
)

dask = pytest.importorskip("dask")
pytest.importorskip("dask.array")

import dask.array as da  # noqa: E402
from test_docs import run_python_of  # noqa: E402

import fastattn  # noqa: E402
import fastattn.dask  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.dask.FewKeysWarning")

SHAPE = (2, 4, 2, 50, 70, 8)
DRAW = make_rng(1)
KEYWORDS = {
    "plain": {},
    "causal": {"causal": True},
    "top-left": {"causal": True, "query_offset": 0},
    "window": {"window": (9, 3), "scale": 0.4},
    "causal window": {"causal": True, "window": (20, None), "softcap": 3.0},
    "offsets": {"causal": True, "query_offset": np.array([3, -20])},
    "lengths": {"key_lengths": np.array([70, 5]), "causal": True},
    "no keys": {"key_lengths": np.array([0, 33])},
    "alibi": {"alibi_slopes": np.array([0.5, 0.25, 0.1, 0.0])},
    "alibi of a batch": {"alibi_slopes": DRAW.random((2, 4)), "causal": True},
    "sinks": {"sinks": np.array([0.5, -1.0, 2.0, 0.0]), "window": (4, 0)},
    "mask": {"mask": DRAW.random((2, 1, 50, 70)) < 0.6},
    "mask of keys": {"mask": DRAW.random(70) < 0.6},
    "bias": {"bias": DRAW.standard_normal((4, 50, 70)).astype(F32)},
    "bias of rows": {"bias": DRAW.standard_normal((2, 1, 50, 1)).astype(F32), "causal": True},
}
QUERY, KEY, VALUE = (1, 2, 20, 8), (1, 1, 16, 3), (2, 2, 30, 8)


def lazy(x, chunks):
    return da.from_array(x, chunks=chunks)


def lazy_keywords(keywords):
    return {name: lazy(x, 13) if name in ("mask", "bias") else x for name, x in keywords.items()}


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
def test_as_accurate_as_one_call(keywords, dtypes):
    query, key, value = qkv(make_rng(), SHAPE, dtypes)
    out, lse = fastattn.dask.attention(
        lazy(query, QUERY), lazy(key, KEY), lazy(value, VALUE), return_lse=True, **lazy_keywords(keywords)
    )
    expected, expected_lse = exact(query, key, value, **keywords, return_lse=True)
    out_tolerance, lse_tolerance, _ = tolerances(query, key, value, **keywords)
    assert (out.dtype, out.shape, out.chunks[-2]) == (query.dtype, query.shape, (20, 20, 10))
    assert (lse.dtype, lse.shape) == (F64 if query.dtype == F64 else F32, query.shape[:-1])
    computed, computed_lse = dask.compute(out, lse)
    assert computed.dtype == out.dtype
    assert computed_lse.dtype == lse.dtype
    assert_close(computed, expected, 1.01 * out_tolerance)
    assert_close(computed_lse, expected_lse, 1.5 * lse_tolerance, "lse")


# Keywords decide which chunks there are, and dtypes what parts are made of: all of one with some of the other.
OF_EACH_DTYPE = ("causal window", "alibi of a batch", "sinks", "bias of rows")
GRADIENTS = {
    f"{name}-{dtype}": (keywords, dtypes)
    for name, keywords in KEYWORDS.items()
    for dtype, dtypes in zip(DTYPE_IDS, DTYPES, strict=True)
    if name in OF_EACH_DTYPE or dtypes in ((F64, F64), (BF16, BF16))
}


@pytest.mark.parametrize(("keywords", "dtypes"), GRADIENTS.values(), ids=GRADIENTS)
def test_gradients(keywords, dtypes):
    rng = make_rng()
    query, key, value = qkv(rng, SHAPE, dtypes)

    def backward(grad_out, query, key, value, out, lse, *, grad_lse, **keywords):
        grads = fastattn.dask.attention_backward(
            lazy(grad_out, VALUE),
            lazy(query, QUERY),
            lazy(key, KEY),
            lazy(value, VALUE),
            lazy(out, QUERY),
            lazy(lse, 17),
            grad_lse=lazy(grad_lse, 19),
            **lazy_keywords(keywords),
        )
        computed = dask.compute(*grads)
        assert [x.dtype for x in grads] == [x.dtype for x in computed]
        assert [x.shape for x in grads] == [x.shape for x in computed]
        return computed

    grad_lse = normal(rng, query.shape[:-1], F32)
    check_backward(backward, query, key, value, normal(rng, query.shape, dtypes[0]), grad_lse=grad_lse, **keywords)


@pytest.mark.parametrize("shapes", [((50, 8), (70, 8)), ((50, 8), (3, 1, 70, 8)), ((3, 1, 4, 50, 8), (2, 2, 70, 8))])
def test_axes_that_broadcast(shapes):
    rng = make_rng()
    query, key, value = (normal(rng, shapes[i > 0], F64) for i in range(3))
    if query.ndim == 2 and key.ndim > 2:
        query = query[None]
    expected = fastattn.attention(query, key, value, causal=True, return_lse=True)
    arrays = [lazy(x, (*[1] * (x.ndim - 2), 30, 8)) for x in (query, key, value)]
    results = fastattn.dask.attention(*arrays, causal=True, return_lse=True)
    for actual, want in zip(dask.compute(*results), expected, strict=True):
        np.testing.assert_allclose(actual, want, atol=1e-14)
    grads = fastattn.dask.attention_backward(lazy(expected[0], 40), *arrays, *results, causal=True)
    wanted = fastattn.attention_backward(expected[0], query, key, value, *expected, causal=True)
    for actual, want in zip(dask.compute(*grads), wanted, strict=True):
        assert actual.shape == want.shape
        np.testing.assert_allclose(actual, want, atol=1e-13)


@pytest.mark.parametrize("split_every", [2, 3, 100])
@pytest.mark.parametrize("heads", [(1, 1, 1, 3), (2, 4), (6,)], ids=str)
def test_chunks_of_heads_and_of_what_is_merged(heads, split_every):
    query, key, value = qkv(make_rng(), (1, 6, 3, 20, 90, 8), (F64, F64))
    arrays = lazy(query, (1, heads, 10, 4)), lazy(key, (1, (1, 2), 10, 8)), lazy(value, (1, 3, 7, 8))
    out = fastattn.dask.attention(*arrays, causal=True, split_every=split_every)
    np.testing.assert_allclose(out.compute(), fastattn.attention(query, key, value, causal=True), atol=1e-14)


def never_loaded(x, chunk, seen):
    """An array of which only the chunks that are seen may be computed."""

    def load(block, block_info):
        (begin, end) = block_info[None]["array-location"][-2]
        if begin >= seen[1] or end <= seen[0]:
            raise AssertionError(f"keys {begin} to {end} are loaded, though nothing sees them")
        return block

    return lazy(x, (*x.shape[:-2], chunk, x.shape[-1])).map_blocks(load, dtype=x.dtype, meta=np.empty((0,) * x.ndim))


@pytest.mark.parametrize(
    ("keywords", "seen"),
    [
        ({"causal": True, "query_offset": 0}, (0, 40)),
        ({"window": (10, 10), "query_offset": 100}, (90, 150)),
        ({"causal": True, "window": (25, None)}, (135, 200)),
        ({"key_lengths": [33], "query_offset": 0}, (0, 33)),
        ({"causal": True, "query_offset": -50}, (0, 0)),
    ],
    ids=str,
)
def test_what_nothing_sees_is_not_loaded(keywords, seen):
    query, key, value = qkv(make_rng(), (1, 2, 2, 40, 200, 8), (F64, F64))
    arrays = lazy(query, (1, 2, 15, 8)), never_loaded(key, 10, seen), never_loaded(value, 10, seen)
    results = fastattn.dask.attention(*arrays, **keywords, return_lse=True)
    expected = fastattn.attention(query, key, value, **keywords, return_lse=True)
    for actual, want in zip(dask.compute(*results), expected, strict=True):
        np.testing.assert_allclose(actual, want, atol=1e-14)
    grads = fastattn.dask.attention_backward(results[0], *arrays, *results, **keywords)
    wanted = fastattn.attention_backward(expected[0], query, key, value, *expected, **keywords)
    for actual, want in zip(dask.compute(*grads), wanted, strict=True):
        np.testing.assert_allclose(actual, want, atol=1e-13)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", pytest.param("processes", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_schedulers_give_the_same_bits(scheduler, dtype):
    query, key, value = qkv(make_rng(), SHAPE, (dtype, dtype))
    out = fastattn.dask.attention(lazy(query, QUERY), lazy(key, KEY), lazy(value, VALUE), causal=True)
    expected = out.compute(scheduler="synchronous")
    assert out.compute(scheduler=scheduler, num_workers=2).tobytes() == expected.tobytes()


def test_a_task_has_one_thread_or_as_many_as_are_given(monkeypatch):
    counts = []
    original = fastattn.attention

    def recorded(*arrays, num_threads, **keywords):
        counts.append(num_threads)
        return original(*arrays, **keywords)

    monkeypatch.setattr(fastattn, "attention", recorded)
    x = da.ones((2, 40, 8), chunks=(2, 20, 8))
    fastattn.dask.attention(x, x, x).compute()
    assert counts == [1, 1, 1, 1]
    fastattn.dask.attention(x, x, x, num_threads=2).compute()
    assert counts[4:] == [2, 2, 2, 2]


@pytest.mark.filterwarnings("error")
def test_chunks_of_few_keys_are_warned_about():
    x = da.ones((1, 4096, 8), chunks=(1, 1024, 8), dtype=F32)
    with pytest.warns(fastattn.dask.FewKeysWarning, match=r"key has chunks of 1024 keys.*key\.rechunk") as caught:
        fastattn.dask.attention(x, x, x)
    assert Path(caught[0].filename).name == "test_dask.py"
    key = x.rechunk({-2: (2048, 2047, 1)})
    assert fastattn.dask.attention(x, key, x).chunks == x.chunks


def test_numpy_arrays_are_taken():
    query, key, value = qkv(make_rng(), SHAPE)
    out = fastattn.dask.attention(query, lazy(key, KEY), value)
    np.testing.assert_allclose(out.compute(), fastattn.attention(query, key, value), atol=1e-6)


X = da.ones((2, 4, 50, 8), chunks=(1, 2, 20, 8), dtype=F32)
UNKNOWN = X[0, 0][X[0, 0, :, 0] > 0]


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "words"),
    [
        ((X, X, X), {"is_causal": True}, TypeError, "unexpected keyword argument 'is_causal': here it is causal="),
        ((X, X, X, X), {}, TypeError, "takes 3 positional arguments"),
        ((X, X[..., :5], X), {}, ValueError, "query and key must have the same head_dim"),
        ((X, X[:, :3], X[:, :3]), {}, ValueError, "heads"),
        ((X.astype(int), X, X), {}, TypeError, "query has dtype int64"),
        ((X, X, X), {"mask": X[..., :3] > 0}, ValueError, r"mask has shape .* does not broadcast to \(2, 4, 50, 50\)"),
        ((X, X, X), {"mask": da.ones((50, 50))}, TypeError, "mask has dtype float64; accepted is bool.*bias="),
        ((X, X, X), {"bias": da.ones((3, 50))}, ValueError, "bias has shape"),
        ((X, X, X), {"key_lengths": [60, 1]}, ValueError, "key_lengths"),
        ((X, X, X), {"sinks": [0, np.inf, 0, -np.inf]}, ValueError, r"sinks holds \+inf, for head 1; accepted"),
        ((X, X, X), {"sinks": da.full(4, np.inf)}, ValueError, r"sinks holds \+inf, for head 0; accepted"),
        ((X, X, X), {"split_every": 1}, ValueError, "split_every must be at least 2"),
        ((X, X, X), {"softcap": -1.0}, ValueError, "softcap"),
        ((UNKNOWN, X[0, 0], X[0, 0]), {}, ValueError, r"query has chunks of unknown size.*compute_chunk_sizes"),
        ((np.ma.ones((4, 50, 8)), X, X), {}, TypeError, "query is a masked array"),
        ((da.from_array(np.ma.ones((4, 50, 8))), X, X), {}, TypeError, "query is a masked array"),
    ],
)
def test_bad_input(arguments, keywords, error, words):
    with pytest.raises(error, match=words):
        fastattn.dask.attention(*arguments, **keywords)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"out": X[..., :3]}, ValueError, r"out has shape .*; accepted is \(2, 4, 50, 8\)"),
        ({"grad_out": X.astype(F16)}, TypeError, "grad_out has dtype float16; accepted is float32"),
        ({"lse": X}, ValueError, r"lse has shape .*; accepted is \(2, 4, 50\)"),
        ({"lse": X[..., 0].astype(F16)}, TypeError, "lse has dtype float16; accepted is float32 or float64"),
        ({"out": X.astype(F16)}, TypeError, "out has dtype float16; accepted is float32"),
        ({"out": X.astype(F64)}, TypeError, "out has dtype float64; accepted is float32"),
        ({"sinks": [np.inf, 0, 0, 0]}, ValueError, r"sinks holds \+inf, for head 0"),
        ({"return_grad_bias": True}, ValueError, "return_grad_bias is given without bias"),
        ({"return_grad_sinks": True}, ValueError, "return_grad_sinks is given without sinks"),
        ({"dropout": 0.1}, TypeError, "dropout"),
    ],
)
def test_bad_input_of_gradients(change, error, words):
    arguments = {"grad_out": X, "query": X, "key": X, "value": X, "out": X, "lse": X[..., 0]}
    with pytest.raises(error, match=words):
        fastattn.dask.attention_backward(**arguments | change)


# --- a cluster of two worker processes ------------------------------------------------------------

# A limit of minutes: a hang is a failure, and so is nothing else that takes long.
CLUSTER = """
import os, signal, sys, warnings
import numpy as np, dask.array as da
from distributed import Client, LocalCluster, wait
import fastattn.dask
warnings.simplefilter("ignore")
def cluster(limit):
    return LocalCluster(n_workers=2, threads_per_worker=1, memory_limit=limit, dashboard_address=None)
"""
KILLED = (
    CLUSTER
    + """
marker = sys.argv[1] if len(sys.argv) > 1 else os.environ["MARKER"]
def load(block, block_info):
    if block_info[None]["chunk-location"][-2] == 5 and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return block
draw = np.random.default_rng(0)
query, key, value = draw.standard_normal((3, 2, 1000, 16))
lazy = [da.from_array(x, chunks=(2, 100, 16)) for x in (query, key, value)]
dying = lazy[1].map_blocks(load, dtype=key.dtype, meta=key[:0])
with cluster("1GiB") as servers, Client(servers) as client:
    out, lse = fastattn.dask.attention(lazy[0], dying, lazy[2], causal=True, return_lse=True)
    grads = fastattn.dask.attention_backward(lazy[0], lazy[0], dying, lazy[2], out, lse, causal=True)
    results = [x.result(timeout=300) for x in client.compute([out, lse, *grads])]
expected = fastattn.attention(query, key, value, causal=True, return_lse=True)
wanted = fastattn.attention_backward(query, query, key, value, *expected, causal=True)
print(os.path.exists(marker), all(np.allclose(a, b, atol=1e-12) for a, b in zip(results, [*expected, *wanted])))
"""
)
STORED = (
    CLUSTER
    + """
import zarr
folder, kind = os.environ["STORE"], os.environ["KIND"]
KEYS, CHUNK, LIMIT = 700_000, 20_000, 300 << 20
def stored(name, seed):
    x = da.random.default_rng(seed).random((1, KEYS, 64), np.float32, chunks=(1, CHUNK, 64))
    if kind == "npy":
        da.to_npy_stack(f"{folder}/{name}", x, axis=1)
        return da.from_npy_stack(f"{folder}/{name}", mmap_mode="r")
    da.to_zarr(x, f"{folder}/{name}.zarr")
    return da.from_zarr(f"{folder}/{name}.zarr")
def main():
    key, value = stored("key", 1), stored("value", 2)
    assert key.nbytes + value.nbytes > LIMIT
    query = np.random.default_rng(0).standard_normal((1, 8, 64)).astype(np.float32)
    with cluster(LIMIT) as servers, Client(servers) as client:
        threads = client.run(lambda: fastattn.get_num_threads())
        result = client.compute(fastattn.dask.attention(query, key, value)).result(timeout=300)
        workers = len(client.scheduler_info()["workers"])
    chunks = [[np.asarray(x[:, a : a + CHUNK]) for x in (key, value)] for a in range(0, KEYS, CHUNK)]
    parts = [fastattn.attention(query, *chunk, return_lse=True) for chunk in chunks]
    print(workers, sorted(threads.values()), np.allclose(result, fastattn.merge(*zip(*parts))[0], atol=1e-6))
main()
"""
)


@pytest.mark.slow
def test_a_worker_that_is_killed(tmp_path):
    pytest.importorskip("distributed")
    assert run_script(KILLED, MARKER=str(tmp_path / "killed")).split() == ["True", "True"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zarr", "npy"])
def test_stores_larger_than_a_workers_memory(tmp_path, kind):
    pytest.importorskip("distributed")
    pytest.importorskip("zarr")
    assert run_script(STORED, STORE=str(tmp_path), KIND=kind).split() == ["2", "[1,", "1]", "True"]


# --- what is around it ----------------------------------------------------------------------------


def test_importing_fastattn_does_not_import_dask():
    assert run_script("import sys, fastattn; print('dask' in sys.modules)").strip() == "False"


PAGE = Path(__file__).parent.parent / "docs" / "dask.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside the tests")
def test_python_in_its_page(tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    pytest.importorskip("zarr")
    monkeypatch.chdir(tmp_path)
    run_python_of(PAGE)


@pytest.mark.parametrize("name", ["", "attention", "attention_backward"])
def test_examples_in_docstrings(name):
    of = operator.attrgetter(name)(fastattn.dask) if name else fastattn.dask
    (test,) = doctest.DocTestFinder(recurse=False).find(of, "fastattn.dask", globs={})
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int8])
@pytest.mark.parametrize("chunk", [40, 20])
def test_lengths_of_any_integer_dtype(dtype, chunk):
    x = make_rng().standard_normal((2, 3, 40, 8), F32)
    arrays = [da.from_array(x, chunks=(1, 3, chunk, 8)) for _ in range(3)]
    lengths = np.array([5, 40], dtype)
    for keywords in ({"causal": True, "key_lengths": lengths}, {"window": (3, 3), "key_lengths": lengths}):
        mine = fastattn.dask.attention(*arrays, **keywords).compute()
        np.testing.assert_allclose(mine, fastattn.attention(x, x, x, **keywords), atol=1e-5)


def test_a_batch_of_one_that_the_query_lacks():
    query, key = make_rng().standard_normal((3, 20, 8), F32), make_rng(1).standard_normal((1, 3, 40, 8), F32)
    mine = fastattn.dask.attention(da.from_array(query), da.from_array(key), da.from_array(key)).compute()
    np.testing.assert_allclose(mine, fastattn.attention(query, key, key), atol=1e-5)


def test_gradients_of_sinks_where_a_row_sees_no_key():
    query, key, value, grad_out = make_rng().standard_normal((4, 2, 4, 8), F32)
    mask = np.ones((4, 4), bool)
    mask[1] = False
    grad_out[:, 1] = np.nan
    sinks = np.array([0.5, -0.5])
    keywords = {"mask": mask, "sinks": sinks}
    out, lse = fastattn.attention(query, key, value, return_lse=True, **keywords)
    expected = fastattn.attention_backward(grad_out, query, key, value, out, lse, return_grad_sinks=True, **keywords)[
        -1
    ]
    lazy = [da.from_array(x) for x in (grad_out, query, key, value, out, lse)]
    found = fastattn.dask.attention_backward(*lazy, return_grad_sinks=True, mask=da.from_array(mask), sinks=sinks)[
        -1
    ].compute()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_gradients_of_results_that_are_not_rounded(dtype):
    query, key, value, grad_out = make_rng().standard_normal((4, 3, 40, 8), F32).astype(dtype)
    results = fastattn.attention(query, key, value, unrounded=True, return_lse=True)
    assert results[0].dtype == F32
    sinks = np.zeros(3)
    asked = {"sinks": sinks, "return_grad_sinks": True}
    expected = fastattn.attention_backward(grad_out, query, key, value, *results, **asked)
    arrays = [lazy(x, (1, 15, 8)[: x.ndim]) for x in (grad_out, query, key, value, *results)]
    for mine, want in zip(dask.compute(*fastattn.dask.attention_backward(*arrays, **asked)), expected, strict=True):
        assert mine.dtype == want.dtype
        np.testing.assert_allclose(mine.astype(F64), want.astype(F64), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("sink", [1e300, 3e38, -1e300, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.filterwarnings("error")
def test_sinks_that_float32_does_not_hold(sink, dtype):
    x = make_rng().standard_normal((2, 30, 8)).astype(dtype)
    arrays, sinks = [lazy(x, (1, 10, 8))] * 3, np.array([0.5, sink])
    expected = fastattn.attention(x, x, x, sinks=sinks, return_lse=True)
    found = fastattn.dask.attention(*arrays, sinks=sinks, return_lse=True)
    for mine, want in zip(dask.compute(*found), expected, strict=True):
        np.testing.assert_allclose(mine, want, rtol=1e-5, atol=1e-6)
