"""The attention layer, against plain matrix products around the reference, and against PyTorch's where it is installed.

Rounding: a projection of E features errs by (E + 2) u |x| |w|, which is less than 1e3 u for the sizes here; the scores
by less than 32 of those, the heads by less than 64, and the output projection sums less than 64 heads' elements. All in
all that is well below 1e7 u: 1e-9 in float64, in which the logic is tested, where an error of logic is of size 1.
In float32 the same formula in NumPy says what rounding costs (`test_float32_errs_no_more_than_numpy`).
"""

import doctest
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from oracle import BF16, F16, F32, F64, UNIT, assert_close, assert_same_bits, make_rng, normal
from test_rotary import turned

import fastattn
from fastattn import MultiHeadAttention, layer, reference

TOLERANCE = 1e7 * UNIT[F64]
EMBED, HEADS = 48, 4


def drawn(rng, *, kv_heads=HEADS, head_dim=12, head_dim_v=12, features=(EMBED, EMBED, EMBED), biases=True, dtype=F64):
    """Return the weights of a layer by the names of its parameters; results are of size 1."""
    rows = {"query": HEADS * head_dim, "key": kv_heads * head_dim, "value": kv_heads * head_dim_v, "out": EMBED}
    columns = dict(zip(rows, (*features, HEADS * head_dim_v), strict=True))
    weights = {f"{n}_weight": normal(rng, (rows[n], columns[n]), dtype, columns[n] ** -0.5) for n in rows}
    return weights | {f"{n}_bias": normal(rng, rows[n], dtype) for n in rows if biases}


def plain(weights, query, key=None, value=None, *, kv_heads=HEADS, turn=None, positions=None, dtype=F64, **keywords):
    """Return what the layer is to return, by plain matrix products and the reference; `turn` are rotary's keywords."""
    key = query if key is None else key
    value = key if value is None else value

    def projected(x, name):
        bias = weights.get(f"{name}_bias", np.zeros(1))
        return x.astype(dtype) @ weights[f"{name}_weight"].T.astype(dtype) + bias.astype(dtype)

    def split(x, name, heads):
        y = projected(x, name)
        return y.reshape(*y.shape[:-1], heads, -1).swapaxes(-3, -2)

    queries, keys, values = split(query, "query", HEADS), split(key, "key", kv_heads), split(value, "value", kv_heads)
    if turn is not None:
        rows = np.arange(query.shape[-2])[:, None] if positions is None else positions
        queries, keys = turned(queries, rows, **turn), turned(keys, rows, **turn)
    heads, weights_of_keys = reference.attention(queries, keys, values, **keywords, return_weights=True)
    joined = heads.swapaxes(-3, -2)
    return projected(joined.reshape(*joined.shape[:-2], -1), "out"), weights_of_keys


# --- against the reference ------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("biases", [True, False])
def test_self_attention(batch, kv_heads, biases):
    rng = make_rng(0)
    weights = drawn(rng, kv_heads=kv_heads, head_dim_v=10, biases=biases)
    attend = MultiHeadAttention(**weights, num_heads=HEADS)
    assert (attend.num_kv_heads, attend.head_dim, attend.head_dim_v) == (kv_heads, 12, 10)
    x = normal(rng, (*batch, 9, EMBED), F64)
    out, seen = attend(x, return_weights=True)
    expected, expected_seen = plain(weights, x, kv_heads=kv_heads)
    assert_close(out, expected, TOLERANCE)
    assert_close(seen, expected_seen, TOLERANCE, "weights")
    assert_same_bits(attend(x), out)


@pytest.mark.parametrize("bias", ["query", "key", "value", "out"])
def test_each_bias_alone(bias):
    rng = make_rng(1)
    weights = {name: x for name, x in drawn(rng).items() if "weight" in name or name.startswith(bias)}
    x = normal(rng, (7, EMBED), F64)
    assert_close(MultiHeadAttention(**weights, num_heads=HEADS)(x), plain(weights, x)[0], TOLERANCE)


@pytest.mark.parametrize("features", [(48, 48, 48), (48, 30, 30), (48, 48, 30), (48, 30, 20)], ids=str)
def test_cross_attention(features):
    rng = make_rng(2)
    weights = drawn(rng, features=features)
    query, key, value = (normal(rng, (2, rows, n), F64) for rows, n in zip((5, 8, 8), features, strict=True))
    attend = MultiHeadAttention(**weights, num_heads=HEADS)
    for inputs in [(query, key, value)] + [(query, key)] * (features[1] == features[2]):
        out, seen = attend(*inputs, return_weights=True)
        expected, expected_seen = plain(weights, *inputs)
        assert_close(out, expected, TOLERANCE)
        assert_close(seen, expected_seen, TOLERANCE, "weights")


def test_keys_of_one_batch_serve_many_queries():
    rng = make_rng(3)
    weights = drawn(rng)
    query, key = normal(rng, (3, 5, EMBED), F64), normal(rng, (1, 7, EMBED), F64)
    expected = plain(weights, query, np.broadcast_to(key, (3, 7, EMBED)))[0]
    assert_close(MultiHeadAttention(**weights, num_heads=HEADS)(query, key), expected, TOLERANCE)


rng_of_keywords = make_rng(4)
KEYWORDS = {
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "mask": {"mask": rng_of_keywords.random((2, 1, 9, 9)) < 0.7},
    "bias": {"bias": rng_of_keywords.standard_normal((HEADS, 9, 9))},
    "alibi": {"alibi_slopes": [0.5, 0.25, 0.125, 0.0625], "causal": True},
    "scale, softcap": {"scale": 0.7, "softcap": 2.0},
    "sinks": {"sinks": [0.0, 1.0, -1.0, 2.0]},
    "key_lengths": {"key_lengths": [9, 4]},
    "key_lengths, causal": {"key_lengths": [5, 1], "causal": True},
}


@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
def test_keywords_of_attention(keywords):
    rng = make_rng(5)
    weights = drawn(rng)
    x = normal(rng, (2, 9, EMBED), F64)
    attend = MultiHeadAttention(**weights, num_heads=HEADS)
    out, seen = attend(x, **keywords, return_weights=True)
    # Row i of self-attention is token i, and stays it where key_lengths is less.
    expected, expected_seen = plain(weights, x, **keywords, query_offset=0)
    assert_close(out, expected, TOLERANCE)
    assert_close(seen, expected_seen, TOLERANCE, "weights")
    assert np.abs(out - attend(x)).max() > 1e-3
    assert_same_bits(attend(x, **keywords, num_threads=1), attend(x, **keywords, num_threads=2))


