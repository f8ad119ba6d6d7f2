"""Arrays are read, and out written, in place: any strides, nothing changed that is not out."""

import numpy as np
import pytest
from hypothesis import given, settings
from oracle import (
    DTYPE_IDS,
    DTYPES,
    F32,
    assert_close,
    assert_same_bits,
    check,
    exact,
    make_rng,
    normal,
    qkv,
    tolerances,
)
from strategies import backward_cases, cases

import fastattn
from fastattn import reference

SHAPE = (2, 4, 2, 37, 50, 24)

each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)


def in_memory(x, order):
    """The same array, lying in memory with its axes in the given order."""
    return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))


def in_a_field(x):
    """The same array as a field of records, whose size is no multiple of the element's."""
    records = np.zeros(x.shape, [("flag", np.int8), ("x", x.dtype)])
    records["x"] = x
    return records["x"]


LAYOUTS = {
    "batch-seq-heads-dim": lambda x: in_memory(x, (0, 2, 1, 3)),
    "seq-batch-heads-dim": lambda x: in_memory(x, (2, 0, 1, 3)),
    "dim-before-seq": lambda x: in_memory(x, (0, 1, 3, 2)),
    "fortran": np.asfortranarray,
    "reversed": lambda x: np.ascontiguousarray(x[::-1, ::-1, ::-1, ::-1])[::-1, ::-1, ::-1, ::-1],
    "last-axis-strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "last-axis-in-thirds": lambda x: np.repeat(x, 3, axis=-1)[..., ::3],
    "last-axis-reversed": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "field": in_a_field,
    "rows-strided": lambda x: np.repeat(x, 3, axis=-2)[..., ::3, :],
    "padded-rows": lambda x: np.pad(x, ((0, 0), (0, 0), (0, 0), (3, 4)))[..., 3:-4],
}


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtypes, layout):
    query, key, value = qkv(make_rng(), SHAPE, dtypes)
    lay = LAYOUTS[layout]
    for x in (query, key, value):
        np.testing.assert_array_equal(lay(x), x)
    check(lay(query), lay(key), lay(value), causal=True)
    check(query, lay(key), value)
    check(query, key, lay(value))
    # One row takes the path of decoding.
    check(lay(query)[:, :, 5:6], lay(key), lay(value))


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize(
    "layout",
    [
        *("dim-before-seq", "reversed", "last-axis-strided", "last-axis-reversed", "last-axis-in-thirds"),
        "field",
        "fortran",
    ],
)
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 80), (33, 32), (80, 17), (96, 49)])
def test_layouts_of_whole_vectors_and_tails(dtypes, layout, head_dim, head_dim_v):
    """Vectors that are shuffled or transposed on their way, whole ones and tails, from even keys and odd ones."""
    lay = LAYOUTS[layout]
    arrays = [lay(x) for x in qkv(make_rng(), (1, 2, 2, 70, 135, head_dim), dtypes, head_dim_v)]
    check(*arrays)
    check(*arrays, window=(40, 3), query_offset=45)
    check(arrays[0][:, :, :3], *arrays[1:], window=(70, 1))


@each_dtype
def test_packed_qkv(dtypes):
    if dtypes[0] != dtypes[1]:
        pytest.skip("one array has one dtype")
    packed = normal(make_rng(), (2, 50, 3, 4, 24), dtypes[0])
    query, key, value = (packed[:, :, i].swapaxes(1, 2) for i in range(3))
    check(query, key, value, causal=True)


@each_dtype
def test_zero_strides(dtypes):
    query, key, value = qkv(make_rng(), SHAPE, dtypes)
    check(np.broadcast_to(query[:1, :1], query.shape), np.broadcast_to(key[:, :, :1], key.shape), value)
    check(query, np.broadcast_to(key[..., :1], key.shape), np.broadcast_to(value[..., :1], value.shape))
    check(query, np.broadcast_to(key[:, :1], key.shape), np.broadcast_to(value[:1], value.shape))


@each_dtype
def test_rows_off_their_natural_alignment(dtypes):
    """A view into a byte buffer may start anywhere."""
    arrays = []
    for x in qkv(make_rng(), SHAPE, dtypes):
        raw = np.zeros(x.nbytes + 1, np.uint8)
        raw[1:] = np.frombuffer(x.tobytes(), np.uint8)
        arrays.append(raw[1:].view(x.dtype).reshape(x.shape))
        assert not arrays[-1].flags.aligned
    check(*arrays)


