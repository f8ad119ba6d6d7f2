"""Results that join those of other keys in place."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    BF16,
    DTYPE_IDS,
    DTYPES,
    F16,
    F32,
    F64,
    UNIT,
    assert_close,
    assert_same_bits,
    exact,
    make_rng,
    qkv,
    tolerances,
)

import fastattn
from fastattn import reference

pytestmark = pytest.mark.isa

each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)


def sums_dtype(dtype):
    return F64 if dtype == F64 else F32


def nothing_yet(query, columns):
    """Results over no keys, which may hold anything."""
    dtype = sums_dtype(query.dtype)
    return np.full((*query.shape[:-1], columns), np.nan, dtype), np.full(query.shape[:-1], -np.inf, dtype)


def added(query, key, value, ends, into=None, **keywords):
    """Attend to the keys from one end to the next, one set after the other."""
    into = nothing_yet(query, value.shape[-1]) if into is None else into
    for a, b in itertools.pairwise(ends):
        out, lse = fastattn.attention(
            query, key[..., a:b, :], value[..., a:b, :], add_to=into, return_lse=True, **keywords
        )
        assert out is into[0]
        assert lse is into[1]
    return into


def check_sums(actual, arrays, sets, **keywords):
    """Each set rounds the sums once more, by an epsilon of their dtype, which the tolerance of one call holds."""
    expected = exact(*arrays, **keywords, return_lse=True)
    out_tol, lse_tol, _ = tolerances(*arrays, **keywords)
    assert_close(actual[0], expected[0], (1 + sets) * out_tol)
    assert_close(actual[1], expected[1], (1 + sets) * lse_tol, "lse")


@each_dtype
@pytest.mark.parametrize("seqlen_q", [1, 3, 12, 33, 100])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(40, 24), (64, 64), (16, 0), (8, 130)])
def test_sets_of_keys(dtypes, seqlen_q, head_dim, head_dim_v):
    query, key, _ = qkv(make_rng(seqlen_q), (2, 4, 2, seqlen_q, 200, head_dim), dtypes)
    value = make_rng(7).standard_normal((2, 2, 200, head_dim_v)).astype(key.dtype)
    check_sums(added(query, key, value, [0, 70, 71, 200]), (query, key, value), 3)


@each_dtype
@settings(max_examples=20)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 200), max_size=4), seqlen_q=st.integers(1, 70))
def test_sets_cut_at_random(dtypes, seed, cuts, seqlen_q):
    query, key, value = qkv(make_rng(seed), (2, 4, 2, seqlen_q, 200, 16), dtypes)
    check_sums(added(query, key, value, [0, *sorted(cuts), 200]), (query, key, value), len(cuts) + 1)


@each_dtype
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("seqlen_q", [1, 5, 40])
def test_keys_that_are_split_among_threads(dtypes, num_threads, seqlen_q):
    query, key, value = qkv(make_rng(seqlen_q), (1, 4, 1, seqlen_q, 6000, 32), dtypes)
    actual = added(query, key, value, [0, 2500, 6000], num_threads=num_threads)
    check_sums(actual, (query, key, value), 2)
    alone = added(query, key, value, [0, 2500, 6000], num_threads=1)
    assert_same_bits(actual[0], alone[0])
    assert_same_bits(actual[1], alone[1], "lse")


def test_it_is_a_merge():
    query, key, value = qkv(make_rng(), (2, 4, 2, 50, 130, 32))
    parts = [
        fastattn.attention(query, key[..., keys, :], value[..., keys, :], causal=True, query_offset=80, return_lse=True)
        for keys in (slice(0, 60), slice(60, 130))
    ]
    merged = fastattn.merge(*zip(*parts, strict=True))
    fastattn.attention(query, key[..., 60:, :], value[..., 60:, :], causal=True, query_offset=80, add_to=parts[0])
    np.testing.assert_allclose(parts[0][0], merged[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(parts[0][1], merged[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_the_reference_defines_it(seqlen_q):
    query, key, value = qkv(make_rng(), (2, 4, 2, seqlen_q, 60, 16), (F64, F64))
    into = fastattn.attention(query, key, value, return_lse=True)
    wanted = tuple(x.copy() for x in into)
    result = reference.attention(query, key[..., :9, :], value[..., :9, :], add_to=wanted)
    assert result is wanted[0]
    fastattn.attention(query, key[..., :9, :], value[..., :9, :], add_to=into)
    np.testing.assert_allclose(into[0], wanted[0], rtol=0, atol=1e-14)
    np.testing.assert_allclose(into[1], wanted[1], rtol=0, atol=1e-14)


# --- rows that one of the sets has no key for -----------------------------------------------------


@each_dtype
@pytest.mark.parametrize("seqlen_q", [2, 50])
def test_rows_without_keys(dtypes, seqlen_q):
    query, key, value = qkv(make_rng(), (1, 2, 2, seqlen_q, 60, 16), dtypes)
    mask = np.ones((seqlen_q, 60), bool)
    mask[0] = False
    into = nothing_yet(query, 16)
    fastattn.attention(query, key, value, mask=mask, add_to=into)
    np.testing.assert_array_equal(into[0][..., 0, :], 0)
    np.testing.assert_array_equal(into[1][..., 0], -np.inf)
    before = tuple(x.copy() for x in into)
    assert np.isfinite(before[0]).all()
    mask[:] = False
    mask[0] = True
    fastattn.attention(query, key, value, mask=mask, add_to=into)
    np.testing.assert_allclose(into[0][..., 1:, :], before[0][..., 1:, :], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(into[1][..., 1:], before[1][..., 1:], rtol=1e-6)
    check_sums((into[0][..., :1, :], into[1][..., :1]), (query[..., :1, :], key, value), 1)


@pytest.mark.parametrize("seqlen_q", [2, 40])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_value_that_is_not_finite_stays_in_any_order(seqlen_q, dtype):
    """Its weight may be so small that it is 0 beside the others': 0 · inf is NaN, as of one call and of a merge."""
    query, key, value = qkv(make_rng(), (1, 1, 1, seqlen_q, 2, 8), (dtype, dtype))
    bias, planted = np.array([0.0, -3000.0], F32), value.copy()
    planted[..., 1, 2] = np.inf
    sets = [(key[..., n, :][..., None, :], planted[..., n, :][..., None, :], bias[n : n + 1]) for n in (0, 1)]
    for order in (sets, sets[::-1]):
        into = nothing_yet(query, 8)
        for keys, values, own in order:
            fastattn.attention(query, keys, values, bias=own, add_to=into)
        assert np.isnan(into[0][..., 2]).all()
        assert np.isfinite(np.delete(into[0], 2, axis=-1)).all()


