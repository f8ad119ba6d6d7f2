"""The accuracy promised, as numbers: against a wider oracle, beside the same formula in NumPy at that precision."""

import ml_dtypes
import numpy as np
import pytest
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
    exact,
    formula,
    make_rng,
    normal,
    qkv,
    tolerances,
)

import fastattn

SHAPES = [(1, 4, 4, 128, 128, 64), (1, 2, 1, 65, 517, 128), (2, 4, 1, 1, 1000, 64), (1, 2, 2, 64, 300, 33)]


def largest_error(actual, truth):
    return float(np.max(np.abs(actual.astype(truth.dtype) - truth)))


@pytest.mark.isa
@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_at_most_twice_that_of_numpy(shape, dtypes):
    query, key, value = qkv(make_rng(*shape), shape, dtypes)
    # longdouble has 64 significant bits on x86; where it is only a double, both sides of the bound say so.
    wide = np.longdouble if dtypes[0] == F64 else np.float64
    truth = formula(query, key, value, wide)
    error = largest_error(fastattn.attention(query, key, value), truth)
    bound = 2 * largest_error(formula(query, key, value, dtypes[0]), truth)
    assert error <= bound, f"error {error:.3g}, twice NumPy's is {bound:.3g}"


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("seqlen_q", [1, 64])
def test_error_does_not_grow_with_the_keys(dtype, seqlen_q):
    """Values of one sign, whose sum's roundings do not cancel: NumPy sums pairwise."""
    rng = make_rng()
    query, key = (rng.standard_normal((1, 1, n, 8)).astype(dtype) for n in (seqlen_q, 32768))
    value = rng.random((1, 1, 32768, 8)).astype(dtype)
    truth = formula(query, key, value, np.longdouble)
    error = largest_error(fastattn.attention(query, key, value), truth)
    assert error <= 2 * largest_error(formula(query, key, value, dtype), truth)


@pytest.mark.isa
@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lse_error_at_most_twice_that_of_numpy(shape, dtypes):
    """The lse of half types is float32, and so is NumPy's here; it rounds to half a unit in the last place."""
    query, key, value = qkv(make_rng(*shape), shape, dtypes)
    lse_dtype, wide = (F64, np.longdouble) if dtypes[0] == F64 else (F32, F64)
    group = shape[1] // shape[2]

    def lse_in(dtype):
        q, k = query.astype(dtype), np.repeat(key, group, axis=1).astype(dtype)
        scores = (q @ k.swapaxes(-1, -2)) * np.array(1 / np.sqrt(np.longdouble(shape[5])), dtype)
        largest = scores.max(axis=-1, keepdims=True)
        return (largest + np.log(np.exp(scores - largest).sum(axis=-1, keepdims=True)))[..., 0]

    truth = lse_in(wide)
    _, lse = fastattn.attention(query, key, value, return_lse=True)
    bound = 2 * largest_error(lse_in(lse_dtype), truth) + UNIT[lse_dtype] * float(np.max(np.abs(truth)))
    assert largest_error(lse, truth) <= bound


@pytest.mark.isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_is_good_to_about_1e_15(shape):
    """Relative to Σ w|v|: the mean itself may cancel to nothing.

    Multiply-adds that are fused round once. The baseline rounds twice, so its errors are √2 times as large.
    """
    query, key, value = qkv(make_rng(*shape), shape, (F64, F64))
    truth = formula(query, key, value, np.longdouble)
    error = np.abs(fastattn.attention(query, key, value).astype(np.longdouble) - truth)
    bound = 1.4e-15 if fastattn.show_config(mode="dicts")["isa"] == "baseline" else 1e-15
    assert np.max(error / exact(query, key, np.abs(value))) <= bound


