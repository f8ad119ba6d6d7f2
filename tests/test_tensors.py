"""Tensors in, tensors out: PyTorch's as they are, and objects that have DLPack alone as arrays."""

import gc
import textwrap

import numpy as np
import pytest
from oracle import make_rng, run_script

import fastattn
from fastattn import reference

torch = pytest.importorskip("torch")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
EPSILON = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 4e-3, torch.bfloat16: 3e-2}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def tensors(*shapes, dtype=torch.float32, seed=0):
    rng = make_rng(21, seed)
    return [torch.from_numpy(rng.standard_normal(shape)).to(dtype) for shape in shapes]


def qkv(dtype=torch.float32, seqlen_k=9):
    return tensors((2, 4, 7, 8), (2, 2, seqlen_k, 8), (2, 2, seqlen_k, 6), dtype=dtype)


def doubles(*xs):
    return [x.double().numpy() for x in xs]


def assert_near(result, expected, dtype):
    assert type(result) is torch.Tensor
    assert result.dtype == dtype
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=EPSILON[dtype] * 4)


# --- what comes back ------------------------------------------------------------------------------


@each_dtype
def test_attention(dtype):
    xs = qkv(dtype)
    out, lse, weights = fastattn.attention(*xs, causal=True, return_lse=True, return_weights=True)
    expected = reference.attention(*doubles(*xs), causal=True, return_lse=True, return_weights=True)
    assert_near(out, expected[0], dtype)
    assert_near(lse, expected[1], torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(weights, expected[2], dtype)


@each_dtype
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_every_array_may_be_a_tensor(dtype, bias_dtype):
    xs = qkv(dtype)
    (bias,), (slopes, sinks) = tensors((1, 4, 7, 9), dtype=bias_dtype), tensors((4,), (4,), dtype=bias_dtype)
    mask = torch.from_numpy(make_rng(3).random((2, 1, 7, 9)) < 0.8)
    keywords = {"bias": bias, "alibi_slopes": slopes, "sinks": sinks, "mask": mask}
    keywords |= {"key_lengths": torch.tensor([5, 9]), "query_offset": torch.tensor([1, 2], dtype=torch.int32)}
    out = fastattn.attention(*xs, **keywords)
    exact = {name: x.double().numpy() if x.is_floating_point() else x.numpy() for name, x in keywords.items()}
    assert_near(out, reference.attention(*doubles(*xs), **exact), dtype)


LAYOUTS = {
    "swapped": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "reversed-axes": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "stepped": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "offset": lambda x: torch.cat([x, x])[len(x) :],
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
}


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, layout):
    xs = [LAYOUTS[layout](x) for x in qkv(dtype)]
    before = [x.clone() for x in xs]
    assert_near(fastattn.attention(*xs), reference.attention(*doubles(*xs)), dtype)
    assert all(torch.equal(x, old) for x, old in zip(xs, before, strict=True))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (3, 2, 1, 0)])
def test_the_result_has_the_order_of_the_query(order):
    query, key, value = qkv()
    back = tuple(np.argsort(order))
    result = fastattn.attention(query.permute(order).contiguous().permute(back), key, value)
    assert result.permute(order).is_contiguous()


@each_dtype
def test_out(dtype):
    xs = qkv(dtype)
    room = torch.zeros(2, 7, 4, 6, dtype=dtype)
    out = room.transpose(1, 2)
    assert fastattn.attention(*xs, out=out) is out
    assert torch.equal(out, fastattn.attention(*xs))


@pytest.mark.parametrize(
    "shapes", [((0, 4, 7, 8), (1, 2, 9, 8)), ((2, 4, 0, 8), (2, 2, 9, 8)), ((2, 4, 7, 8), (2, 2, 0, 8))]
)
def test_empty(shapes):
    query, key = tensors(*shapes)
    result = fastattn.attention(query, key, key)
    assert type(result) is torch.Tensor
    assert result.shape == query.shape
    assert not result.any()


