"""Gradients: against finite differences, against PyTorch's autograd, and the same for every implementation."""

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
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
    check_backward,
    formula_backward,
    make_rng,
    normal,
    qkv,
)
from strategies import backward_cases

import fastattn
from fastattn import reference

MODULES = {"reference": reference, "fast": fastattn}
each_implementation = pytest.mark.parametrize("implementation", MODULES)
# The reference is the same on each instruction set.
each_implementation_and_isa = pytest.mark.parametrize(
    "implementation", [pytest.param(name, marks=[pytest.mark.isa] * (name != "reference")) for name in MODULES]
)
each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)


def backward_of(implementation):
    return MODULES[implementation].attention_backward


# --- finite differences ---------------------------------------------------------------------------

# 2 items, 4 heads in 2 groups, 4 rows, 6 keys.
SHAPE = (2, 4, 2, 4, 6, 3)
rng_of_keywords = make_rng(0)
HIDING = np.where(rng_of_keywords.random((4, 6)) < 0.3, -np.inf, rng_of_keywords.standard_normal((4, 6)))
KEYWORDS = {
    "plain": {},
    "scale": {"scale": -0.7},
    "scale 0": {"scale": 0.0},
    "causal": {"causal": True},
    "causal, query_offset": {"causal": True, "query_offset": 0},
    "causal, query_offset per batch": {"causal": True, "query_offset": [-2, 5]},
    "window": {"window": (2, 1)},
    "window, query_offset": {"window": (1, None), "query_offset": [1, 4]},
    "mask": {"mask": rng_of_keywords.random((2, 1, 4, 6)) < 0.6},
    "mask that leaves nothing": {"mask": np.zeros((4, 1), bool)},
    "bias": {"bias": rng_of_keywords.standard_normal((2, 4, 4, 6))},
    "bias of heads": {"bias": rng_of_keywords.standard_normal((4, 1, 1))},
    "bias of a batch's keys": {"bias": rng_of_keywords.standard_normal((2, 1, 1, 6))},
    "bias of rows": {"bias": rng_of_keywords.standard_normal((4, 1))},
    "bias of all": {"bias": np.array(0.5)},
    "bias that hides": {"bias": HIDING},
    "alibi_slopes": {"alibi_slopes": [0.5, 0.25, 0.0, 1.0]},
    "alibi_slopes per batch": {"alibi_slopes": rng_of_keywords.random((2, 4)), "causal": True},
    "softcap": {"softcap": 0.8},
    "softcap, bias": {"softcap": 1.5, "bias": rng_of_keywords.standard_normal((4, 4, 6)), "scale": 1.0},
    "sinks": {"sinks": np.array([0.0, 1.0, -2.0, 3.0])},
    "sinks without keys": {
        "sinks": np.array([0.0, 1.0, -2.0, 3.0]),
        "mask": np.array([[True], [False], [True], [True]]),
    },
    "key_lengths": {"key_lengths": [6, 2]},
    "key_lengths, causal": {"key_lengths": [5, 0], "causal": True},
    "all": {
        "scale": 0.9,
        "causal": True,
        "query_offset": [3, 4],
        "window": (4, 0),
        "mask": rng_of_keywords.random((4, 6)) < 0.8,
        "bias": rng_of_keywords.standard_normal((1, 4, 1, 6)),
        "alibi_slopes": [0.5, 0.25, 0.0, 1.0],
        "softcap": 3.0,
        "sinks": np.array([0.0, 1.0, -2.0, 3.0]),
        "key_lengths": [6, 5],
    },
}
LEARNT = ("query", "key", "value", "bias", "sinks")


def loss(weight_out, weight_lse, **arguments):
    """A number that depends on out and, where there is a key or a sink, on lse."""
    out, lse = reference.attention(**arguments, return_lse=True)
    return math.fsum((weight_out * out).ravel()) + math.fsum((weight_lse * np.where(lse == -np.inf, 0, lse)).ravel())


