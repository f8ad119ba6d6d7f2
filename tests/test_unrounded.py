"""Results and gradients that stay in the precision of sums, where queries are half."""

import ml_dtypes
import numpy as np
import pytest
from oracle import BF16, F16, F32, F64, UNIT, make_rng, qkv

import fastattn
from fastattn import reference

pytestmark = pytest.mark.isa
HALVES = pytest.mark.parametrize("half", [F16, BF16], ids=str)


def arrays_of(half, seqlen_q, head_dim=40, seqlen_k=150):
    return qkv(make_rng(seqlen_q), (2, 4, 2, seqlen_q, seqlen_k, head_dim), (half, half))


def assert_is_what_was_rounded(unrounded, rounded):
    assert (unrounded.dtype, unrounded.shape) == (F32, rounded.shape)
    np.testing.assert_array_equal(unrounded.astype(rounded.dtype), rounded)
    assert not np.array_equal(unrounded, rounded.astype(F32))


def tolerance_of_sums(half, exact):
    """Probabilities and score gradients of bfloat16 are rounded before they are multiplied, those of float16 not."""
    return (UNIT[BF16] if half == BF16 else UNIT[F32] * 100) * np.abs(exact).max()


@HALVES
@pytest.mark.parametrize("seqlen_q", [1, 4, 12, 100])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_attention(half, seqlen_q, head_dim):
    arrays = arrays_of(half, seqlen_q, head_dim)
    rounded, lse = fastattn.attention(*arrays, causal=True, return_lse=True)
    unrounded, same_lse = fastattn.attention(*arrays, causal=True, unrounded=True, return_lse=True)
    assert_is_what_was_rounded(unrounded, rounded)
    np.testing.assert_array_equal(same_lse, lse)
    out = np.zeros((2, seqlen_q, 4, head_dim), F32).swapaxes(1, 2)
    assert fastattn.attention(*arrays, causal=True, out=out) is out
    np.testing.assert_array_equal(out, unrounded)


@HALVES
def test_weights_keep_their_dtype(half):
    out, weights = fastattn.attention(*arrays_of(half, 20), unrounded=True, return_weights=True)
    assert (out.dtype, weights.dtype) == (F32, half)


@HALVES
def test_packed_sequences(half):
    query, key, value = (x[0].swapaxes(0, 1) for x in arrays_of(half, 150))
    lengths = [0, 30, 31, 31, 150]
    rounded = fastattn.attention_varlen(query, key, value, lengths, lengths)
    unrounded = fastattn.attention_varlen(query, key, value, lengths, lengths, unrounded=True)
    assert_is_what_was_rounded(unrounded, rounded)
    out = np.zeros(query.shape, F32)
    fastattn.attention_varlen(query, key, value, lengths, lengths, out=out)
    np.testing.assert_array_equal(out, unrounded)


@pytest.mark.parametrize(("query_dtype", "dtype"), [(F16, F16), (BF16, BF16), (BF16, np.int8)], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 30])
def test_a_cache(query_dtype, dtype, seqlen_q):
    query, key, value = (x[0] for x in arrays_of(query_dtype, seqlen_q))
    cache = fastattn.KVCache(2, 40, num_pages=8, dtype=dtype)
    sequence = cache.add(key, value)
    rounded = cache.attention(query, sequence)
    unrounded = cache.attention(query, sequence, unrounded=True)
    assert_is_what_was_rounded(unrounded, rounded)
    out = np.zeros(query.shape, F32)
    cache.attention(query, sequence, out=out)
    np.testing.assert_array_equal(out, unrounded)


