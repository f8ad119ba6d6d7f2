"""The gradients of the layer: against finite differences, and against PyTorch's layer where it is installed."""

import threading

import numpy as np
import pytest
from oracle import F16, F32, F64, UNIT, assert_close, assert_same_bits, make_rng, normal
from test_backward import differences
from test_layer import drawn

import fastattn
from fastattn import MultiHeadAttention

EMBED, HEADS = 8, 4


def small(rng, features=(EMBED, EMBED, EMBED), kv_heads=2, head_dim=4, head_dim_v=3, biases=True, dtype=F64):
    """Return the weights of a small layer by their names."""
    rows = {"query": HEADS * head_dim, "key": kv_heads * head_dim, "value": kv_heads * head_dim_v, "out": 5}
    columns = dict(zip(rows, (*features, HEADS * head_dim_v), strict=True))
    weights = {f"{n}_weight": normal(rng, (rows[n], columns[n]), dtype, columns[n] ** -0.5) for n in rows}
    return weights | {f"{n}_bias": normal(rng, rows[n], dtype) for n in rows if biases}


def x_of(*shape, seed=0, dtype=F64):
    return normal(make_rng(seed), shape, dtype)


def check_gradients(weights, inputs, *, turn=None, **keywords):
    """Compare the gradients of all that the layer's result depends on with finite differences."""
    learnt = {name: keywords[name] for name in ("bias", "sinks") if name in keywords}
    layer = MultiHeadAttention(**weights, num_heads=HEADS, rotary=turn)
    out, saved = layer(**inputs, **keywords, return_saved=True)
    assert_same_bits(out, layer(**inputs, **keywords))
    grad_out = make_rng(1).standard_normal(out.shape)
    grads = layer.backward(grad_out, saved, **{f"return_grad_{name}": True for name in learnt})

    def loss(**changed):
        changed_weights = {name: changed.get(name, x) for name, x in weights.items()}
        changed_layer = MultiHeadAttention(**changed_weights, num_heads=HEADS, rotary=turn)
        changed_inputs = {name: changed.get(name, x) for name, x in inputs.items()}
        more = {name: changed.get(name, x) for name, x in keywords.items()}
        return (changed_layer(**changed_inputs, **more) * grad_out).sum()

    assert grads.parameters.keys() == weights.keys()
    found = {**grads.parameters, **{name: getattr(grads, name) for name in (*inputs, *learnt)}}
    for name, grad in found.items():
        x = {**weights, **inputs, **learnt}[name]
        assert_close(grad, differences(lambda x, name=name: loss(**{name: x}), x), 1e-8, f"grad of {name}")
    for name in {"key", "value", "bias", "sinks"} - found.keys():
        assert getattr(grads, name) is None


rng_of_keywords = make_rng(2)
KEYWORDS = {
    "plain": {},
    "causal": {"causal": True},
    "window, scale": {"window": (2, 1), "scale": 0.7},
    "mask": {"mask": rng_of_keywords.random((2, 1, 5, 5)) < 0.7},
    "bias": {"bias": rng_of_keywords.standard_normal((HEADS, 5, 5)), "softcap": 2.0},
    "sinks, alibi": {"sinks": np.array([0.0, 1.0, -1.0, 2.0]), "alibi_slopes": [0.5, 0.25, 0.125, 0.0]},
    "key_lengths, causal": {"key_lengths": [5, 2], "causal": True},
    "dropout": {"dropout": 0.3, "seed": 5, "causal": True},
}


@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
def test_self_attention(keywords):
    check_gradients(small(make_rng(3)), {"query": x_of(2, 5, EMBED)}, **keywords)


@pytest.mark.parametrize("batch", [(), (2, 2)], ids=str)
@pytest.mark.parametrize("given", [["query"], [], ["key", "out"]], ids=str)
def test_batches_and_some_biases(batch, given):
    weights = {n: x for n, x in small(make_rng(4)).items() if "weight" in n or n.removesuffix("_bias") in given}
    check_gradients(weights, {"query": x_of(*batch, 3, EMBED)})