def differences(of, x, step=1e-3):
    """Return the gradient of a function of an array, by differences whose error is of fourth order in the step."""
    grad = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        moved = [x.copy() for _ in range(4)]
        for by, each in zip((1, -1, 2, -2), moved, strict=True):
            each[index] += by * step
        once, back, twice, back_twice = (of(each) for each in moved)
        grad[index] = (8 * (once - back) - (twice - back_twice)) / (12 * step)
    return grad


def arguments_of(case):
    query, key, value = qkv(make_rng(1), SHAPE, (F64, F64), head_dim_v=2)
    return {"query": query, "key": key, "value": value, **KEYWORDS[case]}


def cotangents(case, query, value, **_):
    rng = make_rng(2)
    rows = (*np.broadcast_shapes(query.shape[:-3], value.shape[:-3]), *query.shape[-3:-1])
    grad_lse = rng.standard_normal(rows)
    return rng.standard_normal((*rows, value.shape[-1])), grad_lse


@functools.cache
def numeric_gradients(case):
    arguments = arguments_of(case)
    weights = cotangents(case, **arguments)
    return {
        name: differences(lambda x, name=name: loss(*weights, **{**arguments, name: x}), arguments[name])
        for name in LEARNT
        if name in arguments
    }


def gradients(implementation, grad_out, grad_lse, **arguments):
    """Return the gradients of all that can be learnt, by their names."""
    asked = {f"return_grad_{name}": True for name in ("bias", "sinks") if name in arguments}
    out, lse = reference.attention(**arguments, return_lse=True)
    grads = backward_of(implementation)(grad_out, out=out, lse=lse, grad_lse=grad_lse, **arguments, **asked)
    return dict(zip([name for name in LEARNT if name in arguments], grads, strict=True))


@each_implementation
@pytest.mark.parametrize("case", KEYWORDS)
def test_finite_differences(implementation, case):
    """The step's error is of size 1e-12 times a fifth derivative, and what rounding adds 1e-15 / 1e-3."""
    arguments = arguments_of(case)
    grads = gradients(implementation, *cotangents(case, **arguments), **arguments)
    for name, expected in numeric_gradients(case).items():
        assert_close(grads[name], expected, 1e-8, f"grad_{name}")


@each_implementation
@pytest.mark.parametrize(
    "batches",
    [((3,), (1,), (3,)), ((1,), (3,), (3,)), ((3,), (), ()), ((2, 1), (3,), (2, 3)), ((), (), ())],
    ids=str,
)
def test_broadcast_batches_are_summed(implementation, batches):
    """Gradients of what was repeated add up."""
    arrays = [x[0] for x in qkv(make_rng(3), (1, 4, 2, 5, 7, 3), (F64, F64))]
    rng = make_rng(4)
    query, key, value = (x + 0.1 * rng.standard_normal((*b, *x.shape)) for b, x in zip(batches, arrays, strict=True))
    batch = np.broadcast_shapes(*batches)
    weights = rng.standard_normal((*batch, 4, 5, 3)), rng.standard_normal((*batch, 4, 5))
    grads = gradients(implementation, *weights, query=query, key=key, value=value)
    whole = [np.broadcast_to(x, (*batch, *x.shape[-3:])) for x in (query, key, value)]
    repeated = gradients(implementation, *weights, **dict(zip(("query", "key", "value"), whole, strict=True)))
    for name, x in {"query": query, "key": key, "value": value}.items():
        expected = repeated[name].reshape(-1, *x.shape).sum(axis=0) if x.ndim == 3 else repeated[name]
        stretched = tuple(a for a, size in enumerate(x.shape) if size != expected.shape[a + expected.ndim - x.ndim])
        lead = tuple(range(expected.ndim - x.ndim))
        expected = expected.sum(axis=lead).sum(axis=stretched, keepdims=True)
        assert_close(grads[name], expected, 1e-12, f"grad_{name}")