def test_no_keys_at_all():
    query, key, value = qkv(make_rng(), (1, 2, 2, 20, 30, 16))
    into = fastattn.attention(query, key, value, return_lse=True)
    before = tuple(x.copy() for x in into)
    fastattn.attention(query, key[..., :0, :], value[..., :0, :], add_to=into)
    np.testing.assert_allclose(into[0], before[0], rtol=1e-6)
    np.testing.assert_allclose(into[1], before[1], rtol=1e-6)


@each_dtype
@pytest.mark.parametrize("seqlen_q", [2, 40])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_hidden_values_that_are_not_finite(dtypes, seqlen_q, bad):
    """They are met in a second try, before which nothing has been added."""
    query, key, value = qkv(make_rng(), (1, 2, 2, seqlen_q, 60, 16), dtypes)
    mask = np.ones((seqlen_q, 60), bool)
    mask[1:, 40] = False
    planted = value.copy()
    planted[..., 40, 3] = bad
    into = added(query, key, planted, [0, 30])
    fastattn.attention(query, key[..., 30:, :], planted[..., 30:, :], mask=mask[:, 30:], add_to=into)
    assert not np.isfinite(into[0][..., 0, 3]).any()
    whole = query[..., 1:, :], key, value
    expected = exact(*whole, mask=mask[1:], return_lse=True)
    out_tol, lse_tol, _ = tolerances(*whole, mask=mask[1:])
    assert_close(into[0][..., 1:, :], expected[0], 3 * out_tol)
    assert_close(into[1][..., 1:], expected[1], 3 * lse_tol, "lse")


def test_far_apart():
    """Where one set outweighs the other beyond all digits, it is what is left."""
    query, key, value = qkv(make_rng(), (1, 1, 1, 40, 20, 16))
    into = fastattn.attention(query, key, value, return_lse=True)
    into[0][...] = 3e38
    into[1][...] = -3e38
    fastattn.attention(query, key, value, add_to=into)
    check_sums(into, (query, key, value), 1)
    into[1][...] = 3e38
    before = into[0].copy()
    fastattn.attention(query, key, value, add_to=into)
    np.testing.assert_array_equal(into[0], before)


