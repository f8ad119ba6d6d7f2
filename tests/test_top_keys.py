"""The most attended keys of each query, and what each key is given in all, against the whole matrix of weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPE_IDS, DTYPES, F16, F32, F64, UNIT, make_rng, qkv, run_script, tolerances
from strategies import cases

import fastattn
from fastattn import reference

each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)


def check(query, key, k, **keywords):
    """The listed weights are the largest, each is that of its key, and totals are sums over the queries."""
    value = np.zeros((*key.shape[:-1], 1), key.dtype)
    _, _, tolerance = tolerances(query, key, value, **keywords)
    _, every = reference.attention(*(x.astype(F64) for x in (query, key, value)), return_weights=True, **keywords)
    largest = np.sort(np.pad(every, [(0, 0)] * (every.ndim - 1) + [(0, k)]), axis=-1)[..., ::-1][..., :k]
    allowed = np.max(np.broadcast_to(tolerance, every.shape), axis=-1, keepdims=True, initial=0.0)

    indices, weights, totals = fastattn.top_keys(query, key, k, return_totals=True, **keywords)
    assert indices.dtype == np.int64
    assert weights.dtype == query.dtype
    assert indices.shape == weights.shape == largest.shape
    listed = weights.astype(F64)
    assert np.all(np.abs(listed - largest) <= allowed)
    assert np.all((indices >= 0) | (listed == 0))
    padded = np.pad(every, [(0, 0)] * (every.ndim - 1) + [(0, 1)])  # key -1 has weight 0
    assert np.all(np.abs(np.take_along_axis(padded, indices, axis=-1) - largest) <= 2 * allowed)
    assert np.all(np.diff(listed, axis=-1) <= 0)
    for row in indices.reshape(-1, k):
        there = row[row >= 0]
        assert len(set(there)) == len(there)
    # Rounded to units of 2**-61 rows, and summed in float32 within a tile; half types are not rounded to.
    rounding = UNIT[totals.dtype] * (64 + 4 * every.sum(axis=-2)) * max(every.shape[-2], 1)
    assert np.all(np.abs(totals - every.sum(axis=-2)) <= np.sum(tolerance, axis=-2) + rounding)
    return indices, weights, totals


@pytest.mark.isa
@settings(max_examples=60)
@given(case=cases(), k=st.sampled_from([1, 2, 8, 30]))
def test_any_call(case, k):
    check(case.query, case.key, k, **case.keywords)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("shape", [(2, 4, 2, 1, 700, 32), (1, 6, 2, 40, 300, 16), (1, 2, 2, 200, 130, 8)], ids=str)
@pytest.mark.parametrize("keywords", [{}, {"causal": True}, {"window": (20, 3)}, {"sinks": 1.0}], ids=str)
def test_shapes(dtypes, shape, keywords):
    query, key, _ = qkv(make_rng(*shape), shape, dtypes)
    if "sinks" in keywords:
        keywords = {"sinks": np.full(shape[1], keywords["sinks"])}
    check(query, key, 8, **keywords)


def test_against_the_reference():
    query, key, _ = qkv(make_rng(), (1, 4, 2, 30, 50, 16), (F64, F64))
    mine = fastattn.top_keys(query, key, 60, causal=True, return_totals=True)
    theirs = reference.top_keys(query, key, 60, causal=True, return_totals=True)
    np.testing.assert_array_equal(mine[0], theirs[0])
    np.testing.assert_allclose(mine[1], theirs[1], rtol=1e-12)
    np.testing.assert_allclose(mine[2], theirs[2], rtol=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seqlen_q", [1, 40])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    "key",
    [[-900, -950, 0, 900, 5], [0, np.nan, -900, 3, 5], [0, np.inf, 3, 1, 5], [0, -np.inf, 3, 1, 5]],
    ids=["underflow", "NaN", "infinite", "minus infinite"],
)
def test_the_reference_lists_the_same_keys(seqlen_q, dtype, key):
    """Keys whose weight is 0 are listed by their scores, and hidden or NaN ones not, in rows of NaN either."""
    query = np.ones((seqlen_q, 1), dtype)
    arguments = {"mask": [True, True, True, True, False], "return_totals": True}
    mine = fastattn.top_keys(query, np.array(key, dtype)[:, None], 7, **arguments)
    theirs = reference.top_keys(query, np.array(key, dtype)[:, None], 7, **arguments)
    for got, expected in zip(mine, theirs, strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_totals_leave_out_rows_of_nan(dtype):
    """Three rows are one tile, of which each counts by itself."""
    query = np.array([[1], [np.nan], [1]], dtype)
    results = [f.top_keys(query, np.eye(3, 1, dtype=dtype), 2, return_totals=True) for f in (fastattn, reference)]
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@each_dtype
@pytest.mark.parametrize("seqlen_q", [1, 50])
def test_equal_keys_come_in_their_order(dtypes, seqlen_q):
    query, key, _ = qkv(make_rng(), (1, 2, 2, seqlen_q, 1, 16), dtypes)
    indices, _ = fastattn.top_keys(query, np.repeat(key, 200, axis=-2), 5)
    np.testing.assert_array_equal(indices, np.broadcast_to(np.arange(5), indices.shape))


def test_fewer_keys_than_k():
    query, key, _ = qkv(make_rng(), (1, 2, 2, 3, 2, 8))
    indices, weights = fastattn.top_keys(query, key, 4)
    assert (indices[..., 2:] == -1).all()
    assert (weights[..., 2:] == 0).all()
    indices, weights, totals = fastattn.top_keys(query, key[:, :, :0], 4, return_totals=True)
    assert (indices == -1).all()
    assert totals.shape == (1, 2, 0)


@each_dtype
def test_same_bits_for_any_number_of_threads(dtypes):
    for shape in [(2, 4, 2, 150, 300, 32), (1, 12, 12, 500, 500, 16)]:
        query, key, _ = qkv(make_rng(), shape, dtypes)
        alone = fastattn.top_keys(query, key, 8, return_totals=True, num_threads=1)
        for num_threads in (2, 5, 64):
            together = fastattn.top_keys(query, key, 8, return_totals=True, num_threads=num_threads)
            for a, b in zip(alone, together, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("seqlen_q", [8, 640])
def test_a_nan_query_takes_no_other_row_from_the_totals(dtypes, seqlen_q):
    query, key, _ = qkv(make_rng(), (1, 1, 1, seqlen_q, 100, 16), dtypes)
    query[..., 3, :] = np.nan
    _, _, totals = fastattn.top_keys(query, key, 4, return_totals=True)
    np.testing.assert_allclose(totals.astype(F64).sum(), seqlen_q - 1, rtol=1e-3 if totals.dtype.itemsize > 2 else 0.02)


@pytest.mark.parametrize("seqlen_q", [1, 100])
def test_scores_that_rise_replace_every_entry(seqlen_q):
    query, key = np.ones((seqlen_q, 1)), np.arange(1000.0)[:, None] / 100
    indices, weights = fastattn.top_keys(query, key, 100)
    np.testing.assert_array_equal(indices, np.broadcast_to(np.arange(999, 899, -1), indices.shape))
    theirs = reference.top_keys(query, key, 100)
    np.testing.assert_allclose(weights, theirs[1], rtol=1e-12)


def test_nan_keys_under_a_mask_and_a_nan_query():
    query, key, _ = qkv(make_rng(), (1, 1, 1, 3, 40, 8))
    key[..., 7, :] = np.nan
    query[..., 1, :] = np.nan
    mask = np.arange(40) != 7
    indices, weights, totals = fastattn.top_keys(query, key, 40, mask=mask, return_totals=True)
    for row in (0, 2):
        assert 7 not in indices[0, 0, row]
        assert np.isfinite(weights[0, 0, row]).all()
    np.testing.assert_allclose(totals.sum(), 2, rtol=1e-5)


def test_two_dimensional_and_half_cache():
    query, key, _ = (x[0, 0] for x in qkv(make_rng(), (1, 1, 1, 4, 60, 16), (F32, F16)))
    indices, weights = fastattn.top_keys(query, key, 3)
    assert indices.shape == weights.shape == (4, 3)


@pytest.mark.parametrize(
    ("k", "error", "words"),
    [(0, ValueError, "k must be from 1 to 1024"), (1025, ValueError, "k must be"), (2.0, TypeError, "k must be an int"),
     (True, TypeError, "k must be an int")],
)  # fmt: skip
def test_bad_k(k, error, words):
    query, key, _ = qkv(make_rng(), (1, 1, 1, 2, 3, 4))
    with pytest.raises(error, match=words):
        fastattn.top_keys(query, key, k)


@pytest.mark.slow
def test_memory_is_linear_in_the_sequence():
    """16384 keys by 16384 queries by 8 heads are 8 GB of weights; what is taken beyond the results is small."""
    source = """
import resource, numpy as np, fastattn
x = np.random.default_rng(0).standard_normal((8, 16384, 16), np.float32)
fastattn.top_keys(x[:, :64], x, 8, return_totals=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
results = fastattn.top_keys(x, x, 8, return_totals=True)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024)
"""
    assert int(run_script(source)) < 64e6