@each_implementation
def test_one_head(implementation):
    """2-D arrays are one head, in gradients, too."""
    arrays = [x[0, 0] for x in qkv(make_rng(5), (1, 1, 1, 4, 6, 3), (F64, F64))]
    names = ("query", "key", "value")
    bias = make_rng(6).standard_normal((4, 6))
    weights = make_rng(7).standard_normal((4, 3)), make_rng(8).standard_normal(4)
    grads = gradients(implementation, *weights, **dict(zip(names, arrays, strict=True)), bias=bias)
    expected = gradients(
        implementation,
        *(x[None] for x in weights),
        **{n: x[None] for n, x in zip(names, arrays, strict=True)},
        bias=bias,
    )
    for name in names:
        assert_same_bits(grads[name], expected[name][0])
    assert_same_bits(grads["bias"], expected["bias"])


# --- autograd -------------------------------------------------------------------------------------

rng_of_torch = make_rng(9)
SEEN = rng_of_torch.random((2, 1, 4, 6)) < 0.6
SEEN[..., 0] = True  # PyTorch has NaN for a row without keys
AUTOGRAD = {
    "plain": ({}, {}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "causal": ({"causal": True, "query_offset": 0}, {"is_causal": True}),
    "mask": ({"mask": SEEN}, {"attn_mask": SEEN}),
    "bias": ({"bias": KEYWORDS["bias"]["bias"]}, {"attn_mask": KEYWORDS["bias"]["bias"]}),
    "bias of heads": ({"bias": KEYWORDS["bias of heads"]["bias"]}, {"attn_mask": KEYWORDS["bias of heads"]["bias"]}),
}


@each_implementation
@pytest.mark.parametrize("case", AUTOGRAD)
def test_autograd_of_torch(implementation, case):
    torch = pytest.importorskip("torch")
    ours, theirs = AUTOGRAD[case]
    query, key, value = qkv(make_rng(10), SHAPE, (F64, F64), head_dim_v=5)
    grad_out = make_rng(11).standard_normal((2, 4, 4, 5))
    leaves = [torch.from_numpy(x).requires_grad_() for x in (query, key, value)]
    theirs = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in theirs.items()}
    if "bias" in ours:
        theirs["attn_mask"].requires_grad_()
        leaves.append(theirs["attn_mask"])
        theirs["attn_mask"] = theirs["attn_mask"].expand(2, 4, 4, 6)
    out = torch.nn.functional.scaled_dot_product_attention(*leaves[:3], **theirs, enable_gqa=True)
    out.backward(torch.from_numpy(grad_out))
    grads = gradients(implementation, grad_out, None, query=query, key=key, value=value, **ours)
    for (name, grad), leaf in zip(grads.items(), leaves, strict=True):
        assert_close(grad, leaf.grad.numpy(), 1e-12, f"grad_{name}")


@each_implementation
def test_autograd_of_torch_through_lse(implementation):
    torch = pytest.importorskip("torch")
    query, key, value = qkv(make_rng(12), (2, 3, 3, 4, 6, 5), (F64, F64))
    sinks = make_rng(13).standard_normal(3)
    grad_lse = make_rng(14).standard_normal((2, 3, 4))
    q, k, s = leaves = [torch.from_numpy(x).requires_grad_() for x in (query, key, sinks)]
    scores = torch.cat([q @ k.mT / 5**0.5, s[:, None, None].expand(2, 3, 4, 1)], dim=-1)
    torch.logsumexp(scores, dim=-1).backward(torch.from_numpy(grad_lse))
    grad_out = np.zeros((2, 3, 4, 5))
    grads = gradients(implementation, grad_out, grad_lse, query=query, key=key, value=value, sinks=sinks)
    for name, leaf in zip(("query", "key", "sinks"), leaves, strict=True):
        assert_close(grads[name], leaf.grad.numpy(), 1e-12, f"grad_{name}")
    np.testing.assert_array_equal(grads["value"], 0)