@pytest.mark.parametrize("turn", [{}, {"base": 100.0, "dim": 2}, {"interleaved": True}], ids=str)
@pytest.mark.parametrize("positions", [None, 7, [[0, 1, 2], [5, 3, 9]]], ids=str)
def test_rotary(turn, positions):
    check_gradients(small(make_rng(5)), {"query": x_of(2, 3, EMBED)}, turn=turn, positions=positions, causal=True)


@pytest.mark.parametrize("turn", [None, {}], ids=["plain", "rotary"])
def test_packed_sequences(turn):
    keywords = {"cu_seqlens": [0, 2, 2, 6], "causal": True, "sinks": np.array([0.0, 1.0, -1.0, 2.0])}
    check_gradients(small(make_rng(6)), {"query": x_of(6, EMBED)}, turn=turn, **keywords)
    check_gradients(small(make_rng(6)), {"query": x_of(6, EMBED)}, turn=turn, **keywords, dropout=0.4, seed=7)


@pytest.mark.parametrize("keywords", [{}, {"cu_seqlens": [0, 2, 5]}], ids=["dense", "packed"])
def test_dropout_is_that_of_attention(keywords):
    layer, x = MultiHeadAttention(**small(make_rng(20)), num_heads=HEADS), x_of(5, EMBED)
    query, key, value = layer.project(x)
    asked = {"causal": True, "dropout": 0.4, "seed": 7}
    if keywords:
        lengths = keywords["cu_seqlens"]
        rows = (part.swapaxes(0, 1) for part in (query, key, value))
        heads = fastattn.attention_varlen(*rows, lengths, lengths, **asked).swapaxes(0, 1)
    else:
        heads = fastattn.attention(query, key, value, **asked)
    assert_same_bits(layer(x, **keywords, **asked), layer.output(heads))
    assert not np.array_equal(layer(x, **keywords, **asked), layer(x, **keywords, causal=True))


@pytest.mark.parametrize(
    ("features", "shared"), [((8, 8, 8), True), ((8, 6, 6), True), ((8, 6, 6), False), ((8, 6, 5), False)], ids=str
)
@pytest.mark.parametrize("batches", [((2,), (2,)), ((2,), (1,)), ((), ())], ids=str)
def test_cross_attention(features, shared, batches):
    inputs = {"query": x_of(*batches[0], 3, features[0]), "key": x_of(*batches[1], 4, features[1], seed=7)}
    if not shared:
        inputs["value"] = x_of(*batches[1], 4, features[2], seed=8)
    check_gradients(small(make_rng(9), features), inputs)


def test_an_array_that_serves_twice_has_one_gradient():
    weights, x, y = small(make_rng(10)), x_of(2, 5, EMBED), x_of(2, 4, EMBED, seed=11)
    layer = MultiHeadAttention(**weights, num_heads=HEADS)
    for inputs, alike in (((x, x, x), (x,)), ((x, y, y), (x, y))):
        (out, saved), (_, expected) = layer(*inputs, return_saved=True), layer(*alike, return_saved=True)
        grads, wanted = layer.backward(out, saved), layer.backward(out, expected)
        assert_same_bits(grads.query, wanted.query)
        assert (grads.key is None) == (len(alike) == 1)
        assert grads.value is wanted.value is None


@pytest.mark.parametrize("shape", [(0, EMBED), (0, 3, EMBED), (2, 0, EMBED)], ids=str)
def test_nothing_to_attend(shape):
    layer = MultiHeadAttention(**small(make_rng(12)), num_heads=HEADS, rotary={})
    x = np.zeros(shape)
    out, saved = layer(x, return_saved=True)
    grads = layer.backward(out, saved)
    assert grads.query.shape == shape
    assert all((grads.parameters[name] == 0).all() for name in layer.parameters)


@pytest.mark.parametrize("keywords", [{"return_weights": True}, {"return_weights": True, "causal": True}], ids=str)
def test_weights_come_before_what_is_saved(keywords):
    layer, x = MultiHeadAttention(**small(make_rng(13)), num_heads=HEADS), x_of(2, 5, EMBED)
    out, weights, saved = layer(x, **keywords, return_saved=True)
    expected = layer(x, **keywords)
    assert_same_bits(out, expected[0])
    assert_same_bits(weights, expected[1])
    assert_same_bits(layer.backward(out, saved).query.astype(F64), layer.backward(out, saved).query)


