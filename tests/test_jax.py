"""Attention inside JAX's transformations: the bits of `fastattn.attention`, and gradients beside jax.grad's own."""

import doctest
from pathlib import Path

import numpy as np
import pytest
from oracle import run_script

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from test_docs import run_python_of  # noqa: E402

import fastattn  # noqa: E402
import fastattn.jax  # noqa: E402

KEYWORDS = [
    {},
    {"causal": True},
    {"window": (3, None), "scale": 0.3},
    {"softcap": 2.0, "query_offset": 4},
    {"mask": "mask"},
    {"mask": "row"},
    {"bias": "bias", "causal": True},
    {"alibi_slopes": "slopes"},
    {"sinks": "sinks", "softcap": 3.0},
    {"key_lengths": "lengths"},
    {"query_offset": "offsets", "causal": True},
]


def arrays_of(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 8)
    return {
        "query": jax.random.normal(keys[0], (2, 4, 9, 16)).astype(dtype),
        "key": jax.random.normal(keys[1], (2, 2, 13, 16)).astype(dtype),
        "value": jax.random.normal(keys[2], (2, 2, 13, 8)).astype(dtype),
        "mask": jax.random.bernoulli(keys[3], 0.7, (2, 1, 9, 13)),
        "row": jax.random.bernoulli(keys[4], 0.7, (13,)),
        "bias": jax.random.normal(keys[5], (4, 9, 13)).astype(dtype),
        "slopes": jnp.array([1.0, 0.5, 0.25, 0.125]),
        "sinks": jax.random.normal(keys[6], (4,)),
        "lengths": jnp.array([13, 5]),
        "offsets": jnp.array([2, 7]),
    }


def split(arrays, keywords):
    """The array keywords, and the others."""
    named = {name: arrays[x] for name, x in keywords.items() if isinstance(x, str)}
    return named, {name: x for name, x in keywords.items() if not isinstance(x, str)}