@pytest.mark.parametrize("turn", [None, {}], ids=["plain", "rotary"])
def test_keys_that_are_the_query_are_self_attention(turn):
    """PyTorch's spelling of it: padding then moves no position, and rotary positions, packing and a cache go along."""
    rng = make_rng(5)
    attend = MultiHeadAttention(**drawn(rng), num_heads=HEADS, rotary=turn)
    x = normal(rng, (2, 7, EMBED), F64)
    for keywords in ({"causal": True, "key_lengths": [3, 5]}, {"window": (2, 1), "return_weights": True}):
        for got, expected in zip(attend(x, x, x, **keywords), attend(x, **keywords), strict=True):
            assert_same_bits(got, expected)
        assert_same_bits(attend(x, x, **keywords)[0], attend(x, **keywords)[0])
    for got, expected in zip(attend.project(x, x, x), attend.project(x), strict=True):
        assert_same_bits(got, expected)
    rows = x[0]
    assert_same_bits(attend(rows, rows, rows, cu_seqlens=[0, 3, 7]), attend(rows, cu_seqlens=[0, 3, 7]))
    cache = new_cache(attend)
    first, second = cache.add(), cache.add()
    narrow = MultiHeadAttention(**drawn(rng, dtype=F32), num_heads=HEADS, rotary=turn)
    rows = rows.astype(F32)
    expected = narrow(rows, cache=cache, sequences=first)
    assert_same_bits(narrow(rows, rows, rows, cache=cache, sequences=second), expected)


def test_causal_cross_attention_is_aligned_at_the_end():
    rng = make_rng(6)
    weights = drawn(rng)
    query, key = normal(rng, (5, EMBED), F64), normal(rng, (8, EMBED), F64)
    out = MultiHeadAttention(**weights, num_heads=HEADS)(query, key, causal=True)
    assert_close(out, plain(weights, query, key, causal=True, query_offset=3)[0], TOLERANCE)


TURNS = {
    "halves": {},
    "interleaved": {"interleaved": True},
    "partial": {"dim": 6, "base": 500.0},
    "partial, interleaved": {"dim": 6, "interleaved": True},
}
each_turn = pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS)


@each_turn
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_rotary(turn, kv_heads):
    rng = make_rng(7)
    weights = drawn(rng, kv_heads=kv_heads)
    attend = MultiHeadAttention(**weights, num_heads=HEADS, rotary=turn)
    x = normal(rng, (2, 9, EMBED), F64)
    expected = plain(weights, x, kv_heads=kv_heads, turn=turn, causal=True)[0]
    assert_close(attend(x, causal=True), expected, TOLERANCE)
    # Only differences of positions matter.
    assert_close(attend(x, causal=True, positions=100), expected, TOLERANCE)
    assert np.abs(MultiHeadAttention(**weights, num_heads=HEADS)(x, causal=True) - expected).max() > 1e-3


def test_positions_of_each_batch():
    rng = make_rng(8)
    weights = drawn(rng)
    attend = MultiHeadAttention(**weights, num_heads=HEADS, rotary={})
    x, positions = normal(rng, (2, 9, EMBED), F64), rng.integers(0, 100, (2, 9))
    expected = plain(weights, x, turn={}, positions=positions[:, None, :, None])[0]
    assert_close(attend(x, positions=positions), expected, TOLERANCE)


def test_float32_errs_no_more_than_numpy():
    rng = make_rng(9)
    weights = drawn(rng, dtype=F32)
    x = normal(rng, (4, 100, EMBED), F32)
    exact = plain(weights, x)[0]
    # Twice, as everywhere in this library, and the last roundings.
    allowed = 2 * np.abs(plain(weights, x, dtype=F32)[0] - exact).max() + 4 * UNIT[F32] * np.abs(exact).max()
    out = MultiHeadAttention(**weights, num_heads=HEADS)(x)
    assert out.dtype == F32
    assert_close(out, exact, allowed)


@pytest.mark.parametrize("half", [F16, BF16], ids=str)
def test_half_types_are_upcast(half):
    rng = make_rng(10)
    weights, x = drawn(rng, dtype=half), normal(rng, (5, EMBED), half)
    wide = {name: weight.astype(F32) for name, weight in weights.items()}
    attend = MultiHeadAttention(**weights, num_heads=HEADS)
    assert attend.dtype == F32
    assert_same_bits(attend(x), MultiHeadAttention(**wide, num_heads=HEADS)(x.astype(F32)))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0,)], ids=str)
def test_nothing_to_attend(shape):
    attend = MultiHeadAttention(**drawn(make_rng(11)), num_heads=HEADS)
    out = np.zeros((*shape, EMBED))
    assert attend(np.zeros((*shape, EMBED)), out=out) is out


def test_no_keys_leave_the_bias_of_the_output():
    weights = drawn(make_rng(11))
    out = MultiHeadAttention(**weights, num_heads=HEADS)(np.ones((5, EMBED)), np.ones((0, EMBED)))
    assert_same_bits(out, np.tile(weights["out_bias"], (5, 1)))


def test_any_strides():
    rng = make_rng(12)
    weights = drawn(rng)
    attend = MultiHeadAttention(**weights, num_heads=HEADS)
    x = normal(rng, (7, 2, EMBED), F64).swapaxes(0, 1)
    assert_close(attend(x), plain(weights, x)[0], TOLERANCE)
    assert_close(attend(x[::-1, ::2]), plain(weights, x[::-1, ::2])[0], TOLERANCE)


# --- where things lie -----------------------------------------------------------------------------


def test_out_is_written_and_may_be_the_input():
    rng = make_rng(13)
    attend = MultiHeadAttention(**drawn(rng), num_heads=HEADS)
    x = normal(rng, (2, 5, EMBED), F64)
    expected = attend(x)
    out = np.full_like(x, 7)
    assert attend(x, out=out) is out
    assert_same_bits(out, expected)
    assert attend(x, out=x) is x
    assert_same_bits(x, expected)