@pytest.mark.isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float16_is_rounded_once(shape):
    """Every element is within half a unit in its last place, and what float32 arithmetic adds."""
    query, key, value = qkv(make_rng(*shape), shape, (F16, F16))
    truth = formula(query, key, value, F64)
    actual = fastattn.attention(query, key, value).astype(F64)
    in_float32, _, _ = tolerances(*(x.astype(F32) for x in (query, key, value)))
    half_unit = np.maximum(UNIT[F16] * np.abs(truth), 2.0**-25)  # 2**-24 is the smallest subnormal
    assert np.all(np.abs(actual - truth) <= half_unit + in_float32)


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
def test_scores_that_rise_by_block(dtypes):
    """The maximum moves in every block of keys, so all that was accumulated is rescaled each time."""
    query, key, value = qkv(make_rng(), (1, 1, 1, 40, 400, 8), dtypes)
    rise = np.repeat(np.arange(50.0), 8)
    for bias in (rise, -rise, rise * (-1) ** np.arange(400)):
        bias = bias.astype(F32)
        expected, lse = exact(query, key, value, bias=bias, return_lse=True)
        out_tol, lse_tol, _ = tolerances(query, key, value, bias=bias)
        actual, actual_lse = fastattn.attention(query, key, value, bias=bias, return_lse=True)
        assert_close(actual, expected, out_tol)
        assert_close(actual_lse, lse, lse_tol, "lse")


@pytest.mark.isa
@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
def test_huge_scores_pick_one_key(dtypes):
    """Scores far beyond what exp can take: the largest one has weight exactly 1."""
    # Their product, times four, stays within float32.
    large_query = {F16: 2.0**15, F64: 2.0**500}.get(dtypes[0], 2.0**61)
    large_key = {F16: 2.0**15, F64: 2.0**500}.get(dtypes[1], 2.0**63)
    for sign in (1.0, -1.0):
        for winner in (0, 63, 64, 99):
            key = np.full((100, 4), -sign * large_key).astype(dtypes[1])
            key[winner] = sign * large_key
            query = np.full((20, 4), sign * large_query).astype(dtypes[0])
            value = normal(make_rng(winner), (100, 6), dtypes[1])
            out, lse, weights = fastattn.attention(query, key, value, scale=0.25, return_lse=True, return_weights=True)
            np.testing.assert_array_equal(out, np.broadcast_to(value[winner].astype(dtypes[0]), out.shape))
            np.testing.assert_array_equal(weights.argmax(axis=-1), winner)
            np.testing.assert_array_equal(weights.astype(F64).sum(axis=-1), 1.0)
            expected = float(query[0, 0]) * float(key[winner, 0])
            # Four equal powers of two add exactly; the base changes twice, two roundings each.
            np.testing.assert_allclose(lse.astype(F64), expected, rtol=8 * UNIT[lse.dtype])


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
def test_very_negative_scores_do_not_underflow(dtypes):
    query, key, value = qkv(make_rng(), (1, 2, 2, 9, 70, 8), dtypes)
    bias = np.array(-30000.0, F32)
    plain, lse = fastattn.attention(query, key, value, return_lse=True)
    shifted, shifted_lse = fastattn.attention(query, key, value, bias=bias, return_lse=True)
    out_tol, lse_tol, _ = tolerances(query, key, value, bias=bias)
    assert_close(shifted, plain, 2 * out_tol)
    np.testing.assert_array_less(np.abs((shifted_lse - bias) - lse), lse_tol * 2)


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
def test_tiny_scores_average_the_values(dtypes):
    query, key, value = qkv(make_rng(), (1, 1, 1, 5, 64, 8), dtypes)
    tiny = 1e-6 if dtypes[1] == F16 else 1e-25
    query, key = (query.astype(F64) * tiny).astype(dtypes[0]), (key.astype(F64) * tiny).astype(dtypes[1])
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    mean = value.astype(F64).mean(axis=-2, keepdims=True)
    out_tol, _, _ = tolerances(query, key, value)
    assert np.all(np.abs(out.astype(F64) - mean) <= out_tol)
    np.testing.assert_allclose(lse, np.log(64), rtol=1e-6)


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
def test_scale_zero_and_negative(dtypes):
    query, key, value = qkv(make_rng(), (1, 2, 2, 5, 70, 16), dtypes)
    out = fastattn.attention(query, key, value, scale=0.0).astype(F64)
    out_tol, _, _ = tolerances(query, key, value, scale=0.0)
    assert np.all(np.abs(out - value.astype(F64).mean(axis=-2, keepdims=True)) <= out_tol)
    negative = fastattn.attention(query, key, value, scale=-0.3)
    out_tol, _, _ = tolerances(query, key, value, scale=-0.3)
    assert_close(negative, exact(query, (-key).astype(key.dtype), value, scale=0.3), out_tol)


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("scale", [1e-60, -1e-320])
def test_scale_below_the_precision(dtypes, scale):
    """It vanishes in float32, where it must become 0, and a masked score must stay masked."""
    query, key, value = qkv(make_rng(), (1, 2, 2, 5, 70, 16), dtypes)
    keywords = {"scale": scale, "causal": True}
    out_tol, _, _ = tolerances(query, key, value, **keywords)
    assert_close(fastattn.attention(query, key, value, **keywords), exact(query, key, value, **keywords), out_tol)