def test_scalars_arrays_with_strides():
    """The small arrays may be views too."""
    query, key, value = qkv(make_rng(), SHAPE)
    per_head = np.arange(16, dtype=F32).reshape(2, 8)[::-1, ::-2] / 8
    check(query, key, value, alibi_slopes=per_head, sinks=per_head[0])
    check(query, key, value, key_lengths=np.array([50, 0, 20, 0])[::2], causal=True)


@settings(max_examples=60)
@given(case=cases())
def test_inputs_unchanged(case):
    arrays = {"query": case.query, "key": case.key, "value": case.value}
    arrays |= {k: v for k, v in case.keywords.items() if isinstance(v, np.ndarray)}
    before = {name: x.tobytes() for name, x in arrays.items()}
    fastattn.attention(case.query, case.key, case.value, **case.keywords, return_lse=True)
    for name, x in arrays.items():
        assert x.tobytes() == before[name], name


STEPS = {
    "reversed": (-1, -1, -1, -1),
    "last-axis-strided": (1, 1, 1, 2),
    "last-axis-reversed": (1, 1, 1, -1),
    "last-axis-in-thirds": (1, 1, 1, 3),
    "rows-strided": (1, 1, 3, 1),
}
AXES_IN_MEMORY = {
    "batch-seq-heads-dim": (0, 2, 1, 3),
    "seq-batch-heads-dim": (2, 0, 1, 3),
    "dim-before-seq": (0, 1, 3, 2),
    "fortran": (3, 2, 1, 0),
}


def room(shape, dtype, layout):
    """Return a view of that layout to store results in, and what tells whether the memory between has been written."""
    if layout == "field":
        records = np.zeros(shape, [("flag", np.int8), ("x", dtype)])
        return records["x"], lambda: (records["flag"] == 0).all()
    steps, order = STEPS.get(layout, (1, 1, 1, 1)), AXES_IN_MEMORY.get(layout, (0, 1, 2, 3))
    sizes = [n * abs(s) for n, s in zip(shape, steps, strict=True)]
    sizes[-1] += 5 if layout == "padded-rows" else 0
    memory = np.full([sizes[axis] for axis in order], 7.0, dtype).transpose(np.argsort(order))
    written = np.zeros(memory.shape, bool)
    view, own = (x[tuple(slice(None, None, step) for step in steps)][..., : shape[-1]] for x in (memory, written))
    own[...] = True
    return view, lambda: (memory[~written].astype(np.float64) == 7.0).all()


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("layout", [*LAYOUTS, "contiguous"])
def test_out_views(dtypes, layout):
    """out may be any view; the memory between its elements keeps what it held."""
    query, key, value = qkv(make_rng(), SHAPE, dtypes, head_dim_v=13)
    expected = exact(query, key, value)
    out, is_untouched_between = room(expected.shape, dtypes[0], layout)
    result = fastattn.attention(query, key, value, out=out)
    assert result is out
    assert_close(out, expected, tolerances(query, key, value)[0])
    assert is_untouched_between()
    # One row, the path of decoding.
    fastattn.attention(query[:, :, :1], key, value, out=out[:, :, :1])
    assert_close(out, expected, tolerances(query, key, value)[0])


def test_out_with_lse_and_weights():
    query, key, value = qkv(make_rng(), SHAPE)
    out = np.empty(query.shape, F32)
    result = fastattn.attention(query, key, value, out=out, return_lse=True, return_weights=True)
    assert result[0] is out
    assert_close(out, exact(query, key, value), tolerances(query, key, value)[0])


def test_out_of_one_head():
    query, key, value = (x[0, 0] for x in qkv(make_rng(), SHAPE))
    out = np.empty((query.shape[0], value.shape[1] * 2), F32)[:, ::2]
    assert fastattn.attention(query, key, value, out=out) is out
    assert_close(out, exact(query, key, value), tolerances(query, key, value)[0])