@pytest.mark.parametrize("of", [torch.nn.Parameter, lambda x: x.as_subclass(type("Subclass", (torch.Tensor,), {}))])
def test_subclasses(of):
    xs = qkv()
    subclass = of(xs[0].clone())
    result = fastattn.attention(subclass.requires_grad_(False), *xs[1:])
    assert torch.equal(result, fastattn.attention(*xs))


def test_a_result_outlives_its_arguments():
    xs = qkv()
    result, expected = fastattn.attention(*xs), fastattn.attention(*xs).numpy().copy()
    del xs
    gc.collect()
    np.testing.assert_array_equal(result.numpy(), expected)


@each_dtype
def test_backward(dtype):
    xs = qkv(dtype)
    (grad,) = tensors((2, 4, 7, 6), dtype=dtype, seed=1)
    (bias,), (sinks,) = tensors((1, 4, 7, 9), dtype=dtype, seed=2), tensors((4,), dtype=dtype, seed=3)
    out, lse = fastattn.attention(*xs, bias=bias, sinks=sinks, return_lse=True)
    more = {"return_grad_bias": True, "return_grad_sinks": True}
    results = fastattn.attention_backward(grad, *xs, out, lse, bias=bias, sinks=sinks, **more)
    x, b, s = doubles(*xs), *doubles(bias, sinks)
    exact = reference.attention(*x, bias=b, sinks=s, return_lse=True)
    expected = reference.attention_backward(*doubles(grad), *x, *exact, bias=b, sinks=s, **more)
    scale = max(np.abs(each).max() for each in expected)
    for result, each, like in zip(results, expected, [*xs, bias, sinks], strict=True):
        assert type(result) is torch.Tensor
        assert result.dtype == like.dtype
        np.testing.assert_allclose(result.double().numpy(), each, rtol=0, atol=EPSILON[dtype] * 8 * scale)


def test_grads():
    xs = qkv()
    (grad,) = tensors((2, 4, 7, 6), seed=1)
    out, lse = fastattn.attention(*xs, return_lse=True)
    rooms = tuple(torch.zeros_like(x) for x in xs)
    results = fastattn.attention_backward(grad, *xs, out, lse, grads=rooms)
    assert all(result is room for result, room in zip(results, rooms, strict=True))
    alone = fastattn.attention_backward(grad, *xs, out, lse)
    assert all(torch.equal(room, each) for room, each in zip(rooms, alone, strict=True))


# --- the other functions --------------------------------------------------------------------------


@each_dtype
def test_varlen(dtype):
    xs = tensors((10, 4, 8), (10, 2, 8), (10, 2, 8), dtype=dtype)
    lengths = torch.tensor([0, 3, 3, 10])
    out, lse = fastattn.attention_varlen(*xs, lengths, lengths, return_lse=True)
    expected = reference.attention_varlen(*doubles(*xs), lengths.numpy(), lengths.numpy(), return_lse=True)
    assert_near(out, expected[0], dtype)
    grads = fastattn.attention_varlen_backward(out, *xs, out, lse, lengths, lengths)
    assert [(type(grad), grad.dtype) for grad in grads] == [(torch.Tensor, dtype)] * 3


@each_dtype
def test_top_keys(dtype):
    query, key, _ = qkv(dtype)
    indices, weights, totals = fastattn.top_keys(query, key, 3, return_totals=True)
    assert indices.dtype == torch.int64
    assert weights.dtype == dtype
    full = fastattn.attention(query, key, key, return_weights=True)[1]
    assert torch.equal(full.gather(-1, indices), weights)
    np.testing.assert_allclose(totals.double(), full.double().sum(dim=-2), atol=0.05)


