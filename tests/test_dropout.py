"""Dropout: which weights are dropped, exactly, and that the numbers which say so behave as if drawn at random."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from oracle import (
    DTYPE_IDS,
    DTYPES,
    F32,
    F64,
    UNIT,
    assert_close,
    assert_same_bits,
    check,
    check_backward,
    make_rng,
    qkv,
)
from strategies import backward_cases, cases, dropouts
from test_backward import SHAPE, differences

import fastattn
from fastattn import reference
from fastattn._philox import philox4x32

MODULES = {"reference": reference, "fast": fastattn}


each_implementation = pytest.mark.parametrize("implementation", MODULES)
# The reference is the same on each instruction set.
each_implementation_and_isa = pytest.mark.parametrize(
    "implementation", [pytest.param(name, marks=[pytest.mark.isa] * (name != "reference")) for name in MODULES]
)


# --- the numbers ----------------------------------------------------------------------------------

WORD = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers_of_philox(counter, key, expected):
    """Those that its authors publish with their library, Random123."""
    words = philox4x32(tuple(np.full(1, word, np.uint64) for word in counter), tuple(key))
    assert [int(word[0]) for word in words] == expected


def philox_in_integers(counter, key):
    """Philox4x32-10 on Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & WORD, (a >> 32) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def is_dropped(share, seed, item, head, position, key_index):
    words = philox_in_integers((key_index // 8, position % 2**32, head, item), (seed % 2**32, seed // 2**32))
    number = words[key_index % 8 // 2] >> (16 * (key_index % 2)) & 0xFFFF
    return number < round(share * 65536)


def expected_factors(share, seed, rows, seqlen_k):
    """Return what weights are multiplied by, for rows that are (item, head, position)."""
    return np.array(
        [[0.0 if is_dropped(share, seed, *row, n) else 1 / (1 - share) for n in range(seqlen_k)] for row in rows]
    )


# --- which weights are dropped --------------------------------------------------------------------


def uniform_weights(implementation, shape, dtype=F32, **keywords):
    """Return the weights where every key is as good as any other; shape is (batch..., heads, rows, keys)."""
    query, key = np.zeros((*shape[:-1], 4), dtype), np.zeros((*shape[:-3], 1, shape[-1], 4), dtype)
    attend = MODULES[implementation].attention
    return attend(query, key, key, return_weights=True, **keywords)[1]


@each_implementation_and_isa
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.999, 2.0**-16, 1e-9])
@pytest.mark.parametrize("seqlen_k", [1, 7, 8, 9, 40])
def test_each_weight_is_dropped_by_its_place(implementation, seed, share, seqlen_k):
    shape = (2, 3, 5, seqlen_k)
    weights = uniform_weights(implementation, shape, dropout=share, seed=seed)
    rows = [(b, h, m + seqlen_k - 5) for b, h, m in np.ndindex(shape[:3])]
    expected = expected_factors(share, seed, rows, seqlen_k).reshape(shape) / seqlen_k
    assert_close(weights, expected, 4 * UNIT[F32] * expected)


@each_implementation_and_isa
@pytest.mark.parametrize(
    ("offset", "lengths"), [(0, None), ([-3, 2**33 + 5], None), (None, [9, 4]), (7, [0, 9])], ids=str
)
def test_positions_are_those_of_causal_and_window(implementation, offset, lengths):
    keywords = {"query_offset": offset, "key_lengths": lengths}
    plain = uniform_weights(implementation, (2, 2, 5, 9), **keywords)
    weights = uniform_weights(implementation, (2, 2, 5, 9), dropout=0.4, seed=3, **keywords)
    begins = np.broadcast_to(np.subtract(9 if lengths is None else lengths, 5) if offset is None else offset, 2)
    rows = [(b, h, m + int(begins[b])) for b, h, m in np.ndindex(2, 2, 5)]
    expected = plain * expected_factors(0.4, 3, rows, 9).reshape(plain.shape)
    assert_close(weights, expected, 4 * UNIT[F32] * expected)


@each_implementation_and_isa
def test_items_are_counted_over_all_batch_axes(implementation):
    weights = uniform_weights(implementation, (2, 1, 3, 2, 4, 9), dropout=0.4, seed=3)
    flat = uniform_weights(implementation, (6, 2, 4, 9), dropout=0.4, seed=3)
    assert_same_bits(weights.reshape(flat.shape), flat)


@each_implementation_and_isa
def test_broadcast_items_are_dropped_each_for_itself(implementation):
    query, key, value = (x[0] for x in qkv(make_rng(0), (1, 2, 1, 4, 9, 8)))
    shared = MODULES[implementation].attention(query, key[None].repeat(3, axis=0), value, dropout=0.4, seed=3)
    whole = MODULES[implementation].attention(
        *(x[None].repeat(3, axis=0) for x in (query, key, value)), dropout=0.4, seed=3
    )
    assert_same_bits(shared, whole)
    assert not np.array_equal(shared[0], shared[1])


@each_implementation_and_isa
def test_rows_by_themselves_are_dropped_as_among_others(implementation):
    query, key, value = qkv(make_rng(1), (2, 4, 2, 70, 90, 8), (F64, F64))
    attend = MODULES[implementation].attention
    keywords = {"causal": True, "dropout": 0.3, "seed": 11}
    whole = attend(query, key, value, query_offset=20, **keywords)
    parts = [
        attend(query[..., a:b, :], key, value, query_offset=20 + a, **keywords) for a, b in ((0, 1), (1, 40), (40, 70))
    ]
    assert_close(np.concatenate(parts, axis=-2), whole, 1e-13)


@pytest.mark.isa
@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("seqlen_q", [1, 5, 8, 16])
def test_few_rows_whose_keys_threads_share(dtypes, seqlen_q):
    """They are no decode tile, and what is known after a split of the keys takes more room than that of one."""
    arrays = qkv(make_rng(14), (1, 2, 2, seqlen_q, 4100, 128), dtypes)
    one, two = (fastattn.attention(*arrays, dropout=0.25, seed=3, num_threads=count) for count in (1, 2))
    assert_same_bits(two, one)


@each_implementation_and_isa
def test_packed_sequences_are_items(implementation):
    lengths = np.array([0, 3, 3, 10, 14])
    query, key, value = qkv(make_rng(2), (14, 4, 2, 1, 1, 8))
    query, key, value = query[:, :, 0], key[:, :, 0], value[:, :, 0]
    module = MODULES[implementation]
    keywords = {"dropout": 0.4, "seed": 2**40 + 1}
    out = module.attention_varlen(query, key, value, lengths, lengths, **keywords)
    # The same sequences in a batch, each padded by keys that are hidden.
    padded = [np.zeros((4, x.shape[1], 7, 8), F32) for x in (query, key, value)]
    for (b, (begin, end)), (x, rows) in itertools.product(
        enumerate(itertools.pairwise(lengths)), zip(padded, (query, key, value), strict=True)
    ):
        x[b, :, : end - begin] = rows[begin:end].swapaxes(0, 1)
    expected = module.attention(*padded, key_lengths=np.diff(lengths), query_offset=0, **keywords)
    for b, (begin, end) in enumerate(itertools.pairwise(lengths)):
        assert_close(out[begin:end].swapaxes(0, 1), expected[b, :, : end - begin], 1e-6)


# --- what becomes of the others -------------------------------------------------------------------

KEYWORDS = {
    "plain": {},
    "causal": {"causal": True, "window": (20, None)},
    "sinks": {"sinks": np.array([0.0, 1.0, -1.0, 2.0])},
    "bias, softcap": {"bias": make_rng(3).standard_normal((4, 1, 33)), "softcap": 2.0},
    "mask": {"mask": make_rng(4).random((2, 1, 21, 33)) < 0.6},
}


@each_implementation_and_isa
@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
def test_the_others_are_scaled_and_lse_stays(implementation, keywords):
    query, key, value = qkv(make_rng(5), (2, 4, 2, 21, 33, 8), (F64, F64))
    asked = {"return_lse": True, "return_weights": True}
    attend = MODULES[implementation].attention
    _, lse, weights = attend(query, key, value, **keywords, **asked)
    out, kept_lse, kept = attend(query, key, value, **keywords, **asked, dropout=0.25, seed=6)
    rows = [(b, h, m + 12) for b, h, m in np.ndindex(2, 4, 21)]
    expected = weights * expected_factors(0.25, 6, rows, 33).reshape(weights.shape)
    assert_close(kept, expected, 1e-14)
    assert_same_bits(kept_lse, lse)
    assert_close(out, expected @ np.repeat(value, 2, axis=1), 1e-13)


@pytest.mark.isa
@given(case=cases(), drawn=dropouts)
def test_any_call(case, drawn):
    check(case.query, case.key, case.value, **case.keywords, **drawn)


@pytest.mark.isa
@given(case=backward_cases(), drawn=dropouts)
def test_any_call_of_backward(case, drawn):
    case, grad_out, grad_lse = case
    arrays = case.query, case.key, case.value, grad_out
    check_backward(fastattn.attention_backward, *arrays, grad_lse=grad_lse, **case.keywords, **drawn)


@each_implementation_and_isa
def test_no_dropout_changes_nothing(implementation):
    arrays = qkv(make_rng(6), (2, 4, 2, 21, 33, 8))
    attend = MODULES[implementation].attention
    for keywords in ({"dropout": 0}, {"dropout": 0.0, "seed": 5}, {"dropout": np.float32(0)}):
        assert_same_bits(attend(*arrays, **keywords), attend(*arrays))


@each_implementation_and_isa
def test_all_may_be_dropped(implementation):
    """A share that rounds to 1 leaves nothing."""
    out, lse = MODULES[implementation].attention(
        *qkv(make_rng(7), (1, 2, 2, 5, 9, 8)), dropout=1 - 2.0**-20, seed=1, return_lse=True
    )
    assert np.all(out == 0)
    assert np.isfinite(lse).all()


# --- statistics -----------------------------------------------------------------------------------

STATISTICS_SHAPE = (2, 4, 64, 64)
SEEDS = [*range(20), *(2**32 * seed for seed in range(1, 11))]


def dropped(implementation, share):
    """Return which weights are dropped, for all seeds: (seeds, batch, heads, rows, keys)."""
    return np.stack([uniform_weights(implementation, STATISTICS_SHAPE, dropout=share, seed=s) == 0 for s in SEEDS])


@each_implementation
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_rates(implementation, share):
    """The mean of N draws of variance s (1 - s) is within five of its deviations, √(s (1 - s) / N)."""
    drops = dropped(implementation, share)
    exact = round(share * 65536) / 65536
    for axes in ((0, 1, 2, 3, 4), (0, 1, 2, 3), (0, 1, 2, 4), (0, 1, 3, 4), (0, 2, 3, 4), (1, 2, 3, 4)):
        means = drops.mean(axis=axes)
        count = drops.size / means.size
        assert np.all(np.abs(means - exact) <= 5 * np.sqrt(exact * (1 - exact) / count)), axes


NEIGHBOURS = [(1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 1, 1), (0, 0, 0, 1, -1)]
NEIGHBOURS += [(0, 0, 0, 0, n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 16)]


@each_implementation
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_neighbours_are_independent(implementation, share):
    """If a and b are, (a - s)(b - s) has mean 0 and deviation s (1 - s), the mean of N is below 5 s (1 - s) / √N."""
    exact = round(share * 65536) / 65536
    deviations = dropped(implementation, share) - exact
    for shift in NEIGHBOURS:
        here = tuple(slice(max(-by, 0), size - max(by, 0)) for by, size in zip(shift, deviations.shape, strict=True))
        there = tuple(slice(max(by, 0), size - max(-by, 0)) for by, size in zip(shift, deviations.shape, strict=True))
        products = deviations[here] * deviations[there]
        assert abs(products.mean()) <= 5 * exact * (1 - exact) / np.sqrt(products.size), shift


# --- gradients ------------------------------------------------------------------------------------


each_backward_case = pytest.mark.parametrize(
    "keywords", [{}, {"causal": True, "sinks": np.array([0.0, 1.0, -2.0, 3.0]), "softcap": 2.0}], ids=["plain", "all"]
)


def backward_case(keywords):
    """Return the arguments, the gradients of a loss with respect to the results, and the names of what is learnt."""
    query, key, value = qkv(make_rng(8), SHAPE, (F64, F64), head_dim_v=2)
    bias = make_rng(9).standard_normal((4, 1, 6))
    arguments = {"query": query, "key": key, "value": value, "bias": bias, **keywords, "dropout": 0.3, "seed": 10}
    out, lse = reference.attention(**arguments, return_lse=True)
    assert not np.array_equal(out, reference.attention(**{**arguments, "dropout": 0.0}))
    weights = make_rng(10).standard_normal(out.shape), make_rng(11).standard_normal(lse.shape)
    return arguments, weights, [name for name in ("query", "key", "value", "bias", "sinks") if name in arguments]


def gradients(module, arguments, weights, learnt):
    (grad_out, grad_lse), (out, lse) = weights, reference.attention(**arguments, return_lse=True)
    asked = {"return_grad_bias": True, "return_grad_sinks": "sinks" in learnt}
    return module.attention_backward(grad_out, out=out, lse=lse, grad_lse=grad_lse, **asked, **arguments)


@each_backward_case
def test_finite_differences(keywords):
    arguments, weights, learnt = backward_case(keywords)

    def loss(name, x):
        out, lse = reference.attention(**{**arguments, name: x}, return_lse=True)
        return (out * weights[0]).sum() + (lse * weights[1]).sum()

    for name, grad in zip(learnt, gradients(reference, arguments, weights, learnt), strict=True):
        assert_close(grad, differences(lambda x, name=name: loss(name, x), arguments[name]), 1e-8, f"grad_{name}")


@pytest.mark.isa
@each_backward_case
def test_gradients_are_those_of_the_reference(keywords):
    """Whose gradients the finite differences have checked."""
    case = backward_case(keywords)
    expected, found = gradients(reference, *case), gradients(fastattn, *case)
    for name, grad, want in zip(case[2], found, expected, strict=True):
        assert_close(grad, want, 1e-13 * max(1, np.abs(want).max()), f"grad_{name}")


PACKED_LENGTHS = np.array([0, 3, 3, 7])
PACKED = {"cu_seqlens_q": PACKED_LENGTHS, "cu_seqlens_k": PACKED_LENGTHS, "causal": True, "dropout": 0.3, "seed": 10}


def packed_case():
    arrays = [x[:, :, 0] for x in qkv(make_rng(12), (7, 4, 2, 1, 1, 3), (F64, F64))]
    out, lse = reference.attention_varlen(*arrays, return_lse=True, **PACKED)
    return make_rng(13).standard_normal(out.shape), *arrays, out, lse


def test_finite_differences_of_packed_sequences():
    grad_out, *arrays, out, lse = packed_case()
    grads = reference.attention_varlen_backward(grad_out, *arrays, out, lse, **PACKED)
    for i, grad in enumerate(grads):

        def loss(x, i=i):
            return (reference.attention_varlen(*arrays[:i], x, *arrays[i + 1 :], **PACKED) * grad_out).sum()

        assert_close(grad, differences(loss, arrays[i]), 1e-8, f"grad of argument {i}")


@pytest.mark.isa
def test_gradients_of_packed_sequences_are_those_of_the_reference():
    case = packed_case()
    expected = reference.attention_varlen_backward(*case, **PACKED)
    for i, (grad, want) in enumerate(zip(fastattn.attention_varlen_backward(*case, **PACKED), expected, strict=True)):
        assert_close(grad, want, 1e-13 * max(1, np.abs(want).max()), f"grad of argument {i}")


# --- bad input ------------------------------------------------------------------------------------

BAD = {
    "no seed": ({"dropout": 0.1}, ValueError, r"dropout is 0\.1, but seed is not given"),
    "one": ({"dropout": 1.0, "seed": 1}, ValueError, r"dropout must be at least 0 and less than 1, but is 1\.0"),
    "negative": ({"dropout": -0.1, "seed": 1}, ValueError, r"dropout must be .*, but is -0\.1"),
    "NaN": ({"dropout": np.nan, "seed": 1}, ValueError, "dropout must be .*, but is nan"),
    "words": ({"dropout": "0.1", "seed": 1}, TypeError, "dropout must be a real number, not '0.1'"),
    "flag": ({"dropout": True, "seed": 1}, TypeError, "dropout must be a real number, not True"),
    "negative seed": (
        {"dropout": 0.1, "seed": -1},
        ValueError,
        "seed must be from 0 to 18446744073709551615, but is -1",
    ),
    "large seed": ({"dropout": 0.1, "seed": 2**64}, ValueError, "seed must be from 0 to"),
    "fraction": ({"dropout": 0.1, "seed": 1.0}, TypeError, "seed must be an int, not 1.0"),
    "seed alone": ({"seed": -1}, ValueError, "seed must be from 0 to"),
}


@each_implementation
@pytest.mark.parametrize("case", BAD)
def test_bad_input(implementation, case):
    keywords, error, words = BAD[case]
    query, key, value = qkv(make_rng(), (1, 2, 2, 3, 4, 8))
    out = np.full(query.shape, 7, F32)
    with pytest.raises(error, match=words):
        MODULES[implementation].attention(query, key, value, out=out, **keywords)
    assert np.all(out == 7)


@each_implementation
@pytest.mark.parametrize("case", BAD)
def test_bad_input_of_backward(implementation, case):
    keywords, error, words = BAD[case]
    query, key, value = qkv(make_rng(), (1, 2, 2, 3, 4, 8))
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    with pytest.raises(error, match=words):
        MODULES[implementation].attention_backward(out, query, key, value, out, lse, **keywords)
