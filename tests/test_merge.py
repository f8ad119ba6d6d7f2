"""Merging results over disjoint sets of keys."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPE_IDS, DTYPES, F16, F32, F64, UNIT, assert_close, exact, make_rng, qkv, tolerances

import fastattn
from fastattn import reference


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@settings(max_examples=20)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 200), max_size=4))
def test_keys_split_at_random(dtypes, seed, cuts):
    query, key, value = qkv(make_rng(seed), (2, 4, 2, 3, 200, 16), dtypes)
    ends = [0, *sorted(cuts), 200]
    parts = [
        fastattn.attention(query, key[:, :, a:b], value[:, :, a:b], return_lse=True)
        for a, b in itertools.pairwise(ends)
    ]
    out, lse = fastattn.merge(*zip(*parts, strict=True))
    expected, expected_lse = exact(query, key, value, return_lse=True)
    out_tol, lse_tol, _ = tolerances(query, key, value)
    # Each part has been rounded to its dtype once more, in units of itself, not of the whole.
    largest = np.abs(value.astype(F64)).max()
    assert_close(out, expected, 2 * out_tol + 2 * UNIT[dtypes[0]] * largest)
    assert_close(lse, expected_lse, 2 * lse_tol, "lse")
    assert out.dtype == dtypes[0]
    assert lse.dtype == (F64 if dtypes[0] == F64 else F32)


def test_the_empty_set_is_neutral():
    query, key, value = qkv(make_rng(), (1, 2, 2, 3, 50, 8))
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    empty = np.full_like(out, np.nan), np.full_like(lse, -np.inf)
    for parts in ([(out, lse), empty], [empty, (out, lse)], [empty, empty, (out, lse)]):
        merged = fastattn.merge(*zip(*parts, strict=True))
        np.testing.assert_array_equal(merged[0], out)
        np.testing.assert_allclose(merged[1], lse, rtol=4 * UNIT[F32])
    nothing, none = fastattn.merge(*zip(empty, empty, strict=True))
    np.testing.assert_array_equal(nothing, 0)
    np.testing.assert_array_equal(none, -np.inf)


def test_some_rows_have_keys_in_one_part_only():
    query, key, value = qkv(make_rng(), (1, 2, 2, 4, 60, 8))
    first = fastattn.attention(query, key[:, :, :30], value[:, :, :30], causal=True, query_offset=28, return_lse=True)
    second = fastattn.attention(query, key[:, :, 30:], value[:, :, 30:], causal=True, query_offset=-2, return_lse=True)
    whole = fastattn.attention(query, key, value, causal=True, query_offset=28, return_lse=True)
    out, lse = fastattn.merge([first[0], second[0]], [first[1], second[1]])
    np.testing.assert_allclose(out, whole[0], atol=1e-6)
    np.testing.assert_allclose(lse, whole[1], atol=1e-6)


def test_a_prefix_that_a_batch_shares():
    """The prefix is attended once for all: its result has no batch axis, and broadcasts."""
    rng = make_rng()
    query, key, value = qkv(rng, (3, 2, 2, 1, 40, 8))
    prefix = [x[0] for x in qkv(rng, (1, 2, 2, 1, 25, 8))[1:]]
    query[:] = query[:1]  # the same query, so that the prefix's result is the same
    shared = fastattn.attention(query[0], *prefix, return_lse=True)
    own = fastattn.attention(query, key, value, return_lse=True)
    out, lse = fastattn.merge([shared[0], own[0]], [shared[1], own[1]])
    assert out.shape == own[0].shape
    for b in range(3):
        both = [np.concatenate([prefix[i], (key, value)[i][b]], axis=-2) for i in range(2)]
        expected = fastattn.attention(query[b], *both, return_lse=True)
        np.testing.assert_allclose(out[b], expected[0], atol=1e-6)
        np.testing.assert_allclose(lse[b], expected[1], atol=1e-6)


def test_against_the_reference():
    rng = make_rng()
    outs = rng.standard_normal((5, 2, 3, 7, 4)).astype(F32)
    lses = (rng.standard_normal((5, 2, 3, 7)) * 30).astype(F32)
    lses[rng.random(lses.shape) < 0.3] = -np.inf
    for mine, theirs in zip(fastattn.merge(outs, lses), reference.merge(outs, lses), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("error")
def test_the_reference_has_the_same_results_of_the_same_dtypes():
    ones = np.ones((2, 3, 4), F32)
    none = np.full((2, 3), -np.inf, F32)
    each = {
        "no keys": (ones, none),
        "no keys, NaN": (ones * np.nan, none),
        "no columns": (ones[..., :0], np.zeros((2, 3), F32)),
        "no rows": (ones[:, :0], none[:, :0]),
        "wider logs": (ones, [none[0], np.zeros(3)]),
        "wider outs": (ones.astype(F64), np.zeros((2, 3), F32)),
        "half": (ones.astype(F16), [np.zeros(3, F32), np.zeros(3)]),
        "broadcast": ([ones[0], ones], [np.zeros(3, F32), none]),
        "tiny weight of NaN": ([ones[0] * np.nan, ones[0]], np.array([[-500.0] * 3, [0.0] * 3])),
    }
    for case, arguments in each.items():
        for mine, theirs in zip(fastattn.merge(*arguments), reference.merge(*arguments), strict=True):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), case
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, err_msg=case)


def test_huge_logs_do_not_overflow():
    out, lse = fastattn.merge(np.array([[[1.0]], [[3.0]]], F32), np.array([[3e38], [3e38]], F32))
    np.testing.assert_array_equal(out, [[2.0]])
    np.testing.assert_array_equal(lse, np.array([3e38], F32))


def test_a_nan_log_stays():
    out, lse = fastattn.merge(np.ones((2, 1, 1), F32), np.array([[np.nan], [0.0]], F32))
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


@pytest.mark.parametrize("merge", [fastattn.merge, reference.merge], ids=["fast", "reference"])
@pytest.mark.parametrize("other", [0.0, -np.inf, np.nan])
def test_a_set_without_keys_as_flash_attention_marks_it_is_refused(merge, other):
    with pytest.raises(ValueError, match=r"lses\[1\] holds \+inf, by which FlashAttention .*; here that is -inf"):
        merge(np.ones((2, 1, 1), F32), np.array([[other], [np.inf]], F32))


@pytest.mark.parametrize(
    ("outs", "lses", "error", "words"),
    [
        ([], [], ValueError, "outs is empty"),
        (None, None, TypeError, "outs must be a sequence of arrays, not None"),
        ([np.zeros((2, 3), F32)], 5, TypeError, "lses must be a sequence of arrays, not 5"),
        ([np.zeros((2, 3), F32)], [], ValueError, "as many"),
        ([np.zeros((2, 3), F32)], [np.zeros(3, F32)], ValueError, r"lses\[0\] has shape \(3,\)"),
        ([np.zeros((2, 3), int)], [np.zeros(2, F32)], TypeError, r"outs\[0\] has dtype int64"),
        ([np.zeros((2, 3), F32)], [np.zeros(2, F16)], TypeError, r"lses\[0\] has dtype float16"),
        ([np.zeros((2, 3), F32), np.zeros((2, 3), F16)], [np.zeros(2, F32)] * 2, TypeError, "share a dtype"),
        ([np.zeros((2, 3), F32), np.zeros((2, 4), F32)], [np.zeros(2, F32)] * 2, ValueError, "last axis"),
        ([np.zeros((2, 3), F32), np.zeros((5, 3), F32)], [np.zeros(2, F32), np.zeros(5, F32)], ValueError, "broadcast"),
    ],
)
def test_bad_input(outs, lses, error, words):
    with pytest.raises(error, match=words):
        fastattn.merge(outs, lses)
