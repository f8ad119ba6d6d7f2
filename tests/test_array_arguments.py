"""What is no array of numbers, or would lose something as one, is refused by the name of the argument."""

import ml_dtypes
import numpy as np
import pytest
from oracle import BF16, F32, make_rng, qkv

import fastattn
from fastattn import reference
from fastattn.encoder import Encoder

SHAPE = (2, 4, 2, 5, 7, 8)
BATCHED = {"query": (2, 4, 5, 8), "key": (2, 2, 7, 8), "value": (2, 2, 7, 8)}
SCORES = {
    "mask": np.ones((5, 7), bool),
    "bias": np.zeros((5, 7), F32),
    "alibi_slopes": np.ones(4),
    "sinks": np.ones(4),
    "key_lengths": np.array([7, 7]),
    "query_offset": np.array([0, 0]),
}


def dense():
    return dict(zip(("query", "key", "value"), qkv(make_rng(), SHAPE), strict=True)) | SCORES


def dense_with_out():
    return dense() | {"out": np.full((2, 4, 5, 8), 7.0, F32)}


def packed():
    return {
        "query": np.ones((6, 4, 8), F32),
        "key": np.ones((6, 2, 8), F32),
        "value": np.ones((6, 2, 8), F32),
        "cu_seqlens_q": np.array([0, 2, 6]),
        "cu_seqlens_k": np.array([0, 2, 6]),
        "alibi_slopes": np.ones(4),
        "sinks": np.ones(4),
        "query_offset": np.array([0, 0]),
        "out": np.full((6, 4, 8), 7.0, F32),
    }


def query_and_key():
    return {name: x for name, x in dense().items() if name != "value"}


def parts():
    return {"outs": [np.ones((4, 5, 8), F32)] * 2, "lses": [np.zeros((4, 5), F32)] * 2}


def cache():
    made = fastattn.KVCache(2, 8, num_pages=2)
    made.add(np.ones((2, 3, 8), F32), np.ones((2, 3, 8), F32))
    return made


def layer():
    return fastattn.MultiHeadAttention(*np.ones((4, 8, 8), F32), num_heads=2)


def layer_arguments():
    return {
        "query": np.ones((2, 5, 8), F32),
        "key": np.ones((2, 7, 8), F32),
        "value": np.ones((2, 7, 8), F32),
        "mask": np.ones((5, 7), bool),
        "bias": np.zeros((5, 7), F32),
        "alibi_slopes": np.ones(2),
        "sinks": np.ones(2),
        "key_lengths": np.array([7, 7]),
        "out": np.full((2, 5, 8), 7.0, F32),
    }


WEIGHTS = ("query_weight", "key_weight", "value_weight", "out_weight")
BIASES = ("query_bias", "key_bias", "value_bias", "out_bias")

