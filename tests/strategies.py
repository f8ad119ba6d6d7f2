"""Hypothesis strategies: whole calls of attention, over shapes, dtypes, strides and every keyword together."""

import math

import numpy as np
from hypothesis import strategies as st
from oracle import BF16, DTYPES, F16, F32, F64, normal

# Small sizes, and those on either side of a vector, a register tile or a block.
SEQLENS_Q = st.integers(0, 20) | st.sampled_from([31, 32, 33, 47, 48, 49, 63, 65, 96, 97])
SEQLENS_K = st.integers(0, 20) | st.sampled_from([31, 33, 63, 64, 65, 127, 128, 129, 200, 700, 1100])
HEAD_DIMS = st.integers(0, 20) | st.sampled_from([31, 32, 33, 63, 64, 65, 80, 127, 128])

# A call's scores stay below about 2⁹ elements in each dimension above; this keeps the reference quick too.
MAX_SCORES = 60_000


class Case:
    def __init__(self, query, key, value, keywords):
        self.query, self.key, self.value, self.keywords = query, key, value, keywords

    def __repr__(self):
        arrays = (self.query, self.key, self.value)
        described = ", ".join(f"{x.dtype.name}{x.shape} strides {x.strides}" for x in arrays)
        keywords = {k: (v.shape, v.dtype.name) if isinstance(v, np.ndarray) and v.size > 8 else v
                    for k, v in self.keywords.items()}  # fmt: skip
        return f"Case({described}, {keywords})"


@st.composite
def laid_out(draw, array):
    """Return the same values in another layout: permuted, stepped, reversed, offset, read-only."""
    order = draw(st.permutations(range(array.ndim)))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) for _ in order]
    # Memory is laid out in the order of the permutation; a step leaves gaps, a negative one reverses.
    shape = [array.shape[axis] * abs(steps[axis]) for axis in order]
    memory = np.zeros(shape, array.dtype).transpose(np.argsort(order))
    view = memory[(..., *(slice(None, None, step) for step in steps))]
    view = view[(..., *(slice(n) for n in array.shape))]
    view[...] = array
    view.flags.writeable = draw(st.booleans())
    return view


@st.composite
def broadcastable(draw, shape, max_rank=4):
    """Return a shape that broadcasts to the given one: shorter, and with axes of size 1 anywhere."""
    rank = draw(st.integers(0, min(len(shape), max_rank)))
    return tuple(draw(st.sampled_from([n, n, 1])) for n in shape[len(shape) - rank :])


@st.composite
def biases(draw, rng, shape):
    dtype = draw(st.sampled_from([F32, F64, F16, BF16]))
    bias = normal(rng, draw(broadcastable(shape)), dtype)
    if draw(st.booleans()):
        bias = np.where(rng.random(bias.shape) < 0.2, np.array(-np.inf, dtype), bias)
    return draw(laid_out(np.asarray(bias)))


@st.composite
def keywords_for(draw, rng, batch, heads, seqlen_q, seqlen_k, single_head):
    """Return keyword arguments; each is there or not, independently."""
    scores_shape = (seqlen_q, seqlen_k) if single_head else (*batch, heads, seqlen_q, seqlen_k)
    bound = st.none() | st.integers(0, seqlen_k + 2)
    offset = st.integers(-seqlen_q - 3, seqlen_k + 3)

    def per_batch(element):
        shape = draw(broadcastable(batch))
        return np.array([draw(element) for _ in range(math.prod(shape))], np.int64).reshape(shape)

    choices = {
        "scale": lambda: draw(st.sampled_from([0.0, 1.0, -0.5, 0.125])),
        "causal": lambda: True,
        "query_offset": lambda: draw(offset) if draw(st.booleans()) else per_batch(offset),
        "window": lambda: (draw(bound), draw(bound)),
        "mask": lambda: draw(laid_out(np.asarray(rng.random(draw(broadcastable(scores_shape))) < 0.8))),
        "bias": lambda: draw(biases(rng, scores_shape)),
        "alibi_slopes": lambda: rng.random(draw(st.sampled_from([(heads,), (*batch, heads)]))).astype(np.float32),
        "softcap": lambda: draw(st.sampled_from([0.5, 5.0, 50.0])),
        "sinks": lambda: rng.standard_normal(heads).astype(np.float32),
        "key_lengths": lambda: per_batch(st.integers(0, seqlen_k)),
        "num_threads": lambda: draw(st.sampled_from([1, 2, 3])),
    }
    return {name: make() for name, make in choices.items() if draw(st.booleans())}


@st.composite
def cases(draw, dtypes=tuple(DTYPES)):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    query_dtype, kv_dtype = draw(st.sampled_from(dtypes))
    single_head = draw(st.sampled_from([False, False, False, True]))
    seqlen_q, seqlen_k = draw(SEQLENS_Q), draw(SEQLENS_K)
    head_dim, head_dim_v = draw(HEAD_DIMS), draw(HEAD_DIMS)
    batch = () if single_head else tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    kv_heads, group = (1, 1) if single_head else (draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    if math.prod(batch) * kv_heads * group * seqlen_q * seqlen_k > MAX_SCORES:
        batch, kv_heads = batch[:0], 1

    def array(dtype, *shape):
        # key and value may each be shared by the whole batch; query says how large the batch is.
        lead = batch if dtype is None else draw(broadcastable(batch))
        full = shape[1:] if single_head else (*lead, *shape)
        return draw(laid_out(normal(rng, full, dtype or query_dtype)))

    return Case(
        array(None, kv_heads * group, seqlen_q, head_dim),
        array(kv_dtype, kv_heads, seqlen_k, head_dim),
        array(kv_dtype, kv_heads, seqlen_k, head_dim_v),
        draw(keywords_for(rng, batch, kv_heads * group, seqlen_q, seqlen_k, single_head)),
    )


# Shares about which the threshold, and the factor of what is left, are special.
dropouts = st.fixed_dictionaries(
    {
        "dropout": st.sampled_from([0.0, 1e-6, 2.0**-16, 0.1, 0.5, 0.9, 0.999]),
        "seed": st.sampled_from([0, 1, 2**32, 2**64 - 1]) | st.integers(0, 2**64 - 1),
    }
)


@st.composite
def backward_cases(draw, dtypes=tuple(DTYPES)):
    """Return a case, and the gradients of its result and, sometimes, of its lse."""
    case = draw(cases(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch = np.broadcast_shapes(case.query.shape[:-3], case.key.shape[:-3], case.value.shape[:-3])
    rows = (*batch, *case.query.shape[-3:-1])
    grad_out = draw(laid_out(normal(rng, (*rows, case.value.shape[-1]), case.query.dtype)))
    lse_dtype = F64 if case.query.dtype == F64 else F32
    return case, grad_out, draw(laid_out(normal(rng, rows, lse_dtype))) if draw(st.booleans()) else None
