"""A few queries on many keys: keys in lanes, splits of the keys, and their merging."""

import numpy as np
import pytest
from oracle import (
    BF16,
    DTYPE_IDS,
    DTYPES,
    F16,
    F32,
    assert_close,
    assert_same_bits,
    check,
    check_planted,
    exact,
    make_rng,
    normal,
    qkv,
    tolerances,
)

import fastattn

each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(128, 64), (64, 96), (160, 48), (20, 33), (1, 1)])
@pytest.mark.parametrize("seqlen_k", [1, 70, 530])
def test_few_rows(dtypes, rows, head_dim, head_dim_v, seqlen_k):
    """Rows are heads of a group or queries; both are lanes of one vector."""
    rng = make_rng(rows, head_dim, seqlen_k)
    query, key, value = qkv(rng, (2, 2 * rows, 2, 1, seqlen_k, head_dim), dtypes, head_dim_v)
    check(query, key, value)
    query, key, value = qkv(rng, (1, 2, 2, rows, seqlen_k, head_dim), dtypes, head_dim_v)
    check(query, key, value, causal=True)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("seqlen_q", [1, 4, 12])
@pytest.mark.parametrize(
    "names",
    ["mask", "bias", "sinks", "softcap", "alibi_slopes", "window", "causal", "key_lengths",
     "mask, bias, sinks, alibi_slopes, softcap, causal"],
)  # fmt: skip
def test_every_keyword_over_splits(dtypes, seqlen_q, names):
    """1300 keys are three splits."""
    rng = make_rng(seqlen_q)
    query, key, value = qkv(rng, (2, 4, 2, seqlen_q, 1300, 32), dtypes)
    scores = (2, 4, seqlen_q, 1300)
    mask = rng.random(scores) < 0.7
    mask[0, :, :, 512:1024] = False  # a split that nobody sees
    each = {
        "mask": {"mask": mask},
        "bias": {"bias": np.where(rng.random(scores) < 0.1, -np.inf, rng.standard_normal(scores)).astype(F32)},
        "alibi_slopes": {"alibi_slopes": rng.random(4) * 0.01},
        "sinks": {"sinks": rng.standard_normal(4)},
        "softcap": {"softcap": 2.0},
        "window": {"window": (600, 3), "query_offset": [1000, 700]},
        "causal": {"causal": True, "query_offset": [-2, 520]},
        "key_lengths": {"key_lengths": [1290, 0]},
    }
    keywords = {}
    for name in names.split(", "):
        keywords |= each[name]
    check(query, key, value, **keywords)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 40000, 16), (1, 4, 1, 1, 20000, 16)], ids=str)
def test_splits_grow_with_the_keys(dtypes, shape):
    """Beyond 16384 keys splits are longer, so that there are no more than 33 of them, wherever they begin."""
    query, key, value = qkv(make_rng(), shape, dtypes)
    assert 1 < fastattn.plan(query, key, value).splits <= 33
    check(query, key, value)


@each_dtype
def test_a_window_reads_its_own_splits_only(dtypes):
    query, key, value = qkv(make_rng(), (1, 4, 1, 2, 5000, 16), dtypes)
    assert fastattn.plan(query, key, value, window=(300, 0)).splits <= 2
    key[..., :4000, :] = np.nan
    value[..., :4000, :] = np.nan
    out = fastattn.attention(query, key, value, window=(300, 0))
    assert np.isfinite(out.astype(F32)).all()


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 16), (6, 80)])
def test_planted_in_one_split(dtypes, bad, heads, head_dim):
    """Half of the rows see it; those that do not must not notice."""
    rng = make_rng()
    clean = qkv(rng, (1, heads, 1, 2, 1500, head_dim), dtypes)
    mask = np.ones((2, 1500), bool)
    mask[0, 700] = False
    mask[0, 1400] = False
    query, key, value = (x.copy() for x in clean)
    key[..., 700, :] = np.nan
    value[..., 1400, 3] = bad
    check_planted(clean, (query, key, value), mask=mask)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("begin", [0, 1, 6, 7, 31])
@pytest.mark.parametrize("count", [1, 2, 5, 34])
@pytest.mark.parametrize("heads", [3, 7])
def test_keys_begin_and_end_anywhere(dtypes, begin, count, heads):
    """Values may be multiplied by pairs of keys, of which one may lie outside: it must not be noticed."""
    end = begin + count
    clean = qkv(make_rng(begin, count), (1, heads, 1, 1, end + 5, 32), dtypes)
    keywords = {"window": (count - 1, 0), "query_offset": end - 1}
    query, key, value = (x.copy() for x in clean)
    for x in (key, value):
        x[..., :begin, :] = np.nan
        x[..., end:, :] = np.nan
    check_planted(clean, (query, key, value), **keywords)
    value[..., begin, 0] = np.inf
    value[..., end - 1, 1] = -np.inf
    out = fastattn.attention(query, key, value, **keywords)
    assert (out[..., 0] == np.inf).all()
    assert (out[..., 1] == -np.inf).all()


