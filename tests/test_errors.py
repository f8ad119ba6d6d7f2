"""Bad input raises before anything is written, and the message names the argument, what came and what is accepted."""

import ml_dtypes
import numpy as np
import pytest
from oracle import BF16, F32, make_rng, qkv

import fastattn

# (B, H, Hkv, Sq, Sk, D) of the good call that each case spoils.
SHAPE = (2, 4, 2, 5, 7, 8)


def good():
    query, key, value = qkv(make_rng(), SHAPE)
    return {"query": query, "key": key, "value": value, "out": np.full(query.shape, 7.0, F32)}


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


# What is spoiled, how, the exception, and words its message must hold, whatever their case.
CASES = {
    "query dtype int": ({"query": zeros(2, 4, 5, 8, dtype=np.int64)}, TypeError, ["query", "int64", "float32"]),
    "query dtype complex": ({"query": zeros(2, 4, 5, 8, dtype=np.complex64)}, TypeError, ["query", "complex64"]),
    "query dtype bool": ({"query": zeros(2, 4, 5, 8, dtype=bool)}, TypeError, ["query", "bool"]),
    "query dtype object": ({"query": zeros(2, 4, 5, 8, dtype=object)}, TypeError, ["query", "dtype object"]),
    "query dtype longdouble": (
        {"query": zeros(2, 4, 5, 8, dtype=np.longdouble)},
        TypeError,
        ["query", np.dtype(np.longdouble).name],
    ),
    "query dtype float8": (
        {"query": zeros(2, 4, 5, 8, dtype=ml_dtypes.float8_e4m3fn)},
        TypeError,
        ["query", "float8_e4m3fn"],
    ),
    "query byte-swapped": ({"query": zeros(2, 4, 5, 8, dtype=">f4")}, TypeError, ["query", "byte"]),
    "key byte-swapped": ({"key": zeros(2, 2, 7, 8, dtype=">f4")}, TypeError, ["key", "byte"]),
    "key and value differ": (
        {"value": zeros(2, 2, 7, 8, dtype=np.float16)},
        TypeError,
        ["value", "float16", "float32"],
    ),
    "query float64, key float32": ({"query": zeros(2, 4, 5, 8, dtype=np.float64)}, TypeError, ["float64", "float32"]),
    "query float16, key float32": ({"query": zeros(2, 4, 5, 8, dtype=np.float16)}, TypeError, ["float16", "float32"]),
    "query float16, key bfloat16": (
        {
            "query": zeros(2, 4, 5, 8, dtype=np.float16),
            "key": zeros(2, 2, 7, 8, dtype=BF16),
            "value": zeros(2, 2, 7, 8, dtype=BF16),
        },
        TypeError,
        ["float16", "bfloat16"],
    ),
    "query float64, key float16": (
        {
            "query": zeros(2, 4, 5, 8, dtype=np.float64),
            "key": zeros(2, 2, 7, 8, dtype=np.float16),
            "value": zeros(2, 2, 7, 8, dtype=np.float16),
        },
        TypeError,
        ["float64", "float16"],
    ),
    "query 1-D": ({"query": zeros(8)}, ValueError, ["query", "(8,)"]),
    "query 0-D": ({"query": zeros()}, ValueError, ["query", "()"]),
    "key 1-D": ({"key": zeros(8)}, ValueError, ["key", "(8,)"]),
    "value 1-D": ({"value": zeros(8)}, ValueError, ["value", "(8,)"]),
    "query 2-D, key 4-D": ({"query": zeros(5, 8)}, ValueError, ["query", "2", "key", "4"]),
    "query 4-D, key 2-D": ({"key": zeros(7, 8)}, ValueError, ["query", "4", "key", "2"]),
    "head_dim differs": ({"key": zeros(2, 2, 7, 9)}, ValueError, ["key", "9", "8"]),
    "seqlen_k differs": ({"value": zeros(2, 2, 6, 8)}, ValueError, ["value", "6", "7"]),
    "kv heads differ": ({"value": zeros(2, 1, 7, 8)}, ValueError, ["value", "1", "2"]),
    "heads no multiple": (
        {"key": zeros(2, 3, 7, 8), "value": zeros(2, 3, 7, 8)},
        ValueError,
        ["heads", "4", "3"],
    ),
    "axes of one step in the order (batch, seqlen, heads, head_dim)": (
        {"query": zeros(2, 1, 4, 8), "key": zeros(2, 7, 2, 8), "value": zeros(2, 7, 2, 8)},
        ValueError,
        ["heads", "(batch, heads, seqlen, head_dim)", "x.swapaxes(1, 2)"],
    ),
    "value in the order (batch, seqlen, heads, head_dim)": (
        {"value": zeros(2, 7, 2, 8)},
        ValueError,
        ["value", "(2, 7, 2, 8)", "number of keys"],
    ),
    "no kv heads": ({"key": zeros(2, 0, 7, 8), "value": zeros(2, 0, 7, 8)}, ValueError, ["heads", "4", "0"]),
    "batches do not broadcast": ({"key": zeros(3, 2, 7, 8)}, ValueError, ["key", "(3,)", "(2,)"]),
    "head_dim over the limit": (
        {"query": zeros(2, 4, 5, 513), "key": zeros(2, 2, 7, 513)},
        ValueError,
        ["513", "512"],
    ),
    "head_dim_v over the limit": (
        {"value": zeros(2, 2, 7, 600), "out": np.full((2, 4, 5, 600), 7.0, F32)},
        ValueError,
        ["value", "600", "512"],
    ),
    "scale nan": ({"scale": np.nan}, ValueError, ["scale", "nan", "finite"]),
    "scale inf": ({"scale": np.inf}, ValueError, ["scale", "inf", "finite"]),
    "scale text": ({"scale": "big"}, TypeError, ["scale"]),
    "causal text": ({"causal": "yes"}, TypeError, ["causal", "bool"]),
    "causal int": ({"causal": 1}, TypeError, ["causal", "bool"]),
    "causal None": ({"causal": None}, TypeError, ["causal", "bool"]),
    "query_offset float": ({"query_offset": 1.5}, TypeError, ["query_offset", "int"]),
    "query_offset shape": ({"query_offset": [0, 1, 2]}, ValueError, ["query_offset", "(3,)", "(2,)"]),
    "window int": ({"window": 3}, TypeError, ["window"]),
    "window of three": ({"window": (1, 2, 3)}, TypeError, ["window", "(1, 2, 3)", "pair"]),
    "window negative left": ({"window": (-1, 0)}, ValueError, ["window", "-1", "None, not -1, is unbounded"]),
    "window negative right": ({"window": (0, -2)}, ValueError, ["window", "-2", "None"]),
    "window float": ({"window": (1.5, 0)}, TypeError, ["window"]),
    "mask float": ({"mask": zeros(5, 7)}, TypeError, ["mask", "float32", "bias="]),
    "mask int": ({"mask": zeros(5, 7, dtype=np.int64)}, TypeError, ["mask", "int64", "np.asarray(mask).astype(bool)"]),
    "mask a list of ints": ({"mask": [[1] * 7] * 5}, TypeError, ["mask", "int64", "np.asarray(mask).astype(bool)"]),
    "mask shape": ({"mask": zeros(5, 8, dtype=bool)}, ValueError, ["mask", "(5, 8)", "(2, 4, 5, 7)"]),
    "mask of keys for each item": (
        {"mask": zeros(2, 7, dtype=bool)},
        ValueError,
        ["mask", "(2, 7)", "mask[:, None, None, :]", "key_lengths="],
    ),
    "mask for each item": ({"mask": zeros(2, 5, 7, dtype=bool)}, ValueError, ["(2, 5, 7)", "mask[:, None, :, :]"]),
    "mask of one row for each item": ({"mask": zeros(2, 1, 7, dtype=bool)}, ValueError, ["mask[:, None, :, :]"]),
    "bias of keys for each item": ({"bias": zeros(2, 7)}, ValueError, ["(2, 7)", "bias[:, None, None, :]"]),
    "bias for each item": ({"bias": zeros(2, 5, 7)}, ValueError, ["(2, 5, 7)", "bias[:, None, :, :]"]),
    "mask enlarges the batch": (
        {"mask": zeros(3, 2, 4, 5, 7, dtype=bool)},
        ValueError,
        ["mask", "(3, 2, 4, 5, 7)", "(2, 4, 5, 7)"],
    ),
    "bias bool": ({"bias": zeros(5, 7, dtype=bool)}, TypeError, ["bias", "bool", "mask="]),
    "bias int": ({"bias": zeros(5, 7, dtype=np.int32)}, TypeError, ["bias", "int32", "float"]),
    "bias complex": ({"bias": zeros(5, 7, dtype=np.complex64)}, TypeError, ["bias", "complex64"]),
    "bias byte-swapped": ({"bias": zeros(5, 7, dtype=">f4")}, TypeError, ["bias", "byte"]),
    "bias shape": ({"bias": zeros(4, 5, 6)}, ValueError, ["bias", "(4, 5, 6)", "(2, 4, 5, 7)"]),
    "alibi_slopes shape": ({"alibi_slopes": zeros(3)}, ValueError, ["alibi_slopes", "(3,)", "(2, 4)"]),
    "alibi_slopes complex": ({"alibi_slopes": zeros(4, dtype=np.complex64)}, TypeError, ["alibi_slopes", "complex64"]),
    "softcap zero": ({"softcap": 0.0}, ValueError, ["softcap", "0"]),
    "softcap negative": ({"softcap": -5.0}, ValueError, ["softcap", "-5"]),
    "softcap nan": ({"softcap": np.nan}, ValueError, ["softcap", "nan"]),
    "softcap inf": ({"softcap": np.inf}, ValueError, ["softcap", "inf"]),
    "softcap text": ({"softcap": "much"}, TypeError, ["softcap"]),
    "sinks shape": ({"sinks": zeros(2)}, ValueError, ["sinks", "(2,)", "(4,)"]),
    "sinks 2-D": ({"sinks": zeros(2, 4)}, ValueError, ["sinks", "(2, 4)", "(4,)"]),
    "sinks complex": ({"sinks": zeros(4, dtype=np.complex64)}, TypeError, ["sinks", "complex64"]),
    "key_lengths over Sk": ({"key_lengths": [3, 8]}, ValueError, ["key_lengths", "8", "7"]),
    "key_lengths negative": ({"key_lengths": [-1, 3]}, ValueError, ["key_lengths", "-1"]),
    "key_lengths huge": ({"key_lengths": np.array([2**63, 1], np.uint64)}, ValueError, ["key_lengths", str(2**63)]),
    "key_lengths float": ({"key_lengths": [1.0, 2.0]}, TypeError, ["key_lengths", "float64", "int"]),
    "key_lengths bool": ({"key_lengths": [True, False]}, TypeError, ["key_lengths", "bool", "int"]),
    "key_lengths shape": ({"key_lengths": [1, 2, 3]}, ValueError, ["key_lengths", "(3,)", "(2,)"]),
    "num_threads zero": ({"num_threads": 0}, ValueError, ["num_threads", "0"]),
    "num_threads negative": ({"num_threads": -1}, ValueError, ["num_threads", "-1"]),
    "num_threads float": ({"num_threads": 1.5}, TypeError, ["num_threads"]),
    "out list": ({"out": [[0.0]]}, TypeError, ["out", "list"]),
    "out shape": ({"out": np.full((2, 4, 5, 9), 7.0, F32)}, ValueError, ["out", "(2, 4, 5, 9)", "(2, 4, 5, 8)"]),
    "out broadcastable shape": ({"out": np.full((1, 2, 4, 5, 8), 7.0, F32)}, ValueError, ["out", "(2, 4, 5, 8)"]),
    "out dtype": ({"out": np.full((2, 4, 5, 8), 7.0, np.float64)}, TypeError, ["out", "float64", "float32"]),
    "out byte-swapped": ({"out": np.full((2, 4, 5, 8), 7.0, ">f4")}, TypeError, ["out"]),
    "out overlaps itself": (
        {"out": np.lib.stride_tricks.as_strided(np.full(8, 7.0, F32), (2, 4, 5, 8), (0, 0, 0, 4))},
        ValueError,
        ["out", "overlap"],
    ),
}