def formula(query, key, value, *, dtype=jnp.float32, **keywords):
    """What JAX differentiates by itself: one batch item, of the keywords that have gradients."""
    s = jnp.einsum("hqd,hkd->hqk", query, jnp.repeat(key, query.shape[0] // key.shape[0], 0))
    s = s * keywords.get("scale", query.shape[-1] ** -0.5)
    if "softcap" in keywords:
        s = keywords["softcap"] * jnp.tanh(s / keywords["softcap"])
    if "bias" in keywords:
        s = s + keywords["bias"]
    distance = jnp.arange(s.shape[2]) - (jnp.arange(s.shape[1])[:, None] + s.shape[2] - s.shape[1])
    if keywords.get("causal"):
        s = jnp.where(distance <= 0, s, -jnp.inf)
    if "sinks" in keywords:
        s = jnp.concatenate([s, jnp.broadcast_to(keywords["sinks"][:, None, None], (*s.shape[:2], 1))], -1)
    p = jax.nn.softmax(s, -1)[..., : key.shape[1]]
    return jnp.einsum("hqk,hkd->hqd", p, jnp.repeat(value, query.shape[0] // value.shape[0], 0))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("keywords", KEYWORDS, ids=str)
def test_the_bits_of_attention(keywords, dtype):
    arrays = arrays_of(dtype)
    named, constants = split(arrays, keywords)
    qkv = [arrays[name] for name in ("query", "key", "value")]
    expected = fastattn.attention(
        *map(np.asarray, qkv), return_lse=True, **{name: np.asarray(x) for name, x in named.items()}, **constants
    )
    call = jax.jit(lambda qkv, named: fastattn.jax.attention(*qkv, return_lse=True, **named, **constants))
    for result, want in zip(call(qkv, named), expected, strict=True):
        assert result.dtype == want.dtype
        assert np.asarray(result).tobytes() == want.tobytes()


def test_without_jit_and_one_head():
    q, k, v = jax.random.normal(jax.random.key(1), (3, 20, 8))
    assert np.array_equal(fastattn.jax.attention(q, k, v), fastattn.attention(*map(np.asarray, (q, k, v))))


@pytest.mark.parametrize(
    "keywords", [{}, {"causal": True}, {"bias": "bias"}, {"sinks": "sinks"}, {"softcap": 2.0, "scale": 0.4}], ids=str
)
def test_gradients(keywords):
    arrays = arrays_of()
    named, constants = split(arrays, keywords)
    inputs = {name: arrays[name][0] for name in ("query", "key", "value")} | named
    weights = jax.random.normal(jax.random.key(2), (4, 9, 8))

    def loss(attend):
        return lambda inputs: (attend(**inputs, **constants) * weights).sum()

    got, want = (jax.grad(loss(attend))(inputs) for attend in (fastattn.jax.attention, formula))
    for name, grad in want.items():
        np.testing.assert_allclose(got[name], grad, rtol=2e-5, atol=2e-5)


def test_the_gradient_of_lse():
    arrays = arrays_of()
    query, key, value = (arrays[name] for name in ("query", "key", "value"))

    def lse(query):
        return fastattn.jax.attention(query, key, value, return_lse=True)[1].sum()

    def formula_of_lse(query):
        s = jnp.einsum("bhqd,bhkd->bhqk", query, jnp.repeat(key, 2, 1)) / 4
        return jax.nn.logsumexp(s, -1).sum()

    np.testing.assert_allclose(jax.grad(lse)(query), jax.grad(formula_of_lse)(query), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("mapped", ["query", "mask", "bias", "sinks", "key_lengths", "all"])
def test_vmap(mapped):
    arrays = arrays_of()
    inputs = {name: arrays[name][0] for name in ("query", "key", "value")}
    several = {
        "query": arrays["query"],
        "mask": jax.random.bernoulli(jax.random.key(3), 0.7, (3, 9, 13)),
        "bias": jax.random.normal(jax.random.key(3), (3, 4, 9, 13)),
        "sinks": jax.random.normal(jax.random.key(3), (3, 4)),
        "key_lengths": jnp.array([13, 5, 0]),
    }
    if mapped == "all":
        many, inputs = {name: arrays[name] for name in ("query", "key", "value")}, {}
    else:
        many = {mapped: several[mapped]}
        inputs.pop(mapped, None)
    mapped_result = jax.vmap(lambda many: fastattn.jax.attention(**inputs, **many))(many)
    for i, result in enumerate(mapped_result):
        alone = fastattn.jax.attention(**inputs, **{n: x[i] for n, x in many.items()})
        np.testing.assert_array_equal(result, alone)


def test_gradients_for_each_mapped_item_also_of_what_they_share():
    arrays = arrays_of()
    key, value = arrays["key"][0], arrays["value"][0]
    grad = jax.grad(lambda query, key: (fastattn.jax.attention(query, key, value) ** 2).sum(), (0, 1))
    for shared, query in zip(
        zip(*jax.vmap(grad, (0, None))(arrays["query"], key), strict=True), arrays["query"], strict=True
    ):
        for result, want in zip(shared, grad(query, key), strict=True):
            np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"key": a["key"][..., :5]}, "query and key must have the same head_dim"),
        (lambda a: a | {"key": a["key"][:, :1]}, "key and value must have the same number of heads"),
        (lambda a: a | {"query": a["query"].astype("int8")}, "query has dtype int8"),
        (lambda a: a | {"mask": jnp.ones((3, 9, 13), bool)}, "mask has shape"),
        (lambda a: a | {"mask": jnp.ones((1, 1, 1, 9, 13), bool)}, "mask has shape"),
        (lambda a: a | {"softcap": -1.0}, "softcap must be finite and greater than 0"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    arrays = {name: x for name, x in arrays_of().items() if name in ("query", "key", "value")}
    with pytest.raises(Exception, match=message) as caught:
        jax.block_until_ready(fastattn.jax.attention(**change(arrays)))
    assert isinstance(caught.value, (ValueError, jax.errors.JaxRuntimeError))


def test_scalars_of_numpy():
    q, k, v = jax.random.normal(jax.random.key(1), (3, 20, 8))
    result = fastattn.jax.attention(q, k, v, scale=np.float32(0.5), window=(np.int64(3), 0))
    assert np.array_equal(result, fastattn.jax.attention(q, k, v, scale=0.5, window=(3, 0)))


def test_a_second_derivative_is_refused():
    q, k, v = jax.random.normal(jax.random.key(1), (3, 20, 8))
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.hessian(lambda q: fastattn.jax.attention(q, k, v).sum())(q)


def test_arrays_are_read_in_place_by_attention_itself():
    x = jax.random.normal(jax.random.key(1), (3, 20, 8), jnp.bfloat16)
    assert isinstance(fastattn.attention(*x), np.ndarray)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec
import fastattn.jax
assert len(jax.devices()) == 2
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
x = jax.random.normal(jax.random.key(0), (3, 4, 2, 9, 8))
spec = PartitionSpec("batch")
sharded = jax.jit(jax.shard_map(
    lambda q, k, v: fastattn.jax.attention(q, k, v), mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
))
print(np.array_equal(sharded(*x), fastattn.jax.attention(*x)))
"""


def test_shard_map():
    flags = "--xla_force_host_platform_device_count=2"
    assert run_script(SHARDED, XLA_FLAGS=flags, JAX_PLATFORMS="cpu").strip() == "True"


def test_importing_fastattn_does_not_import_jax():
    assert run_script("import sys, fastattn; print('jax' in sys.modules)").strip() == "False"


PAGE = Path(__file__).parent.parent / "docs" / "jax.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside the tests")
def test_python_in_its_page():
    run_python_of(PAGE)


@pytest.mark.parametrize("of", [fastattn.jax, fastattn.jax.attention], ids=["module", "attention"])
def test_examples_in_docstrings(of):
    (test,) = doctest.DocTestFinder(recurse=False).find(of, "fastattn.jax", globs={})
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0