# --- keywords and layouts -------------------------------------------------------------------------


@each_dtype
def test_keywords(dtypes):
    query, key, value = qkv(make_rng(), (2, 4, 2, 30, 90, 16), dtypes)
    bias = make_rng(1).standard_normal((4, 30, 90)).astype(F32)
    sinks = np.linspace(-1, 1, 4)
    into = nothing_yet(query, 16)
    for keys, own in ((slice(0, 40), {"sinks": sinks}), (slice(40, 90), {})):
        parts = key[..., keys, :], value[..., keys, :]
        fastattn.attention(query, *parts, bias=bias[..., keys], softcap=5.0, scale=0.3, **own, add_to=into)
    check_sums(into, (query, key, value), 2, bias=bias, softcap=5.0, scale=0.3, sinks=sinks)


def test_dropout():
    query, key, value = qkv(make_rng(), (1, 2, 2, 40, 60, 16))
    first = fastattn.attention(query, key, value, dropout=0.3, seed=1, return_lse=True)
    second = fastattn.attention(query, value, key, dropout=0.3, seed=2, return_lse=True)
    merged = fastattn.merge(*zip(first, second, strict=True))
    fastattn.attention(query, value, key, dropout=0.3, seed=2, add_to=first)
    np.testing.assert_allclose(first[0], merged[0], rtol=0, atol=1e-6)