def test_half_output_overflows_to_infinity_only_past_its_range():
    """The sum that is not yet divided by the weights' sum passes float16's range, but it is held in float32."""
    largest = float(ml_dtypes.finfo(F16).max)
    out = fastattn.attention(np.zeros((1, 4), F16), np.zeros((4, 4), F16), np.full((4, 2), largest, F16))
    np.testing.assert_array_equal(out.astype(F64), largest)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("size", [1e10, 1e15, 1e30])
def test_scores_so_large_that_their_rounding_matters(dtype, size):
    """The largest score wins, whatever multiplying it by log2(e) would round away."""
    keys = make_rng().permutation(np.linspace(0.0, 1.0, 100)).astype(dtype)[:, None]
    value = np.arange(100, dtype=dtype)[:, None]
    out, lse = fastattn.attention(np.full((1, 1), size, dtype), keys, value, scale=1.0, return_lse=True)
    assert out[0, 0] == np.argmax(keys)
    assert lse[0] == dtype.type(size)


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("bias_dtype", [F32, F64], ids=str)
def test_the_least_finite_bias_hides_nothing(dtypes, bias_dtype):
    """Padding is often written so: on a whole row it leaves the uniform mean."""
    query, key, value = qkv(make_rng(), (1, 2, 2, 3, 40, 8), dtypes)
    bias = np.full((3, 40), np.finfo(bias_dtype).min, bias_dtype)
    out_tol, _, _ = tolerances(query, key, value, scale=0.0)
    out = fastattn.attention(query, key, value, bias=bias).astype(F64)
    assert np.all(np.abs(out - value.astype(F64).mean(axis=-2, keepdims=True)) <= out_tol)


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("sink", [np.nan, np.inf])
def test_a_sink_that_is_no_number_is_not_passed_over(dtypes, sink):
    query, key, value = qkv(make_rng(), (1, 2, 2, 3, 40, 8), dtypes)
    out, lse = fastattn.attention(query, key, value, sinks=[0.0, sink], return_lse=True)
    assert np.isfinite(out[:, 0].astype(F64)).all()
    assert np.isnan(out[:, 1].astype(F64)).all()
    assert not np.isfinite(lse[:, 1]).any()


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("softcap", [1e-50, 1e-40, 1e39, 1e300])
def test_softcaps_beyond_the_precision(dtypes, softcap):
    """Next to nothing: equal weights. More than any score: no cap at all."""
    query, key, value = qkv(make_rng(), (1, 2, 2, 3, 40, 8), dtypes)
    query[..., 0, :] = 0  # scores of 0, which times infinity would be NaN
    same = {"scale": 0.0} if softcap < 1 else {}
    out_tol, _, _ = tolerances(query, key, value)
    assert_close(fastattn.attention(query, key, value, softcap=softcap), exact(query, key, value, **same), out_tol)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [F32, F64], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("seqlen_q", [1, 4000], ids=["decode", "wide"])