# What is called, and its array arguments, all of them good.
CALLS = {
    "attention": (fastattn.attention, dense_with_out),
    "attention_varlen": (fastattn.attention_varlen, packed),
    "plan": (fastattn.plan, dense),
    "top_keys": (fastattn.top_keys, query_and_key),
    "merge": (fastattn.merge, parts),
    "rotary": (
        fastattn.rotary,
        lambda: {"x": np.ones((2, 5, 8), F32), "positions": np.arange(5), "out": np.full((2, 5, 8), 7.0, F32)},
    ),
    "KVCache": (
        lambda store: fastattn.KVCache(2, 8, store=store),
        lambda: {"store": np.zeros(2 * fastattn.KVCache.bytes_per_page(2, 8), np.uint8)},
    ),
    "KVCache.add": (
        lambda **arrays: cache().add(**arrays),
        lambda: {"key": np.ones((2, 3, 8), F32), "value": np.ones((2, 3, 8), F32)},
    ),
    "KVCache.append": (
        lambda **arrays: cache().append(**arrays),
        lambda: {"sequences": np.array([0]), "key": np.ones((1, 2, 3, 8), F32), "value": np.ones((1, 2, 3, 8), F32)},
    ),
    "KVCache.attention": (
        lambda **arrays: cache().attention(**arrays),
        lambda: {
            "query": np.ones((1, 4, 2, 8), F32),
            "sequences": np.array([0]),
            "alibi_slopes": np.ones(4),
            "sinks": np.ones(4),
            "query_offset": np.array([0]),
            "out": np.full((1, 4, 2, 8), 7.0, F32),
        },
    ),
    "KVCache.attention of one": (
        lambda **arrays: cache().attention(sequences=0, **arrays),
        lambda: {"query": np.ones((4, 2, 8), F32), "out": np.full((4, 2, 8), 7.0, F32)},
    ),
    "KVCache.attention, packed": (
        lambda **arrays: cache().attention(sequences=[0], **arrays),
        lambda: {"query": np.ones((2, 4, 8), F32), "cu_seqlens_q": np.array([0, 2])},
    ),
    "MultiHeadAttention": (
        lambda **arrays: fastattn.MultiHeadAttention(num_heads=2, **arrays),
        lambda: dict.fromkeys(WEIGHTS, np.ones((8, 8), F32)) | dict.fromkeys(BIASES, np.ones(8, F32)),
    ),
    "the layer": (lambda **arrays: layer()(**arrays), layer_arguments),
    "the layer, packed": (
        lambda **arrays: layer()(**arrays),
        lambda: {"query": np.ones((5, 8), F32), "cu_seqlens": np.array([0, 5])},
    ),
    "the layer's project": (
        lambda **arrays: layer().project(**arrays),
        lambda: {"query": np.ones((5, 8), F32), "key": np.ones((5, 8), F32), "value": np.ones((5, 8), F32)},
    ),
    "the layer's output": (
        lambda **arrays: layer().output(**arrays),
        lambda: {"heads": np.ones((2, 5, 4), F32), "out": np.full((5, 8), 7.0, F32)},
    ),
    "from_torch": (
        lambda **state: fastattn.MultiHeadAttention.from_torch(
            {name.replace("__", "."): x for name, x in state.items()}, 2
        ),
        lambda: {"in_proj_weight": np.ones((24, 8), F32), "out_proj__weight": np.ones((8, 8), F32)},
    ),
    "AttentionView": (lambda weights: fastattn.AttentionView(weights, ["a", "b"]), lambda: {"weights": np.eye(2)}),
    "AttentionView.from_top_keys": (
        lambda **arrays: fastattn.AttentionView.from_top_keys(**arrays, tokens=["a", "b"]),
        lambda: {"indices": np.array([[0], [1]]), "weights": np.ones((2, 1))},
    ),
    "reference.attention": (reference.attention, dense_with_out),
    "reference.attention_varlen": (reference.attention_varlen, packed),
    "reference.top_keys": (reference.top_keys, query_and_key),
    "reference.merge": (reference.merge, parts),
}
ARGUMENTS = [(call, name) for call, (_, arguments) in CALLS.items() for name in arguments()]


def named(argument):
    """An argument as a message names it."""
    return {"outs": "outs[0]", "lses": "lses[0]"}.get(argument, argument.replace("__", "."))


def assert_refused(call, name, x, words, exceptions=TypeError):
    function, arguments = CALLS[call][0], CALLS[call][1]()
    with pytest.raises(exceptions) as caught:
        function(**{**arguments, name: x})
    assert str(caught.value).startswith(named(name)), caught.value
    assert not [word for word in words if word not in str(caught.value)], caught.value
    if name != "out" and "out" in arguments:
        np.testing.assert_array_equal(arguments["out"], 7.0)


@pytest.mark.parametrize("call", CALLS)
def test_the_good_call(call):
    function, arguments = CALLS[call]
    function(**arguments())


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_masked_arrays_are_refused(call, name):
    good = CALLS[call][1]()[name]
    masked = [np.ma.masked_array(part) for part in good] if isinstance(good, list) else np.ma.masked_array(good)
    assert_refused(call, name, masked, ["masked array", "np.ma.filled", "mask=", "key_lengths="])