@HALVES
@pytest.mark.parametrize("keys_of_one", [False, True], ids=["keys each", "keys of one"])
def test_gradients(half, keys_of_one):
    query, key, value = arrays_of(half, 70)
    if keys_of_one:
        key, value = key[:1], value[:1]
    grad_out = make_rng(1).standard_normal(query.shape).astype(half)
    out, lse = fastattn.attention(query, key, value, causal=True, unrounded=True, return_lse=True)
    arguments = grad_out, query, key, value, out, lse
    rounded = fastattn.attention_backward(*arguments, causal=True)
    unrounded = fastattn.attention_backward(*arguments, causal=True, unrounded=True)
    grads = tuple(np.zeros(x.shape, F32) for x in rounded)
    fastattn.attention_backward(*arguments, causal=True, grads=grads)
    expected = reference.attention_backward(*arguments, causal=True, unrounded=True)
    for mine, want, stored, exact in zip(unrounded, rounded, grads, expected, strict=True):
        assert_is_what_was_rounded(mine, want)
        np.testing.assert_array_equal(stored, mine)
        np.testing.assert_allclose(mine, exact, atol=4 * tolerance_of_sums(half, exact))


@HALVES
def test_gradients_of_packed_sequences(half):
    query, key, value = (x[0].swapaxes(0, 1) for x in arrays_of(half, 150))
    grad_out = make_rng(1).standard_normal(query.shape).astype(half)
    lengths = [0, 30, 31, 31, 150]
    out, lse = fastattn.attention_varlen(query, key, value, lengths, lengths, unrounded=True, return_lse=True)
    arguments = grad_out, query, key, value, out, lse, lengths, lengths
    rounded = fastattn.attention_varlen_backward(*arguments)
    unrounded = fastattn.attention_varlen_backward(*arguments, unrounded=True)
    expected = reference.attention_varlen_backward(*arguments, unrounded=True)
    for mine, want, exact in zip(unrounded, rounded, expected, strict=True):
        assert_is_what_was_rounded(mine, want)
        np.testing.assert_allclose(mine, exact, atol=4 * tolerance_of_sums(half, exact))


@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F64), (F32, F16)], ids=str)
def test_other_queries_are_not_concerned(dtypes):
    arrays = qkv(make_rng(), (1, 2, 2, 20, 30, 8), dtypes)
    out = fastattn.attention(*arrays, unrounded=True)
    assert out.dtype == dtypes[0]
    np.testing.assert_array_equal(out, fastattn.attention(*arrays))


@HALVES
def test_the_reference(half):
    query, key, value = arrays_of(half, 20)
    lengths = [0, 4, 20]
    packed = [x[0].swapaxes(0, 1)[:20] for x in (query, key, value)]
    grad_out = np.ones(query.shape, half)
    out, lse = reference.attention(query, key, value, unrounded=True, return_lse=True)
    varlen = reference.attention_varlen(*packed, lengths, lengths, unrounded=True)
    grads = reference.attention_backward(grad_out, query, key, value, out, lse, unrounded=True)
    assert {x.dtype for x in (out, varlen, *grads)} == {F32}
    np.testing.assert_array_equal(out.astype(half), reference.attention(query, key, value))
    into = np.zeros(query.shape, F32)
    np.testing.assert_array_equal(reference.attention(query, key, value, out=into), out)
    np.testing.assert_allclose(fastattn.attention(query, key, value, unrounded=True), out, atol=0.02)


@HALVES
def test_an_out_that_is_rounded_is_refused(half):
    query, key, value = arrays_of(half, 20)
    out = np.full(query.shape, 7, half)
    with pytest.raises(TypeError, match=rf"out has dtype {half}; accepted is float32, with unrounded"):
        fastattn.attention(query, key, value, out=out, unrounded=True)
    with pytest.raises(TypeError, match=rf"out has dtype float64; accepted is that of query, {half}, or float32"):
        fastattn.attention(query, key, value, out=out.astype(F64))
    other = F16 if half == BF16 else np.dtype(ml_dtypes.bfloat16)
    with pytest.raises(TypeError, match=rf"out has dtype {other}; accepted is that of query, {half}, or float32"):
        fastattn.attention(query, key, value, out=out.astype(other))
    np.testing.assert_array_equal(out, 7)