def test_softcap_keeps_the_relative_accuracy_of_any_score(dtype, seqlen_q):
    """The lse of one key is its score, capped. Far from 0 and near it are computed differently; lanes of one vector
    may be on both sides. The bound: some eight roundings."""
    magnitudes = np.concatenate([np.geomspace(1e-20, 100, 2000), np.linspace(0.74, 0.76, 2000)])
    scores = (magnitudes * make_rng().choice([-1, 1], 4000)).astype(dtype)
    for order in (np.arange(4000), make_rng(1).permutation(4000)):
        query = scores[order].reshape(4000 // seqlen_q, 1, seqlen_q, 1)
        key = np.ones((1, 1, 1, 1), dtype)
        _, lse = fastattn.attention(query, key, key, scale=1.0, softcap=3.0, return_lse=True)
        expected = 3 * np.tanh(query[..., 0].astype(np.longdouble) / 3)
        np.testing.assert_allclose(lse, expected, rtol=8 * UNIT[dtype])


@pytest.mark.parametrize("seqlen_q", [1, 40], ids=["decode", "wide"])
@pytest.mark.parametrize(
    ("dtype", "huge", "tiny", "cap"), [(F32, 1e8, 1e-16, 1e30), (F64, 1e15, 1e-30, 1e300)], ids=["float32", "float64"]
)
def test_scale_over_softcap_beyond_the_precision(dtype, huge, tiny, cap, seqlen_q):
    """Scale and cap are normal numbers, and their quotient is not. The cap rounds scores of up to 4 some eight times,
    and that, as a relative error, twice: above the line of the softmax and below it."""
    query = np.full((1, 1, seqlen_q, 1), huge, dtype)
    key = huge * np.arange(1, 5, dtype=dtype).reshape(1, 1, 4, 1)
    value = np.eye(4, dtype=dtype)[None, None]
    out = fastattn.attention(query, key, value, scale=tiny, softcap=cap)
    plain = fastattn.attention(query, key, value, scale=tiny)
    np.testing.assert_allclose(out, plain, rtol=2 * 8 * 4 * UNIT[dtype])
    assert plain[0, 0, 0, 3] > 0.6


# Scores that grow along the keys, or are far apart: what the reference of a row's exponentials has to follow. In tiles
# of many rows, over several blocks of keys, and in a decode tile.
@pytest.mark.isa
@pytest.mark.parametrize("rows", [3, 40, 150])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16)], ids=str)
@pytest.mark.parametrize("kind", ["left padding", "all padding", "rising", "rising by leaps", "one far above"])
def test_scores_far_apart_by_a_bias(kind, dtypes, rows):
    query, key, value = qkv(make_rng(), (1, 2, 2, rows, 300, 64), dtypes)
    lowest = np.finfo(F32).min
    bias = {
        "left padding": np.where(np.arange(300) < 130, lowest, 0),
        "all padding": np.full(300, lowest),
        "rising": np.arange(300) * 0.7,
        "rising by leaps": np.arange(300) // 64 * 60.0,
        "one far above": np.where(np.arange(300) == 170, 200.0, 0),
    }[kind].astype(F32)
    if "padding" in kind:
        check_out(query, key, value, bias)
    else:
        check(query, key, value, bias=bias)


def check_out(query, key, value, bias):
    """Against the reference without the keys at the lowest number, or, where all are, with the mean of the values."""
    seen = bias > np.finfo(F32).min
    seen = seen if seen.any() else ~seen
    scale = None if (bias == 0).any() else 0.0
    out, weights = fastattn.attention(query, key, value, bias=bias, return_weights=True)
    keys, values = key[..., seen, :], value[..., seen, :]
    expected = exact(query, keys, values, scale=scale)
    out_tol, _, _ = tolerances(query, keys, values, scale=scale)
    assert_close(out, expected, out_tol)
    assert not weights[..., ~seen].any()


@pytest.mark.isa
@pytest.mark.parametrize("scale", [1e6, 1e9, 1e20, 1e36])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16)], ids=str)
def test_huge_scales_pick_the_largest_score(dtypes, scale):
    query, key, value = qkv(make_rng(), (1, 1, 1, 40, 256, 64), dtypes)
    out = fastattn.attention(query, key, value, scale=scale)
    largest = (query.astype(F64) @ key.astype(F64).swapaxes(-1, -2)).argmax(axis=-1)
    np.testing.assert_array_equal(out, np.take_along_axis(value, largest[..., None], axis=-2))


@pytest.mark.isa
@pytest.mark.parametrize("rows", [2, 40])
def test_large_values_under_rising_scores_do_not_overflow(rows):
    query, key, _ = qkv(make_rng(), (1, 1, 1, rows, 256, 64), (BF16, BF16))
    value = np.full(key.shape, 1e34, BF16)
    for rise in (5.0, 12.0, 16.0, 40.0):
        out = fastattn.attention(query, key, value, bias=np.where(np.arange(256) < 64, 0.0, rise).astype(F32))
        np.testing.assert_allclose(out.astype(F64), np.float64(value[0, 0, 0, 0]), rtol=2**-8)


@pytest.mark.isa
@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
def test_values_without_columns(dtypes):
    query, key, value = qkv(make_rng(), (1, 2, 2, 64, 512, 64), dtypes)
    _, lse = fastattn.attention(query, key, value, return_lse=True)
    out, alone = fastattn.attention(query, key, value[..., :0], return_lse=True)
    assert out.shape == (1, 2, 64, 0)
    np.testing.assert_array_equal(alone, lse)
