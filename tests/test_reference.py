"""The reference itself, against cases computed by hand and against loops that follow the definition word for word."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from oracle import F64, make_rng
from strategies import cases

from fastattn import reference

E = math.e


def one_head(scores, values=(1.0, 10.0, 100.0), **keywords):
    """Attention of one query row whose scores are given: D = 1, query 1, scale 1."""
    key = np.array(scores, np.float64)[:, None]
    value = np.array(values[: len(scores)], np.float64)[:, None]
    keywords = {"scale": 1.0, "return_lse": True, "return_weights": True, **keywords}
    out, lse, weights = reference.attention(np.ones((1, 1)), key, value, **keywords)
    return out[0, 0], lse[0], weights[0]


def test_two_keys_by_hand():
    out, lse, weights = one_head([0.0, math.log(3.0)])
    np.testing.assert_allclose(weights, [0.25, 0.75], rtol=1e-15)
    assert out == pytest.approx(0.25 * 1 + 0.75 * 10, rel=1e-15)
    assert lse == pytest.approx(math.log(4.0), rel=1e-15)


def test_default_scale_is_one_over_root_head_dim():
    query, key, value = np.ones((1, 4)), np.array([[0.0] * 4, [1.0] * 4]), np.array([[0.0], [1.0]])
    # The scores are 0 and 4/√4 = 2.
    assert reference.attention(query, key, value)[0, 0] == pytest.approx(E**2 / (1 + E**2), rel=1e-15)


def test_softcap_comes_before_bias():
    _, _, weights = one_head([100.0, 0.0], softcap=2.0, bias=[[0.0, 1.0]])
    # Capped: 2 tanh(50) = 2 and 0; then the bias makes them 2 and 1.
    assert weights[0] == pytest.approx(E / (1 + E), rel=1e-14)


def test_sink_is_neither_scaled_nor_capped_and_adds_no_value():
    query, key, value = np.ones((1, 1)), np.zeros((1, 1)), np.ones((1, 1))
    out, lse, weights = reference.attention(
        query, key, value, scale=0.1, softcap=1.0, sinks=[math.log(3.0)], return_lse=True, return_weights=True
    )
    assert out[0, 0] == pytest.approx(0.25, rel=1e-15)
    assert weights[0, 0] == pytest.approx(0.25, rel=1e-15)
    assert lse[0] == pytest.approx(math.log(4.0), rel=1e-15)


def test_alibi_falls_with_distance():
    # The query is at the last key's position, 2, so the distances are 2, 1, 0.
    _, _, weights = one_head([0.0, 0.0, 0.0], alibi_slopes=[0.5])
    expected = np.exp([-1.0, -0.5, 0.0])
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-15)


def seen(seqlen_q, seqlen_k, **keywords):
    """Which keys have weight, as rows of 0 and 1."""
    query, key, value = np.zeros((seqlen_q, 1)), np.zeros((seqlen_k, 1)), np.zeros((seqlen_k, 1))
    _, weights = reference.attention(query, key, value, return_weights=True, **keywords)
    return (weights > 0).astype(int).tolist()


def test_causal_aligns_the_last_query_with_the_last_key():
    assert seen(2, 4, causal=True) == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert seen(3, 2, causal=True) == [[0, 0], [1, 0], [1, 1]]
    assert seen(2, 4, causal=True, query_offset=0) == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert seen(2, 4, causal=True, key_lengths=3) == [[1, 1, 0, 0], [1, 1, 1, 0]]


def test_window_bounds_are_inclusive():
    assert seen(3, 3, window=(1, 0)) == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert seen(3, 3, window=(None, 1)) == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert seen(3, 3, window=(0, None)) == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    assert seen(3, 3, window=(1, 1), causal=True) == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_query_offset_and_key_lengths_per_batch():
    query, key = np.zeros((2, 1, 1, 1)), np.zeros((2, 1, 3, 1))
    _, weights = reference.attention(
        query, key, key, causal=True, query_offset=[0, 2], key_lengths=[3, 2], return_weights=True
    )
    assert (weights[:, 0, 0] > 0).tolist() == [[True, False, False], [True, True, False]]


@pytest.mark.parametrize(
    "keywords", [{"mask": [[False, False]]}, {"bias": [[-np.inf, -np.inf]]}, {"key_lengths": 0}], ids=str
)
def test_a_row_without_keys(keywords):
    out, lse, weights = one_head([1.0, 2.0], **keywords)
    assert (out, lse, weights.tolist()) == (0.0, -np.inf, [0.0, 0.0])
    out, lse, weights = one_head([1.0, 2.0], sinks=[0.5], **keywords)
    assert (out, lse, weights.tolist()) == (0.0, 0.5, [0.0, 0.0])
    out, lse, weights = one_head([])
    assert (out, lse, weights.tolist()) == (0.0, -np.inf, [])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "keywords", [{"mask": [[True, False]]}, {"bias": [[0.0, -np.inf]]}, {"key_lengths": 1}], ids=str
)
def test_masked_key_contributes_nothing(bad, keywords):
    out, lse, weights = one_head([1.0, bad], values=(3.0, bad), **keywords)
    assert (out, lse, weights.tolist()) == (3.0, 1.0, [1.0, 0.0])


def test_visible_nan_and_inf_spread_as_in_ieee_arithmetic():
    assert np.isnan(one_head([1.0, np.nan])[0])
    assert np.isnan(one_head([1.0, np.inf])[0])
    assert one_head([1.0, -np.inf])[0] == 1.0
    assert one_head([1.0, 1.0], values=(1.0, np.inf))[0] == np.inf
    assert np.isnan(one_head([1.0, 1.0], values=(-np.inf, np.inf))[0])


def test_out_is_filled_and_returned():
    query, key, value = np.ones((2, 3)), np.ones((4, 3)), np.ones((4, 5))
    out = np.zeros((2, 5))
    assert reference.attention(query, key, value, out=out) is out
    np.testing.assert_array_equal(out, 1.0)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_rounds_once_to_the_dtype_of_query(dtype):
    rng = make_rng()
    query, key, value = (rng.standard_normal((2, 3, 4)).astype(dtype) for _ in range(3))
    out, lse = reference.attention(query, key, value, return_lse=True)
    wide, wide_lse = reference.attention(*(x.astype(F64) for x in (query, key, value)), return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == np.float32
    assert wide_lse.dtype == F64
    np.testing.assert_array_equal(out, wide.astype(dtype))


def by_loops(query, key, value, *, scale=None, causal=False, query_offset=None, window=None, mask=None, bias=None,
             alibi_slopes=None, softcap=None, sinks=None, key_lengths=None, num_threads=None):  # fmt: skip
    """The definition, one number at a time."""
    if query.ndim == 2:
        query, key, value = query[None], key[None], value[None]
    batch = np.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    (heads, seqlen_q, head_dim), (kv_heads, seqlen_k, head_dim_v) = query.shape[-3:], value.shape[-3:]
    out = np.zeros((*batch, heads, seqlen_q, head_dim_v))
    query, key, value = (np.broadcast_to(x, batch + x.shape[-3:]).astype(np.float64) for x in (query, key, value))
    mask = np.broadcast_to(True if mask is None else mask, (*batch, heads, seqlen_q, seqlen_k))
    bias = np.broadcast_to(0.0 if bias is None else bias, mask.shape).astype(np.float64)
    slopes = np.broadcast_to(0.0 if alibi_slopes is None else alibi_slopes, (*batch, heads))
    lengths = np.broadcast_to(seqlen_k if key_lengths is None else key_lengths, batch)
    offsets = np.broadcast_to(lengths - seqlen_q if query_offset is None else query_offset, batch)
    left, right = window or (None, None)
    for *b, h, m in np.ndindex(*batch, heads, seqlen_q):
        b = tuple(b)
        n_head = h // (heads // kv_heads)
        p = m + int(offsets[b])
        terms = {}
        for n in range(int(lengths[b])):
            s = math.fsum(query[(*b, h, m)] * key[(*b, n_head, n)])
            s *= 1 / math.sqrt(head_dim or 1) if scale is None else scale
            s = s if softcap is None else softcap * math.tanh(s / softcap)
            s += bias[(*b, h, m, n)] - float(slopes[(*b, h)]) * abs(p - n)
            hidden = not mask[(*b, h, m, n)] or s == -math.inf
            hidden |= (causal and n > p) or (left is not None and n < p - left) or (right is not None and n > p + right)
            if not hidden:
                terms[n] = s
        sink = [] if sinks is None else [float(sinks[h])]
        top = max([*terms.values(), *sink], default=0.0)
        total = math.fsum(math.exp(s - top) for s in [*terms.values(), *sink])
        for n, s in terms.items():
            out[(*b, h, m)] += math.exp(s - top) / total * value[(*b, n_head, n)]
    return out


@settings(max_examples=60)
@given(case=cases(dtypes=((F64, F64),)).filter(lambda case: case.query[..., 0:1].size * case.key.shape[-2] < 2000))
def test_agrees_with_loops(case):
    expected = by_loops(case.query, case.key, case.value, **case.keywords)
    actual = reference.attention(case.query, case.key, case.value, **case.keywords)
    # Both are float64; scores stay under about 100, so e^s differs by 100 units and the rest by less.
    np.testing.assert_allclose(actual.reshape(expected.shape), expected, rtol=1e-12, atol=1e-13)