@pytest.mark.parametrize("case", AUTOGRAD)
def test_autograd_of_jax(case):
    """By `jax.grad` of the formula, in float64."""
    jax = pytest.importorskip("jax")
    keywords, theirs = AUTOGRAD[case]
    query, key, value = qkv(make_rng(10), SHAPE, (F64, F64), head_dim_v=5)
    grad_out = make_rng(11).standard_normal((2, 4, 4, 5))
    seen = np.tri(4, 6, dtype=bool) if "is_causal" in theirs else keywords.get("mask", True)

    def loss(query, key, value, bias):
        key, value = (jax.numpy.repeat(x, 2, axis=1) for x in (key, value))
        scores = query @ key.mT * keywords.get("scale", query.shape[-1] ** -0.5) + bias
        weights = jax.nn.softmax(jax.numpy.where(seen, scores, -np.inf))
        return (weights @ value * grad_out).sum()

    with jax.enable_x64():
        expected = jax.grad(loss, argnums=(0, 1, 2, 3))(query, key, value, keywords.get("bias", np.zeros(())))
        expected = dict(zip(LEARNT, map(np.asarray, expected), strict=False))
    for name, grad in gradients("fast", grad_out, None, query=query, key=key, value=value, **keywords).items():
        assert_close(grad, expected[name], 1e-12, f"grad_{name}")


# --- any call -------------------------------------------------------------------------------------


@each_implementation_and_isa
@given(case=backward_cases())
def test_any_call(implementation, case):
    case, grad_out, grad_lse = case
    check_backward(
        backward_of(implementation), case.query, case.key, case.value, grad_out, grad_lse=grad_lse, **case.keywords
    )


@each_implementation_and_isa
@each_dtype
@pytest.mark.parametrize("shape", [(1, 4, 4, 128, 128, 64), (1, 2, 1, 65, 517, 128), (2, 4, 1, 1, 600, 64)], ids=str)
def test_error_at_most_twice_that_of_numpy(implementation, dtypes, shape):
    """From what attention itself returns: by its lse, all weights of a row err by u |lse|, for that was rounded, and by
    2 u, as exponentials do (math.h), of whose sum it is the logarithm."""
    query, key, value = qkv(make_rng(*shape), shape, dtypes)
    grad_out = normal(make_rng(15), query.shape, dtypes[0])
    wide = np.longdouble if dtypes[0] == F64 else np.float64
    truth = formula_backward(grad_out, query, key, value, wide)
    theirs = formula_backward(grad_out, query, key, value, dtypes[0])
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    mine = backward_of(implementation)(grad_out, query, key, value, out, lse)
    for name, m, t, exact, dtype in zip(
        ("query", "key", "value"), mine, theirs, truth, (dtypes[0], dtypes[1], dtypes[1]), strict=True
    ):
        error, bound = (float(np.max(np.abs(x.astype(wide) - exact))) for x in (m, t))
        rounding = UNIT[lse.dtype] * (np.max(np.abs(lse)) + 2) + UNIT[dtype] * (dtype != dtypes[0])
        rounding = float(rounding * np.max(np.abs(exact)))
        assert error <= 2 * bound + rounding, f"grad_{name}: error {error:.3g}, NumPy's is {bound:.3g}"


@each_implementation
@each_dtype
@pytest.mark.parametrize("seen", [0, 2, 3])
def test_results_of_a_union_give_the_share_of_a_part(implementation, dtypes, seen):
    """Keys in parts, as in a ring: with the merged out and lse each part's gradients are those of its keys."""
    query, key, value = qkv(make_rng(16), (2, 4, 2, 5, 9, 8), dtypes)
    grad_out = normal(make_rng(17), query.shape, dtypes[0])
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    whole = backward_of(implementation)(grad_out, query, key, value, out, lse)
    cuts = itertools.pairwise([0, seen, 6, 9])
    parts = [
        backward_of(implementation)(grad_out, query, key[..., a:b, :], value[..., a:b, :], out, lse) for a, b in cuts
    ]
    unit = max(UNIT[dtype] for dtype in dtypes)
    queries = sum(part[0].astype(F64) for part in parts)
    np.testing.assert_allclose(queries, whole[0].astype(F64), atol=16 * unit)
    for i in (1, 2):
        joined = np.concatenate([part[i] for part in parts], axis=-2).astype(F64)
        np.testing.assert_allclose(joined, whole[i].astype(F64), atol=16 * unit)