def holds(message, words):
    return [word for word in words if word.lower() not in message.lower()]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("extra", [{}, {"return_lse": True, "return_weights": True}], ids=["out", "all"])
def test_bad_input(case, extra):
    spoiled, exception, words = CASES[case]
    arguments = {**good(), **spoiled, **extra}
    out = arguments["out"]
    before = np.array(out).copy()
    with pytest.raises(exception) as caught:
        fastattn.attention(**arguments)
    assert type(caught.value) is exception, "a subclass would say that something else noticed"
    missing = holds(str(caught.value), words)
    assert not missing, f"{caught.value!s} does not say {missing}"
    np.testing.assert_array_equal(np.array(out), before)


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("out")])
def test_plan_refuses_the_same(case):
    spoiled, exception, words = CASES[case]
    arguments = {**good(), **spoiled}
    del arguments["out"]
    with pytest.raises(exception) as caught:
        fastattn.plan(**arguments)
    assert not holds(str(caught.value), words)


def test_out_read_only():
    arguments = good()
    arguments["out"].flags.writeable = False
    with pytest.raises(ValueError, match=r"(?i)out\b.*(read-only|write)"):
        fastattn.attention(**arguments)
    np.testing.assert_array_equal(arguments["out"], 7.0)


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "mask", "sinks", "alibi_slopes", "key_lengths"])
def test_out_overlaps_an_input(name):
    memory = np.full(4096, 1.0, F32)
    arguments = good()
    shape = {"bias": (5, 7), "mask": (5, 7), "sinks": (4,), "alibi_slopes": (4,), "key_lengths": (2,)}
    shape = shape.get(name) or arguments[name].shape
    dtype = np.dtype({"mask": bool, "key_lengths": np.int64}.get(name, F32))
    count = int(np.prod(shape))
    view = memory.view(np.uint8)[: count * dtype.itemsize].view(dtype).reshape(shape)
    view[...] = 1
    arguments[name] = view
    before = memory.copy()
    # Not its first byte, so that a comparison of addresses alone would miss it.
    for shift in (0, count * dtype.itemsize // 4 - 1):
        arguments["out"] = memory[shift : shift + 320].reshape(2, 4, 5, 8)
        with pytest.raises(ValueError, match=r"(?i)out\b.*overlap") as caught:
            fastattn.attention(**arguments)
        assert name in str(caught.value)
        assert memory.tobytes() == before.tobytes()


def test_out_overlaps_what_lies_before_an_inputs_first_element():
    arguments = good()
    shape, size = arguments["key"].shape, arguments["key"].size
    memory = np.full(size + 320, 1.0, F32)
    arguments["key"] = memory[:size].reshape(shape)[::-1, ::-1, ::-1, ::-1]
    for begin in (0, 100, size - 1):
        arguments["out"] = memory[begin : begin + 320].reshape(2, 4, 5, 8)
        with pytest.raises(ValueError, match=r"(?i)out\b.*overlaps key"):
            fastattn.attention(**arguments)
    arguments["out"] = memory[size:].reshape(2, 4, 5, 8)  # beside it
    fastattn.attention(**arguments)


def test_out_between_the_rows_of_an_input():
    arguments = good()
    memory = np.full((2, 4, 5, 2, 8), 1.0, F32)
    arguments["query"], arguments["out"] = memory[..., 0, :], memory[..., 1, :]
    out = fastattn.attention(**arguments)
    assert out is arguments["out"]
    np.testing.assert_array_equal(memory[..., 0, :], 1.0)


def test_out_whose_rows_overlap_each_other():
    arguments = good()
    memory = np.full(1000, 7.0, F32)
    arguments["out"] = np.lib.stride_tricks.as_strided(memory, (2, 4, 5, 8), (4 * 160, 4 * 40, 4 * 4, 4))
    with pytest.raises(ValueError, match=r"(?i)out\b.*overlap"):
        fastattn.attention(**arguments)
    np.testing.assert_array_equal(memory, 7.0)


def test_keywords_only_and_spelled_right():
    arguments = good()
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    with pytest.raises(TypeError, match="positional"):
        fastattn.attention(query, key, value, 0.5)
    with pytest.raises(TypeError, match="attn_mask"):
        fastattn.attention(query, key, value, attn_mask=None)
    with pytest.raises(TypeError, match="misses value"):
        fastattn.attention(query, key)


@pytest.mark.parametrize("name", ["query", "key", "value", "mask", "bias"])
def test_what_is_no_array(name):
    arguments = {**good(), name: object()}
    with pytest.raises(TypeError, match=name):
        fastattn.attention(**arguments)
    np.testing.assert_array_equal(arguments["out"], 7.0)


def test_two_dimensional_call_takes_two_dimensional_mask():
    query = np.zeros((5, 8), F32)
    with pytest.raises(ValueError, match=r"mask.*\(1, 5, 5\).*\(5, 5\)"):
        fastattn.attention(query, query, query, mask=np.ones((1, 5, 5), bool))
    with pytest.raises(ValueError, match=r"key_lengths.*\(1,\).*\(\)"):
        fastattn.attention(query, query, query, key_lengths=[5])


def test_a_failed_call_leaves_the_library_usable():
    arguments = good()
    with pytest.raises(ValueError, match="softcap"):
        fastattn.attention(**arguments, softcap=-1.0)
    assert np.isfinite(fastattn.attention(**arguments)).all()


def test_a_number_too_large_for_a_float():
    x = np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match="scale"):
        fastattn.attention(x, x, x, scale=10**400)


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 5, 7), (2, 3, 1, 7)])
def test_a_mask_without_an_axis_of_heads_works_as_the_message_says(shape):
    query, key, value = (np.ones((2, 3, 4, *rest), F32) for rest in ((5, 8), (7, 8), (7, 8)))
    mask = np.ones(shape, bool)
    with pytest.raises(ValueError, match="does not broadcast") as caught:
        fastattn.attention(query, key, value, mask=mask)
    advice = str(caught.value).partition("give ")[2].partition("], ")[0].rstrip("]") + "]"
    fastattn.attention(query, key, value, mask=eval(advice, {"mask": mask}))