@pytest.mark.parametrize("keywords", [{}, {"cu_seqlens": [0, 500, 1000]}], ids=["dense", "packed"])
def test_only_the_buffers_are_allocated(keywords):
    attend = MultiHeadAttention(**drawn(make_rng(14), dtype=F32), num_heads=HEADS)
    x = np.ones((1000, EMBED), F32)
    out = np.empty_like(x)
    attend(x, out=out, **keywords)
    tracemalloc.start()
    try:
        attend(x, out=out, **keywords)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Queries, keys and values, and what attention makes of them; a copy of any is another x.nbytes.
    assert 4 * x.nbytes <= peak < 4.5 * x.nbytes


def test_projections_share_a_buffer():
    attend = MultiHeadAttention(**drawn(make_rng(15), kv_heads=2), num_heads=HEADS)
    x = np.ones((2, 5, EMBED))
    query, key, value = attend.project(x)
    assert query.base is key.base is value.base
    assert query.strides == key.strides == value.strides
    assert query.strides[-1] == 8
    query, key, value = attend.project(x, x.copy())
    assert key.base is value.base
    assert query.base is not key.base


def test_project_attention_output_is_a_call():
    rng = make_rng(16)
    attend = MultiHeadAttention(**drawn(rng, kv_heads=2), num_heads=HEADS, rotary={})
    x = normal(rng, (2, 5, EMBED), F64)
    out = np.empty_like(x)
    heads = fastattn.attention(*attend.project(x), causal=True)
    assert attend.output(heads, out=out) is out
    assert_close(out, attend(x, causal=True), TOLERANCE)


# --- packed, and to a cache -----------------------------------------------------------------------


@pytest.mark.parametrize("turn", [None, {}], ids=["plain", "rotary"])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_attended_alone(turn, causal):
    rng = make_rng(17)
    attend = MultiHeadAttention(**drawn(rng, kv_heads=2), num_heads=HEADS, rotary=turn)
    cu_seqlens = [0, 5, 5, 6, 70]
    x = normal(rng, (70, EMBED), F64)
    out = np.empty_like(x)
    assert attend(x, cu_seqlens=cu_seqlens, causal=causal, out=out) is out
    for begin, end in pairwise(cu_seqlens):
        assert_close(out[begin:end], attend(x[begin:end], causal=causal), TOLERANCE)


def new_cache(attend, num_pages=8):
    return fastattn.KVCache(attend.num_kv_heads, attend.head_dim, head_dim_v=attend.head_dim_v, num_pages=num_pages)


# The cache holds float32: keys and values are rounded once, to u = 2⁻²⁴ of them. Scores are then off by less than
# 32 u, and so are weights, relative; the output sums 48 elements that are off by less than 64 u of size 1.
CACHE_TOLERANCE = 48 * 64 * UNIT[F32]


def test_weights_with_a_cache():
    rng = make_rng(19)
    attend = MultiHeadAttention(**drawn(rng, dtype=F32), num_heads=HEADS)
    x = normal(rng, (2, 9, EMBED), F32)
    expected = attend(x, causal=True, return_weights=True)
    cache = new_cache(attend)
    sequences = [cache.add(), cache.add()]
    attend(x[:, :6], cache=cache, sequences=sequences)
    got = attend(x[:, 6:], cache=cache, sequences=sequences, return_weights=True)
    for mine, whole in zip(got, expected, strict=True):
        assert_close(mine, whole[..., 6:, :], CACHE_TOLERANCE)


def test_a_prompt_in_a_cache_is_causal_unless_told_otherwise():
    rng = make_rng(19)
    attend = MultiHeadAttention(**drawn(rng, dtype=F32), num_heads=HEADS)
    x = normal(rng, (9, EMBED), F32)
    cache = new_cache(attend)
    assert_close(attend(x, cache=cache, sequences=cache.add()), attend(x, causal=True), CACHE_TOLERANCE)
    assert_close(attend(x, causal=False, cache=cache, sequences=cache.add()), attend(x), CACHE_TOLERANCE)
    assert_same_bits(attend(x), attend(x, causal=False))


@each_turn
def test_step_by_step_with_a_cache(turn):
    rng = make_rng(18)
    attend = MultiHeadAttention(**drawn(rng, kv_heads=2, head_dim_v=10, dtype=F32), num_heads=HEADS, rotary=turn)
    x = normal(rng, (80, EMBED), F32)
    whole = attend(x, causal=True)
    cache = new_cache(attend)
    sequence = cache.add()
    begin = 0
    for size in (13, 1, 1, 60, 1, 4):
        rows = slice(begin, begin + size)
        out = np.empty((size, EMBED), F32)
        assert attend(x[rows], causal=True, cache=cache, sequences=sequence, out=out) is out
        assert_close(out, whole[rows], CACHE_TOLERANCE)
        begin += size
    assert cache.lengths == {sequence: 80}


def test_sequences_of_different_lengths_in_a_cache():
    rng = make_rng(19)
    attend = MultiHeadAttention(**drawn(rng, dtype=F32), num_heads=HEADS, rotary={})
    texts = [normal(rng, (20, EMBED), F32), normal(rng, (9, EMBED), F32)]
    cache = new_cache(attend)
    sequences = [cache.add(), cache.add()]
    for text, sequence in zip(texts, sequences, strict=True):
        attend(text[:-2], causal=True, cache=cache, sequences=sequence)
    last = attend(np.stack([text[-2:] for text in texts]), causal=True, cache=cache, sequences=np.array(sequences))
    for text, rows in zip(texts, last, strict=True):
        assert_close(rows, attend(text, causal=True)[-2:], CACHE_TOLERANCE)


def test_positions_with_a_cache():
    rng = make_rng(20)
    attend = MultiHeadAttention(**drawn(rng, dtype=F32), num_heads=HEADS, rotary={})
    x, positions = normal(rng, (6, EMBED), F32), np.array([3, 1, 4, 1, 5, 9])
    cache = new_cache(attend)
    sequence = cache.add()
    attend(x[:4], cache=cache, sequences=sequence, positions=positions[:4])
    out = attend(x[4:], cache=cache, sequences=sequence, positions=positions[4:])
    assert_close(out, attend(x, causal=True, positions=positions)[4:], CACHE_TOLERANCE)