each_number_of_keys = pytest.mark.parametrize("seqlen_k", [63, 64, 65, 191, 255, 256, 257, 320, 500])


@pytest.mark.isa
@each_dtype
@each_number_of_keys
@pytest.mark.parametrize("window", [None, (150, 0)])
def test_blocks_one_by_one_or_four_at_once(dtypes, seqlen_k, window):
    """Scores of 64 keys under a mask, of 256 without one: the sums are the same."""
    arrays = qkv(make_rng(seqlen_k), (1, 4, 2, 2, seqlen_k, 64), dtypes)
    keywords = {"window": window, "query_offset": seqlen_k - 2, "return_lse": True}
    plain = fastattn.attention(*arrays, **keywords)
    masked = fastattn.attention(*arrays, mask=np.ones(seqlen_k, bool), **keywords)
    assert_same_bits(masked[0], plain[0])
    assert_same_bits(masked[1], plain[1], "lse")


@pytest.mark.isa
@each_dtype
@each_number_of_keys
def test_blocks_that_are_hidden(dtypes, seqlen_k):
    """Whatever a hidden block holds."""
    clean = qkv(make_rng(seqlen_k), (1, 4, 2, 2, seqlen_k, 64), dtypes)
    mask = np.ones(seqlen_k, bool)
    mask[64:128] = False
    mask[320:384] = False
    query, key, value = (x.copy() for x in clean)
    key[..., ~mask, :] = np.nan
    value[..., ~mask, :] = np.nan
    check_planted(clean, (query, key, value), mask=mask)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 9000, 32), (1, 8, 2, 1, 3000, 64), (1, 8, 2, 5, 3000, 16),
                                   (3, 8, 2, 3, 1200, 16)], ids=str)  # fmt: skip
@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_same_bits_for_any_number_of_threads(dtypes, shape, num_threads):
    """One thread merges the splits as they come; several leave them to the one that is last."""
    query, key, value = qkv(make_rng(), shape, dtypes)
    keywords = {"sinks": np.ones(shape[1]), "return_lse": True}
    alone = fastattn.attention(query, key, value, num_threads=1, **keywords)
    for _ in range(5):
        together = fastattn.attention(query, key, value, num_threads=num_threads, **keywords)
        assert_same_bits(together[0], alone[0])
        assert_same_bits(together[1], alone[1], "lse")


@each_dtype
def test_same_bits_whatever_else_is_in_the_batch(dtypes):
    """A long sequence is split, and shared out only if it is long beside the others."""
    lengths = [1, 4000, 513, 0, 2100]
    query, key, value = qkv(make_rng(), (5, 4, 2, 1, 4000, 32), dtypes)
    together = fastattn.attention(query, key, value, key_lengths=lengths)
    for b, length in enumerate(lengths):
        alone = fastattn.attention(query[b], key[b, :, :length], value[b, :, :length])
        assert_same_bits(together[b], alone)


@pytest.mark.parametrize("kv_dtype", [F16, BF16], ids=str)
def test_a_half_size_cache_keeps_the_precision_of_its_queries(kv_dtype):
    """float32 queries meet keys as they are stored: the error is that of float32."""
    query, key, value = qkv(make_rng(), (1, 8, 2, 1, 3000, 64), (F32, kv_dtype))
    out_tol, _, _ = tolerances(query, key, value)
    assert_close(fastattn.attention(query, key, value), exact(query, key, value), out_tol)
    assert out_tol.max() < 2e-3


@each_dtype
def test_keys_of_any_strides(dtypes):
    rng = make_rng()
    query = normal(rng, (1, 8, 1, 64), dtypes[0])
    packed = normal(rng, (1, 900, 2, 2, 64), dtypes[1])  # (batch, seq, k/v, heads, dim)
    key, value = packed[:, :, 0].swapaxes(1, 2), packed[:, :, 1].swapaxes(1, 2)
    expected = fastattn.attention(query, np.ascontiguousarray(key), np.ascontiguousarray(value))
    assert_same_bits(fastattn.attention(query, key, value), expected)


@each_dtype
@pytest.mark.parametrize(
    "take", [lambda x: x[..., ::2], lambda x: x[..., ::-2], lambda x: x[:, :, ::-1, :64]], ids=["step", "back", "rows"]
)
def test_keys_with_gaps(dtypes, take):
    rng = make_rng()
    query = normal(rng, (1, 8, 1, 64), dtypes[0])
    view = take(normal(rng, (1, 2, 900, 128), dtypes[1]))
    expected = fastattn.attention(query, np.ascontiguousarray(view), np.ascontiguousarray(view))
    out_tol, _, _ = tolerances(query, view, view)
    assert_close(fastattn.attention(query, view, view), expected, 2 * out_tol)