LAYOUTS = {
    "swapaxes": lambda shape: np.zeros((shape[0], shape[2], shape[1], *shape[3:]), F32).swapaxes(1, 2),
    "reversed": lambda shape: np.zeros(shape, F32)[:, :, ::-1],
    "every second": lambda shape: np.zeros((*shape[:2], 2 * shape[2], *shape[3:]), F32)[:, :, ::2],
    "transposed": lambda shape: np.zeros(shape[::-1], F32).T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seqlen_q", [1, 3, 50])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_any_strides(layout, seqlen_q, dtype):
    query, key, value = qkv(make_rng(), (2, 4, 2, seqlen_q, 90, 24), (dtype, dtype))
    plain, into = nothing_yet(query, 24), tuple(LAYOUTS[layout](x.shape) for x in nothing_yet(query, 24))
    for x, y in zip(into, plain, strict=True):
        x[...] = y
    added(query, key, value, [0, 50, 90], plain)
    added(query, key, value, [0, 50, 90], into)
    assert_same_bits(np.ascontiguousarray(into[0]), plain[0])
    assert_same_bits(np.ascontiguousarray(into[1]), plain[1], "lse")


@each_dtype
def test_packed_sequences(dtypes):
    query, key, value = (x[0].swapaxes(0, 1) for x in qkv(make_rng(), (1, 4, 2, 70, 70, 16), dtypes))
    lengths, rng = [0, 30, 31, 31, 70], make_rng(2)
    more_key, more_value = (rng.standard_normal((8, 2, 16)).astype(key.dtype) for _ in range(2))
    more = [0, 2, 2, 5, 8]
    parts = [
        fastattn.attention_varlen(query, key, value, lengths, lengths, causal=True, unrounded=True, return_lse=True),
        fastattn.attention_varlen(query, more_key, more_value, lengths, more, unrounded=True, return_lse=True),
    ]
    merged = fastattn.merge(*zip(*parts, strict=True))
    wanted = tuple(x.copy() for x in parts[0])
    out = fastattn.attention_varlen(query, more_key, more_value, lengths, more, add_to=parts[0])
    assert out is parts[0][0]
    np.testing.assert_allclose(parts[0][0], merged[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(parts[0][1], merged[1], rtol=0, atol=1e-6)
    reference.attention_varlen(query, more_key, more_value, lengths, more, add_to=wanted)
    # 2 Sk + 32 roundings of sums over at most 47 keys; of half types no more is promised than of a rounded result.
    largest = max(np.abs(x.astype(F64)).max() for x in (value, more_value))
    atol = (4 if dtypes[0] in (F16, BF16) else 126) * UNIT[dtypes[0]] * largest
    np.testing.assert_allclose(parts[0][0], wanted[0], rtol=0, atol=atol)


def test_tensors():
    torch = pytest.importorskip("torch")
    query, key, value = (torch.from_numpy(x).bfloat16() for x in qkv(make_rng(), (2, 4, 2, 30, 90, 16)))
    into = fastattn.attention(query, key[:, :, :40], value[:, :, :40], unrounded=True, return_lse=True)
    out, lse = fastattn.attention(query, key[:, :, 40:], value[:, :, 40:], add_to=into, return_lse=True)
    assert (out.dtype, out.data_ptr(), lse.data_ptr()) == (torch.float32, into[0].data_ptr(), into[1].data_ptr())
    whole = fastattn.attention(query, key, value, unrounded=True)
    torch.testing.assert_close(out, whole, rtol=0, atol=0.02)


# --- errors ---------------------------------------------------------------------------------------


def of_two(x, place, new):
    return tuple(new if i == place else each for i, each in enumerate(x))


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


ERRORS = {
    "no tuple": (lambda a: {"add_to": a["add_to"][0]}, TypeError, "add_to must be .out, lse., .* not ndarray"),
    "one of two": (lambda a: {"add_to": a["add_to"][:1]}, TypeError, "add_to must be .out, lse.*not a tuple of 1"),
    "three": (lambda a: {"add_to": (*a["add_to"], 1)}, TypeError, "add_to must be .out, lse.*not a tuple of 3"),
    "a list as out": (lambda a: {"add_to": of_two(a["add_to"], 0, [1.0])}, TypeError, r"add_to\[0\].*list"),
    "rounded out": (
        lambda a: {"add_to": of_two(a["add_to"], 0, a["add_to"][0].astype(F16))},
        TypeError,
        r"add_to\[0\] has dtype float16; accepted is float32",
    ),
    "lse of float64": (
        lambda a: {"add_to": of_two(a["add_to"], 1, a["add_to"][1].astype(F64))},
        TypeError,
        r"add_to\[1\] has dtype float64; accepted is float32",
    ),
    "out in another byte order": (
        lambda a: {"add_to": of_two(a["add_to"], 0, a["add_to"][0].astype(">f4"))},
        TypeError,
        r"add_to\[0\] has dtype >f4",
    ),
    "shape of out": (lambda a: {"add_to": of_two(a["add_to"], 0, a["add_to"][0][..., 1:])}, ValueError, r"add_to\[0\]"),
    "shape of lse": (lambda a: {"add_to": of_two(a["add_to"], 1, a["add_to"][1][..., 1:])}, ValueError, r"add_to\[1\]"),
    "read-only out": (
        lambda a: {"add_to": of_two(a["add_to"], 0, read_only(a["add_to"][0]))},
        ValueError,
        r"add_to\[0\] is read-only",
    ),
    "read-only lse": (
        lambda a: {"add_to": of_two(a["add_to"], 1, read_only(a["add_to"][1]))},
        ValueError,
        r"add_to\[1\] is read-only",
    ),
    "out that is query": (
        lambda a: {"add_to": of_two(a["add_to"], 0, a["query"])},
        ValueError,
        r"add_to\[0\] overlaps query",
    ),
    "lse within out": (
        lambda a: {"add_to": of_two(a["add_to"], 1, a["add_to"][0][..., 0])},
        ValueError,
        r"add_to\[1\] overlaps add_to\[0\]",
    ),
    "lse of +inf": (
        lambda a: {"add_to": of_two(a["add_to"], 1, np.full((1, 2, 5), np.inf, F32))},
        ValueError,
        r"add_to\[1\] holds \+inf",
    ),
    "out, too": (lambda a: {"out": np.zeros((1, 2, 5, 8), F32)}, ValueError, "out cannot be given with add_to"),
    "weights": (lambda a: {"return_weights": True}, ValueError, "return_weights cannot be given with add_to"),
}


@pytest.mark.parametrize("function", [fastattn.attention, reference.attention], ids=["fast", "reference"])
@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, function):
    change, error, message = ERRORS[case]
    query, key, value = qkv(make_rng(), (1, 2, 2, 5, 9, 8))
    into = fastattn.attention(query, key, value, return_lse=True)
    before = tuple(x.copy() for x in into)
    arguments = {"query": query, "key": key, "value": value, "add_to": into}
    kept = query.copy()
    with pytest.raises(error, match=message):
        function(**arguments | change(arguments))
    np.testing.assert_array_equal(into[0], before[0])
    np.testing.assert_array_equal(into[1], before[1])
    np.testing.assert_array_equal(query, kept)