@each_dtype
def test_merge(dtype):
    query, key, value = qkv(dtype)
    parts = [fastattn.attention(query, key[:, :, s], value[:, :, s], return_lse=True) for s in (slice(4), slice(4, 9))]
    out, lse = fastattn.merge(*zip(*parts, strict=True))
    expected = reference.attention(*doubles(query, key, value), return_lse=True)
    assert_near(out, expected[0], dtype)
    assert type(lse) is torch.Tensor


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_cache(dtype):
    key, value, query = tensors((2, 5, 8), (2, 5, 8), (4, 2, 8))
    cache, twin = (fastattn.KVCache(2, 8, dtype=dtype, num_pages=4) for _ in range(2))
    sequence = cache.add(key, value)
    cache.append(sequence, key[:, :1], value[:, :1])
    same = twin.add(key.numpy(), value.numpy())
    twin.append(same, key[:, :1].numpy(), value[:, :1].numpy())
    result, lse = cache.attention(query, sequence, return_lse=True)
    assert type(result) is type(lse) is torch.Tensor
    np.testing.assert_array_equal(result.numpy(), twin.attention(query.numpy(), same))
    out = torch.zeros(4, 2, 8)
    assert cache.attention(query, sequence, out=out) is out
    assert torch.equal(out, result)
    assert torch.equal(cache.attention(query[None], [sequence])[0], result)


def test_layer_and_view():
    weights = tensors(*[(16, 16)] * 4)
    layer = fastattn.MultiHeadAttention(*weights, num_heads=4)
    (x,) = tensors((2, 5, 16), seed=4)
    out, probabilities = layer(x, mask=torch.ones(5, 5, dtype=torch.bool), return_weights=True)
    assert type(out) is type(probabilities) is torch.Tensor
    np.testing.assert_array_equal(out.numpy(), layer(x.numpy()))
    room = torch.zeros(2, 5, 16)
    assert layer(x, out=room) is room
    assert torch.equal(room, out)
    view, same = (fastattn.AttentionView(x[0], list("abcde")) for x in (probabilities, probabilities.numpy()))
    assert view.table("a") == same.table("a")


def test_gradients_of_a_layer():
    layer = fastattn.MultiHeadAttention(*tensors(*[(16, 16)] * 4), num_heads=4)
    (x,), (grad_out,) = tensors((2, 5, 16), seed=4), tensors((2, 5, 16), seed=5)
    bias = torch.zeros(4, 5, 5)
    _, saved = layer(x, bias=bias, return_saved=True)
    grads = layer.backward(grad_out, saved, return_grad_bias=True)
    same = layer.backward(grad_out.numpy(), saved, return_grad_bias=True)
    for mine, want in ((grads.query, same.query), (grads.bias, same.bias)):
        assert type(mine) is torch.Tensor
        assert type(want) is np.ndarray
        np.testing.assert_array_equal(mine.numpy(), want)
    assert grads.key is grads.value is grads.sinks is None
    assert {type(x) for x in grads.parameters.values()} == {np.ndarray}


# --- what is refused ------------------------------------------------------------------------------


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as those of transformations are."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    def __init__(self, x):
        self.x = x

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*[x.x if isinstance(x, Wrapper) else x for x in args], **(kwargs or {}))


def negated(x):
    return torch.complex(x, x).conj().imag