# --- what is hidden, and what is not there --------------------------------------------------------

HIDDEN = {
    "mask": {"mask": ~np.isin(np.arange(70), [0, 3, 17, 63, 64, 69])},
    "bias": {"bias": np.where(np.isin(np.arange(70), [0, 3, 17, 63, 64, 69]), -np.inf, 0.5).astype(F32)},
    "key_lengths": {"key_lengths": [40, 1]},
    "causal": {"causal": True, "query_offset": 20},
    "window": {"window": (3, 2), "query_offset": 20},
    "key_lengths 0": {"key_lengths": 0, "sinks": np.zeros(4, F32)},
}


def unseen_keys(seqlen_q, keywords):
    """Which keys no row of an item sees, as (batch, keys), and which rows see no key, as (batch, rows)."""
    ones = np.zeros((2, 1, seqlen_q, 1)), np.zeros((2, 1, 70, 1))
    keywords = {name: x for name, x in keywords.items() if name != "sinks"}
    _, weights = reference.attention(*ones, ones[1], **keywords, return_weights=True)
    return (weights == 0).all(axis=(1, 2)), (weights == 0).all(axis=(1, 3))


@each_implementation_and_isa
@each_dtype
@pytest.mark.parametrize("case", HIDDEN)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("seqlen_q", [1, 4, 37])
def test_hidden_keys_have_gradient_0_and_leave_no_trace(implementation, dtypes, case, bad, seqlen_q):
    keywords = HIDDEN[case]
    clean = qkv(make_rng(18), (2, 4, 2, seqlen_q, 70, 20), dtypes)
    grad_out = normal(make_rng(19), clean[0].shape, dtypes[0])
    hidden, _ = unseen_keys(seqlen_q, keywords)
    hidden = np.broadcast_to(hidden[:, None], (2, 2, 70))
    assert hidden.any()
    planted = [x.copy() for x in clean]
    planted[1][hidden], planted[2][hidden] = bad, bad
    out, lse = fastattn.attention(*clean, **keywords, return_lse=True)
    asked = {f"return_grad_{name}": True for name in ("bias", "sinks") if name in keywords}
    expected = backward_of(implementation)(grad_out, *clean, out, lse, **keywords, **asked)
    actual = backward_of(implementation)(grad_out, *planted, out, lse, **keywords, **asked)
    for a, e in zip(actual, expected, strict=True):
        assert np.isfinite(a.astype(F64)).all()
        assert_same_bits(a + np.zeros((), a.dtype), e + np.zeros((), e.dtype))  # -0 is 0
    for a in actual[1:3]:
        assert (a[hidden] == 0).all()