@pytest.mark.parametrize(("call", "name"), [pair for pair in ARGUMENTS if pair[1] not in ("out", "store")])
def test_masked_arrays_within_lists_are_refused(call, name):
    good = CALLS[call][1]()[name]
    rows = good if isinstance(good, list) else [good]
    assert_refused(call, name, [[np.ma.masked_array(row) for row in rows]], ["masked array"])


def test_an_encoder_refuses_masked_arrays():
    with pytest.raises(TypeError, match=r"embeddings.*masked array"):
        Encoder({"embeddings": np.ma.ones(3)}, 2)


NO_ARRAYS = {
    "a str": ("much", "str 'much'"),
    "bytes": (b"much", "bytes"),
    "a list of str": (["much"], "dtype <U4"),
    "an object": (object(), "object"),
    "complex": (np.ones((2, 4, 5, 8), np.complex64), "np.real(query)"),
    "ints": (np.ones((2, 4, 5, 8), np.int64), "np.asarray(query, np.float32)"),
    "a list of ints": ([[1, 2], [3, 4]], "np.asarray(query, np.float32)"),
    "byte-swapped": (np.ones((2, 4, 5, 8), ">f4"), "np.asarray(query, np.float32)"),
    "float8": (np.ones((2, 4, 5, 8), ml_dtypes.float8_e4m3fn), "np.asarray(query, np.float32)"),
    "None": (None, "None"),
    "a structured array": (np.ones((2, 8), [("re", F32), ("im", F32)]), "query['re']"),
}


@pytest.mark.parametrize("what", NO_ARRAYS)
@pytest.mark.parametrize("call", ["attention", "plan", "top_keys", "attention_varlen", "KVCache.attention"])
def test_queries_that_are_no_floats(call, what):
    x, words = NO_ARRAYS[what]
    assert_refused(call, "query", x, [words])
    with pytest.raises(TypeError) as caught:
        CALLS[call][0](**{**CALLS[call][1](), "query": x})
    assert "query.astype" not in str(caught.value)


@pytest.mark.parametrize("what", ["complex", "ints", "None", "a str"])
@pytest.mark.parametrize("call", ["KVCache.add", "the layer", "rotary", "AttentionView", "merge"])
def test_arrays_elsewhere_that_are_no_floats(call, what):
    name = {"KVCache.add": "value", "rotary": "x", "AttentionView": "weights", "merge": "outs"}.get(call, "query")
    x, words = NO_ARRAYS[what]
    given = [x, x] if name == "outs" else x
    error = ValueError if (what, call) == ("None", "KVCache.add") else TypeError  # which says that value is missing
    with pytest.raises(error) as caught:
        CALLS[call][0](**{**CALLS[call][1](), name: given})
    if "np." in words:
        assert words.replace("query", named(name)) in str(caught.value)


@pytest.mark.parametrize("name", ["query", "mask", "key_lengths"])
def test_lists_of_unequal_lengths(name):
    assert_refused("attention", name, [[1.0], [2.0, 3.0]], ["inhomogeneous"], ValueError)


class Bfloat16Tensor:
    """What NumPy meets in a torch tensor of bfloat16."""

    dtype = "torch.bfloat16"

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Got unsupported ScalarType BFloat16")


@pytest.mark.parametrize("call", ["attention", "KVCache.attention", "the layer", "attention_varlen"])
def test_a_bfloat16_tensor_says_how(call):
    way = "tensor.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)"
    assert_refused(call, "query", Bfloat16Tensor(), ["tensor.detach().float()", way])


def test_both_ways_from_a_bfloat16_tensor():
    torch = pytest.importorskip("torch")
    tensor = torch.ones((2, 4, 5, 8), dtype=torch.bfloat16, requires_grad=True)
    assert_refused("attention", "query", tensor, ["query.detach()"], RuntimeError)
    half = tensor.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    assert fastattn.attention(half, half, half).dtype == BF16
    whole = tensor.detach().float()
    assert fastattn.attention(whole, whole, whole).dtype == torch.float32
