"""Arrays are read, and out written, in place: any strides, nothing changed that is not out."""

import numpy as np
import pytest
from hypothesis import given, settings
from oracle import DTYPE_IDS, DTYPES, F32, assert_close, check, exact, make_rng, normal, qkv, tolerances
from strategies import cases

import fastattn

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


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("layout", [*LAYOUTS, "contiguous"])
def test_out_views(dtypes, layout):
    """out may be any view; the memory between its elements keeps what it held."""
    query, key, value = qkv(make_rng(), SHAPE, dtypes, head_dim_v=13)
    expected = exact(query, key, value)
    steps = {"reversed": (-1, -1, -1, -1), "last-axis-strided": (1, 1, 1, 2), "last-axis-reversed": (1, 1, 1, -1),
             "last-axis-in-thirds": (1, 1, 1, 3), "rows-strided": (1, 1, 3, 1)}.get(layout, (1, 1, 1, 1))  # fmt: skip
    order = {"batch-seq-heads-dim": (0, 2, 1, 3), "seq-batch-heads-dim": (2, 0, 1, 3), "dim-before-seq": (0, 1, 3, 2),
             "fortran": (3, 2, 1, 0)}.get(layout, (0, 1, 2, 3))  # fmt: skip
    pad = 5 if layout == "padded-rows" else 0
    sizes = [n * abs(s) for n, s in zip(expected.shape, steps, strict=True)]
    sizes[-1] += pad
    memory = np.full([sizes[axis] for axis in order], 7.0, dtypes[0]).transpose(np.argsort(order))
    out = memory[tuple(slice(None, None, step) for step in steps)][..., : expected.shape[-1]]
    written = np.zeros(memory.shape, bool)
    written[tuple(slice(None, None, step) for step in steps)][..., : expected.shape[-1]] = True

    result = fastattn.attention(query, key, value, out=out)
    assert result is out
    assert_close(out, expected, tolerances(query, key, value)[0])
    assert (memory[~written].astype(np.float64) == 7.0).all()
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