# --- gradients ------------------------------------------------------------------------------------

MODES = ["dense", "packed"]
BOUNDS = {"cu_seqlens_q": [0, 2, 5], "cu_seqlens_k": [0, 3, 7]}


def good_for_backward(mode):
    """Arguments of `attention_backward`, or of its packed form; grads are full of 7."""
    query, key, value = qkv(make_rng(), SHAPE)
    if mode == "packed":
        query, key, value = (x[0].swapaxes(0, 1) for x in (query, key, value))
        out, lse = fastattn.attention_varlen(query, key, value, **BOUNDS, return_lse=True)
    else:
        out, lse = fastattn.attention(query, key, value, return_lse=True)
    grads = tuple(np.full(x.shape, 7.0, F32) for x in (query, key, value))
    arguments = {"grad_out": out, "query": query, "key": key, "value": value, "out": out, "lse": lse, "grads": grads}
    return {**arguments, **(BOUNDS if mode == "packed" else {})}


def refused_backward(mode, arguments, exception):
    """Return the message with which a call is refused that has written nothing."""
    function = fastattn.attention_varlen_backward if mode == "packed" else fastattn.attention_backward
    given = [x for x in [*arguments.values(), *arguments["grads"]] if isinstance(x, np.ndarray)]
    before = [x.tobytes() for x in given]
    with pytest.raises(exception) as caught:
        function(**arguments)
    assert type(caught.value) is exception
    assert [x.tobytes() for x in given] == before
    return str(caught.value)


