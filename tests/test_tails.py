"""Sizes on either side of every vector, register tile and block: nothing is lost, nothing counted twice."""

import pytest
from oracle import DTYPE_IDS, DTYPES, check, check_backward, make_rng, normal, qkv

import fastattn

# Tiles are up to three vectors of at most 16 float32 (32 half) lanes; blocks hold some 64 keys.
SEQLENS_Q = [*range(1, 71), 95, 96, 97, 127, 128, 129, 143, 144, 145, 191, 192, 193]
SEQLENS_K = [*range(1, 18), 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193, 255, 256, 257]
HEAD_DIMS = [*range(1, 20), 31, 32, 33, 47, 48, 49, 63, 64, 65, 79, 80, 96, 97, 127, 128, 129, 191, 255, 256, 257, 384,
             511, 512]  # fmt: skip

each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("seqlen_q", SEQLENS_Q)
def test_seqlen_q(dtypes, seqlen_q):
    query, key, value = qkv(make_rng(seqlen_q), (1, 2, 2, seqlen_q, 67, 19), dtypes)
    check(query, key, value)
    check(query, key, value, causal=True, query_offset=0)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("seqlen_k", SEQLENS_K)
@pytest.mark.parametrize("seqlen_q", [1, 5, 50])
def test_seqlen_k(dtypes, seqlen_k, seqlen_q):
    rng = make_rng(seqlen_k)
    query, key, value = qkv(rng, (1, 2, 1, seqlen_q, seqlen_k, 17), dtypes)
    check(query, key, value)
    check(query, key, value, causal=True)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("seqlen_q", [1, 21])
def test_head_dim(dtypes, head_dim, seqlen_q):
    rng = make_rng(head_dim)
    check(*qkv(rng, (1, 1, 1, seqlen_q, 35, head_dim), dtypes))


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims_that_differ(dtypes, head_dim):
    """The two head dimensions have tails of their own."""
    rng = make_rng(head_dim)
    check(*qkv(rng, (1, 1, 1, 21, 35, head_dim), dtypes, head_dim_v=9))
    check(*qkv(rng, (1, 1, 1, 21, 35, 9), dtypes, head_dim_v=head_dim))


@each_dtype
@pytest.mark.parametrize("seqlen_q", [1, 2, 3, 4, 7, 8, 15, 16, 17])
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 7, 8, 12, 16])
def test_group_rows(dtypes, seqlen_q, group_size):
    """With few queries, the rows of a whole group share a tile."""
    query, key, value = qkv(make_rng(seqlen_q, group_size), (1, 2 * group_size, 2, seqlen_q, 70, 24), dtypes)
    check(query, key, value, causal=True)


@each_dtype
@pytest.mark.parametrize("seqlen_k", [511, 512, 513, 1023, 1025, 2047, 4099])
def test_decoding_long_caches(dtypes, seqlen_k):
    """One query over many keys is split along the keys; the splits have tails too."""
    query, key, value = qkv(make_rng(seqlen_k), (1, 4, 2, 1, seqlen_k, 40), dtypes)
    check(query, key, value)
    check(query, key, value, key_lengths=seqlen_k - 5, window=(700, None))


@each_dtype
@pytest.mark.parametrize("offset", [*range(-40, 160, 7), 47, 48, 49, 63, 64, 65, 127, 128, 129])
def test_causal_and_window_edges_at_each_position(dtypes, offset):
    query, key, value = qkv(make_rng(), (1, 1, 1, 37, 150, 16), dtypes)
    check(query, key, value, causal=True, query_offset=offset)
    check(query, key, value, window=(3, 1), query_offset=offset)
    check(query, key, value, window=(64, None), query_offset=offset)


# --- gradients ------------------------------------------------------------------------------------


def check_gradients(shape, dtypes, head_dim_v=None, **keywords):
    rng = make_rng(*shape)
    query, key, value = qkv(rng, shape, dtypes, head_dim_v)
    grad_out = normal(rng, (*query.shape[:-1], value.shape[-1]), dtypes[0])
    check_backward(fastattn.attention_backward, query, key, value, grad_out, **keywords)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("seqlen_q", SEQLENS_Q)
def test_gradients_of_seqlen_q(dtypes, seqlen_q):
    check_gradients((1, 2, 2, seqlen_q, 67, 19), dtypes)
    check_gradients((1, 2, 1, seqlen_q, 67, 19), dtypes, causal=True, query_offset=0)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("seqlen_k", SEQLENS_K)
@pytest.mark.parametrize("seqlen_q", [1, 50])
def test_gradients_of_seqlen_k(dtypes, seqlen_k, seqlen_q):
    check_gradients((1, 2, 1, seqlen_q, seqlen_k, 17), dtypes)
    check_gradients((1, 2, 1, seqlen_q, seqlen_k, 17), dtypes, causal=True)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_gradients_of_head_dim(dtypes, head_dim):
    """The two head dimensions have tails of their own."""
    check_gradients((1, 1, 1, 21, 35, head_dim), dtypes)
    check_gradients((1, 1, 1, 21, 70, head_dim), dtypes, head_dim_v=9)
    check_gradients((1, 1, 1, 50, 70, 9), dtypes, head_dim_v=head_dim)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("group_size", [1, 3, 8, 50])
@pytest.mark.parametrize("seqlen_q", [1, 5, 33])
def test_gradients_of_group_rows(dtypes, seqlen_q, group_size):
    check_gradients((1, 2 * group_size, 2, seqlen_q, 70, 24), dtypes, causal=True)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("seqlen_q", [1023, 1024, 1025, 2080])
def test_gradients_of_rows_that_are_split(dtypes, seqlen_q):
    check_gradients((1, 1, 1, seqlen_q, 70, 24), dtypes)


@each_dtype
@pytest.mark.parametrize("offset", [*range(-40, 160, 7), 47, 48, 49, 63, 64, 65, 127, 128, 129])
def test_gradients_at_causal_and_window_edges(dtypes, offset):
    check_gradients((1, 1, 1, 37, 150, 16), dtypes, causal=True, query_offset=offset)
    check_gradients((1, 1, 1, 37, 150, 16), dtypes, window=(3, 1), query_offset=offset)
    check_gradients((1, 1, 1, 37, 150, 16), dtypes, window=(64, None), query_offset=offset)