REFUSED = {
    "requires_grad": (lambda x: x.clone().requires_grad_(), RuntimeError, r"requires a gradient.*\.detach\(\)"),
    "meta": (lambda x: x.to("meta"), TypeError, "meta"),
    "sparse": (lambda x: x.to_sparse(), TypeError, "cannot be read by DLPack"),
    "wrapper": (Wrapper, TypeError, "holds no data"),
    "negated": (negated, TypeError, r"resolve_neg\(\)"),
    "int": (lambda x: x.int(), TypeError, "has dtype int32"),
    "complex": (lambda x: x.to(torch.complex64), TypeError, "has a dtype"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), TypeError, "has a dtype"),
    "array": (lambda x: x.numpy(), TypeError, "of one kind"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_refused(what, name):
    make, error, message = REFUSED[what]
    arguments = dict(zip(("query", "key", "value"), tensors(*[(1, 4, 7, 8)] * 3), strict=True))
    arguments[name] = make(arguments[name])
    if (what, name) == ("array", "query"):
        name = "key"  # the first of the two kinds is right
    with pytest.raises(error, match=rf"^{name} .*{message}"):
        fastattn.attention(**arguments)


def one_dual(name, **arguments):
    """Arguments of which one carries a tangent."""
    tangent = torch.ones_like(arguments[name])
    return arguments | {name: torch.autograd.forward_ad.make_dual(arguments[name], tangent)}


def arguments_for(**more):
    return dict(zip(("query", "key", "value"), tensors(*[(2, 4, 8, 16)] * 3), strict=True)) | more


BOUNDS = torch.tensor([0, 2])
WITH_TANGENTS = {
    "attention": (fastattn.attention, arguments_for()),
    "bias": (fastattn.attention, arguments_for(bias=torch.zeros(8, 8))),
    "slopes": (fastattn.attention, arguments_for(alibi_slopes=torch.ones(4))),
    "sinks": (fastattn.attention, arguments_for(sinks=torch.ones(4))),
    "scale": (fastattn.attention, arguments_for(scale=torch.tensor(0.5))),
    "softcap": (fastattn.attention, arguments_for(softcap=torch.tensor(5.0))),
    "out": (fastattn.attention, arguments_for(out=torch.zeros(2, 4, 8, 16))),
    "packed": (fastattn.attention_varlen, dict(zip(("query", "key", "value"), tensors(*[(2, 4, 8)] * 3), strict=True))
               | {"cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS}),
    "backward": (fastattn.attention_backward, arguments_for(grad_out=torch.ones(2, 4, 8, 16), lse=torch.ones(2, 4, 8),
                                                            out=torch.ones(2, 4, 8, 16))),
    "top keys": (fastattn.top_keys, dict(zip(("query", "key"), tensors(*[(2, 4, 8, 16)] * 2), strict=True)) | {"k": 2}),
    "layer": (fastattn.MultiHeadAttention(*np.ones((4, 16, 16), np.float32), num_heads=2),
              {"query": torch.ones(1, 8, 16)}),
}  # fmt: skip
OF_MAKE_DUAL = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
NOT_LEARNT = ("cu_seqlens_q", "cu_seqlens_k", "k")


@OF_MAKE_DUAL
@pytest.mark.parametrize(
    ("what", "name"),
    [(what, name) for what, (_, given) in WITH_TANGENTS.items() for name in given if name not in NOT_LEARNT],
)
def test_tangents_are_not_dropped(what, name):
    function, arguments = WITH_TANGENTS[what]
    with torch.autograd.forward_ad.dual_level():
        function(**arguments)  # within, too, what carries none is taken
        with pytest.raises(RuntimeError, match=rf"^{name} has a tangent.*unpack_dual\({name}\)\.primal"):
            function(**one_dual(name, **arguments))
    function(**arguments)


@OF_MAKE_DUAL
@pytest.mark.parametrize("name", ["outs", "lses"])
def test_tangents_of_what_is_merged_are_not_dropped(name):
    sets = {"outs": [torch.ones(2, 3)] * 2, "lses": [torch.zeros(2)] * 2}
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(sets[name][1], sets[name][1])
        with pytest.raises(RuntimeError, match=rf"^{name}\[1\] has a tangent"):
            fastattn.merge(**sets | {name: [sets[name][0], dual]})


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_a_number_that_requires_a_gradient_is_refused(name):
    number = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(RuntimeError, match=rf"^{name} requires a gradient"):
        fastattn.attention(**arguments_for(**{name: number}))


@pytest.mark.parametrize(
    "keyword",
    [
        {"mask": np.ones((7, 9), bool)},
        {"bias": np.zeros((7, 9), np.float32)},
        {"key_lengths": np.array([3, 4])},
        {"sinks": np.zeros(4, np.float32)},
        {"out": np.zeros((2, 4, 7, 6), np.float32)},
    ],
    ids=lambda keyword: next(iter(keyword)),
)
def test_two_kinds(keyword):
    (name,) = keyword
    with pytest.raises(TypeError, match=rf"^{name} is an ndarray, but query is a torch\.Tensor: all arrays"):
        fastattn.attention(*qkv(), **keyword)


def test_lists_go_with_either():
    xs = qkv()
    assert torch.equal(
        fastattn.attention(*xs, key_lengths=[3, 9]), fastattn.attention(*xs, key_lengths=torch.tensor([3, 9]))
    )


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.zeros(2, 4, 7, 5), ValueError, "out has shape"),
        (torch.zeros(2, 4, 7, 6, dtype=torch.float64), TypeError, "out has dtype float64"),
        (torch.zeros(1).expand(2, 4, 7, 6), ValueError, "out overlaps itself"),
        (torch.zeros(2, 4, 7, 6, requires_grad=True), RuntimeError, "out requires a gradient"),
        ([], TypeError, "out must be a tensor, not list"),
    ],
    ids=["shape", "dtype", "itself", "gradient", "list"],
)
def test_bad_out(out, error, message):
    with pytest.raises(error, match=f"^{message}"):
        fastattn.attention(*qkv(), out=out)


