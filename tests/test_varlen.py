"""Packed sequences: each is attended as if it were alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPE_IDS, DTYPES, F32, assert_close, assert_same_bits, make_rng, normal, tolerances

import fastattn
from fastattn import reference

each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)


def packed(rng, lengths_q, lengths_k, dtypes=(F32, F32), heads=4, kv_heads=2, head_dim=16, head_dim_v=24):
    query = normal(rng, (sum(lengths_q), heads, head_dim), dtypes[0])
    key = normal(rng, (sum(lengths_k), kv_heads, head_dim), dtypes[1])
    value = normal(rng, (sum(lengths_k), kv_heads, head_dim_v), dtypes[1])
    return query, key, value, np.cumsum([0, *lengths_q]), np.cumsum([0, *lengths_k])


def alone(query, key, value, cu_q, cu_k, b, **keywords):
    rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
    return fastattn.attention(
        query[rows].swapaxes(0, 1), key[keys].swapaxes(0, 1), value[keys].swapaxes(0, 1), **keywords
    )


lengths = st.integers(0, 12) | st.sampled_from([31, 48, 49, 64, 65, 100, 600])


@settings(max_examples=60)
@given(
    sizes=st.lists(st.tuples(lengths, lengths), max_size=5),
    dtypes=st.sampled_from(DTYPES),
    keywords=st.fixed_dictionaries(
        {},
        optional={
            "causal": st.just(True),
            "window": st.tuples(st.none() | st.integers(0, 70), st.none() | st.integers(0, 70)),
            "softcap": st.just(3.0),
            "scale": st.sampled_from([0.0, -0.3]),
            "num_threads": st.sampled_from([1, 2, 3]),
        },
    ),
    sinks=st.booleans(),
    alibi=st.booleans(),
    offsets=st.booleans(),
)
def test_each_sequence_is_attended_alone(sizes, dtypes, keywords, sinks, alibi, offsets):
    rng = make_rng(len(sizes))
    query, key, value, cu_q, cu_k = packed(rng, [q for q, _ in sizes], [k for _, k in sizes], dtypes)
    if sinks:
        keywords["sinks"] = rng.standard_normal(4)
    slopes = rng.random((len(sizes), 4)) * 0.1
    starts = rng.integers(-5, 50, len(sizes))
    each = {**({"alibi_slopes": slopes} if alibi else {}), **({"query_offset": starts} if offsets else {})}
    out, lse = fastattn.attention_varlen(query, key, value, cu_q, cu_k, return_lse=True, **keywords, **each)
    assert out.shape == (len(query), 4, 24)
    assert out.dtype == dtypes[0]
    for b in range(len(sizes)):
        own = {name: x[b] for name, x in each.items()}
        expected = alone(query, key, value, cu_q, cu_k, b, return_lse=True, **keywords, **own)
        rows = slice(cu_q[b], cu_q[b + 1])
        assert_same_bits(out[rows].swapaxes(0, 1), expected[0])
        assert_same_bits(lse[rows].swapaxes(0, 1), expected[1], "lse")


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize(
    "keywords",
    [{}, {"causal": True}, {"window": (20, 3)}, {"alibi_slopes": [0.1, 0.2, 0.0, 0.3]}],
    ids=str,
)
def test_against_the_reference(dtypes, keywords):
    lengths_q, lengths_k = [1, 0, 50, 3, 0, 7], [600, 5, 70, 0, 0, 130]
    query, key, value, cu_q, cu_k = packed(make_rng(), lengths_q, lengths_k, dtypes)
    out, lse = fastattn.attention_varlen(query, key, value, cu_q, cu_k, return_lse=True, **keywords)
    wide = (x.astype(np.float64) for x in (query, key, value))
    expected, expected_lse = reference.attention_varlen(*wide, cu_q, cu_k, return_lse=True, **keywords)
    for b in range(len(lengths_q)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        own = (x.swapaxes(0, 1) for x in (query[rows], key[keys], value[keys]))
        out_tol, lse_tol, _ = tolerances(*own, **keywords)
        assert_close(out[rows].swapaxes(0, 1), expected[rows].swapaxes(0, 1), out_tol)
        assert_close(lse[rows].swapaxes(0, 1), expected_lse[rows].swapaxes(0, 1), lse_tol, "lse")


@pytest.mark.parametrize("num_threads", [2, 4])
def test_one_sequence_far_longer_than_the_rest(num_threads):
    """It is shared out, among the threads and in the plan, without a change in any bit."""
    rng = make_rng()
    query, key, value, cu_q, cu_k = packed(rng, [1] * 40, [5] * 39 + [30000])
    out = fastattn.attention_varlen(query, key, value, cu_q, cu_k, num_threads=1)
    assert_same_bits(fastattn.attention_varlen(query, key, value, cu_q, cu_k, num_threads=num_threads), out)


@pytest.mark.parametrize("integers", [np.int32, np.int64, np.uint16])
def test_cumulative_lengths_of_any_integers(integers):
    query, key, value, cu_q, cu_k = packed(make_rng(), [2, 3], [4, 5])
    expected = fastattn.attention_varlen(query, key, value, cu_q, cu_k)
    assert_same_bits(fastattn.attention_varlen(query, key, value, cu_q.astype(integers), list(cu_k)), expected)


def test_strided_arrays_and_out():
    query, key, value, cu_q, cu_k = packed(make_rng(), [20, 3], [40, 5])
    expected = fastattn.attention_varlen(query, key, value, cu_q, cu_k)
    turned = [np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in (query, key, value)]
    out = np.full((23, 24, 4), 7, F32).swapaxes(1, 2)
    assert fastattn.attention_varlen(*turned, cu_q, cu_k, out=out) is out
    assert_same_bits(out, expected)


def test_no_sequences():
    query, key, value, cu_q, cu_k = packed(make_rng(), [], [])
    out, lse = fastattn.attention_varlen(query, key, value, cu_q, cu_k, return_lse=True)
    assert out.shape == (0, 4, 24)
    assert lse.shape == (0, 4)


GOOD = packed(make_rng(), [2, 3], [4, 5])
WRAPS = [0, 10, 5 - 2**63, -1, 5]  # the differences wrap to positive ones
BAD = {
    "falls": ({3: [0, 3, 2, 5], 4: [0, 1, 2, 9]}, ValueError, "cu_seqlens_q must rise from 0 to the 5 rows of query"),
    "falls far": ({3: WRAPS, 4: [0, 1, 2, 3, 9]}, ValueError, "cu_seqlens_q must rise from 0 to the 5 rows of query"),
    "keys fall far": ({3: [0, 1, 2, 3, 5], 4: [*WRAPS[:-1], 9]}, ValueError, "cu_seqlens_k must rise from 0 to the 9"),
    "beyond int64": (
        {3: np.array([0, 10, 2**63 + 5, 2**64 - 1, 5], np.uint64), 4: [0, 1, 2, 3, 9]},
        ValueError,
        "cu_seqlens_q must rise from 0 to the 5 rows of query",
    ),
    "not from 0": ({3: [1, 2, 5]}, ValueError, "cu_seqlens_q must rise from 0"),
    "too short": ({4: [0, 4, 8]}, ValueError, "cu_seqlens_k must rise from 0 to the 9 rows of key"),
    "too long": ({4: [0, 4, 10]}, ValueError, "cu_seqlens_k must rise from 0 to the 9 rows of key"),
    "unequal": ({4: [0, 9]}, ValueError, "cu_seqlens_q and cu_seqlens_k must have the same length"),
    "floats": ({3: [0.0, 2.0, 5.0]}, TypeError, "cu_seqlens_q has dtype float64"),
    "2-D": ({3: [[0, 2, 5]]}, ValueError, r"cu_seqlens_q has shape \(1, 3\)"),
    "nothing": ({3: np.zeros(0, int)}, ValueError, r"cu_seqlens_q has shape \(0,\)"),
    "query 4-D": ({0: GOOD[0][None]}, ValueError, "query has shape"),
    "value rows": ({2: GOOD[2][:-1]}, ValueError, "same number of keys"),
    "value heads": ({2: GOOD[2][:, :1]}, ValueError, "same number of heads"),
    "head_dim": ({1: GOOD[1][..., :-1]}, ValueError, "same head_dim"),
    "heads": ({0: GOOD[0][:, :3]}, ValueError, "multiple"),
    "dtype": ({1: GOOD[1].astype(np.int32)}, TypeError, "key has dtype int32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, words = BAD[case]
    arguments = [changes.get(i, x) for i, x in enumerate(GOOD)]
    out = np.full((5, 4, 24), 7, F32)
    with pytest.raises(error, match=words):
        fastattn.attention_varlen(*arguments, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("name", ["mask", "bias", "key_lengths", "return_weights"])
def test_keywords_that_make_no_sense_do_not_exist(name):
    with pytest.raises(TypeError, match=name):
        fastattn.attention_varlen(*GOOD, **{name: None})


def test_out_of_the_wrong_shape_or_overlapping():
    with pytest.raises(ValueError, match="out has shape"):
        fastattn.attention_varlen(*GOOD, out=np.zeros((5, 4, 23), F32))
    query, key, value, cu_q, cu_k = packed(make_rng(), [4], [4], heads=2, head_dim=8, head_dim_v=8)
    with pytest.raises(ValueError, match="out overlaps query"):
        fastattn.attention_varlen(query, key, value, cu_q, cu_k, out=query)
