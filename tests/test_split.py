"""float32 and float16 split into parts that a unit for bfloat16 multiplies: nobody is to notice but for the time."""

import numpy as np
import pytest
from oracle import BF16, F16, F32, F64, assert_same_bits, formula, make_rng, python, qkv, run_script

import fastattn

pytestmark = pytest.mark.isa
# Enough rows, keys and head dims for the split, with tails of all of them; and whole tiles.
SHAPES = [(1, 2, 2, 150, 200, 72), (1, 4, 2, 64, 128, 64)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def magnified(shape, factors):
    """Arrays times factors that float32 holds, exactly: powers of two."""
    return [x * F32.type(factor) for x, factor in zip(qkv(make_rng(*shape), shape), factors, strict=True)]


@each_shape
@pytest.mark.parametrize(
    "factors",
    [
        (1, 1, 1),
        (2.0**60, 2.0**-60, 1),
        (2.0**-60, 2.0**60, 1),
        (2.0**-100, 2.0**100, 1),
        (2.0**100, 2.0**-100, 1),
        (2.0**70, 2.0**-72, 2.0**-70),
        (1, 1, 2.0**100),
        (1, 1, 2.0**-70),
        (1, 1, 2.0**-95),
    ],
    ids=lambda factors: "-".join(f"{np.log2(factor):.0f}" for factor in factors),
)
def test_error_at_most_twice_that_of_numpy_at_every_magnitude(shape, factors):
    query, key, value = magnified(shape, factors)
    truth = formula(query, key, value, F64)
    error = np.abs(fastattn.attention(query, key, value) - truth).max()
    assert error <= 2 * np.abs(formula(query, key, value, F32) - truth).max()


@each_shape
def test_scores_far_apart(shape):
    """Each row's weight is on one key, to the last bit."""
    query, key, value = magnified(shape, (2.0**30, 2.0**31, 1))
    best = (query.astype(F64) @ np.repeat(key, shape[1] // shape[2], 1).astype(F64).swapaxes(-1, -2)).argmax(-1)
    expected = np.take_along_axis(np.repeat(value, shape[1] // shape[2], 1), best[..., None], axis=2)
    assert_same_bits(fastattn.attention(query, key, value), expected)


@pytest.mark.parametrize("dtype", [F32, F16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("planted", [np.inf, -np.inf, np.nan], ids=str)
@pytest.mark.parametrize("where", ["query", "key", "value"])
@each_shape
def test_what_is_not_finite_reaches_those_who_see_it_alone(shape, where, planted, dtype):
    arrays = dict(zip(("query", "key", "value"), qkv(make_rng(*shape), shape, (dtype, dtype)), strict=True))
    clean = fastattn.attention(**arrays, causal=True, query_offset=70)
    place = 5 if where == "query" else 100
    arrays[where][0, 0, place, 3] = planted
    arrays[where][0, 0, place, 7] = 0
    out = fastattn.attention(**arrays, causal=True, query_offset=70)
    with np.errstate(invalid="ignore", over="ignore"):
        truth = fastattn.reference.attention(**arrays, causal=True, query_offset=70)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(truth))
    np.testing.assert_array_equal(np.isinf(out), np.isinf(truth))
    group = shape[1] // shape[2]
    sees = np.zeros(out.shape, bool)
    if where == "query":
        sees[0, 0, place] = True
    elif where == "key":
        sees[0, :group, place - 70 :] = True
    else:
        sees[0, :group, place - 70 :, 3] = True
        sees[0, :group, place - 70 :, 7] = True
    assert_same_bits(np.where(sees, 0, out).astype(dtype), np.where(sees, 0, clean).astype(dtype))


@pytest.mark.parametrize("planted", [2.0**60, -(2.0**127), 2.0**-120], ids=lambda x: f"{x:.1e}")
@pytest.mark.parametrize("where", ["key", "value"])
@each_shape
def test_hidden_numbers_of_every_magnitude_change_no_bit(shape, where, planted):
    arrays = dict(zip(("query", "key", "value"), qkv(make_rng(*shape), shape), strict=True))
    mask = np.ones(shape[4], bool)
    mask[[3, 90]] = False
    clean = fastattn.attention(**arrays, mask=mask)
    arrays[where][:, :, [3, 90]] = planted
    assert_same_bits(fastattn.attention(**arrays, mask=mask), clean)


@pytest.mark.parametrize("key_dtype", [F16, BF16, F32], ids=lambda dtype: dtype.name)
@each_shape
def test_rows_do_not_depend_on_their_company(shape, key_dtype):
    query, key, value = qkv(make_rng(*shape), shape, (F32, key_dtype))
    alone = fastattn.attention(query, key, value)
    query[:, :, 1::2] *= np.where(np.arange(shape[5]) % 2, F32.type(2.0**80), F32.type(2.0**-80))
    assert_same_bits(fastattn.attention(query, key, value)[:, :, ::2], alone[:, :, ::2])


def test_a_hidden_value_changes_no_bit_of_tiny_ones():
    query, key, value = magnified((1, 1, 1, 128, 256, 64), (1, 1, 2.0**-103))
    mask = np.arange(256) != 7
    clean = fastattn.attention(query, key, value, mask=mask)
    value[..., 7, :] = 1
    assert_same_bits(fastattn.attention(query, key, value, mask=mask), clean)


def test_large_numbers_change_no_bit_of_others():
    """A hidden key and another row that are packed smaller, in the same block and tile: 2^-138 times the rest."""
    query, key, value = qkv(make_rng(), (1, 1, 1, 128, 256, 64))
    mask = np.arange(256) != 7
    clean = fastattn.attention(query, key, value, mask=mask)
    query[..., 5, 0] = key[..., 7, 0] = 2.0**60
    out = fastattn.attention(query, key, value, mask=mask)
    assert_same_bits(np.delete(out, 5, axis=2), np.delete(clean, 5, axis=2))


@pytest.mark.parametrize("exponent", [-60, -80])
def test_small_rows_beside_a_large_one(exponent):
    """Scores of the usual size, of numbers that are below 2^-126 if they are packed smaller."""
    query, key, value = magnified((1, 1, 1, 128, 256, 64), (2.0**exponent, 2.0 ** min(-exponent, 58), 1))
    scale = 2.0 ** max(0, -exponent - 58) / 8
    alone = fastattn.attention(query, key, value, scale=scale)
    query[..., 5, 0] = 2.0**60
    out = fastattn.attention(query, key, value, scale=scale)
    assert_same_bits(np.delete(out, 5, axis=2), np.delete(alone, 5, axis=2))


def test_sums_of_many_keys():
    """Values of one sign, whose sum's roundings do not cancel. Each row shows it: some are compared."""
    rng = make_rng()
    query, key = (rng.standard_normal((1, 1, n, 64)).astype(F32) for n in (128, 32768))
    value = rng.random((1, 1, 32768, 64)).astype(F32)
    some = query[:, :, ::16]
    truth = formula(some, key, value, np.longdouble)
    error = np.abs(fastattn.attention(query, key, value)[:, :, ::16] - truth).max()
    assert error <= 2 * np.abs(formula(some, key, value, F32) - truth).max()


@pytest.mark.parametrize("window", [(1000, 0), (700, 100)], ids=str)
def test_superblocks_begin_at_the_same_keys_whatever_shares_an_item(window):
    """How many tiles an item has depends on the threads and on the batch, and with it the first key it sees."""
    query, key, value = qkv(make_rng(), (2, 1, 1, 2048, 2048, 64))
    alone = [fastattn.attention(query[:1], key[:1], value[:1], window=window, num_threads=n) for n in (1, 2)]
    assert_same_bits(alone[1], alone[0])
    assert_same_bits(fastattn.attention(query, key, value, window=window)[:1], alone[0])


def test_plan_counts_the_keys_that_are_seen():
    """64 of 200: too few to be split."""
    query, key, value = qkv(make_rng(), (1, 1, 1, 128, 200, 64))
    few = fastattn.plan(query, key, value, causal=True, query_offset=-64)
    assert few.path == fastattn.plan(query, key[:, :, :64], value[:, :, :64]).path


PATH = """
import numpy as np, fastattn
x = np.zeros((1, 2, 256, 64), {dtype!r})
print(fastattn.plan(x, x, x).path, fastattn.show_config(mode="dicts")["split"])
"""


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_it_can_be_switched_off(dtype):
    splits = fastattn.show_config(mode="dicts")["isa"].startswith("amx")
    source = PATH.format(dtype=dtype)
    assert run_script(source, FASTATTN_SPLIT="0").split() == ["float32", "False"]
    for switched_on in ("", "1"):
        path, split = run_script(source, FASTATTN_SPLIT=switched_on).split()
        assert (path, split) == (("split", "True") if splits else ("float32", "False"))


def test_another_setting_is_refused():
    done = python("-c", "import fastattn", FASTATTN_SPLIT="yes")
    assert done.returncode != 0
    assert "FASTATTN_SPLIT is 'yes'; accepted are 0, 1 and always" in done.stderr
