"""Rotary positions, against their definition by complex numbers."""

import numpy as np
import pytest
from oracle import BF16, F16, F32, F64, UNIT, assert_close, assert_same_bits, make_rng, normal

import fastattn

each_convention = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def turned(x, positions=0, *, base=10000.0, dim=None, interleaved=False):
    """Multiply pairs, as complex numbers, by exp(i p base ** (-2 i / dim)); positions are (..., 1, seq, 1)."""
    x = np.asarray(x).astype(np.float64)
    dim = x.shape[-1] if dim is None else dim
    low, high = (np.s_[0:dim:2], np.s_[1:dim:2]) if interleaved else (np.s_[: dim // 2], np.s_[dim // 2 : dim])
    angles = positions * base ** (-2 * np.arange(dim // 2) / dim)
    z = (x[..., low] + 1j * x[..., high]) * np.exp(1j * angles)
    out = x.copy()
    out[..., low], out[..., high] = z.real, z.imag
    return out


def tolerance(x, largest_position, dtype):
    """Return a bound on the error.

    Frequencies are good to 4 u of float64, on both sides, and so are angles to 12 p u; cos, sin, two products and a
    sum are 4 roundings of the working precision, each of at most |z|, up to sqrt(2) of the largest element; and
    results in half types are rounded once more.
    """
    working = UNIT[F64] if dtype == F64 else UNIT[F32]
    modulus = 1.5 * float(np.abs(x.astype(np.float64)).max())
    return modulus * (12 * (largest_position + 1) * UNIT[F64] + 8 * working + UNIT[np.dtype(dtype)])


@each_convention
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
@pytest.mark.parametrize("dim", [None, 2, 10])
def test_against_complex_numbers(dtype, interleaved, dim):
    x = normal(make_rng(), (2, 3, 7, 16), dtype)
    rows = np.arange(100, 107)
    out = fastattn.rotary(x, 100, base=500.0, dim=dim, interleaved=interleaved)
    assert out.dtype == dtype
    expected = turned(x, rows[:, None], base=500.0, dim=dim, interleaved=interleaved)
    assert_close(out, expected, tolerance(x, 107, dtype))
    if dim:
        assert_same_bits(out[..., dim:], x[..., dim:])


def test_positions_default_to_the_number_of_the_row():
    x = normal(make_rng(), (3, 5, 8), F32)
    assert_same_bits(fastattn.rotary(x), fastattn.rotary(x, [0, 1, 2, 3, 4]))
    assert_same_bits(fastattn.rotary(x, 7), fastattn.rotary(x, np.arange(7, 12)))


@pytest.mark.parametrize("shape", [(5,), (2, 5), (1, 5), (2, 1), (3, 1, 5), (3, 2, 5)], ids=str)
def test_positions_for_each_batch(shape):
    rng = make_rng(1)
    x = normal(rng, (3, 2, 4, 5, 8), F64)
    positions = rng.integers(-50, 50, shape)
    rows = np.broadcast_to(positions, (3, 2, 5))[:, :, None, :, None]
    assert_close(fastattn.rotary(x, positions), turned(x, rows), tolerance(x, 50, F64))


@each_convention
def test_scores_depend_on_the_difference_of_positions(interleaved):
    query, key = normal(make_rng(2), (2, 1, 1, 32), F64)

    def score(p, q):
        turn = {"interleaved": interleaved}
        return (fastattn.rotary(query, p, **turn) * fastattn.rotary(key, q, **turn)).sum()

    # 32 terms of at most max², each off by twice the tolerance of its factors.
    allowed = 32 * np.abs(query).max() * 4 * tolerance(key, 5040, F64)
    assert abs(score(12, 5) - score(5012, 5005)) <= allowed
    assert abs(score(12, 5) - score(12, 6)) > 1e-3


@each_convention
def test_many_rows_are_turned_in_blocks(interleaved, monkeypatch):
    monkeypatch.setitem(fastattn.rotary.__globals__, "ROTARY_BLOCK", 3 * 4 * 8)
    x = normal(make_rng(3), (4, 32, 8), F64)
    out = fastattn.rotary(x, 3, interleaved=interleaved)
    assert_close(out, turned(x, np.arange(3, 35)[:, None], interleaved=interleaved), tolerance(x, 35, F64))


@each_convention
@pytest.mark.parametrize("positions", [0, 1000, [[3, 0, -5, 2, 2**40]], np.arange(5, dtype=np.uint8)], ids=str)
def test_inverse_rotates_back_and_is_the_transpose(interleaved, positions):
    rng = make_rng(5)
    x, y = normal(rng, (2, 2, 3, 5, 8), F64)
    options = {"base": 100.0, "dim": 6, "interleaved": interleaved}
    there = fastattn.rotary(x, positions, **options)
    assert_close(fastattn.rotary(there, positions, **options, inverse=True), x, 1e-14)
    back = fastattn.rotary(y, positions, **options, inverse=True)
    assert abs((there * y).sum() - (x * back).sum()) < 1e-12


@each_convention
def test_out_may_be_x(interleaved):
    x = normal(make_rng(4), (2, 3, 5, 8), F32)
    expected = fastattn.rotary(x, 9, dim=4, interleaved=interleaved)
    apart = np.full_like(x, 7)
    assert fastattn.rotary(x, 9, dim=4, interleaved=interleaved, out=apart) is apart
    assert_same_bits(apart, expected)
    assert fastattn.rotary(x, 9, dim=4, interleaved=interleaved, out=x) is x
    assert_same_bits(x, expected)


def test_strided_views_are_turned_where_they_lie():
    buffer = normal(make_rng(5), (2, 5, 3, 2, 8), F32)
    before = buffer.copy()
    view = buffer[:, :, 1].swapaxes(1, 2)
    fastattn.rotary(view, out=view)
    assert_close(view, turned(before[:, :, 1].swapaxes(1, 2), np.arange(5)[:, None]), tolerance(before, 5, F32))
    assert_same_bits(buffer[:, :, [0, 2]], before[:, :, [0, 2]])


def test_in_place_through_another_view_of_axes_of_size_one():
    x = normal(make_rng(6), (1, 5, 8), F32)
    expected = fastattn.rotary(x, 3)
    out = np.lib.stride_tricks.as_strided(x, x.shape, (4, *x.strides[1:]))
    assert out.strides != x.strides
    fastattn.rotary(x, 3, out=out)
    assert_same_bits(x, expected)


def test_two_axes_are_one_head():
    x = normal(make_rng(6), (5, 8), F32)
    assert_same_bits(fastattn.rotary(x, 3), fastattn.rotary(x[None], 3)[0])
    assert_same_bits(fastattn.rotary(x, np.arange(3, 8)), fastattn.rotary(x[None], 3)[0])


@pytest.mark.parametrize("shape", [(0, 4, 5, 8), (2, 0, 5, 8), (2, 4, 0, 8)], ids=str)
def test_nothing_to_turn(shape):
    assert fastattn.rotary(np.zeros(shape, np.float32)).shape == shape


def read_only(x):
    x.flags.writeable = False
    return x


X = np.arange(80, dtype=np.float32).reshape(2, 5, 8)
CASES = {
    "x integers": ({"x": X.astype(int)}, TypeError, ["x has dtype int64", "float32, float64, float16, bfloat16"]),
    "x byte-swapped": ({"x": X.astype(">f4")}, TypeError, ["x has dtype >f4", "byte order"]),
    "x one axis": ({"x": X[0, 0]}, ValueError, ["x has shape (8,)", "(..., heads, seq, head_dim)"]),
    "head_dim odd": ({"x": X[..., :7], "out": None}, ValueError, ["dim must be even", "7"]),
    "dim odd": ({"dim": 3}, ValueError, ["dim must be even, but is 3", "head_dim of 8"]),
    "dim large": ({"dim": 10}, ValueError, ["dim must be from 2 to 8, but is 10"]),
    "dim 0": ({"dim": 0}, ValueError, ["dim must be from 2 to 8, but is 0"]),
    "dim float": ({"dim": 4.0}, TypeError, ["dim must be an int, not 4.0"]),
    "base 0": ({"base": 0}, ValueError, ["base must be a finite number greater than 0, but is 0"]),
    "base NaN": ({"base": np.nan}, ValueError, ["base", "nan"]),
    "base word": ({"base": "10000"}, ValueError, ["base", "'10000'"]),
    "interleaved": ({"interleaved": 1}, TypeError, ["interleaved must be a bool, not 1"]),
    "inverse": ({"inverse": 1}, TypeError, ["inverse must be a bool, not 1"]),
    "positions floats": ({"positions": 1.5}, TypeError, ["positions must be an int", "float64"]),
    "positions beyond int64": ({"positions": np.uint64(2**64 - 1)}, ValueError, ["positions", "2**53", str(2**64 - 1)]),
    "positions beyond all": ({"positions": 2**70}, ValueError, ["positions", "2**53", str(2**70)]),
    "positions beyond float64": ({"positions": 2**53 + 1}, ValueError, ["positions", "9007199254740993"]),
    "positions far below": ({"positions": -(2**63)}, ValueError, ["-2**53", str(-(2**63))]),
    "positions of uint64": ({"positions": np.full(5, 2**63, np.uint64)}, ValueError, ["positions", str(2**63)]),
    "positions some beyond": ({"positions": [0, 1, 2, 3, 2**64]}, ValueError, ["positions", "2**53"]),
    "positions objects": ({"positions": [0, 1, 2, 3, None]}, TypeError, ["positions must be an int", "object"]),
    "positions shape": ({"positions": [1, 2]}, ValueError, ["positions has shape (2,)", "broadcasts to (5,)"]),
    "positions with heads": ({"positions": np.zeros((2, 5), int)}, ValueError, ["positions", "(2, 5)", "(5,)"]),
    "out list": ({"out": [0.0]}, TypeError, ["out must be an ndarray, not list"]),
    "out dtype": ({"out": np.zeros((2, 5, 8))}, TypeError, ["out has dtype float64; accepted is float32"]),
    "out shape": ({"out": np.zeros((5, 8), F32)}, ValueError, ["out has shape (5, 8); accepted is (2, 5, 8)"]),
    "out read-only": ({"out": read_only(np.zeros((2, 5, 8), F32))}, ValueError, ["out is read-only"]),
    "out overlaps": ({"x": X, "out": X[:, ::-1]}, ValueError, ["out overlaps x", "not x itself"]),
}


@pytest.mark.parametrize(("spoilt", "error", "words"), CASES.values(), ids=CASES)
def test_errors(spoilt, error, words):
    good = {"x": X.copy(), "out": np.full_like(X, 7)}
    out = (good | spoilt)["out"]
    before = np.array(out)
    with pytest.raises(error) as raised:
        fastattn.rotary(**(good | spoilt))
    for word in words:
        assert word in str(raised.value)
    assert np.array_equal(out, before) or out is None