def test_calls_do_not_meet():
    """What one call saved is not touched by another, and may be used twice, by any thread."""
    layer = MultiHeadAttention(**small(make_rng(14)), num_heads=HEADS, rotary={})
    xs = [x_of(2, 5, EMBED, seed=seed) for seed in range(4)]
    alone = [layer.backward(out, saved) for out, saved in (layer(x, return_saved=True) for x in xs)]
    calls = [layer(x, return_saved=True) for x in xs]
    found = [None] * len(xs)

    def run(i):
        layer.backward(*calls[i])
        found[i] = layer.backward(*calls[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in reversed(range(len(xs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for grads, expected in zip(found, alone, strict=True):
        assert_same_bits(grads.query, expected.query)
        for name, grad in expected.parameters.items():
            assert_same_bits(grads.parameters[name], grad, name)


@pytest.mark.parametrize("features", [(8, 8, 8), (8, 6, 6), (8, 6, 5)], ids=str)
def test_parameters_are_those_of_the_class_and_can_be_written(features):
    weights = small(make_rng(15), features)
    del weights["key_bias"]
    layer = MultiHeadAttention(**weights, num_heads=HEADS)
    assert layer.parameters.keys() == weights.keys()
    inputs = [x_of(2, 4, n, seed=n) for n in features]
    changed = {}
    for name, parameter in layer.parameters.items():
        assert_same_bits(np.ascontiguousarray(parameter), weights[name], name)
        changed[name] = parameter * 1.25
        parameter *= 1.25
    expected = MultiHeadAttention(**changed, num_heads=HEADS)(*inputs)
    assert_same_bits(layer(*inputs), expected)
    assert_same_bits(MultiHeadAttention(**layer.parameters, num_heads=HEADS)(*inputs), expected)


def test_float32_errs_as_its_products_do():
    """Relative to the largest of each gradient: sums of at most 96 products of numbers that sums have made."""
    weights = drawn(make_rng(16), dtype=F32)
    x, grad_out = normal(make_rng(17), (2, 48, 48), F32), normal(make_rng(18), (2, 48, 48), F32)

    def of(dtype):
        layer = MultiHeadAttention(**{n: w.astype(dtype) for n, w in weights.items()}, num_heads=4, rotary={})
        _, saved = layer(x.astype(dtype), causal=True, return_saved=True)
        grads = layer.backward(grad_out.astype(dtype), saved)
        return {"query": grads.query, **grads.parameters}

    single, double = of(F32), of(F64)
    for name, expected in double.items():
        assert single[name].dtype == F32
        assert_close(single[name], expected, 500 * UNIT[F32] * np.abs(expected).max(), name)


def test_half_types_are_upcast():
    layer = MultiHeadAttention(**small(make_rng(19), dtype=F32), num_heads=HEADS)
    x = x_of(2, 5, EMBED, dtype=F16)
    out, saved = layer(x, return_saved=True)
    grad_out = out.astype(F16)
    grads = layer.backward(grad_out, saved)
    assert grads.query.dtype == F32
    assert_same_bits(grads.query, layer.backward(grad_out.astype(F32), saved).query)


# --- against PyTorch ------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("features", [{}, {"kdim": 30, "vdim": 20}], ids=["self", "cross"])
@pytest.mark.parametrize("causal", [False, True])
def test_torch(bias, features, causal):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(48, 4, batch_first=True, dtype=torch.float64, bias=bias, **features)
    layer = MultiHeadAttention.from_torch(module.state_dict(), 4)
    inputs = [x_of(2, 9, n, seed=n) for n in (48, 30, 20)] if features else [x_of(2, 9, 48)]
    leaves = [torch.from_numpy(x).requires_grad_() for x in inputs]
    later = torch.ones(9, 9, dtype=torch.bool).triu(1) if causal else None
    theirs, _ = module(*(leaves if features else leaves * 3), attn_mask=later)
    grad_out = x_of(2, 9, 48, seed=3)
    theirs.backward(torch.from_numpy(grad_out))

    out, saved = layer(*inputs, causal=causal, return_saved=True)
    grads = layer.backward(grad_out, saved)
    assert_close(out, theirs.detach().numpy(), 1e-12)
    for mine, leaf in zip((grads.query, grads.key, grads.value), leaves, strict=False):
        assert_close(mine, leaf.grad.numpy(), 1e-11)
    mine = grads.parameters
    expected = {name: parameter.grad.numpy() for name, parameter in module.named_parameters()}
    if not features:
        weights = np.split(expected.pop("in_proj_weight"), 3)
        expected |= {f"{part}_proj_weight": weight for part, weight in zip("qkv", weights, strict=True)}
    for part, name in (("q", "query"), ("k", "key"), ("v", "value")):
        assert_close(mine[f"{name}_weight"], expected[f"{part}_proj_weight"], 1e-11, name)
    assert_close(mine["out_weight"], expected["out_proj.weight"], 1e-11, "out")
    if bias:
        of_inputs = np.concatenate([mine[f"{name}_bias"] for name in ("query", "key", "value")])
        assert_close(of_inputs, expected["in_proj_bias"], 1e-11, "biases")
        assert_close(mine["out_bias"], expected["out_proj.bias"], 1e-11, "out_bias")


# --- bad input ------------------------------------------------------------------------------------

LAYER = MultiHeadAttention(*np.zeros((4, 8, 8)), num_heads=HEADS)
X = np.zeros((2, 5, 8))
SAVED = LAYER(X, return_saved=True)[1]
ERRORS = {
    "grad_out shape": ({"grad_out": X[0]}, ValueError, r"grad_out has shape \(5, 8\); accepted is \(2, 5, 8\)"),
    "grad_out dtype": ({"grad_out": X.astype(F32)}, TypeError, "grad_out has dtype float32; accepted are the layer's"),
    "grad_out None": ({"grad_out": None}, TypeError, "grad_out must be an array, not None"),
    "saved": ({"saved": X}, TypeError, "saved must be what a call with return_saved=True returned, not ndarray"),
    "saved of another": (
        {"saved": MultiHeadAttention(*np.zeros((4, 8, 8)), num_heads=HEADS)(X, return_saved=True)[1]},
        ValueError,
        "saved is of a call of another layer",
    ),
    "bias": ({"return_grad_bias": True}, ValueError, "return_grad_bias .* bias"),
    "sinks": ({"return_grad_sinks": True}, ValueError, "return_grad_sinks .* sinks"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_backward(case):
    spoilt, error, words = ERRORS[case]
    with pytest.raises(error, match=words):
        LAYER.backward(**({"grad_out": X, "saved": SAVED} | spoilt))


def test_bias_of_packed_sequences():
    _, saved = LAYER(X[0], cu_seqlens=[0, 2, 5], return_saved=True)
    with pytest.raises(ValueError, match=r"return_grad_bias .* bias"):
        LAYER.backward(X[0], saved, return_grad_bias=True)


def test_nothing_is_kept_of_what_changes():
    """Neither inputs that are overwritten nor a cache's keys, which come from earlier calls."""
    x = np.full((2, 5, 8), 7.0)
    with pytest.raises(ValueError, match="out overlaps query in memory, which return_saved keeps"):
        LAYER(x, out=x, return_saved=True)
    with pytest.raises(ValueError, match="out overlaps key in memory, which return_saved keeps"):
        LAYER(np.ones((2, 5, 8)), x, out=x, return_saved=True)
    assert (x == 7).all()
    cache = fastattn.KVCache(HEADS, 2, num_pages=2)
    sequences = [cache.add(), cache.add()]
    with pytest.raises(ValueError, match="return_saved and cache cannot be given together"):
        LAYER(x, cache=cache, sequences=sequences, return_saved=True)
    with pytest.raises(ValueError, match="dropout and cache cannot be given together"):
        LAYER(x, cache=cache, sequences=sequences, dropout=0.1, seed=1)
    assert set(cache.lengths.values()) == {0}