def test_out_over_an_input():
    query, key, _ = tensors((2, 4, 7, 8), (2, 4, 7, 8), (1,))
    before = query.clone()
    with pytest.raises(ValueError, match=r"^out overlaps query in memory"):
        fastattn.attention(query, key, key, out=query)
    assert torch.equal(query, before)


@pytest.mark.parametrize("transform", ["vmap", "functionalize", "fake"])
def test_what_is_traced_or_transformed(transform):
    from torch._subclasses.fake_tensor import FakeTensorMode

    (x,) = tensors((3, 4, 7, 8))
    attend = {
        "fake": lambda y: fastattn.attention(*[FakeTensorMode().from_tensor(y)] * 3),
        "vmap": torch.func.vmap(lambda y: fastattn.attention(y, y, y)),
        "functionalize": torch.func.functionalize(lambda y: fastattn.attention(y, y, y)),
    }[transform]
    with pytest.raises(TypeError, match=r"^query (cannot be read by DLPack|holds no data)"):
        attend(x)


# --- DLPack alone ---------------------------------------------------------------------------------


class Exporter:
    """What has `__dlpack__`, and nothing else that NumPy could read."""

    def __init__(self, tensor, version=True):
        self.tensor, self.version = tensor, version

    def __dlpack__(self, **keywords):
        if not self.version and keywords:
            raise TypeError("no keywords in DLPack 0.8")
        return self.tensor.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


@each_dtype
@pytest.mark.parametrize("version", [True, False], ids=["1", "0.8"])
def test_dlpack_alone(dtype, version):
    xs = qkv(dtype)
    result = fastattn.attention(*(Exporter(x[..., ::2, :], version) for x in xs))
    assert isinstance(result, np.ndarray)
    expected = fastattn.attention(*(x[..., ::2, :] for x in xs))
    np.testing.assert_array_equal(result.astype(np.float64), expected.double().numpy())


def test_dlpack_of_another_device():
    with pytest.raises(TypeError, match=r"^query cannot be read by DLPack"):
        fastattn.attention(*[Exporter(torch.zeros(1, 2, 3, 4, device="meta"))] * 3)


# --- alone ----------------------------------------------------------------------------------------


def test_bfloat16_without_ml_dtypes():
    run_script(
        textwrap.dedent("""
        import sys
        sys.modules["ml_dtypes"] = None
        import torch, fastattn
        query, key, value = torch.randn(3, 2, 4, 9, 8).bfloat16()
        sinks = torch.randn(4).bfloat16()
        out, lse = fastattn.attention(query, key, value, sinks=sinks, return_lse=True)
        exact = fastattn.attention(query.double(), key.double(), value.double(), sinks=sinks.double())
        assert out.dtype == torch.bfloat16 and (out - exact).abs().max() < 0.03, (out - exact).abs().max()
        grads = fastattn.attention_backward(out, query, key[:1], value, out, lse, sinks=sinks, return_grad_sinks=True)
        assert [grad.dtype for grad in grads] == [torch.bfloat16] * 4
        assert grads[1].shape == (1, 4, 9, 8)
        room = torch.empty_like(out)
        assert fastattn.attention(query, key, value, sinks=sinks, out=room) is room and torch.equal(room, out)
        indices, weights = fastattn.top_keys(query, key, 2)
        assert weights.dtype == torch.bfloat16
    """)
    )


def test_the_library_does_not_import_torch():
    run_script(
        textwrap.dedent("""
        import sys, numpy, fastattn
        fastattn.attention(*numpy.zeros((3, 1, 2, 4, 8)))
        assert "torch" not in sys.modules and "transformers" not in sys.modules
    """)
    )
