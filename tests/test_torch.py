"""fastattn.torch: PyTorch's attention by another name, for autograd, torch.func and torch.compile too."""

import doctest
import gc
import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")  # which the sample inputs of PyTorch import

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import fastattn  # noqa: E402
import fastattn.torch as adapter  # noqa: E402

attend = adapter.scaled_dot_product_attention
theirs = torch.nn.functional.scaled_dot_product_attention
operators = torch.ops.fastattn

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(21)
    yield
    assert torch.nn.functional.scaled_dot_product_attention is theirs


@pytest.fixture
def calls(monkeypatch):
    """Names of the functions of fastattn that were called."""
    names = []
    for name in ("attention", "attention_backward", "attention_varlen"):
        function = getattr(fastattn, name)

        def counted(*args, name=name, function=function, **keywords):
            names.append(name)
            return function(*args, **keywords)

        monkeypatch.setattr(fastattn, name, counted)
    return names


def qkv(dtype=torch.float32, requires_grad=False):
    shapes = (2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 6)
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def assert_near(result, expected, dtype):
    torch.testing.assert_close(result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def gradients(function, inputs, **keywords):
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*leaves, **keywords)
    out.square().sum().backward()
    return [x.grad for x in leaves if x.requires_grad]


# --- PyTorch's semantics --------------------------------------------------------------------------


def in_double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def opinfo_samples(dtype):
    from torch.testing._internal.common_methods_invocations import op_db

    (opinfo,) = [op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention"]
    return list(opinfo.sample_inputs("cpu", dtype, requires_grad=True))


SAMPLES = [(dtype, i) for dtype in DTYPES for i in range(len(opinfo_samples(dtype)))]


@pytest.mark.parametrize(("dtype", "index"), SAMPLES, ids=str)
def test_samples_of_opinfo(dtype, index):
    sample = opinfo_samples(dtype)[index]
    keywords = dict(sample.kwargs)
    mine, other = attend(sample.input, *sample.args, **keywords), theirs(sample.input, *sample.args, **keywords)
    assert mine.dtype == other.dtype
    assert mine.shape == other.shape
    if not keywords.get("dropout_p"):
        assert_near(mine, other, dtype)
        # Scores are in the hundreds here, so that rounding shows: the error is to be that of PyTorch's own.
        inputs = [sample.input, *sample.args]
        doubles = {name: in_double(x) for name, x in keywords.items()}
        exact = gradients(theirs, [in_double(x) for x in inputs], **doubles)
        both = gradients(attend, inputs, **keywords), gradients(theirs, inputs, **keywords)
        for grad, other, expected in zip(*both, exact, strict=True):
            error, peer = ((x - expected).abs().max() for x in (grad, other))
            assert error <= 4 * peer + 5 * TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "keywords",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": "bool"}, {"attn_mask": "float"}, {"attn_mask": "row"}],
    ids=str,
)
def test_keywords(calls, dtype, requires_grad, keywords):
    query, key, value = qkv(dtype, requires_grad)
    masks = {
        "bool": torch.rand(2, 1, 7, 9) < 0.7,
        "float": torch.randn(7, 9, dtype=dtype),
        "row": torch.rand(1, 9) < 0.7,
    }
    keywords = {name: masks.get(x, x) if isinstance(x, str) else x for name, x in keywords.items()}
    assert_near(attend(query, key, value, **keywords), theirs(query, key, value, **keywords), dtype)
    assert calls == ["attention"]


def test_masked_rows_are_zero():
    query, key, value = qkv()
    mask = torch.ones(7, 9, dtype=torch.bool)
    mask[3] = False
    assert not attend(query, key, value, mask)[:, :, 3].any()


FALLBACKS = {
    "batch-broadcasts": lambda q, k, v: (q, k[:1], v[:1]),
    "heads-broadcast": lambda q, k, v: (q, k[:, :1], v[:, :1]),
    "meta": lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta")),
    "wide": lambda q, k, v: [x.repeat(1, 1, 1, 70) for x in (q, k, v)],
    "nested": lambda q, k, v: [torch.nested.nested_tensor(list(x), layout=torch.jagged).transpose(1, 2) for x in
                               (y.transpose(1, 2) for y in (q, k, v))],
}  # fmt: skip