def test_arrays_beside_out_in_one_buffer():
    """out may lie between the rows of an input: interleaved is not overlapping."""
    buffer = normal(make_rng(), (50, 48), F32)
    query, out = buffer[:, :24], buffer[:, 24:]
    key = value = normal(make_rng(1), (30, 24), F32)
    before = query.copy()
    expected = exact(query, key, value)
    fastattn.attention(query, key, value, out=out)
    np.testing.assert_array_equal(query, before)
    assert_close(out, expected, tolerances(query, key, value)[0])


# --- gradients ------------------------------------------------------------------------------------


def for_backward(dtypes):
    """Return the arguments of `attention_backward`, in the order that it has them."""
    arrays = qkv(make_rng(), SHAPE, dtypes, head_dim_v=13)
    out, lse = fastattn.attention(*arrays, causal=True, return_lse=True)
    return [normal(make_rng(1), out.shape, out.dtype), *arrays, out, lse]


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_layouts(dtypes, layout):
    """To the bit those of arrays that are contiguous."""
    arrays = for_backward(dtypes)
    lay = LAYOUTS[layout]
    laid, lse = [lay(x) for x in arrays[:-1]], lay(arrays[-1][..., None])[..., 0]
    expected = fastattn.attention_backward(*arrays, causal=True, grad_lse=arrays[-1])
    actual = fastattn.attention_backward(*laid, lse, causal=True, grad_lse=lse)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("layout", [*LAYOUTS, "contiguous"])
def test_grads_views(dtypes, layout):
    """grads may be any views; the memory between their elements keeps what it held."""
    arrays = for_backward(dtypes)
    expected = fastattn.attention_backward(*arrays, causal=True)
    rooms = [room(x.shape, x.dtype, layout) for x in arrays[1:4]]
    grads = tuple(view for view, _ in rooms)
    actual = fastattn.attention_backward(*arrays, causal=True, grads=grads)
    for (view, is_untouched_between), a, e in zip(rooms, actual, expected, strict=True):
        assert a is view
        assert_same_bits(a, e)
        assert is_untouched_between()


@each_dtype
@pytest.mark.parametrize("module", [fastattn, reference], ids=["fast", "reference"])
@pytest.mark.parametrize("given", [(True, False, False), (False, True, True)], ids=str)
def test_some_grads(dtypes, module, given):
    arrays = for_backward(dtypes)
    grads = tuple(np.empty_like(x) if is_given else None for x, is_given in zip(arrays[1:4], given, strict=True))
    expected = module.attention_backward(*arrays, causal=True)
    actual = module.attention_backward(*arrays, causal=True, grads=grads)
    for a, e, grad in zip(actual, expected, grads, strict=True):
        assert grad is None or a is grad
        assert_same_bits(a, e)


@pytest.mark.parametrize("module", [fastattn, reference], ids=["fast", "reference"])
def test_grads_of_arrays_that_were_broadcast(module):
    """What was repeated has one gradient, the sum, in an array of any strides."""
    query, key, value = qkv(make_rng(), SHAPE)
    key, value = key[:1], value[0]
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    expected = module.attention_backward(out, query, key, value, out, lse)
    grads = tuple(np.empty((*x.shape[:-1], 2 * x.shape[-1]), F32)[..., ::-2] for x in (query, key, value))
    actual = module.attention_backward(out, query, key, value, out, lse, grads=grads)
    for a, e, grad in zip(actual, expected, grads, strict=True):
        assert a is grad
        assert_same_bits(a, e)


@pytest.mark.parametrize("module", [fastattn, reference], ids=["fast", "reference"])
def test_grads_of_packed_sequences(module):
    """Also those of keys whose sequence has no queries, which are 0."""
    query, key, value = (x[0].swapaxes(0, 1) for x in qkv(make_rng(), (1, 4, 2, 20, 30, 8)))
    bounds = [0, 5, 5, 20], [0, 10, 17, 30]
    out, lse = fastattn.attention_varlen(query, key, value, *bounds, return_lse=True)
    expected = module.attention_varlen_backward(out, query, key, value, out, lse, *bounds)
    grads = tuple(np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, F32)[..., ::-2] for x in (query, key, value))
    actual = module.attention_varlen_backward(out, query, key, value, out, lse, *bounds, grads=grads)
    for a, e, grad in zip(actual, expected, grads, strict=True):
        assert a is grad
        assert_same_bits(a, e)
    assert (actual[1][10:17] == 0).all()


