"""Merging results over disjoint sets of keys."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BF16, DTYPE_IDS, DTYPES, F16, F32, F64, UNIT, assert_close, exact, make_rng, qkv, tolerances

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


# --- where the result goes -------------------------------------------------------------------------


def random_sets(dtype, count=3, shape=(2, 3, 7, 20)):
    rng = make_rng()
    outs = [rng.standard_normal(shape).astype(dtype) for _ in range(count)]
    lses = [(rng.standard_normal(shape[:-1]) * 3).astype(F32) for _ in range(count)]
    lses[0][rng.random(shape[:-1]) < 0.3] = -np.inf
    return outs, lses


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
@pytest.mark.parametrize("layout", ["C", "heads last", "reversed", "every other column"])
def test_out(dtype, layout):
    outs, lses = random_sets(dtype)
    expected, expected_lse = fastattn.merge(outs, lses)
    whole = np.zeros((2, 3, 7, 40), dtype)
    out = {
        "C": whole[..., :20],
        "heads last": np.zeros((2, 7, 20, 3), dtype).transpose(0, 3, 1, 2),
        "reversed": whole[::-1, :, ::-1, 19::-1],
        "every other column": whole[..., ::2],
    }[layout]
    merged, lse = fastattn.merge(outs, lses, out=out)
    assert merged is out
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)
    if layout == "every other column":
        np.testing.assert_array_equal(whole[..., 1::2], 0)


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
@pytest.mark.parametrize("layout", ["heads last", "reversed", "gaps"])
def test_sets_of_any_strides(dtype, layout):
    outs, lses = random_sets(dtype)
    expected = fastattn.merge(outs, lses)
    strided = {
        "heads last": lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
        "reversed": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
        "gaps": lambda x: np.repeat(x, 3, axis=-1)[..., 1::3],
    }[layout]
    outs[1], lses[1] = strided(outs[1]), strided(lses[1])
    for mine, want in zip(fastattn.merge(outs, lses), expected, strict=True):
        np.testing.assert_array_equal(mine, want)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_out_may_be_one_of_the_sets(which):
    outs, lses = random_sets(F32)
    expected, _ = fastattn.merge(outs, lses)
    fastattn.merge(outs, lses, out=outs[which])
    np.testing.assert_array_equal(outs[which], expected)


@pytest.mark.parametrize("half", [F16, BF16], ids=str)
def test_out_of_another_precision(half):
    outs, lses = random_sets(F32)
    expected, _ = fastattn.merge(outs, lses)
    rounded, _ = fastattn.merge(outs, lses, out=np.zeros(outs[0].shape, half))
    np.testing.assert_array_equal(rounded, expected.astype(half))
    halves = [out.astype(half) for out in outs]
    unrounded, _ = fastattn.merge(halves, lses, out=np.zeros(outs[0].shape, F32))
    np.testing.assert_array_equal(unrounded.astype(half), fastattn.merge(halves, lses)[0])
    assert not np.array_equal(unrounded, unrounded.astype(half).astype(F32))


def test_an_out_that_does_not_fit_is_left_alone():
    outs, lses = random_sets(F32)
    memory = np.full(2 * outs[0].size, 7, F32)
    outs[1] = memory[: outs[0].size].reshape(outs[0].shape)
    read_only = np.full(outs[0].shape, 7, F32)
    read_only.flags.writeable = False
    for out, error, words in [
        ("a", TypeError, "out must be an ndarray or a tensor, not str"),
        (np.full(outs[0].shape, 7, F64), TypeError, r"out has dtype float64; accepted is that of outs\[0\], float32"),
        (np.zeros((2, 3, 7, 20), ">f4"), TypeError, "out has dtype >f4; accepted is .*, in native byte order"),
        (np.zeros((2, 3, 7, 20), ">f2"), TypeError, "out has dtype >f2; accepted is .*, in native byte order"),
        (np.zeros(outs[0].shape, BF16.newbyteorder(">")), TypeError, "out has dtype .V2.*, in native byte order"),
        (np.full((3, 7, 20), 7, F32), ValueError, r"out has shape \(3, 7, 20\); accepted is \(2, 3, 7, 20\)"),
        (read_only, ValueError, "out is read-only"),
        (memory[20 : outs[0].size + 20].reshape(outs[0].shape), ValueError, r"out overlaps outs\[1\] in memory"),
        (np.broadcast_to(np.ones(20, F32), outs[0].shape), ValueError, "out is read-only"),
    ]:
        with pytest.raises(error, match=words):
            fastattn.merge(outs, lses, out=out)
    np.testing.assert_array_equal(memory, 7)
    np.testing.assert_array_equal(read_only, 7)


def test_many_axes_and_many_sets():
    shape = (1, 2) * 8 + (1, 2)
    rng = make_rng()
    outs = rng.standard_normal((40, *shape, 3)).astype(F32)
    lses = rng.standard_normal((40, *shape)).astype(F32)
    out, lse = fastattn.merge(outs, lses)
    flat = reference.merge(outs.reshape(40, -1, 3), lses.reshape(40, -1))
    np.testing.assert_allclose(out.reshape(-1, 3), flat[0], atol=1e-6)
    np.testing.assert_allclose(lse.reshape(-1), flat[1], rtol=1e-6)
    with pytest.raises(ValueError, match="lses broadcast to 19 axes; at most 18 are accepted"):
        fastattn.merge(outs[:, None], lses[:, None])


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_threads_do_not_change_a_bit(dtype):
    outs, lses = random_sets(dtype, 3, (2, 3, 700, 33))
    one, two = (fastattn.merge(outs, lses, num_threads=threads) for threads in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_results_near_the_largest_number_do_not_overflow():
    outs = np.full((4, 2, 3), 3e38, F32)
    out, _ = fastattn.merge(outs, np.zeros((4, 2), F32))
    np.testing.assert_allclose(out, 3e38, rtol=1e-6)


# --- half queries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [F16, BF16], ids=str)
def test_unrounded_sets_are_as_accurate_as_one_call(half):
    query, key, value = qkv(make_rng(), (1, 4, 4, 64, 1024, 64), (half, half))
    expected = exact(query, key, value)

    def rms(out):
        return np.sqrt(np.mean((out.astype(F64) - expected) ** 2))

    def merged(**keywords):
        cuts = np.split(np.arange(1024), 16)
        parts = [fastattn.attention(query, key[..., n, :], value[..., n, :], return_lse=True, **keywords) for n in cuts]
        return fastattn.merge(*zip(*parts, strict=True))[0]

    one = rms(fastattn.attention(query, key, value))
    # Their own rounding, to 2^-8 or 2^-11 of their size, is larger than the error of one call, which rounds a mean of
    # many values; and it is not there without.
    assert rms(merged(unrounded=True).astype(half)) < 1.05 * one
    assert rms(merged()) > 1.05 * one