@pytest.mark.parametrize("case", FALLBACKS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_handed_on(calls, case):
    inputs = FALLBACKS[case](*(torch.randn(2, 4, 7, 8) for _ in range(3)))
    mine, other = attend(*inputs), theirs(*inputs)
    assert calls in ([], ["attention"])  # asked, and refused
    assert mine.shape == other.shape
    if case not in ("meta", "nested"):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    "make",
    [
        lambda f, q, k, v: f(q, k[..., :3], v),
        lambda f, q, k, v: f(q, k.double(), v),
        lambda f, q, k, v: f(q.int(), k.int(), v.int()),
        lambda f, q, k, v: f(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]),
        lambda f, q, k, v: f(q, k, v, torch.ones(7, 8, dtype=torch.bool)),
        lambda f, q, k, v: f(q, k, v, torch.ones(7, 9, dtype=torch.bool), is_causal=True),
        lambda f, q, k, v: f(q, k, v, dropout_p=1.5),
        lambda f, q, k, v: f(q, k[:, :2], v[:, :2]),
    ],
    ids=["head-dim", "dtypes", "int", "ndim", "mask-shape", "mask-and-causal", "dropout", "heads"],
)
def test_errors_are_those_of_torch(make):
    with pytest.raises((RuntimeError, ValueError)) as expected:
        make(theirs, *qkv())
    with pytest.raises(expected.type):
        make(attend, *qkv())


def test_grouped_queries():
    query, key, value = qkv()
    few = key[:, :2], value[:, :2]
    assert_near(attend(query, *few, enable_gqa=True), theirs(query, *few, enable_gqa=True), torch.float32)


