"""What hides a key, in every way there is, hides it wholly: NaN and infinity behind it never show."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from oracle import (
    BF16,
    DTYPE_IDS,
    DTYPES,
    F16,
    F32,
    F64,
    UNIT,
    assert_close,
    check,
    check_planted,
    exact,
    make_rng,
    normal,
    qkv,
    tolerances,
)
from strategies import cases

import fastattn
from fastattn import reference

each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)

# What broadcasts to (2, 4, 21, 70).
BROADCAST = sorted(
    {shape[4 - rank :] for rank in range(5) for shape in itertools.product((2, 1), (4, 1), (21, 1), (70, 1))}
)


def hiding(way, seqlen_q, seqlen_k, hidden):
    """Keywords that hide the given keys from every row, in one way."""
    seen = ~np.isin(np.arange(seqlen_k), hidden)
    return {
        "mask": {"mask": seen},
        "mask per row": {"mask": np.broadcast_to(seen, (1, 1, seqlen_q, seqlen_k)).copy()},
        "bias": {"bias": np.where(seen, F32.type(0.5), F32.type(-np.inf))},
        "bias per row": {"bias": np.broadcast_to(np.where(seen, 0.5, -np.inf), (seqlen_q, seqlen_k)).astype(F16)},
    }[way]


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("way", ["mask", "mask per row", "bias", "bias per row"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("seqlen_q", [1, 4, 37])
def test_planted_under_masks(dtypes, way, bad, seqlen_q):
    hidden = [0, 3, 17, 63, 64, 90, 99]
    clean = qkv(make_rng(seqlen_q), (2, 4, 2, seqlen_q, 100, 20), dtypes)
    planted = [x.copy() for x in clean]
    planted[1][..., hidden, :] = bad
    planted[2][..., hidden, :] = bad
    out, lse, weights = check_planted(clean, planted, **hiding(way, seqlen_q, 100, hidden))
    assert np.isfinite(out.astype(F64)).all()
    assert np.isfinite(lse).all()
    assert (weights[..., hidden].astype(F64) == 0).all()


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("seqlen_q", [1, 4, 37])
def test_planted_past_key_lengths(dtypes, bad, seqlen_q):
    clean = qkv(make_rng(seqlen_q), (3, 4, 2, seqlen_q, 100, 20), dtypes)
    lengths = np.array([65, 100, 1])
    planted = [x.copy() for x in clean]
    for b, length in enumerate(lengths):
        planted[1][b, :, length:] = bad
        planted[2][b, :, length:] = bad
    out, _, _ = check_planted(clean, planted, key_lengths=lengths)
    assert np.isfinite(out.astype(F64)).all()
    check_planted(clean, planted, key_lengths=lengths, causal=True)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize(
    "keywords", [{"causal": True}, {"window": (5, 2)}, {"window": (20, 0), "query_offset": 30}], ids=str
)
@pytest.mark.parametrize("planted_in", ["key", "value"])
@pytest.mark.parametrize("n", [15, 16, 40, 64, 69])
def test_some_rows_see_the_nan_and_some_do_not(dtypes, keywords, planted_in, n):
    """A row on the seeing side is NaN; its neighbour in the same tile is untouched."""
    clean = qkv(make_rng(), (1, 2, 1, 70, 70, 20), dtypes)
    planted = [x.copy() for x in clean]
    planted[1 if planted_in == "key" else 2][0, 0, n, 3] = np.nan
    out, _, _ = check_planted(clean, planted, **keywords)
    nan_rows = np.isnan(out.astype(F64)).any(axis=-1)
    assert nan_rows.any()
    assert not nan_rows.all()


@each_dtype
def test_masked_per_row_with_infinite_values(dtypes):
    """Different rows of one tile hide different keys; an infinite value reaches only rows that see it."""
    rng = make_rng()
    clean = qkv(rng, (1, 2, 2, 33, 66, 12), dtypes)
    mask = rng.random((33, 66)) < 0.5
    planted = [x.copy() for x in clean]
    planted[2][..., 10, 4] = np.inf
    planted[2][..., 50, 5] = -np.inf
    planted[2][..., 65, 6] = np.nan
    check_planted(clean, planted, mask=mask)


@each_dtype
def test_a_score_of_minus_infinity_hides_the_key_however_it_came_about(dtypes):
    clean = qkv(make_rng(), (1, 2, 2, 20, 70, 12), dtypes)
    clean[0][..., 0] = 1.0
    planted = [x.copy() for x in clean]
    planted[1][..., 40, :] = 0.0
    planted[1][..., 40, 0] = -np.inf
    planted[2][..., 40, 5] = np.nan
    # The other products with this key are 0, so its score is -inf in every row.
    out, _, weights = check_planted(clean, planted)
    assert np.isfinite(out.astype(F64)).all()
    assert (weights[..., 40].astype(F64) == 0).all()


@each_dtype
@pytest.mark.parametrize("seqlen_q", [1, 3, 40])
def test_visible_nan_makes_the_row_nan(dtypes, seqlen_q):
    query, key, value = qkv(make_rng(), (1, 2, 2, seqlen_q, 70, 16), dtypes)
    query[0, 1, seqlen_q - 1, 2] = np.nan
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    nan_rows = np.isnan(out.astype(F64))
    assert nan_rows[0, 1, -1].all()
    assert np.isnan(lse[0, 1, -1])
    assert nan_rows.sum() == out.shape[-1]


@each_dtype
def test_visible_infinite_score_makes_the_row_nan(dtypes):
    """inf - inf in the softmax, as in NumPy."""
    query, key, value = qkv(make_rng(), (1, 1, 1, 5, 70, 16), dtypes)
    bias = np.zeros((5, 70), F32)
    bias[2, 33] = np.inf
    out = fastattn.attention(query, key, value, bias=bias).astype(F64)
    assert np.isnan(out[0, 0, 2]).all()
    assert np.isfinite(np.delete(out, 2, axis=2)).all()


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 2, 50])
@pytest.mark.parametrize("way", ["mask", "bias", "window"])
def test_fully_masked_rows(dtypes, sinks, seqlen_q, way):
    query, key, value = qkv(make_rng(), (2, 2, 1, seqlen_q, 70, 16), dtypes)
    sink = np.array([0.5, -2.0], F32) if sinks else None
    row = seqlen_q // 2
    mask = np.ones((seqlen_q, 70), bool)
    mask[row] = False
    keywords = {
        "mask": {"mask": mask},
        "bias": {"bias": np.where(mask, F32.type(0), F32.type(-np.inf))},
        "window": {"window": (0, 0), "query_offset": 70 - row},
    }[way]
    out, lse, weights = check(query, key, value, sinks=sink, **keywords)
    assert (out[..., row, :].astype(F64) == 0).all()
    assert (weights[..., row, :].astype(F64) == 0).all()
    expected = np.array(sink if sinks else -np.inf, F32)
    np.testing.assert_array_equal(lse[..., row], np.broadcast_to(expected, lse[..., row].shape))


@each_dtype
@pytest.mark.parametrize(
    "keywords",
    [
        {"key_lengths": 0},
        {"mask": np.zeros((), bool)},
        {"bias": np.array(-np.inf, F32)},
        {"causal": True, "query_offset": -70},
        {"window": (3, 3), "query_offset": 1000},
        {"window": (3, 3), "query_offset": -(2**40)},
    ],
    ids=str,
)
def test_no_keys_at_all(dtypes, keywords):
    query, key, value = qkv(make_rng(), (2, 2, 2, 5, 70, 16), dtypes)
    out, lse, _ = check(query, key, value, **keywords)
    assert (out.astype(F64) == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("sinks_dtype", [F16, BF16, F32, F64], ids=lambda dtype: dtype.name)
def test_sinks_of_any_real_dtype(sinks_dtype):
    query, key, value = qkv(make_rng(), (2, 4, 2, 9, 30, 16))
    check(query, key, value, sinks=np.array([-1.0, 0.0, 2.0, 30.0], sinks_dtype))


def test_sink_of_minus_infinity_is_none():
    query, key, value = qkv(make_rng(), (1, 2, 2, 9, 30, 16))
    sinks = np.array([-np.inf, 1.0], F32)
    out = fastattn.attention(query, key, value, sinks=sinks)
    out_tol, _, _ = tolerances(query, key, value)
    assert_close(out[:, 0], exact(query, key, value)[:, 0], out_tol[:, 0])


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("shape", BROADCAST, ids=str)
def test_every_broadcast_of_mask_and_bias(dtypes, shape):
    """Any rank up to 4, and axes of size 1 anywhere, the last included."""
    rng = make_rng()
    query, key, value = qkv(rng, (2, 4, 2, 21, 70, 12), dtypes)
    check(query, key, value, mask=rng.random(shape) < 0.7)
    check(query, key, value, bias=normal(rng, shape, F32))


@pytest.mark.parametrize("bias_dtype", [F16, BF16, F32, F64], ids=lambda dtype: dtype.name)
@each_dtype
@pytest.mark.parametrize("shape", [(2, 1, 21, 70), (1, 4, 1, 70), (21, 1)], ids=str)
def test_bias_dtypes(dtypes, bias_dtype, shape):
    rng = make_rng()
    query, key, value = qkv(rng, (2, 4, 2, 21, 70, 12), dtypes)
    check(query, key, value, bias=normal(rng, shape, bias_dtype))


@each_dtype
@pytest.mark.parametrize(
    "take",
    [
        lambda x: x[:, :, ::2, ::2],
        lambda x: x[::-1, ::-1, 20::-1, 69::-1],
        lambda x: np.ascontiguousarray(x[:, :, :21, :70].swapaxes(-1, -2)).swapaxes(-1, -2),
        lambda x: np.broadcast_to(x[:, :, :1, :70], (2, 4, 21, 70)),
        lambda x: np.broadcast_to(x[:1, :1, :21, :1], (2, 4, 21, 70)),
    ],
)
def test_mask_and_bias_strides(dtypes, take):
    rng = make_rng()
    query, key, value = qkv(rng, (2, 4, 2, 21, 70, 12), dtypes)
    mask, bias = rng.random((2, 4, 42, 140)) < 0.7, normal(rng, (2, 4, 42, 140), F32)
    check(query, key, value, mask=take(mask))
    check(query, key, value, bias=take(bias))
    check(query, key, value, mask=take(mask), bias=take(bias))


@each_dtype
@pytest.mark.parametrize(
    "window",
    [(0, 0), (7, 0), (0, 7), (None, 3), (16, None), (64, 64), (None, None), (1000, 1000), (2**62, 2**62)],
    ids=str,
)
def test_window_composes_with_everything(dtypes, window):
    rng = make_rng()
    query, key, value = qkv(rng, (2, 4, 2, 70, 90, 12), dtypes)
    mask, bias = rng.random((70, 90)) < 0.7, normal(rng, (4, 1, 90), F32)
    check(query, key, value, window=window)
    check(query, key, value, window=window, causal=True, mask=mask)
    check(query, key, value, window=window, bias=bias, query_offset=np.array([-3, 50]), softcap=3.0)
    check(query, key, value, window=window, key_lengths=np.array([90, 31]), causal=True)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("left", [1, 2, 15])
@pytest.mark.parametrize("right", [0, 3, 16, 30])
@pytest.mark.parametrize(
    "modifiers", ["", "softcap", "softcap, bias", "softcap, alibi_slopes", "softcap, mask", "bias"]
)
def test_intervals_that_begin_and_end_at_any_key(dtypes, left, right, modifiers):
    """Twenty heads at one position make a tile whose interval no row cuts; its keys are read in pairs, or more."""
    rng = make_rng()
    query, key, value = qkv(rng, (1, 20, 1, 1, 90, 12), dtypes)
    values = {
        "softcap": 0.5,
        "bias": normal(rng, (20, 1, 90), F32) - 1000,
        "alibi_slopes": np.full(20, 2.0),
        "mask": rng.random((20, 1, 90)) < 0.7,
    }
    keywords = {name: values[name] for name in modifiers.split(", ") if name}
    check(query, key, value, window=(left, right), query_offset=50, **keywords)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("seqlen_k", [1, 31, 33, 65, 100])
def test_scores_far_below_those_of_rows_that_are_not_there(dtypes, seqlen_k):
    """A panel has whole rows of keys; those that are not there must not count as scores of 0. The products
    are exact; scale, logarithm and sum round a few times, in float32 at the least."""
    query, key = np.full((1, 1, 20, 32), 10, dtypes[0]), np.full((1, 1, seqlen_k, 32), -10, dtypes[1])
    out, lse, _ = fastattn.attention(query, key, np.ones_like(key), return_lse=True, return_weights=True)
    assert (out == 1).all()
    np.testing.assert_allclose(lse.astype(F64), np.log(seqlen_k) - 3200 / np.sqrt(32), rtol=8 * UNIT[F32])


@pytest.mark.parametrize("bound", [2**31, 2**62, 2**63 - 1])
@pytest.mark.parametrize(
    "keywords",
    [
        lambda bound: {"window": (bound, bound)},
        lambda bound: {"window": (bound, 0), "query_offset": 5},
        lambda bound: {"window": (0, bound), "query_offset": -5},
        lambda bound: {"window": (bound, 3), "query_offset": 2**50},
        lambda bound: {"window": (bound, 3), "query_offset": -(2**50)},
    ],
)
def test_bounds_beyond_every_key(bound, keywords):
    check(*qkv(make_rng(), (1, 2, 2, 9, 20, 8)), **keywords(bound))


@pytest.mark.parametrize("offset", [2**50, -(2**50)])
def test_offsets_beyond_every_key(offset):
    check(*qkv(make_rng(), (1, 2, 2, 9, 20, 8)), causal=True, query_offset=offset)


@each_dtype
@pytest.mark.parametrize(
    "of",
    [lambda slopes: slopes[0].astype(F32), lambda slopes: slopes.astype(F32), lambda slopes: slopes[:, :1],
     lambda slopes: slopes[0].astype(F16)],
)  # fmt: skip
def test_alibi_shapes(dtypes, of):
    rng = make_rng()
    query, key, value = qkv(rng, (2, 4, 2, 20, 40, 12), dtypes)
    alibi_slopes = of(2.0 ** -np.arange(1.0, 9.0).reshape(2, 4))
    check(query, key, value, alibi_slopes=alibi_slopes)
    check(query, key, value, alibi_slopes=alibi_slopes, query_offset=np.array([0, 100]), causal=True)


LENGTHS = np.array([[3, 20, 0], [7, 1, 19]])


@pytest.mark.parametrize(
    "numbers",
    [LENGTHS, LENGTHS[0], LENGTHS[:, :1], 7, np.int32(7), LENGTHS.astype(np.uint8), LENGTHS[:, ::-1]],
    ids=lambda x: f"{np.asarray(x).dtype}{np.shape(x)}",
)
def test_per_batch_arguments_of_every_shape(numbers):
    query, key, value = qkv(make_rng(), (6, 2, 2, 5, 20, 8))
    query, key, value = (x.reshape(2, 3, *x.shape[1:]) for x in (query, key, value))
    check(query, key, value, key_lengths=numbers)
    check(query, key, value, query_offset=numbers, causal=True)
    check(query, key, value, query_offset=numbers, key_lengths=numbers, causal=True)


@settings(max_examples=100)
@given(case=cases())
def test_hidden_bits_never_matter(case):
    """Whatever any call hides from every row may be NaN: the result keeps its bits."""
    # Of the layout of what is compared: where keys are strided, their products are summed in another order.
    key, value = np.ascontiguousarray(case.key), np.ascontiguousarray(case.value)
    outcome = fastattn.attention(case.query, key, value, **case.keywords)
    # Alike scores, of which none is so low that its weight is 0 without being hidden.
    level = {name: x for name, x in case.keywords.items() if name not in ("softcap", "alibi_slopes", "sinks")}
    if level.get("bias") is not None:
        level["bias"] = np.where(np.isneginf(level["bias"].astype(np.float64)), -np.inf, 0.0)
    _, weights = exact(case.query, case.key, case.value, **level | {"scale": 0.0}, return_weights=True)
    if weights.size == 0:
        return
    group = case.query.shape[-3] // case.key.shape[-3] if case.query.ndim > 2 else 1
    unseen = (weights == 0).all(axis=-2)  # (..., H, Sk)
    if case.query.ndim > 2:
        unseen = unseen.reshape(*unseen.shape[:-2], -1, group, unseen.shape[-1]).all(axis=-2)
    planted = []
    for x in (key, value):
        # A key shared by several batches is hidden only if it is so from each of them.
        extra = tuple(range(unseen.ndim - (x.ndim - 1)))
        hidden = unseen.all(axis=extra)
        shared = tuple(i for i, n in enumerate(x.shape[:-1]) if n == 1 and hidden.shape[i] > 1)
        hidden = hidden.all(axis=shared, keepdims=True)
        planted.append(np.ascontiguousarray(np.where(hidden[..., None], np.array(np.nan, x.dtype), x)))
    again = fastattn.attention(case.query, *planted, **case.keywords)
    np.testing.assert_array_equal(again, outcome)


@pytest.mark.isa
@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("seqlen_q", [1, 70])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scale_zero_times_what_is_not_finite(dtypes, seqlen_q, bad):
    query, key, value = qkv(make_rng(), (1, 1, 1, seqlen_q, 40, 32), dtypes)
    query[0, 0, 0, 5] = bad
    out = fastattn.attention(query, key, value, scale=0.0).astype(np.float64)
    assert np.isnan(out[0, 0, 0]).all()
    assert np.isfinite(out[0, 0, 1:]).all()


@pytest.mark.parametrize(
    ("query_offset", "window"), [(2**60, (2**63 - 1, 0)), (-(2**60), (0, 2**63 - 1)), (2**60, (2**60 - 3, None))]
)
def test_windows_as_wide_as_the_farthest_positions(query_offset, window):
    query, key, value = qkv(make_rng(), (1, 1, 1, 4, 9, 8))
    out = fastattn.attention(query, key, value, query_offset=query_offset, window=window)
    truth = reference.attention(query, key, value, query_offset=query_offset, window=window)
    np.testing.assert_allclose(out, truth, atol=1e-5)