CACHE_ERRORS = {
    "no such sequence": ({"sequences": [0, 7]}, KeyError, ["no sequence 7"]),
    "twice": ({"sequences": [0, 0]}, ValueError, ["sequences must all be different", "[0]"]),
    "one id for a batch": ({"sequences": 0}, ValueError, ["query has shape (2, 5, 48)", "(rows, 48)"]),
    "ids for no batch": (
        {"query": np.zeros((5, EMBED), F32)},
        ValueError,
        ["query has shape (5, 48)", "(2, rows, 48)"],
    ),
    "ids for another batch": ({"sequences": [0]}, ValueError, ["query has shape (2, 5, 48)", "(1, rows, 48)"]),
    "sequences floats": ({"sequences": [0.5, 1.5]}, TypeError, ["sequences must be an int"]),
    "too few pages": ({"query": np.zeros((2, 2000, EMBED), F32), "out": None}, MemoryError, ["pages are needed"]),
    # Found only when keys and values have already been appended.
    "softcap": ({"softcap": -1.0}, ValueError, ["softcap"]),
    "sinks": ({"sinks": [1.0]}, ValueError, ["sinks"]),
    "out": ({"out": np.full((2, 5, 7), 7.0, F32)}, ValueError, ["out has shape (2, 5, 7); accepted is (2, 5, 48)"]),
}


@pytest.mark.parametrize(("spoilt", "error", "words"), CACHE_ERRORS.values(), ids=CACHE_ERRORS)
@pytest.mark.parametrize("turn", [None, {}], ids=["plain", "rotary"])
def test_errors_leave_the_cache_as_it_was(spoilt, error, words, turn):
    attend = MultiHeadAttention(**drawn(make_rng(21), dtype=F32), num_heads=HEADS, rotary=turn)
    cache = new_cache(attend)
    sequences = [cache.add(), cache.add()]
    attend(np.ones((3, EMBED), F32), cache=cache, sequences=1)
    x = np.ones((2, 5, EMBED), F32)
    arguments = {"query": x, "sequences": sequences, "out": np.full_like(x, 7)} | spoilt
    with pytest.raises(error) as raised:
        attend(**arguments, cache=cache)
    for word in words:
        assert word in str(raised.value)
    assert cache.lengths == {0: 0, 1: 3}
    assert arguments["out"] is None or (arguments["out"] == 7).all()


# --- from checkpoints -----------------------------------------------------------------------------


def named(weights, prefix, names):
    """Return weights and biases by the names of a checkpoint."""
    parts = dict(zip(("query", "key", "value", "out"), names, strict=True))
    return {f"{prefix}{parts[n.split('_')[0]]}.{n.split('_')[1]}": x for n, x in weights.items()}


@pytest.mark.parametrize("biases", [True, False])
def test_bert_names(biases):
    rng = make_rng(22)
    weights = drawn(rng, biases=biases)
    mapping = named(weights, "a.3.", ("self.query", "self.key", "self.value", "output.dense"))
    attend = MultiHeadAttention.from_mapping(mapping | {"a.2.self.query.weight": 0}, "a.3.", HEADS, scheme="bert")
    x = normal(rng, (6, EMBED), F64)
    assert_close(attend(x), plain(weights, x)[0], TOLERANCE)


@pytest.mark.parametrize("biases", [True, False])
def test_gpt2_names(biases):
    rng = make_rng(23)
    weights = drawn(rng, biases=biases)
    mapping = {
        "h.0.attn.c_attn.weight": np.concatenate([weights[f"{n}_weight"] for n in ("query", "key", "value")]).T,
        "h.0.attn.c_proj.weight": weights["out_weight"].T,
    }
    if biases:
        mapping["h.0.attn.c_attn.bias"] = np.concatenate([weights[f"{n}_bias"] for n in ("query", "key", "value")])
        mapping["h.0.attn.c_proj.bias"] = weights["out_bias"]
    attend = MultiHeadAttention.from_mapping(mapping, "h.0.attn.", HEADS, scheme="gpt2")
    x = normal(rng, (6, EMBED), F64)
    assert_close(attend(x, causal=True), plain(weights, x, causal=True)[0], TOLERANCE)


@pytest.mark.parametrize("turn", [None, {"base": 500.0, "dim": 6}], ids=["default", "given"])
def test_llama_names(turn):
    rng = make_rng(24)
    weights = drawn(rng, kv_heads=2, biases=False)
    mapping = named(weights, "l.", ("q_proj", "k_proj", "v_proj", "o_proj"))
    attend = MultiHeadAttention.from_mapping(mapping, "l.", HEADS, scheme="llama", num_kv_heads=2, rotary=turn)
    x = normal(rng, (6, EMBED), F64)
    assert_close(attend(x, causal=True), plain(weights, x, kv_heads=2, turn=turn or {}, causal=True)[0], TOLERANCE)


def test_state_of_torch_without_torch():
    rng = make_rng(25)
    weights = drawn(rng)
    state = {
        "a.in_proj_weight": np.concatenate([weights[f"{n}_weight"] for n in ("query", "key", "value")]),
        "a.in_proj_bias": np.concatenate([weights[f"{n}_bias"] for n in ("query", "key", "value")]),
        "a.out_proj.weight": weights["out_weight"],
        "a.out_proj.bias": weights["out_bias"],
    }
    x = normal(rng, (6, EMBED), F64)
    attend = MultiHeadAttention.from_torch(state, HEADS, prefix="a.")
    assert_close(attend(x), plain(weights, x)[0], TOLERANCE)