def test_dropout_comes_from_the_generator():
    query, key, value = qkv()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(attend(query, key, value, dropout_p=0.5))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    many = torch.stack([attend(query, key, value, dropout_p=0.3) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(many, attend(query, key, value), atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_autocast(dtype, masked):
    query, key, value = qkv(dtype)
    mask = torch.randn(7, 9, dtype=dtype) if masked else None
    with torch.autocast("cpu"):
        mine, other = attend(query, key, value, mask), theirs(query, key, value, mask)
    assert mine.dtype == other.dtype
    assert_near(mine, other, torch.bfloat16)


# --- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keywords", [{}, {"is_causal": True}, {"scale": 0.2}], ids=str)
def test_gradcheck(keywords):
    inputs = qkv(torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *xs: attend(*xs, **keywords), inputs)


def test_gradcheck_of_a_mask():
    mask = torch.randn(4, 7, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attend, [*qkv(torch.float64, requires_grad=True), mask])


def test_gradcheck_with_dropout():
    def dropped(*inputs):
        torch.manual_seed(0)
        return attend(*inputs, dropout_p=0.4)

    assert torch.autograd.gradcheck(dropped, qkv(torch.float64, requires_grad=True))


def test_gradcheck_through_lse():
    inputs = qkv(torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *xs: operators.attention(*xs, *adapter.Scores()), inputs)


SCORES = {
    "softcap": lambda: {"softcap": 1.5},
    "sinks": lambda: {"sinks": torch.randn(4, dtype=torch.float64, requires_grad=True)},
    "bias": lambda: {"bias": torch.randn(4, 1, 9, dtype=torch.float64, requires_grad=True), "causal": True},
    "window": lambda: {"left": 3, "right": 1, "query_offset": 2},
    "lengths": lambda: {"key_lengths": torch.tensor([4, 9]), "causal": True},
    "dropout": lambda: {"seed": torch.tensor(7), "dropout": 0.4},
}
SCORES["all"] = lambda: {name: x for make in list(SCORES.values())[:-1] for name, x in make().items()}


@pytest.mark.parametrize("case", SCORES)
def test_gradcheck_of_the_operator(case):
    scores = adapter.Scores(**SCORES[case]())
    learnt = [name for name in ("bias", "sinks") if getattr(scores, name) is not None]
    assert learnt == [name for name in ("bias", "sinks") if case in (name, "all")]

    def out_of(query, key, value, *changed):
        return operators.attention(query, key, value, *scores._replace(**dict(zip(learnt, changed, strict=True))))[0]

    inputs = [*qkv(torch.float64, requires_grad=True), *(getattr(scores, name) for name in learnt)]
    assert torch.autograd.gradcheck(out_of, inputs)


def test_second_derivatives_are_refused():
    with pytest.raises(NotImplementedError, match="fastattn has no second derivatives"):
        torch.autograd.gradgradcheck(attend, qkv(torch.float64, requires_grad=True))


def test_nothing_is_kept_after_backward():
    query, key, value = qkv(requires_grad=True)
    out = attend(query, key, value)
    out.sum().backward()
    del out
    gc.collect()
    assert query.grad is not None


# --- torch.func -----------------------------------------------------------------------------------


def test_func_grad():
    inputs = qkv()
    mine, other = (
        torch.func.grad(lambda *xs, f=f: f(*xs).square().sum(), argnums=(0, 1, 2))(*inputs) for f in (attend, theirs)
    )
    for grad, expected in zip(mine, other, strict=True):
        assert_near(grad, expected, torch.float32)


@pytest.mark.filterwarnings("ignore")
def test_func_second_derivatives_are_refused():
    query, key, value = qkv()
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.func.jacrev(torch.func.grad(lambda x: attend(x, key, value).square().sum()))(query)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, None), (None, 2, 2), (0, 1, None)])
@pytest.mark.parametrize("ndim", [2, 3, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_vmap(in_dims, ndim, masked):
    shapes = [(3, 2, 5, 8)[4 - ndim :], (3, 2, 6, 8)[4 - ndim :], (3, 2, 6, 8)[4 - ndim :]]
    inputs = [
        torch.randn(shape) if axis is None else torch.randn((*shape[:axis], 4, *shape[axis:]))
        for shape, axis in zip(shapes, in_dims, strict=True)
    ]
    mask, mask_dim = (torch.rand(4, 5, 6) < 0.8, 0) if masked else (None, None)
    mine, other = (
        torch.func.vmap(f, in_dims=(*in_dims, mask_dim), randomness="same")(*inputs, mask)
        for f in (attend, lambda q, k, v, m: torch.nn.functional.scaled_dot_product_attention(q, k, v, m))
    )
    assert_near(mine, other, torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_gradients_for_each_sample(ndim):
    inputs = [torch.randn((4, *(3, 2, 5, 8)[4 - ndim :])) for _ in range(3)]
    mine, other = (
        torch.func.vmap(torch.func.grad(lambda *xs, f=f: f(*xs).square().sum(), argnums=(0, 1, 2)))(*inputs)
        for f in (attend, theirs)
    )
    for grad, expected in zip(mine, other, strict=True):
        assert_near(grad, expected, torch.float32)


# What comes with query, key and value, and which axis of it is mapped.
SCORES_OF_SAMPLES = {
    "lengths": {"key_lengths": (lambda batch: torch.randint(0, 7, batch), None)},
    "mapped lengths": {"key_lengths": (lambda batch: torch.randint(0, 7, (5, *batch)), 0)},
    "lengths in the last axis": {"key_lengths": (lambda batch: torch.randint(0, 7, (*batch, 5)), -1)},
    "sinks": {"sinks": (lambda batch: torch.randn(4, dtype=torch.float64), None)},
    "mapped sinks": {"sinks": (lambda batch: torch.randn(5, 4, dtype=torch.float64), 0)},
    "sinks in the last axis": {"sinks": (lambda batch: torch.randn(4, 5, dtype=torch.float64), 1)},
    "both": {"sinks": (lambda batch: torch.randn(5, 4, dtype=torch.float64), 0),
             "key_lengths": (lambda batch: torch.randint(0, 7, (5, *batch)), 0)},
    "no sinks": {"sinks": (lambda batch: torch.full((5, 4), -torch.inf, dtype=torch.float64), 0),
                 "key_lengths": (lambda batch: torch.randint(0, 2, (5, *batch)), 0)},
}  # fmt: skip


def samples(case, ndim):
    """Return query, key, value and the case's scores of five samples, and the axes along which they are mapped."""
    torch.manual_seed(7)
    batch = (2, 3)[4 - ndim :][: ndim - 3]
    inputs = [torch.randn(5, *batch, heads, rows, 8, dtype=torch.float64) for heads, rows in ((4, 5), (2, 6), (2, 6))]
    given = {name: (make(batch), axis) for name, (make, axis) in SCORES_OF_SAMPLES[case].items()}
    return inputs, {name: x for name, (x, _) in given.items()}, {name: axis for name, (_, axis) in given.items()}


def each_sample(x, axis):
    return [x] * 5 if axis is None else x.movedim(axis, 0).unbind()


def one_by_one(function, inputs, scores, axes):
    """Return what a function gives of each sample by itself."""
    columns = {name: each_sample(x, axes[name]) for name, x in scores.items()}
    named = [{name: column[i] for name, column in columns.items()} for i in range(5)]
    found = [function(*arrays, given) for *arrays, given in zip(*inputs, named, strict=True)]
    return [torch.stack(each) for each in zip(*found, strict=True)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ndim", [3, 4, 5])
@pytest.mark.parametrize("case", SCORES_OF_SAMPLES)
def test_vmap_of_scores(case, ndim):
    inputs, scores, axes = samples(case, ndim)

    def attended(query, key, value, scores):
        return (adapter.attention_with_scores(query, key, value, *adapter.Scores(**scores, causal=True)),)

    mapped = torch.func.vmap(attended, in_dims=(0, 0, 0, axes))(*inputs, scores)
    for mine, want in zip(mapped, one_by_one(attended, inputs, scores, axes), strict=True):
        torch.testing.assert_close(mine, want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ndim", [3, 4])
@pytest.mark.parametrize("case", SCORES_OF_SAMPLES)
def test_gradients_for_each_sample_of_scores(case, ndim):
    inputs, scores, axes = samples(case, ndim)
    learnt = ("sinks",) if "sinks" in scores else ()

    def gradients(query, key, value, scores):
        def loss(query, key, value, changed):
            of = adapter.Scores(**scores | changed, causal=True)
            return adapter.attention_with_scores(query, key, value, *of).sin().sum()

        *grads, of_scores = torch.func.grad(loss, (0, 1, 2, 3))(
            query, key, value, {name: scores[name] for name in learnt}
        )
        return (*grads, *of_scores.values())

    mapped = torch.func.vmap(gradients, in_dims=(0, 0, 0, axes))(*inputs, scores)
    for mine, want in zip(mapped, one_by_one(gradients, inputs, scores, axes), strict=True):
        torch.testing.assert_close(mine, want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["mapped sinks", "sinks", "both"])
def test_a_gradient_over_vmap_of_sinks(case):
    inputs, scores, axes = samples(case, 4)

    def attended(query, key, value, scores):
        return adapter.attention_with_scores(query, key, value, *adapter.Scores(**scores, causal=True))

    def loss(sinks, each):
        return each(*inputs, scores | {"sinks": sinks}).sin().sum()

    mapped = torch.func.grad(loss)(scores["sinks"], torch.func.vmap(attended, in_dims=(0, 0, 0, axes)))
    sinks = scores["sinks"].clone().requires_grad_()
    loss(sinks, lambda *call: one_by_one(lambda *x: (attended(*x),), call[:3], call[3], axes)[0]).backward()
    torch.testing.assert_close(mapped, sinks.grad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sink", [1e300, -1e300, 1e39, torch.inf, -torch.inf, torch.nan])
def test_extreme_sinks_of_samples(sink):
    inputs, sinks = [torch.randn(3, 4, 5, 8) for _ in range(3)], torch.zeros(3, 4, dtype=torch.float64)
    sinks[1, 2] = sink

    def attended(query, key, value, sinks):
        return (adapter.attention_with_scores(query, key, value, *adapter.Scores(sinks=sinks)),)

    (mapped,) = torch.func.vmap(attended)(*inputs, sinks)
    alone = torch.stack([attended(*each)[0] for each in zip(*inputs, sinks, strict=True)])
    torch.testing.assert_close(mapped, alone, equal_nan=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(), (1,), (2, 4)])
def test_sinks_of_samples_of_another_shape(shape):
    inputs = [torch.randn(3, 2, 4, 5, 8) for _ in range(3)]

    def attended(query, key, value, sinks):
        return adapter.attention_with_scores(query, key, value, *adapter.Scores(sinks=sinks))

    with pytest.raises(ValueError, match=re.escape(f"sinks has shape {shape}; accepted is one logit a head, (4,)")):
        torch.func.vmap(attended)(*inputs, torch.zeros(3, *shape))


@pytest.mark.filterwarnings("ignore")
def test_sinks_under_two_maps():
    query, sinks = torch.randn(3, 2, 4, 5, 8), torch.randn(2, 4)
    attended = lambda x, s: adapter.attention_with_scores(x, x, x, *adapter.Scores(sinks=s))  # noqa: E731
    mine = torch.func.vmap(torch.func.vmap(attended), in_dims=(0, None))(query, sinks)
    want = torch.stack([torch.stack([attended(query[i, j], sinks[j]) for j in range(2)]) for i in range(3)])
    torch.testing.assert_close(mine, want)


# --- the operators, and the compiler ----------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float", "all"])
def test_opcheck(requires_grad, mask):
    masks = {
        "bool": {"mask": torch.rand(7, 9) < 0.5},
        "float": {"bias": torch.randn(7, 9, requires_grad=requires_grad)},
        "all": {"bias": torch.randn(4, 1, 9, requires_grad=requires_grad), "mask": torch.rand(2, 1, 1, 9) < 0.8,
                "sinks": torch.randn(4, requires_grad=requires_grad), "key_lengths": torch.tensor([9, 5]),
                "softcap": 2.0, "query_offset": 1, "left": 4, "causal": True},
    }  # fmt: skip
    arguments = (*qkv(requires_grad=requires_grad), *adapter.Scores(**masks.get(mask, {})))
    torch.library.opcheck(operators.attention.default, arguments)


@pytest.mark.parametrize("of_bias", [False, True])
@pytest.mark.parametrize("of_sinks", [False, True])
def test_opcheck_of_the_gradients(of_bias, of_sinks):
    inputs, scores = qkv(), adapter.Scores(bias=torch.randn(7, 9), sinks=torch.randn(4), softcap=3.0, left=5)
    out, lse = operators.attention(*inputs, *scores)
    arguments = (out, None, *inputs, out, lse, *scores, of_bias, of_sinks)
    torch.library.opcheck(operators.attention_backward.default, arguments)


def packed(requires_grad=False):
    xs = [torch.randn(10, heads, 8, requires_grad=requires_grad) for heads in (4, 2, 2)]
    return *xs, torch.tensor([0, 3, 3, 10]), torch.tensor([0, 3, 3, 10])


def test_opcheck_of_packed_sequences():
    torch.library.opcheck(operators.varlen.default, (*packed(requires_grad=True), True, None, None, None))
    inputs = packed()
    out, lse = operators.varlen(*inputs, True, None, 4, 0)
    arguments = (out, None, *inputs[:3], out, lse, *inputs[3:], True, None, 4, 0)
    torch.library.opcheck(operators.varlen_backward.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("keywords", [{}, {"is_causal": True}, {"dropout_p": 0.3}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_compile(calls, backend, keywords):
    inputs = qkv(requires_grad=True)
    compiled = torch.compile(lambda *xs: attend(*xs, **keywords).square().sum(), fullgraph=True, backend=backend)
    compiled(*inputs).backward()
    assert calls == ["attention", "attention_backward"]
    if not keywords.get("dropout_p"):
        expected = gradients(theirs, inputs, **keywords)
        for x, grad in zip(inputs, expected, strict=True):
            assert_near(x.grad, grad, torch.float32)


# --- packed sequences -----------------------------------------------------------------------------


def test_packed_sequences():
    query, key, value, lengths, _ = packed(requires_grad=True)
    out = adapter.varlen_attention(query, key, value, lengths, lengths, is_causal=True)
    parts = [
        theirs(*(x[begin:end].transpose(0, 1) for x in (query, key, value)), is_causal=True, enable_gqa=True)
        for begin, end in ((0, 3), (3, 10))
    ]
    expected = torch.cat([part.transpose(0, 1) for part in parts])
    assert_near(out, expected, torch.float32)
    (mine,), (other,) = (torch.autograd.grad(x.square().sum(), query, retain_graph=True) for x in (out, expected))
    assert_near(mine, other, torch.float32)


def test_gradcheck_of_packed_sequences():
    *inputs, first, second = packed()
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *xs: adapter.varlen_attention(*xs, first, second, window=(2, 0)), inputs)


def test_packed_sequences_under_vmap_are_refused():
    *inputs, first, second = packed()
    with pytest.raises(RuntimeError, match="cannot be mapped over by vmap"):
        torch.func.vmap(lambda *xs: adapter.varlen_attention(*xs, first, second))(*(x[None] for x in inputs))


# --- in PyTorch's place -----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("need_weights", [False])
def test_multi_head_attention(calls, training, need_weights):
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True).train(training)
    x = torch.randn(2, 9, 32)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    arguments = {"need_weights": need_weights, "key_padding_mask": padding}
    expected = layer(x, x, x, **arguments)[0]
    with adapter.enabled():
        result = layer(x, x, x, **arguments)[0]
    assert calls == ["attention"]
    assert_near(result, expected, torch.float32)


@pytest.mark.parametrize("grad", [False, True])
def test_transformer_encoder(calls, grad):
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(grad)
    x = torch.randn(2, 9, 32)
    with torch.set_grad_enabled(grad):
        expected = encoder(x)
        with adapter.enabled():
            result = encoder(x)
    assert calls == ["attention"] * 2
    assert_near(result, expected, torch.float32)
    assert torch.backends.mha.get_fastpath_enabled()


def test_enable_twice_and_disable():
    adapter.enable()
    with adapter.enabled():
        pass
    assert torch.nn.functional.scaled_dot_product_attention is attend
    adapter.enable()
    adapter.disable()
    assert torch.nn.functional.scaled_dot_product_attention is theirs
    adapter.disable()


def test_disabled_after_an_error():
    with pytest.raises(ZeroDivisionError), adapter.enabled():
        raise ZeroDivisionError
    assert torch.nn.functional.scaled_dot_product_attention is theirs


# --- what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *adapter.__all__])
def test_examples(name):
    thing = adapter if name is None else getattr(adapter, name)
    examples = doctest.DocTestFinder(recurse=False).find(thing, name or "fastattn.torch", globs={})
    assert sum(len(test.examples) for test in examples) > 0
    for test in examples:
        assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")  # PyTorch's own formulas use it
def test_tangents_go_forward_by_pytorch():
    query, key, value = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    for mask in (None, torch.ones(9, 9, dtype=torch.bool)):
        with torch.autograd.forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
            results = [
                torch.autograd.forward_ad.unpack_dual(attend(dual, key, value, attn_mask=mask)).tangent
                for attend in (adapter.scaled_dot_product_attention, adapter.torch_attention)
            ]
        assert results[0] is not None
        torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("which", ["packed", "sinks"])
def test_tangents_are_refused_where_pytorch_has_not_the_function(which):
    query, key, value, lengths, _ = packed()
    dual_of = torch.autograd.forward_ad.make_dual
    calls = {
        "packed": lambda: adapter.varlen_attention(dual_of(query, query), key, value, lengths, lengths),
        "sinks": lambda: adapter.attention_with_scores(*qkv(), *adapter.Scores(sinks=dual_of(*torch.ones(2, 4)))),
    }
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        calls[which]()


@pytest.mark.parametrize("negated", ["whole", "imaginary"])
def test_negated_views(negated):
    if negated == "whole":
        x = torch._neg_view(torch.randn(2, 4, 9, 8))
    else:
        x = torch.randn(2, 4, 9, 8, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    want = adapter.torch_attention(x, x, x)
    torch.testing.assert_close(adapter.scaled_dot_product_attention(x, x, x), want)
    with pytest.raises(TypeError, match="query is a view whose numbers are negated"):
        fastattn.attention(x, x, x)


def test_a_gradient_over_vmap():
    query, key, value = torch.randn(3, 2, 4, 9, 8)
    masks = torch.randn(2, 9, 9)

    def loss(attend):
        def of_one(a, b, c, m):
            return attend(a, b, c, attn_mask=m.expand(4, 9, 9)).sin().sum()

        return lambda b, m: torch.vmap(of_one, (0, None, 0, 0))(query, b, value, m).sum()

    ours, its = (
        torch.func.grad(loss(attend), (0, 1))(key[0], masks)
        for attend in (adapter.scaled_dot_product_attention, formula_of_sdpa)
    )
    for mine, want in zip(ours, its, strict=True):
        torch.testing.assert_close(mine, want)


def formula_of_sdpa(query, key, value, attn_mask):
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + attn_mask
    return scores.softmax(-1) @ value


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # conditions on shapes, which hold for these
def test_torchscript_records_the_call():
    query, key, value = torch.randn(3, 2, 4, 9, 8)
    traced = torch.jit.trace(
        lambda q, k, v: q + adapter.scaled_dot_product_attention(q, k, v), (query, key, value), check_trace=False
    )
    others = torch.randn(3, 2, 4, 9, 8)
    torch.testing.assert_close(traced(*others), others[0] + adapter.torch_attention(*others))


def test_dropout_under_another_default_device():
    query, key, value = torch.randn(3, 2, 4, 9, 8)
    with torch.device("meta"):
        out = adapter.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    assert out.device.type == "cpu"


@pytest.mark.parametrize("masked", [False, True])
def test_a_scale_that_is_a_tensor_is_refused_as_pytorch_does(masked):
    query, key, value = torch.randn(3, 2, 4, 9, 8)
    mask = torch.ones(9, 9, dtype=torch.bool) if masked else None
    with pytest.raises(TypeError, match="scale"):
        adapter.scaled_dot_product_attention(query, key, value, mask, scale=torch.tensor(0.3, requires_grad=True))