def test_packed_gradients_in_one_buffer():
    """As one product with a matrix of weights takes them: they lie between each other, and do not overlap."""
    arrays = for_backward((F32, F32))
    arrays[3] = arrays[2]
    arrays[0] = arrays[1]
    arrays[4:] = fastattn.attention(*arrays[1:4], return_lse=True)
    batch, heads, kv_heads, seqlen_q, _, head_dim = SHAPE
    expected = fastattn.attention_backward(*arrays)
    buffer = np.full((batch, 50, heads + 2 * kv_heads, head_dim), 7, F32)
    grads = (
        buffer[:, :seqlen_q, :heads].swapaxes(1, 2),
        buffer[:, :, heads : heads + kv_heads].swapaxes(1, 2),
        buffer[:, :, heads + kv_heads :].swapaxes(1, 2),
    )
    for a, e in zip(fastattn.attention_backward(*arrays, grads=grads), expected, strict=True):
        assert_same_bits(a, e)
    assert (buffer[:, seqlen_q:, :heads] == 7).all()


@settings(max_examples=60)
@given(case=backward_cases())
def test_inputs_of_backward_unchanged(case):
    case, grad_out, grad_lse = case
    keywords = case.keywords
    out, lse = fastattn.attention(case.query, case.key, case.value, **keywords, return_lse=True)
    arrays = {"grad_out": grad_out, "query": case.query, "key": case.key, "value": case.value, "out": out, "lse": lse}
    arrays |= {k: v for k, v in {**keywords, "grad_lse": grad_lse}.items() if isinstance(v, np.ndarray)}
    before = {name: x.tobytes() for name, x in arrays.items()}
    asked = {f"return_grad_{name}": True for name in ("bias", "sinks") if name in keywords}
    first = grad_out, case.query, case.key, case.value, out, lse
    fastattn.attention_backward(*first, grad_lse=grad_lse, **keywords, **asked)
    for name, x in arrays.items():
        assert x.tobytes() == before[name], name


# --- the layout of results ------------------------------------------------------------------------

ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 3, 0, 2), (3, 2, 1, 0)]


@each_dtype
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_result_lies_in_memory_as_the_query_does(dtypes, order):
    query, key, value = qkv(make_rng(), SHAPE, dtypes, head_dim_v=11)
    result = fastattn.attention(in_memory(query, order), key, value)
    assert result.transpose(order).flags.c_contiguous
    assert_same_bits(result, fastattn.attention(query, key, value))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_result_has_the_order_that_numpy_gives(layout):
    query, key, value = qkv(make_rng(), SHAPE)
    query = LAYOUTS[layout](query)
    expected = np.add(query, query)
    assert fastattn.attention(query, key, value).strides == expected.strides


def test_axes_of_one_element_or_broadcast_do_not_count():
    query, key, value = qkv(make_rng(), SHAPE)
    same = np.broadcast_to(query[:1], query.shape)
    assert fastattn.attention(same, key, value).flags.c_contiguous
    one = np.ascontiguousarray(query[:, :, :1].swapaxes(1, 2)).swapaxes(1, 2)
    assert fastattn.attention(one, key, value).flags.c_contiguous


def test_the_batch_of_keys_alone_comes_first():
    query, key, value = qkv(make_rng(), SHAPE)
    one = in_memory(query, (0, 2, 1, 3))[0]
    assert fastattn.attention(one, key, value).swapaxes(1, 2).flags.c_contiguous


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_gradients_lie_in_memory_as_their_arrays_do(order):
    query, key, value = (in_memory(x, order) for x in qkv(make_rng(), SHAPE))
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    for grad in fastattn.attention_backward(out, query, key, value, out, lse):
        assert grad.transpose(order).flags.c_contiguous


def test_packed_results_lie_in_memory_as_the_query_does():
    query, key, value = make_rng().standard_normal((3, 10, 4, 8), np.float32)
    heads_first = in_memory(query, (1, 0, 2))
    result = fastattn.attention_varlen(heads_first, key, value, [0, 4, 10], [0, 4, 10])
    assert result.swapaxes(0, 1).flags.c_contiguous
