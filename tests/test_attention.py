"""Everything at once: any legal call agrees with the reference."""

import numpy as np
import pytest
from hypothesis import given
from oracle import DTYPE_IDS, DTYPES, check, make_rng, qkv
from strategies import cases

import fastattn
from fastattn import reference


@pytest.mark.isa
@given(case=cases())
def test_any_call(case):
    check(case.query, case.key, case.value, **case.keywords)


@pytest.mark.isa
@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    "shape",
    [(1, 4, 4, 8, 8, 16), (2, 6, 2, 70, 150, 64), (3, 8, 1, 1, 333, 128), (1, 4, 2, 3, 1000, 80)],
    ids=str,
)
def test_shapes_of_use(dtypes, shape):
    """Small, grouped, one-row decoding and a short speculative block, each with a causal edge."""
    query, key, value = qkv(make_rng(*shape), shape, dtypes)
    check(query, key, value, causal=True)


@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_return_structure(return_lse, return_weights):
    query, key, value = qkv(make_rng(), (2, 4, 2, 5, 7, 8))
    flags = {"return_lse": return_lse, "return_weights": return_weights}
    result = fastattn.attention(query, key, value, **flags)
    expected = reference.attention(query, key, value, **flags)
    assert isinstance(result, tuple) == (return_lse or return_weights)
    if isinstance(result, tuple):
        assert [x.shape for x in result] == [x.shape for x in expected]
        assert [x.dtype for x in result] == [x.dtype for x in expected]
    else:
        assert isinstance(result, np.ndarray)


@pytest.mark.parametrize(
    "shape",
    [
        (0, 2, 2, 3, 4, 8),
        (2, 2, 2, 0, 4, 8),
        (2, 2, 2, 3, 0, 8),
        (2, 2, 2, 3, 4, 0),
        (2, 0, 0, 3, 4, 8),
        (0, 0, 0, 0, 0, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
def test_empty_axes(shape, dtypes):
    query, key, value = qkv(make_rng(), shape, dtypes)
    check(query, key, value)
    check(query, key, value[..., :0])
    check(query, key, value, causal=True, sinks=np.ones(shape[1], np.float32))


def test_lists_are_arrays():
    out = fastattn.attention([[1.0, 0.0]], [[4.0, 0.0], [0.0, 4.0]], [[1.0], [0.0]])
    assert out.dtype == np.float64
    # 1 / (1 + exp(-4/√2))
    assert abs(out[0, 0] - 1 / (1 + np.exp(-4 / np.sqrt(2)))) < 1e-15


def test_batch_broadcasts():
    rng = make_rng()
    query, key, value = qkv(rng, (3, 4, 2, 5, 6, 8))
    check(query, key[0], value[:1])
    check(query[:1], key, value[0])
    check(query[:, None], np.stack([key[0]] * 2), value[:, None])


def test_batch_of_many_axes():
    query, key, value = qkv(make_rng(), (2, 2, 2, 5, 6, 8))
    query, key, value = (x.reshape(*[1] * 7, 2, *[1] * 6, *x.shape[1:]) for x in (query, key, value))
    check(query, key[0], value[:, 0])
    with pytest.raises(ValueError, match="axes"):
        fastattn.attention(query[(None,) * 13], key, value)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(512, 512), (512, 1), (1, 512), (511, 509)])
def test_head_dim_limits(head_dim, head_dim_v):
    rng = make_rng()
    query, key, value = qkv(rng, (1, 2, 1, 17, 33, head_dim), head_dim_v=head_dim_v)
    check(query, key, value)