@each_implementation_and_isa
@each_dtype
@pytest.mark.parametrize("keywords", [{}, {"sinks": np.ones(4, F32)}], ids=["plain", "sinks"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_without_keys_leave_no_trace(implementation, dtypes, keywords, bad):
    clean = qkv(make_rng(20), (2, 4, 2, 37, 70, 20), dtypes)
    grad_out = normal(make_rng(21), clean[0].shape, dtypes[0])
    mask = make_rng(22).random((37, 70)) < 0.7
    blind = np.array([0, 5, 16, 31, 36])
    mask[blind] = False
    query, planted = clean[0].copy(), grad_out.copy()
    query[..., blind, :], planted[..., blind, :] = bad, bad
    out, lse = fastattn.attention(*clean, mask=mask, **keywords, return_lse=True)
    asked = {"return_grad_sinks": True} if keywords else {}
    expected = backward_of(implementation)(grad_out, *clean, out, lse, mask=mask, **keywords, **asked)
    actual = backward_of(implementation)(planted, query, *clean[1:], out, lse, mask=mask, **keywords, **asked)
    for a, e in zip(actual, expected, strict=True):
        assert np.isfinite(a.astype(F64)).all()
        assert_same_bits(a + np.zeros((), a.dtype), e + np.zeros((), e.dtype))
    assert (actual[0][..., blind, :] == 0).all()


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("keywords", [{}, {"softcap": 2.0}, {"dropout": 0.2, "seed": 3}], ids=str)
@pytest.mark.parametrize("seqlen_q", [3, 70, 300])
def test_same_bits_as_with_zeros_where_nothing_is_seen(dtypes, bad, keywords, seqlen_q):
    """In hidden keys and their values, and in rows that see no key and the gradients of their results."""
    query, key, value = qkv(make_rng(29), (2, 4, 2, seqlen_q, 150, 40), dtypes, head_dim_v=24)
    rng = make_rng(30)
    grad_out, grad_lse = normal(rng, (2, 4, seqlen_q, 24), dtypes[0]), rng.standard_normal((2, 4, seqlen_q))
    mask = rng.random((2, 1, seqlen_q, 150)) < 0.5
    hidden_keys, blind_rows = rng.random((2, 150)) < 0.3, rng.random((2, seqlen_q)) < 0.4
    hidden_keys[:, 64:128] |= [[True], [False]]  # a whole block of one item
    mask &= ~hidden_keys[:, None, None] & ~blind_rows[:, None, :, None]
    keywords = {**keywords, "mask": mask, "bias": rng.standard_normal((4, 1, 150)), "sinks": rng.standard_normal(4)}

    def planted(with_):
        arrays = [x.copy() for x in (grad_out, query, key, value)]
        for x, where in zip(arrays, (blind_rows, blind_rows, hidden_keys, hidden_keys), strict=True):
            x.swapaxes(1, 2)[where] = with_
        return arrays

    out, lse = fastattn.attention(*planted(0)[1:], **keywords, return_lse=True)
    asked = {"return_grad_bias": True, "return_grad_sinks": True}
    zeros, poisoned = (
        fastattn.attention_backward(*planted(x), out, lse, grad_lse=grad_lse, **keywords, **asked) for x in (0, bad)
    )
    for a, e, name in zip(poisoned, zeros, LEARNT, strict=True):
        assert_same_bits(a, e, f"grad_{name}")


@each_implementation_and_isa
@each_dtype
@pytest.mark.parametrize("planted_in", ["query", "grad_out", "lse"])
def test_a_row_that_is_nan_reaches_the_keys_that_it_sees(implementation, dtypes, planted_in):
    """And no others: keys after it, with a causal edge, have the gradients that they have without the row."""
    clean = qkv(make_rng(23), (1, 2, 1, 70, 70, 20), dtypes)
    grad_out = normal(make_rng(24), clean[0].shape, dtypes[0])
    out, lse = fastattn.attention(*clean, causal=True, return_lse=True)
    planted = {"query": clean[0].copy(), "grad_out": grad_out.copy(), "lse": lse.copy()}
    planted[planted_in][(..., 40) if planted_in == "lse" else (..., 40, 3)] = np.nan
    arrays = {"key": clean[1], "value": clean[2], "out": out, "causal": True}
    expected = backward_of(implementation)(query=clean[0], grad_out=grad_out, lse=lse, **arrays)
    actual = backward_of(implementation)(**planted, **arrays)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert np.isnan(a[..., :41, :].astype(F64)).any(axis=-1).all()
        assert_same_bits(a[..., 41:, :], e[..., 41:, :])
    others = np.arange(70) != 40
    assert np.isnan(actual[0][..., 40, :].astype(F64)).any(axis=-1).all()
    assert_same_bits(actual[0][..., others, :], expected[0][..., others, :])


@each_implementation
@each_dtype
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
@pytest.mark.parametrize("head_dim_v", [None, 0])
def test_empty_axes(implementation, dtypes, shape, head_dim_v):
    query, key, value = qkv(make_rng(), shape, dtypes, head_dim_v)
    grad_out = normal(make_rng(1), (*query.shape[:-1], value.shape[-1]), dtypes[0])
    keywords = {"sinks": np.ones(shape[1], F32), "bias": np.zeros((shape[1], 1, 1), F32)}
    check_backward(backward_of(implementation), query, key, value, grad_out, **keywords)


@each_implementation
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_gradients_have_the_dtype_and_shape_of_their_arrays(implementation, dtype):
    query, key, value = qkv(make_rng(25), (2, 4, 2, 5, 7, 8), (F32, F16))
    bias, sinks = normal(make_rng(26), (4, 1, 7), dtype), normal(make_rng(27), 4, dtype)
    out, lse = fastattn.attention(query, key, value, bias=bias, sinks=sinks, return_lse=True)
    grads = backward_of(implementation)(
        out, query, key, value, out, lse, bias=bias, sinks=sinks, return_grad_bias=True, return_grad_sinks=True
    )
    inputs = (query, key, value, bias, sinks)
    assert [(x.dtype, x.shape) for x in grads] == [(x.dtype, x.shape) for x in inputs]


@each_implementation
@pytest.mark.parametrize("name", ["bias", "sinks"])
def test_gradients_of_what_is_not_given(implementation, name):
    query, key, value = qkv(make_rng(), (1, 2, 2, 3, 4, 8))
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    with pytest.raises(ValueError, match=f"return_grad_{name} .*{name}"):
        backward_of(implementation)(out, query, key, value, out, lse, **{f"return_grad_{name}": True})


# --- what does not fit into the numbers -----------------------------------------------------------


@each_implementation_and_isa
@each_dtype
@pytest.mark.parametrize("sign", [1, -1])
def test_tiny_scale(implementation, dtypes, sign):
    """Scores are 0 then; lse, here of more keys, exceeds the largest number in units of a score."""
    query, key, value = qkv(make_rng(29), (2, 4, 2, 37, 70, 20), dtypes)
    grad_out = normal(make_rng(30), query.shape, dtypes[0])
    out, lse = fastattn.attention(query, key, value, scale=0.0, return_lse=True)
    lse += 10
    scale = sign * 2 * float(np.finfo(lse.dtype).tiny)
    expected = backward_of(implementation)(grad_out, query, key, value, out, lse, scale=0.0)
    actual = backward_of(implementation)(grad_out, query, key, value, out, lse, scale=scale)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a.astype(F64), e.astype(F64), rtol=64 * UNIT[a.dtype], atol=1e-3 * UNIT[a.dtype])


@each_implementation_and_isa
@each_dtype
@pytest.mark.parametrize("scale", [1e300, -1e300])
def test_huge_scale(implementation, dtypes, scale):
    """Of queries and keys that are 0 the gradients are so, too."""
    value, grad_out = normal(make_rng(31), (2, 70, 20), dtypes[1]), normal(make_rng(32), (2, 37, 20), dtypes[0])
    query, key = np.zeros((2, 37, 20), dtypes[0]), np.zeros((2, 70, 20), dtypes[1])
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    expected = backward_of(implementation)(grad_out, query, key, value, out, lse)
    actual = backward_of(implementation)(grad_out, query, key, value, out, lse, scale=scale)
    for a, e in zip(actual[:2], expected[:2], strict=True):
        assert (a == 0).all()
        assert (e == 0).all()
    unit = UNIT[dtypes[1]]
    np.testing.assert_allclose(actual[2].astype(F64), expected[2].astype(F64), rtol=64 * unit, atol=8 * unit)


@pytest.mark.parametrize("implementation", MODULES)
@pytest.mark.parametrize("sink", [1e39, 1e300])
def test_a_sink_that_lse_cannot_hold_has_a_gradient_of_0(implementation, sink):
    query, key, value, grad_out = normal(make_rng(), (4, 2, 7, 8), F32)
    sinks = np.array([0.5, sink])
    results = fastattn.attention(query, key, value, sinks=sinks, return_lse=True)
    grads = backward_of(implementation)(grad_out, query, key, value, *results, sinks=sinks, return_grad_sinks=True)
    assert np.isfinite(grads[3]).all()
    assert grads[3][1] == 0


@each_implementation
@pytest.mark.parametrize("shared", ["key", "value", "sinks"])
def test_sums_beyond_float16_are_infinite_without_a_warning(implementation, shared):
    """Over what the array was broadcast to; pytest makes errors of warnings."""
    arrays = {name: np.ones((4, 2, 3, 8), F16) for name in ("query", "key", "value")}
    arrays["value"][..., 0, :] = -1
    arrays[shared] = np.ones(2, F16) if shared == "sinks" else arrays[shared][:1]
    out, lse = fastattn.attention(**arrays, return_lse=True)
    grad_out = np.full(out.shape, 6e4, F16)
    asked = {"return_grad_sinks": True} if shared == "sinks" else {}
    grads = backward_of(implementation)(grad_out, out=out, lse=lse, **arrays, **asked)
    assert np.isinf(grads[{"key": 1, "value": 2, "sinks": 3}[shared]]).any()


# --- where gradients are stored -------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_nothing_is_stored_if_one_place_is_bad(packed, bad):
    query, key, value = (normal(make_rng(33 + i), (5, 5, 8), F32) for i in range(3))
    grads = [np.ones((5, 5, 8), F32) for _ in range(3)]
    grads[bad] = np.ones((5, 5, 8), F64)
    if packed:
        lengths = [0, 2, 5]
        out, lse = fastattn.attention_varlen(query, key, value, lengths, lengths, return_lse=True)
        call = functools.partial(fastattn.attention_varlen_backward, out, query, key, value, out, lse, lengths, lengths)
    else:
        out, lse = fastattn.attention(query, key, value, return_lse=True)
        call = functools.partial(fastattn.attention_backward, out, query, key, value, out, lse)
    with pytest.raises(TypeError, match=rf"grads' {('query', 'key', 'value')[bad]} has dtype float64"):
        call(grads=tuple(grads))
    assert all((grad == 1).all() for grad in grads)


# --- packed sequences -----------------------------------------------------------------------------


@each_implementation
@each_dtype
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"causal": True, "sinks": np.array([0.0, 1.0, -1.0, 2.0])},
        {"window": (5, 3), "softcap": 2.0, "scale": 0.5},
        {"alibi_slopes": np.array([[0.1, 0.2, 0.0, 0.3]] * 4), "query_offset": [0, 3, 5, 60], "causal": True},
    ],
    ids=str,
)
def test_packed_sequences_are_alone(implementation, dtypes, keywords):
    lengths_q, lengths_k = [1, 0, 20, 3], [60, 5, 7, 0]
    cu_q, cu_k = np.cumsum([0, *lengths_q]), np.cumsum([0, *lengths_k])
    rng = make_rng(28)
    query = normal(rng, (cu_q[-1], 4, 16), dtypes[0])
    key, value = (normal(rng, (cu_k[-1], 2, dim), dtypes[1]) for dim in (16, 24))
    grad_out, grad_lse = normal(rng, (cu_q[-1], 4, 24), dtypes[0]), normal(rng, (cu_q[-1], 4), F32)
    out, lse = fastattn.attention_varlen(query, key, value, cu_q, cu_k, **keywords, return_lse=True)
    asked = {"return_grad_sinks": True} if "sinks" in keywords else {}
    grads = MODULES[implementation].attention_varlen_backward(
        grad_out, query, key, value, out, lse, cu_q, cu_k, **keywords, grad_lse=grad_lse, **asked
    )
    sinks = np.zeros(4)
    for b in range(4):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        own = {name: x[b] if name in ("alibi_slopes", "query_offset") else x for name, x in keywords.items()}
        arrays = [x.swapaxes(0, 1) for x in (grad_out[rows], query[rows], key[keys], value[keys], out[rows], lse[rows])]
        expected = backward_of(implementation)(*arrays, **own, grad_lse=grad_lse[rows].swapaxes(0, 1), **asked)
        for grad, each, part in zip(grads, expected[:3], (rows, keys, keys), strict=False):
            assert_same_bits(grad[part].swapaxes(0, 1), each)
        sinks += expected[3] if asked else 0
    if asked:
        np.testing.assert_allclose(grads[3], sinks, rtol=1e-5, atol=1e-6)