class Unconvertible:
    """As a tensor of bfloat16."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Got unsupported ScalarType BFloat16")


EYE = np.eye(EMBED)
STATE = {"in_proj_weight": np.concatenate([EYE] * 3), "out_proj.weight": EYE}
BERT = {f"a.{name}.weight": EYE for name in ("self.query", "self.key", "self.value", "output.dense")}
GPT2 = {"a.c_attn.weight": np.concatenate([EYE] * 3, axis=1), "a.c_proj.weight": EYE}
LLAMA = {f"a.{part}_proj.weight": EYE for part in "qkvo"}
MANY = [f"a.x{i}" for i in range(9)]
LOADING_ERRORS = {
    "scheme": (lambda: from_names({}, "t5"), ValueError, ["scheme must be one of bert, gpt2, llama, but is 't5'"]),
    "no weight": (lambda: from_names({}, "bert"), KeyError, ["the mapping has no 'a.self.query.weight'"]),
    "not three parts": (
        lambda: from_names({"a.c_attn.weight": np.zeros((48, 100)), "a.c_proj.weight": EYE}, "gpt2"),
        ValueError,
        ["a.c_attn.weight has shape (100, 48)", "three times"],
    ),
    "torch: no weight": (lambda: from_state("in_proj_weight", None), KeyError, ["the mapping has no 'in_proj_weight'"]),
    "torch: no output": (lambda: from_state("out_proj.weight", None), KeyError, ["no 'out_proj.weight'"]),
    "torch: bias_k": (lambda: from_state("bias_k", EYE), ValueError, ["bias_k", "without add_bias_kv"]),
    "torch: no array": (
        lambda: from_state("out_proj.weight", Unconvertible()),
        TypeError,
        ["out_proj.weight", "Got unsupported ScalarType BFloat16", "tensor.detach().float()"],
    ),
    "q_norm": (
        lambda: from_names(LLAMA | {"a.q_norm.weight": 0}, "llama"),
        ValueError,
        ["a.q_norm.weight", "not norm"],
    ),
    "sinks": (lambda: from_names(LLAMA | {"a.sinks": 0}, "llama"), ValueError, ["a.sinks", "sinks="]),
    "LoRA": (
        lambda: from_names(LLAMA | {"a.q_proj.lora_A.weight": 0, "a.q_proj.lora_B.weight": 0}, "llama"),
        ValueError,
        ["a.q_proj.lora_A.weight, a.q_proj.lora_B.weight", "no place in the layer"],
    ),
    "many": (lambda: from_names(LLAMA | dict.fromkeys(MANY, 0), "llama"), ValueError, ["a.x4, ..., for"]),
    "distances": (
        lambda: from_names(BERT | {"a.self.distance_embedding.weight": 0}, "bert"),
        ValueError,
        ["a.self.distance_embedding.weight", "no place"],
    ),
    "scales": (lambda: from_names(GPT2 | {"a.c_attn.scales": 0}, "gpt2"), ValueError, ["a.c_attn.scales", "no place"]),
    "fused and not": (
        lambda: from_names(LLAMA | {"a.qkv_proj.weight": np.zeros((3 * EMBED, EMBED))}, "llama"),
        ValueError,
        ["a.q_proj.weight, a.k_proj.weight", "no place"],
    ),
    "fused rows": (
        lambda: from_names({"a.qkv_proj.weight": np.zeros((EMBED + 3, EMBED)), "a.o_proj.weight": EYE}, "llama"),
        ValueError,
        ["a.qkv_proj.weight has shape (51, 48)", "48 rows for the query"],
    ),
    "fused heads": (
        lambda: from_names({"a.qkv_proj.weight": np.zeros((EMBED + 14, EMBED)), "a.o_proj.weight": EYE}, "llama"),
        ValueError,
        ["key_weight has 7 rows", "head_dim, 12"],
    ),
    "frequencies of other heads": (
        lambda: from_names(LLAMA | {"a.rotary_emb.inv_freq": 10000.0 ** (np.arange(12) / -12)}, "llama"),
        ValueError,
        ["a.rotary_emb.inv_freq has shape (12,)", "num_heads 4", "(6,) frequencies"],
    ),
    "frequencies of another base": (
        lambda: from_names(LLAMA | {"a.rotary_emb.inv_freq": 5e5 ** (np.arange(6) / -6)}, "llama"),
        ValueError,
        ["a.rotary_emb.inv_freq", "rope_theta"],
    ),
    "torch: more": (lambda: from_state("linear1.weight", EYE), ValueError, ["linear1.weight", "no place"]),
    "torch: fused and not": (
        lambda: MultiHeadAttention.from_torch(STATE | {f"{part}_proj_weight": EYE for part in "qkv"}, HEADS),
        ValueError,
        ["in_proj_weight", "no place"],
    ),
    "torch: thirds": (lambda: from_state("in_proj_bias", np.zeros(100)), ValueError, ["in_proj_bias", "(100,)"]),
    "torch: bias": (lambda: from_state("in_proj_bias", np.zeros(99)), ValueError, ["query_bias", "(33,)", "(48)"]),
}


def from_names(mapping, scheme):
    return MultiHeadAttention.from_mapping(mapping, "a.", HEADS, scheme=scheme)


def from_state(name, value):
    state = {key: x for key, x in (STATE | {name: value}).items() if x is not None}
    return MultiHeadAttention.from_torch(state, HEADS)


@pytest.mark.parametrize(("load", "error", "words"), LOADING_ERRORS.values(), ids=LOADING_ERRORS)
def test_errors_of_loading(load, error, words):
    with pytest.raises(error) as raised:
        load()
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("mapping", "scheme", "more"),
    [
        (BERT, "bert", {"a.output.LayerNorm.weight": 0, "a.output.LayerNorm.bias": 0}),
        (GPT2, "gpt2", {"a.bias": np.tri(9, dtype=bool), "a.masked_bias": -1e4}),
        (LLAMA, "llama", {"a.rotary_emb.inv_freq": (10000.0 ** (np.arange(6) / -6)).astype(np.float16)}),
        (LLAMA, "llama", {"b.sinks": 0, "lm_head.weight": 0, "a": 0}),
    ],
    ids=["bert", "gpt2", "llama", "others"],
)
def test_entries_that_the_layer_does_without(mapping, scheme, more):
    assert from_names(mapping | more, scheme).num_heads == HEADS


@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("biases", [True, False])
def test_fused_llama_names(kv_heads, biases):
    """Phi-3's: rows of all query heads, then those of the key's and the value's."""
    rng = make_rng(24)
    weights = drawn(rng, kv_heads=kv_heads, biases=biases)
    kinds = ("weight", "bias") if biases else ("weight",)
    mapping = {f"l.o_proj.{kind}": weights[f"out_{kind}"] for kind in kinds}
    for kind in kinds:
        mapping[f"l.qkv_proj.{kind}"] = np.concatenate([weights[f"{n}_{kind}"] for n in ("query", "key", "value")])
    attend = MultiHeadAttention.from_mapping(mapping, "l.", HEADS, scheme="llama")
    assert attend.num_kv_heads == kv_heads
    x = normal(rng, (6, EMBED), F64)
    assert_close(attend(x, causal=True), plain(weights, x, kv_heads=kv_heads, turn={}, causal=True)[0], TOLERANCE)