BACKWARD_CASES = {
    "grad_out of another shape": (lambda a: {"grad_out": a["out"][..., :-1]}, ValueError, ["grad_out", "7", "8"]),
    "grad_out of fewer axes": (lambda a: {"grad_out": a["out"][0]}, ValueError, ["grad_out has shape"]),
    "grad_out that would broadcast": (lambda a: {"grad_out": a["out"][:1]}, ValueError, ["grad_out has shape"]),
    "grad_out of another dtype": (
        lambda a: {"grad_out": a["out"].astype(np.float64)},
        TypeError,
        ["grad_out", "float64", "float32"],
    ),
    "out of another dtype": (lambda a: {"out": a["out"].astype(np.float16)}, TypeError, ["out", "float16", "float32"]),
    "out of another shape": (lambda a: {"out": a["out"][..., :-1]}, ValueError, ["out", "7", "8"]),
    "lse of another shape": (lambda a: {"lse": a["lse"][..., None]}, ValueError, ["lse has shape"]),
    "lse of ints": (lambda a: {"lse": a["lse"].astype(np.int64)}, TypeError, ["lse", "int64", "float32"]),
    "grad_lse of another shape": (lambda a: {"grad_lse": a["out"]}, ValueError, ["grad_lse has shape"]),
    "grad_lse of ints": (lambda a: {"grad_lse": a["lse"].astype(np.int64)}, TypeError, ["grad_lse", "int64"]),
    "masked grad_out": (lambda a: {"grad_out": np.ma.masked_array(a["out"])}, TypeError, ["grad_out", "mask"]),
    "out in place of lse": (lambda a: {"lse": a["out"]}, ValueError, ["lse has shape"]),
    "query of ints": (lambda a: {"query": a["query"].astype(np.int64)}, TypeError, ["query", "int64"]),
    "softcap": (lambda a: {"softcap": -1.0}, ValueError, ["softcap"]),
    "num_threads": (lambda a: {"num_threads": 0}, ValueError, ["num_threads"]),
    "grads is an array": (lambda a: {"grads": a["query"]}, TypeError, ["grads must be a tuple of three"]),
    "two grads": (lambda a: {"grads": a["grads"][:2]}, TypeError, ["grads must be a tuple of three"]),
    "grads of lists": (
        lambda a: {"grads": (*a["grads"][:2], [[1.0]])},
        TypeError,
        ["grads' value", "ndarray", "list"],
    ),
    "grads of another shape": (
        lambda a: {"grads": (*a["grads"][:2], a["grads"][2][..., :-1])},
        ValueError,
        ["grads' value has shape", "accepted"],
    ),
    "grads of another dtype": (
        lambda a: {"grads": (None, a["grads"][1].astype(np.float64), None)},
        TypeError,
        ["grads' key", "float64", "key, float32"],
    ),
    "grads that are masked": (
        lambda a: {"grads": (np.ma.masked_array(a["grads"][0]), None, None)},
        TypeError,
        ["grads' query", "mask"],
    ),
    "grads that overlap an input": (
        lambda a: {"grads": (*a["grads"][:2], a["value"])},
        ValueError,
        ["grads' value overlaps value"],
    ),
    "grads that overlap out": (lambda a: {"grads": (a["out"], None, None)}, ValueError, ["grads' query overlaps"]),
    "grads that overlap each other": (
        lambda a: {"grads": (None, a["grads"][1], a["grads"][1][...])},
        ValueError,
        ["grads' value overlaps grads' key"],
    ),
    "grads that overlap themselves": (
        lambda a: {"grads": (np.broadcast_to(np.float32(7), a["query"].shape), None, None)},
        ValueError,
        ["grads' query"],
    ),
    "return_grad_sinks without sinks": (lambda a: {"return_grad_sinks": True}, ValueError, ["return_grad_sinks"]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", BACKWARD_CASES)
def test_bad_input_of_backward(mode, case):
    spoil, exception, words = BACKWARD_CASES[case]
    arguments = good_for_backward(mode)
    message = refused_backward(mode, {**arguments, **spoil(arguments)}, exception)
    assert not holds(message, words), message


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_grads_read_only(mode, index):
    arguments = good_for_backward(mode)
    arguments["grads"][index].flags.writeable = False
    message = refused_backward(mode, arguments, ValueError)
    assert f"grads' {('query', 'key', 'value')[index]} is read-only" in message


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(
    "name", ["grad_out", "query", "key", "value", "out", "lse", "grad_lse", "bias", "mask", "sinks", "alibi_slopes"]
)
def test_grads_overlap_an_input(name, index):
    """Also by some bytes alone."""
    arguments = good_for_backward("dense")
    shapes = {"bias": (5, 7), "mask": (5, 7), "sinks": (4,), "alibi_slopes": (4,), "grad_lse": arguments["lse"].shape}
    shape = shapes[name] if name in shapes else arguments[name].shape
    dtype = np.dtype(bool if name == "mask" else F32)
    memory = np.ones(4096, F32)
    count = int(np.prod(shape))
    arguments[name] = memory.view(np.uint8)[: count * dtype.itemsize].view(dtype).reshape(shape)
    grads = list(arguments["grads"])
    begin = count * dtype.itemsize // 4 - 1
    grads[index] = memory[begin : begin + grads[index].size].reshape(grads[index].shape)
    arguments["grads"] = tuple(grads)
    message = refused_backward("dense", arguments, ValueError)
    assert f"grads' {('query', 'key', 'value')[index]} overlaps {name} in memory" in message