def configured(config, scheme="llama", **keywords):
    mapping = {"bert": BERT, "gpt2": GPT2, "llama": LLAMA}[scheme]
    return MultiHeadAttention.from_mapping(mapping, "a.", HEADS, scheme=scheme, config=config, **keywords)


NUMBERS = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": EMBED // HEADS, "hidden_size": EMBED}


# The config, more keywords, and the layer's rotary.
@pytest.mark.parametrize(
    ("config", "keywords", "rotary"),
    [
        (NUMBERS, {}, {"base": 10000.0, "dim": 12}),
        ({"num_attention_heads": HEADS}, {}, {"base": 10000.0, "dim": 12}),
        ({**NUMBERS, "head_dim": None}, {}, {"base": 10000.0, "dim": 12}),
        ({**NUMBERS, "rope_theta": 5e5, "rope_scaling": None}, {}, {"base": 5e5, "dim": 12}),
        ({**NUMBERS, "rope_theta": 5e5}, {"rotary": {"base": 500000}}, {"base": 500000}),
        ({**NUMBERS, "partial_rotary_factor": 0.5}, {}, {"base": 10000.0, "dim": 6}),
        ({**NUMBERS, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, {}, {"base": 1e6, "dim": 12}),
        ({"n_head": HEADS}, {"scheme": "gpt2"}, None),
        (NUMBERS, {"scheme": "bert"}, None),
    ],
)
def test_the_config_of_a_checkpoint(config, keywords, rotary):
    assert configured(config, **keywords).rotary == rotary


@pytest.mark.parametrize(
    ("config", "keywords", "words"),
    [
        ({"num_attention_heads": 8}, {}, "num_heads is 4, but the config's num_attention_heads is 8"),
        ({"num_attention_heads": 8}, {"scheme": "bert"}, "num_heads is 4, but the config's num_attention_heads is 8"),
        ({"n_head": 12}, {"scheme": "gpt2"}, "num_heads is 4, but the config's n_head is 12"),
        ({**NUMBERS, "num_key_value_heads": 2}, {}, "num_kv_heads is 4, but the config's num_key_value_heads is 2"),
        ({**NUMBERS, "head_dim": 24}, {}, "head_dim is 12, but the config's head_dim is 24"),
        ({"vision_config": {}}, {}, "config has no num_attention_heads or n_head"),
        ({**NUMBERS, "rope_scaling": {"rope_type": "llama3"}}, {}, "rope_scaling.*llama3.*without scaling"),
        ({**NUMBERS, "rope_scaling": {"type": "linear", "factor": 2}}, {}, "rope_scaling.*linear"),
        ({**NUMBERS, "rope_parameters": {"rope_type": "yarn"}}, {}, "rope_scaling.*yarn"),
        ({**NUMBERS, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, {}, "of one kind of layers"),
        ({**NUMBERS, "rope_theta": 5e5}, {"rotary": {}}, r"rotary has .*10000.*, but the config says .*500000"),
        (
            {**NUMBERS, "partial_rotary_factor": 0.5},
            {"rotary": {"dim": 12}},
            "rotary has .*12.*, but the config says .*6",
        ),
    ],
)
def test_a_config_that_contradicts(config, keywords, words):
    with pytest.raises(ValueError, match=words):
        configured(config, **keywords)


# --- against PyTorch ------------------------------------------------------------------------------


def torch_layer(torch, **keywords):
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, **keywords).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:  # biases, which begin as 0
                parameter.normal_()
    return module


def assert_as_torch(torch, module, inputs, ours, **theirs):
    query, key, value = (torch.from_numpy(x) for x in (*inputs, *[inputs[-1]] * (3 - len(inputs))))
    with torch.no_grad():
        expected = module(query, key, value, average_attn_weights=False, **theirs)
    out, weights = MultiHeadAttention.from_torch(module.state_dict(), HEADS)(*inputs, **ours, return_weights=True)
    assert_close(out, expected[0].numpy(), TOLERANCE)
    assert_close(weights, expected[1].numpy(), TOLERANCE, "weights")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("features", [{}, {"kdim": 30}, {"vdim": 20}, {"kdim": 30, "vdim": 20}], ids=str)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_torch_cross_attention(bias, features, batch):
    torch = pytest.importorskip("torch")
    rng = make_rng(26)
    columns = (EMBED, features.get("kdim", EMBED), features.get("vdim", EMBED))
    inputs = [normal(rng, (*batch, rows, n), F64) for rows, n in zip((5, 8, 8), columns, strict=True)]
    assert_as_torch(torch, torch_layer(torch, bias=bias, **features), inputs, {})


@pytest.mark.parametrize(
    ("mask", "meant"),
    [
        (np.arange(5) < [[3]], np.s_[None, None]),
        (np.arange(5) < np.arange(1, 6)[:, None], np.s_[None, None]),
        (np.arange(5) < np.arange(1, 3)[:, None, None], np.s_[None]),
    ],
    ids=["(1, keys)", "(queries, keys), as many as sequences", "(heads, 1, keys)"],
)
def test_masks_broadcast_from_the_last_axis_on(mask, meant):
    rng = make_rng(51)
    attend = MultiHeadAttention(**drawn(rng), num_heads=HEADS)
    x = normal(rng, (5, 5, EMBED), F64)
    if mask.ndim == 3:
        mask = np.repeat(mask, HEADS // 2, axis=0)
    assert_same_bits(attend(x, mask=mask), attend(x, mask=np.broadcast_to(mask[meant], (5, HEADS, 5, 5))))


def torch_masks(torch):
    """Return keywords of the layer, and those of PyTorch's that mean the same: there True is what is not seen."""
    rng = make_rng(27)
    seen = (rng.random((9, 9)) < 0.6) | np.eye(9, dtype=bool)
    added = rng.standard_normal((9, 9))
    of_heads = rng.standard_normal((2, HEADS, 9, 9))
    padding = torch.arange(9) >= torch.tensor([[9], [4]])
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    return {
        "none": ({}, {}),
        "mask": ({"mask": seen}, {"attn_mask": torch.from_numpy(~seen)}),
        "bias": ({"bias": added}, {"attn_mask": torch.from_numpy(added)}),
        "bias of heads": ({"bias": of_heads}, {"attn_mask": torch.from_numpy(of_heads.reshape(-1, 9, 9))}),
        "causal": ({"causal": True}, {"attn_mask": later}),
        "padding": ({"key_lengths": [9, 4]}, {"key_padding_mask": padding}),
        "padding, causal": (
            {"key_lengths": [9, 4], "causal": True},
            {"key_padding_mask": padding, "attn_mask": later},
        ),
    }


@pytest.mark.parametrize("kind", ["none", "mask", "bias", "bias of heads", "causal", "padding", "padding, causal"])
def test_torch_self_attention(kind):
    torch = pytest.importorskip("torch")
    ours, theirs = torch_masks(torch)[kind]
    x = normal(make_rng(28), (2, 9, EMBED), F64)
    module = torch_layer(torch)
    assert_as_torch(torch, module, [x], ours, **theirs)


# --- bad input ------------------------------------------------------------------------------------


def zeros(*shape, dtype=F64):
    return np.zeros(shape, dtype)


LAYER_ERRORS = {
    "dtype": ({"query_weight": EYE.astype(int)}, TypeError, ["query_weight has dtype int64", "float32, float64"]),
    "bias dtype": ({"out_bias": zeros(48, dtype=int)}, TypeError, ["out_bias has dtype int64", "float32"]),
    "dtypes": ({"key_weight": EYE.astype(F32)}, TypeError, ["float64", "float32", "all"]),
    "axes": ({"value_weight": zeros(48)}, ValueError, ["value_weight has shape (48,)", "(out_features, in_features)"]),
    "bias": ({"key_bias": zeros(47)}, ValueError, ["key_bias has shape (47,); accepted is (48)"]),
    "num_heads": ({"num_heads": 5}, ValueError, ["query_weight has 48 rows", "multiples of num_heads, 5"]),
    "num_heads 0": ({"num_heads": 0}, ValueError, ["num_heads must be at least 1, but is 0"]),
    "num_heads float": ({"num_heads": 4.0}, TypeError, ["num_heads must be an int, not 4.0"]),
    "key rows": ({"key_weight": zeros(40, 48)}, ValueError, ["key_weight has 40 rows", "multiples of head_dim, 12"]),
    "no key rows": ({"key_weight": zeros(0, 48)}, ValueError, ["key_weight has 0 rows"]),
    "group": ({"key_weight": zeros(36, 48)}, ValueError, ["num_heads is 4", "multiples of num_kv_heads, 3"]),
    "num_kv_heads": ({"num_kv_heads": 2}, ValueError, ["num_kv_heads is 2, but key_weight has 48 rows"]),
    "value rows": ({"value_weight": zeros(47, 48)}, ValueError, ["value_weight has 47 rows", "num_kv_heads, 4"]),
    "out columns": ({"out_weight": zeros(48, 40)}, ValueError, ["out_weight has 40 columns", "head_dim_v, 48"]),
    "rotary keyword": ({"rotary": {"theta": 1.0}}, TypeError, ["rotary has theta", "base, dim and interleaved"]),
    "rotary dim": ({"rotary": {"dim": 14}}, ValueError, ["dim must be from 2 to 12, but is 14"]),
    "rotary True": ({"rotary": True}, TypeError, ["rotary must be a dict of base, dim and interleaved", "not True"]),
    "rotary interleaved": ({"rotary": {"interleaved": "no"}}, TypeError, ["interleaved must be a bool, not 'no'"]),
    "rotary base": ({"rotary": {"base": -1.0}}, ValueError, ["base", "-1.0"]),
}


@pytest.mark.parametrize(("spoilt", "error", "words"), LAYER_ERRORS.values(), ids=LAYER_ERRORS)
def test_errors_of_the_layer(spoilt, error, words):
    good = {**dict.fromkeys(("query_weight", "key_weight", "value_weight", "out_weight"), EYE), "num_heads": HEADS}
    MultiHeadAttention(**good)
    with pytest.raises(error) as raised:
        MultiHeadAttention(**(good | spoilt))
    for word in words:
        assert word in str(raised.value)


CACHE = fastattn.KVCache(4, 12, page_size=64, num_pages=1)
CALL_ERRORS = {
    "query dtype": ({"query": zeros(2, 5, 48, dtype=F32)}, TypeError, ["query has dtype float32", "float64"]),
    "query integers": ({"query": zeros(2, 5, 48, dtype=int)}, TypeError, ["query has dtype int64"]),
    "query features": ({"query": zeros(2, 5, 47)}, ValueError, ["query has shape (2, 5, 47)", "(..., rows, 48)"]),
    "query one axis": ({"query": zeros(48)}, ValueError, ["query has shape (48,)", "(..., rows, 48)"]),
    "key features": ({"key": zeros(2, 5, 47)}, ValueError, ["key has shape (2, 5, 47)", "(..., rows, 48)"]),
    "key dtype": ({"key": zeros(2, 5, 48, dtype=F32)}, TypeError, ["key has dtype float32"]),
    "value features": ({"key": zeros(2, 5, 48), "value": zeros(2, 5, 7)}, ValueError, ["value has shape (2, 5, 7)"]),
    "value rows": ({"key": zeros(2, 5, 48), "value": zeros(2, 6, 48)}, ValueError, ["value", "5", "6"]),
    "batches": ({"key": zeros(3, 5, 48)}, ValueError, ["batch axes of query, key and value", "(2,), (3,)"]),
    "key 2-D": ({"key": zeros(5, 48)}, ValueError, ["all 2-D", "query (2, 5, 48), key (5, 48)", "key[None]"]),
    "query 2-D": ({"query": zeros(5, 48), "key": zeros(2, 5, 48)}, ValueError, ["query (5, 48), key (2, 5, 48)"]),
    "value 2-D": (
        {"key": zeros(2, 5, 48), "value": zeros(5, 48)},
        ValueError,
        ["query (2, 5, 48), key (2, 5, 48), value (5, 48)"],
    ),
    "value 3-D": (
        {"query": zeros(5, 48), "key": zeros(5, 48), "value": zeros(2, 5, 48)},
        ValueError,
        ["query (5, 48), key (5, 48), value (2, 5, 48)"],
    ),
    "value alone": ({"value": zeros(2, 5, 48)}, ValueError, ["value is given without key"]),
    "mask": ({"mask": zeros(5, 4, dtype=bool)}, ValueError, ["mask", "(5, 4)"]),
    "mask of floats": ({"mask": zeros(5, 5)}, TypeError, ["mask", "bias="]),
    "key_lengths": ({"key_lengths": [5, 6]}, ValueError, ["key_lengths", "6"]),
    "softcap": ({"softcap": -1.0}, ValueError, ["softcap"]),
    "positions": ({"positions": 3}, ValueError, ["positions is given", "no rotary positions"]),
    "cache alone": ({"cache": CACHE}, ValueError, ["cache and sequences must be given together"]),
    "sequences alone": ({"sequences": [0, 1]}, ValueError, ["cache and sequences must be given together"]),
    "cu_seqlens, batch": ({"cu_seqlens": [0, 5]}, ValueError, ["query has shape (2, 5, 48)", "(rows, 48)"]),
    "cu_seqlens, mask": ({"cu_seqlens": [0], "mask": True}, ValueError, ["mask and cu_seqlens cannot"]),
    "cu_seqlens, key": ({"cu_seqlens": [0], "key": zeros(2, 5, 48)}, ValueError, ["key and cu_seqlens cannot"]),
    "cu_seqlens, weights": ({"cu_seqlens": [0], "return_weights": True}, ValueError, ["return_weights and cu_seqlens"]),
    "cache, bias": ({"cache": CACHE, "sequences": 0, "bias": 0.0}, ValueError, ["bias and cache cannot be given"]),
    "cache, cu_seqlens": (
        {"cache": CACHE, "sequences": 0, "cu_seqlens": [0]},
        ValueError,
        ["cu_seqlens and cache cannot be given together"],
    ),
    "out list": ({"out": [0.0]}, TypeError, ["out must be an ndarray, not list"]),
    "out dtype": ({"out": zeros(2, 5, 48, dtype=F32)}, TypeError, ["out has dtype float32; accepted is float64"]),
    "out shape": ({"out": zeros(5, 48)}, ValueError, ["out has shape (5, 48); accepted is (2, 5, 48)"]),
    "out strides": ({"out": zeros(5, 2, 48).swapaxes(0, 1)}, ValueError, ["out must be C-contiguous", "strides"]),
}


@pytest.mark.parametrize(("spoilt", "error", "words"), CALL_ERRORS.values(), ids=CALL_ERRORS)
def test_errors_of_a_call(spoilt, error, words):
    attend = MultiHeadAttention(EYE, EYE, EYE, EYE, num_heads=HEADS)
    good = {"query": zeros(2, 5, 48), "out": np.full((2, 5, 48), 7.0)}
    out = (good | spoilt)["out"]
    before = np.array(out)
    with pytest.raises(error) as raised:
        attend(**(good | spoilt))
    for word in words:
        assert word in str(raised.value)
    assert np.array_equal(out, before)


PACKED_ERRORS = {
    "floats": ([0.0, 5.0], "cu_seqlens"),
    "two axes": ([[0, 5]], "cu_seqlens"),
    "empty": ([], "cu_seqlens"),
    "falling": ([0, 4, 3, 5], "cu_seqlens"),
    "short": ([0, 4], "cu_seqlens"),
    "long": ([0, 6], "cu_seqlens"),
}


@pytest.mark.parametrize("turn", [None, {}], ids=["plain", "rotary"])
@pytest.mark.parametrize(("cu_seqlens", "word"), PACKED_ERRORS.values(), ids=PACKED_ERRORS)
def test_errors_of_cu_seqlens(cu_seqlens, word, turn):
    attend = MultiHeadAttention(EYE, EYE, EYE, EYE, num_heads=HEADS, rotary=turn)
    out = np.full((5, EMBED), 7.0)
    with pytest.raises((TypeError, ValueError), match=word):
        attend(zeros(5, EMBED), cu_seqlens=cu_seqlens, out=out)
    assert (out == 7).all()


def test_what_lacks_must_be_given():
    attend = MultiHeadAttention(**drawn(make_rng(29), features=(48, 30, 20)), num_heads=HEADS)
    with pytest.raises(ValueError, match="key must be given: it has other features than query"):
        attend(zeros(5, 48))
    with pytest.raises(ValueError, match="value must be given: it has other features than key"):
        attend(zeros(5, 48), zeros(5, 30))


def test_rotary_is_of_self_attention():
    attend = MultiHeadAttention(EYE, EYE, EYE, EYE, num_heads=HEADS, rotary={})
    with pytest.raises(ValueError, match="key is given, but the layer has rotary positions"):
        attend(zeros(5, EMBED), zeros(5, EMBED))
    with pytest.raises(ValueError, match=r"positions has shape \(4,\)"):
        attend(zeros(5, EMBED), positions=[1, 2, 3, 4])


@pytest.mark.parametrize(
    ("heads", "error", "words"),
    [
        (zeros(4, 5, 12, dtype=F32), TypeError, "heads has dtype float32"),
        (zeros(5, 4, 12), ValueError, r"heads has shape \(5, 4, 12\); accepted is \(\.\.\., 4, rows, 12\)"),
        (zeros(5, 12), ValueError, "heads has shape"),
    ],
)
def test_errors_of_output(heads, error, words):
    out = np.full((5, EMBED), 7.0)
    with pytest.raises(error, match=words):
        MultiHeadAttention(EYE, EYE, EYE, EYE, num_heads=HEADS).output(heads, out=out)
    assert (out == 7).all()


def test_what_a_layer_says_of_itself():
    weights = drawn(make_rng(30), kv_heads=2, head_dim_v=10, dtype=F32)
    said = repr(MultiHeadAttention(**weights, num_heads=HEADS, rotary={"dim": 6}))
    assert said == (
        "MultiHeadAttention(embed_dim=48, num_heads=4, num_kv_heads=2, head_dim=12, head_dim_v=10, dtype=float32, "
        "rotary={'dim': 6})"
    )


def test_the_callers_weights_and_rotary_are_not_kept():
    rng = make_rng(31)
    weights, turn = drawn(rng), {"dim": 6}
    attend = MultiHeadAttention(**weights, num_heads=HEADS, rotary=turn)
    x = normal(rng, (5, EMBED), F64)
    expected = attend(x)
    for weight in weights.values():
        weight[...] = 0
    turn["dim"] = 12
    assert_same_bits(attend(x), expected)


def test_examples_in_docstrings():
    tried = doctest.testmod(layer)
    assert tried.attempted > 10
    assert tried.failed == 0


def test_every_scheme_is_tested():
    assert set(layer.SCHEMES) == {"bert", "gpt2", "llama"}
