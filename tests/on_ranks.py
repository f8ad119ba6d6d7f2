"""Attention over sequences that are divided among MPI ranks: all ranks run these tests, started by test_mpi.py.

What a test asserts is the same on all ranks, so that all of them pass it or none.
"""

import os
import runpy
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from mpi4py import MPI
from oracle import (
    BF16,
    DTYPE_IDS,
    DTYPES,
    F16,
    F32,
    F64,
    assert_close,
    check_backward,
    exact,
    make_rng,
    normal,
    qkv,
    tolerances,
)

import fastattn
import fastattn.mpi

COMM = MPI.COMM_WORLD
LAYOUTS = ["zigzag", "striped", "contiguous"]
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8

# Keywords whose arrays are as long as the queries or the keys are drawn for these.
KEYWORDS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (7, 4), "scale": 0.4},
    "causal window": {"causal": True, "window": (11, None), "softcap": 3.0},
    "window ahead": {"window": (None, 5)},
    "window behind": {"window": (3, None)},
    "narrow window": {"window": (0, 0)},
    "offset": {"causal": True, "query_offset": 3},
    "far": {"causal": True, "query_offset": -100},
    "sinks": {"sinks": np.array([0.5, -1.0, 2.0, 0.0]), "causal": True},
    "alibi": {"alibi_slopes": np.array([0.5, 0.25, 0.1, 0.0]), "causal": True},
    "mask": {"mask": "rows and keys"},
    "mask of keys": {"mask": "keys"},
    "bias": {"bias": "rows and keys", "causal": True},
}
LENGTHS = {"alike": (37, 37), "more keys": (20, 51), "fewer than ranks": (3, 2)}


def drawn(keywords, seqlen_q, seqlen_k, layout):
    """The keywords for the whole, and for this rank."""
    if layout == "striped" and "alibi_slopes" in keywords and COMM.size > 1:
        pytest.skip("refused")
    whole = dict(keywords)
    if "mask" in keywords:
        whole["mask"] = drawn_for(seqlen_q, seqlen_k, keywords["mask"]) < 0.6
    if "bias" in keywords:
        whole["bias"] = drawn_for(seqlen_q, seqlen_k, keywords["bias"]).astype(F32)
    own = dict(whole)
    for name in ("mask", "bias"):
        if keywords.get(name) == "rows and keys":
            own[name] = shard(whole[name], layout)
    return whole, own


def drawn_for(seqlen_q, seqlen_k, kind):
    rng = make_rng(3)
    return rng.random(seqlen_k) if kind == "keys" else rng.random((HEADS, seqlen_q, seqlen_k))


def shard(x, layout, axis=-2, **packed):
    return fastattn.mpi.shard(COMM, x, layout=layout, axis=axis, **packed)


def unshard(x, layout, axis=-2, **packed):
    return fastattn.mpi.unshard(COMM, x, layout=layout, axis=axis, **packed)


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
def test_ring_is_as_accurate_as_one_call(keywords, layout, lengths, dtypes):
    whole, own = drawn(keywords, *lengths, layout)
    query, key, value = qkv(make_rng(), (2, HEADS, KV_HEADS, *lengths, HEAD_DIM), dtypes)
    parts = (shard(x, layout) for x in (query, key, value))
    out, lse = fastattn.mpi.ring_attention(COMM, *parts, layout=layout, return_lse=True, **own)
    expected, expected_lse = exact(query, key, value, return_lse=True, **whole)
    out_tolerance, lse_tolerance, _ = tolerances(query, key, value, **whole)
    assert out.dtype == query.dtype
    assert lse.dtype == (F64 if query.dtype == F64 else F32)
    assert_close(unshard(out, layout), expected, 1.01 * out_tolerance)
    assert_close(unshard(lse, layout, axis=-1), expected_lse, 1.5 * lse_tolerance, "lse")


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
def test_gradients_of_ring(keywords, layout, lengths, dtypes):
    whole, own = drawn(keywords, *lengths, layout)
    rng = make_rng()
    query, key, value = qkv(rng, (2, HEADS, KV_HEADS, *lengths, HEAD_DIM), dtypes)
    grad_lse = normal(rng, query.shape[:-1], F32)

    def backward(*arrays, grad_lse, return_grad_bias=False, **asked):
        asked = {name: x for name, x in asked.items() if name == "return_grad_sinks"}
        *rows, lse = (shard(x, layout) for x in arrays[:5]), shard(arrays[5], layout, axis=-1)
        grads = fastattn.mpi.ring_attention_backward(
            COMM, *rows[0], lse, layout=layout, grad_lse=shard(grad_lse, layout, axis=-1), **own, **asked
        )
        gathered = [*(unshard(grad, layout) for grad in grads[:3]), *grads[3:]]
        if return_grad_bias:  # which a ring does not have
            gathered.append(fastattn.attention_backward(*arrays, **whole, grad_lse=grad_lse, return_grad_bias=True)[3])
        return gathered

    check_backward(backward, query, key, value, normal(rng, query.shape, dtypes[0]), grad_lse=grad_lse, **whole)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ring_of_bfloat16_errs_no_more_than_one_call(layout):
    """Its parts are float32: were each rounded, as many as there are ranks would show."""
    arrays = qkv(make_rng(), (1, 4, 4, 512, 2048, 64), (BF16, BF16))
    expected = exact(*arrays, causal=True)
    out = unshard(
        fastattn.mpi.ring_attention(COMM, *(shard(x, layout) for x in arrays), layout=layout, causal=True), layout
    )
    ring, one = (
        np.sqrt(np.square(x.astype(F64) - expected).mean()) for x in (out, fastattn.attention(*arrays, causal=True))
    )
    assert ring < 1.05 * one


BOUNDS = [0, 13, 13, 30, 31, 33]
PACKED_KEYWORDS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (5, 2), "sinks": np.arange(4.0)},
}


def packed(rng, dtype=F64):
    return [normal(rng, (BOUNDS[-1], heads, HEAD_DIM), dtype) for heads in (HEADS, HEADS, KV_HEADS, KV_HEADS)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keywords", PACKED_KEYWORDS.values(), ids=PACKED_KEYWORDS)
@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_packed_sequences(kind, keywords, layout):
    if kind == "ulysses" and HEADS % COMM.size:
        pytest.skip("the ranks cannot share the heads")
    attend = getattr(fastattn.mpi, f"{kind}_attention")
    differentiate = getattr(fastattn.mpi, f"{kind}_attention_backward")
    arrays = packed(make_rng())
    how = {"layout": layout, "cu_seqlens": BOUNDS}
    parts = [shard(x, axis=0, **how) for x in arrays]
    results = attend(COMM, *parts[1:], return_lse=True, **how, **keywords)
    expected = fastattn.attention_varlen(*arrays[1:], BOUNDS, BOUNDS, return_lse=True, **keywords)
    for actual, want in zip(results, expected, strict=True):
        np.testing.assert_allclose(unshard(actual, axis=0, **how), want, atol=1e-14)
    grads = differentiate(COMM, *parts, *results, **how, **keywords)
    wanted = fastattn.attention_varlen_backward(*arrays, *expected, BOUNDS, BOUNDS, **keywords)
    for actual, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(unshard(actual, axis=0, **how), want, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "keywords",
    [{}, {"causal": True}, {"key_lengths": [51, 9], "causal": True}, {"alibi_slopes": [0.5, 0.2, 0.1, 0.0]},
     {"sinks": np.arange(4.0), "window": (9, 3)}],
    ids=str,
)  # fmt: skip
def test_ulysses(keywords, kv_heads, layout):
    if HEADS % COMM.size or (kv_heads % COMM.size and COMM.size % kv_heads):
        pytest.skip("the ranks cannot share the heads")
    rng = make_rng()
    arrays = [normal(rng, (2, HEADS, 20, HEAD_DIM), F64), *qkv(rng, (2, HEADS, kv_heads, 20, 51, 8), (F64, F64))]
    parts = [shard(x, layout) for x in arrays]
    results = fastattn.mpi.ulysses_attention(COMM, *parts[1:], layout=layout, return_lse=True, **keywords)
    expected = fastattn.attention(*arrays[1:], return_lse=True, **keywords)
    np.testing.assert_allclose(unshard(results[0], layout), expected[0], atol=1e-14)
    np.testing.assert_allclose(unshard(results[1], layout, axis=-1), expected[1], atol=1e-14)
    grads = fastattn.mpi.ulysses_attention_backward(COMM, *parts, *results, layout=layout, **keywords)
    wanted = fastattn.attention_backward(*arrays, *expected, **keywords)
    for actual, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(unshard(actual, layout), want, atol=1e-13)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("axes", ["(heads, seqlen, head_dim)", "(seqlen, head_dim)"])
def test_fewer_axes(axes, dtype):
    shape = (60, 8) if axes.startswith("(seqlen") else (4, 60, 8)
    arrays = [normal(make_rng(i), shape, dtype) for i in range(4)]
    parts = [shard(x, "zigzag") for x in arrays]
    results = fastattn.mpi.ring_attention(COMM, *parts[:3], causal=True, return_lse=True)
    grads = fastattn.mpi.ring_attention_backward(COMM, parts[3], *parts[:3], *results, causal=True)
    ulysses = fastattn.mpi.ring_attention(COMM, *parts[:3], causal=True)
    assert [x.shape for x in (results[0], *grads, ulysses)] == [parts[0].shape] * 5
    out = unshard(results[0], "zigzag").astype(F64)
    np.testing.assert_allclose(
        out, exact(*arrays[:3], causal=True), atol=1e-6 if dtype == F32 else 0.02, rtol=0 if dtype == F32 else 0.02
    )


@pytest.mark.parametrize("keywords", [{}, {"causal": True}, {"window": (9, 2)}], ids=str)
@pytest.mark.parametrize("empty", ["queries", "keys", "both"])
def test_contiguous_parts_of_any_length(empty, keywords):
    """A rank may be without queries or keys."""
    if COMM.size == 1:
        pytest.skip("one rank has all tokens")
    query, key, value = qkv(make_rng(), (1, 4, 2, 40, 60, 8), (F64, F64))
    ends = {name: [length * (rank + 1) ** 2 // COMM.size**2 for rank in range(COMM.size)]
            for name, length in (("queries", 40), ("keys", 60))}  # fmt: skip
    for name in ends:
        if empty in (name, "both"):
            ends[name][0] = 0
    cuts = {name: slice(each[COMM.rank - 1] if COMM.rank else 0, each[COMM.rank]) for name, each in ends.items()}
    parts = query[:, :, cuts["queries"]], key[:, :, cuts["keys"]], value[:, :, cuts["keys"]]
    results = fastattn.mpi.ring_attention(COMM, *parts, layout="contiguous", return_lse=True, **keywords)
    expected = fastattn.attention(query, key, value, return_lse=True, **keywords)
    np.testing.assert_allclose(unshard(results[0], "contiguous"), expected[0], atol=1e-14)
    grads = fastattn.mpi.ring_attention_backward(COMM, results[0], *parts, *results, layout="contiguous", **keywords)
    wanted = fastattn.attention_backward(expected[0], query, key, value, *expected, **keywords)
    for actual, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(unshard(actual, "contiguous"), want, atol=1e-13)


@pytest.mark.parametrize("strides", ["swapped", "reversed", "broadcast", "every other"])
def test_buffers_that_are_not_contiguous(strides):
    def spread(x):
        if strides == "swapped":
            return np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2)
        if strides == "reversed":
            return np.ascontiguousarray(x[..., ::-1])[..., ::-1]
        if strides == "broadcast":
            return np.broadcast_to(x[:1], x.shape)
        return np.repeat(x, 2, axis=-1)[..., ::2]

    arrays = [normal(make_rng(i), (2, 4, 30, 8), F32) for i in range(3)]
    if strides == "broadcast":
        arrays = [np.ascontiguousarray(spread(x)) for x in arrays]
    parts = [spread(shard(x, "striped")) for x in arrays]
    out = fastattn.mpi.ring_attention(COMM, *parts, layout="striped", causal=True)
    np.testing.assert_allclose(unshard(out, "striped"), fastattn.attention(*arrays, causal=True), atol=1e-6)


@pytest.mark.parametrize("how", [{}, {"cu_seqlens": BOUNDS}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_is_on_one_rank(layout, how):
    where = COMM.allgather(fastattn.mpi.positions(COMM, 33, layout=layout, **how))
    assert sorted(np.concatenate(where).tolist()) == list(range(33))
    x = normal(make_rng(), (33, 3), BF16)
    np.testing.assert_array_equal(unshard(shard(x, layout, 0, **how), layout, 0, **how), x)


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_ranks_have_as_much_work_when_causal(layout):
    """Visible scores of the slowest rank over the mean; contiguous parts have 1.75 on four ranks."""
    where = fastattn.mpi.positions(COMM, 4096, layout=layout)
    counts = COMM.allgather(int((where + 1).sum()))
    assert max(counts) / np.mean(counts) < 1.01


# --- the keys are on their way while others are attended ------------------------------------------


class Recorded(MPI.Intracomm):
    """Says in a list what is posted, and marks the end of what is to be received until it has come."""

    log: ClassVar[list] = []
    awaited: ClassVar[list] = []
    sizes: ClassVar[list] = []

    def Isend(self, buffer, *where):
        self.log.append("send")
        self.sizes.append(buffer[0].nbytes)
        return super().Isend(buffer, *where)

    def Irecv(self, buffer, *where):
        self.log.append("receive")
        buffer[0][-8:] = 0xAB
        self.awaited.append(buffer[0])
        return super().Irecv(buffer, *where)


@pytest.fixture
def recorded():
    for each in (Recorded.log, Recorded.awaited, Recorded.sizes):
        each.clear()
    return Recorded(COMM.Dup())


def test_messages_are_posted_before_what_they_bring_is_needed(recorded, monkeypatch):
    original = fastattn.attention

    def attention(*arrays, **keywords):
        Recorded.log.append("attend")
        return original(*arrays, **keywords)

    monkeypatch.setattr(fastattn, "attention", attention)
    query, key, value = (shard(x, "striped") for x in qkv(make_rng(), (1, 2, 2, 40, 40, 8)))
    fastattn.mpi.ring_attention(recorded, query, key, value, layout="striped")
    steps = ["receive", "receive", "send", "send", "attend"] * (COMM.size - 1)
    assert Recorded.log == [*steps, "attend"]


def test_the_next_keys_arrive_while_others_are_attended(recorded, monkeypatch):
    """Here attending ends when they have come, which would be never if only waiting for them moved them."""
    if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        pytest.skip("this MPI may be called by one thread only")
    original = fastattn.attention

    def attention(*arrays, **keywords):
        deadline = time.monotonic() + 120  # a hang is to fail, too
        while any((buffer[-8:] == 0xAB).all() for buffer in Recorded.awaited):
            assert time.monotonic() < deadline, "the next keys have not come"
            time.sleep(0.001)
        return original(*arrays, **keywords)

    monkeypatch.setattr(fastattn, "attention", attention)
    query, key, value = (shard(x, "striped") for x in qkv(make_rng(), (1, 4, 4, 40, 20000, 64)))
    out = fastattn.mpi.ring_attention(recorded, query, key, value, layout="striped")
    assert out.shape == query.shape


# --- what does not fit ----------------------------------------------------------------------------

X = np.ones((2, 4, 10, 8), F32)
LAST = COMM.size - 1


def refused(words, call):
    """All ranks raise."""
    try:
        call()
    except (ValueError, TypeError, fastattn.mpi.RankError) as failure:
        texts = COMM.allgather(str(failure))
    else:
        texts = COMM.allgather("nothing raised")
    assert all(any(word in text for word in words) for text in texts), texts


@pytest.mark.parametrize(
    ("on_last", "words"),
    [
        ({"layout": "striped"}, ["layout must be the same on all ranks, but is contiguous on rank 0 and striped on"]),
        ({"key": X[:, :2], "value": X[:, :2]}, ["key's shape but for the tokens must be the same on all ranks"]),
        ({"query": X[..., :4]}, ["query and key must have the same head_dim"]),
        (
            {"value": X.astype(BF16), "key": X.astype(BF16)},
            ["key's dtype must be the same on all ranks", "key and value in the query's dtype", "dtype"],
        ),
        ({"causal": True}, ["causal must be the same on all ranks, but is False on rank 0 and True on rank"]),
        ({"value": X[:, :, :3]}, ["key and value must have the same"]),
        ({"query": X.astype(int)}, ["query has dtype int64"]),
        ({"query": np.ma.masked_array(X)}, ["query is a masked array"]),
        ({"layout": "diagonal"}, ["layout must be one of zigzag, striped, contiguous, but is 'diagonal'"]),
        ({"mask": np.ones((7, 3), bool)}, ["what is given must be the same on all ranks"]),
        ({"bias": np.ma.masked_array(np.ones(10))}, ["bias is a masked array"]),
        ({"is_causal": True}, ["unexpected keyword argument 'is_causal': here it is causal="]),
    ],
    ids=str,
)
def test_what_differs_on_one_rank(on_last, words):
    if COMM.size == 1 and "must be the same" in words[0]:
        pytest.skip("there is one rank")
    call = {"query": X, "key": X, "value": X, "layout": "contiguous", "causal": False}
    call |= on_last if COMM.rank == LAST else {}
    refused(words, lambda: fastattn.mpi.ring_attention(COMM, **call))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"alibi_slopes": np.ones(4), "layout": "striped"}, "alibi_slopes cannot be given with layout='striped'"),
        ({"layout": "striped", "query": X[:, :, : 3 + 2 * COMM.rank]}, "query holds"),
        ({"is_causal": True}, "here it is causal="),
        ({"key_lengths": [3, 4]}, "key_lengths"),
        ({"mask": np.ones((7, 3), bool), "layout": "contiguous"}, "mask has shape (7, 3)"),
        ({"query_offset": 1.5}, "query_offset must be an int"),
        ({"window": 5}, "window must be"),
        ({"softcap": -1.0}, "softcap must be"),
        ({"sinks": [0.0, 0.0, np.inf, 0.0]}, "sinks holds +inf, for head 2"),
        ({"alibi_slopes": np.ones(3)}, "alibi_slopes has shape (3,)"),
        ({"cu_seqlens": [0, 10]}, "query has shape (2, 4, 10, 8); accepted is (tokens, heads, head_dim)"),
        ({"cu_seqlens": [3, 2]}, "cu_seqlens must begin with 0 and never fall"),
    ],
    ids=str,
)
def test_bad_input(keywords, words):
    if COMM.size == 1 and "layout" in keywords and "mask" not in keywords:
        pytest.skip("one rank has all tokens")
    call = {"query": X, "key": X, "value": X} | keywords
    refused([words], lambda: fastattn.mpi.ring_attention(COMM, **call))


@pytest.mark.parametrize("comm", [None, 0, MPI.COMM_NULL], ids=["None", "0", "COMM_NULL"])
@pytest.mark.parametrize("name", ["ring_attention", "positions", "shard", "unshard"])
def test_what_is_no_communicator(comm, name):
    given = {"ring_attention": (X, X, X), "positions": (10,), "shard": (X,), "unshard": (X,)}[name]
    with pytest.raises(TypeError, match=r"comm must be an mpi4py.MPI.Intracomm, such as MPI.COMM_WORLD, not"):
        getattr(fastattn.mpi, name)(comm, *given)


@pytest.mark.parametrize(
    ("array", "axis", "words"),
    [
        (X, 4, "axis must be an axis of {}, which has shape (2, 4, 10, 8), but is 4; accepted is from -4 to 3"),
        (X, -5, "axis must be an axis of {}, which has shape (2, 4, 10, 8), but is -5; accepted is from -4 to 3"),
        (X[0, 0, 0], -2, "axis must be an axis of {}, which has shape (8,), but is -2; accepted is from -1 to 0"),
        (np.float32(1), -2, "axis must be an axis of {}, which has shape (), but is -2; accepted is none"),
        (X, 1.0, "axis must be an int, not 1.0"),
        (X, None, "axis must be an int, not None"),
        (X, True, "axis must be an int, not True"),
    ],
)
@pytest.mark.parametrize(("name", "argument"), [("shard", "x"), ("unshard", "part")])
def test_what_is_no_axis(name, argument, array, axis, words):
    refused([words.format(argument)], lambda: getattr(fastattn.mpi, name)(COMM, array, axis=axis))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("way", ["ring", "ulysses"])
def test_gradients_of_results_that_are_not_rounded(way, dtype):
    if way == "ulysses" and HEADS % COMM.size:
        pytest.skip("the ranks cannot share the heads")
    query, key, value, grad_out = make_rng().standard_normal((4, HEADS, 40, 8), F32).astype(dtype)
    results = fastattn.attention(query, key, value, unrounded=True, return_lse=True)
    assert results[0].dtype == F32
    expected = fastattn.attention_backward(grad_out, query, key, value, *results)
    *own, lse = (shard(x, "zigzag", axis) for x, axis in [(grad_out, -2), (query, -2), (key, -2), (value, -2),
                                                          (results[0], -2), (results[1], -1)])  # fmt: skip
    for mine, want in zip(BACKWARD[way](COMM, *own, lse, layout="zigzag"), expected, strict=True):
        np.testing.assert_allclose(unshard(mine, "zigzag").astype(F64), want.astype(F64), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("sink", [1e300, -np.inf, np.nan])
def test_sinks_that_float32_does_not_hold(sink):
    x, sinks = make_rng().standard_normal((2, 30, 8), F32), np.array([0.5, sink])
    expected = fastattn.attention(x, x, x, sinks=sinks)
    part = shard(x, "zigzag")
    mine = fastattn.mpi.ring_attention(COMM, part, part, part, sinks=sinks)
    np.testing.assert_allclose(unshard(mine, "zigzag"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["out", "grad_out", "lse", "grad_lse"])
@pytest.mark.parametrize("tokens", [9, 11])
def test_results_of_other_tokens(name, tokens):
    call = {"grad_out": X, "query": X, "key": X, "value": X, "out": X, "lse": X[..., 0], "grad_lse": X[..., 0]}
    axes = [*X.shape[:2], tokens, *X.shape[3:]][: call[name].ndim]
    call[name] = np.ones(axes, F32)
    words = [f"{name} has {tokens} tokens, but query 10"]
    refused(words, lambda: fastattn.mpi.ring_attention_backward(COMM, **call, layout="contiguous"))


BACKWARD = {"ring": fastattn.mpi.ring_attention_backward, "ulysses": fastattn.mpi.ulysses_attention_backward}
RESULTS = {"grad_out": X, "query": X, "key": X, "value": X, "out": X, "lse": X[..., 0], "grad_lse": X[..., 0]}


@pytest.mark.parametrize("way", BACKWARD)
@pytest.mark.parametrize("name", ["out", "grad_out", "lse", "grad_lse"])
def test_results_of_other_heads(way, name):
    call = RESULTS | {name: np.concatenate([RESULTS[name]] * 2, axis=1)}
    refused([f"{name} has shape"], lambda: BACKWARD[way](COMM, **call))


@pytest.mark.parametrize("way", BACKWARD)
@pytest.mark.parametrize("name", ["out", "grad_out", "lse", "grad_lse"])
def test_results_of_another_dtype_on_one_rank(way, name):
    if COMM.size == 1:
        pytest.skip("one rank has all")
    call = RESULTS | {name: RESULTS[name].astype(F64 if COMM.rank == 0 else F32)}
    refused([f"{name}'s dtype must be the same on all ranks", f"{name} has dtype"], lambda: BACKWARD[way](COMM, **call))


def test_sinks_gradient_that_one_rank_alone_asks_for():
    if COMM.size == 1:
        pytest.skip("one rank has all")
    asked = {"return_grad_sinks": COMM.rank == 0, "sinks": np.zeros(X.shape[1])}
    refused(["return_grad_sinks must be the same on all ranks"], lambda: BACKWARD["ring"](COMM, **RESULTS, **asked))


def test_heads_that_the_ranks_cannot_share():
    query, key = np.ones((2, 3, 10, 8), F32), np.ones((2, 3, 10, 8), F32)
    if COMM.size == 1:
        pytest.skip("one rank has all heads")
    with pytest.raises(ValueError, match=f"query has 3 heads and key 3, which {COMM.size} ranks cannot share"):
        fastattn.mpi.ulysses_attention(COMM, query, key, key)


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_rank_that_fails_in_the_middle(kind, direction, monkeypatch):
    """It has no memory, say: the others hear of it, and none waits for it."""
    if kind == "ulysses" and HEADS % COMM.size:
        pytest.skip("the ranks cannot share the heads")
    parts = [shard(x, "zigzag") for x in qkv(make_rng(), (1, 4, 4, 40, 40, 8))]
    attend, differentiate = (getattr(fastattn.mpi, f"{kind}_attention{name}") for name in ("", "_backward"))
    results = attend(COMM, *parts, layout="zigzag", return_lse=True)

    def fails(*arrays, **keywords):
        raise MemoryError("no memory for the scratch of a thread")

    if COMM.rank == LAST:
        monkeypatch.setattr(fastattn, "attention" if direction == "forward" else "attention_backward", fails)
    call = (
        (lambda: attend(COMM, *parts, layout="zigzag"))
        if direction == "forward"
        else lambda: differentiate(COMM, parts[0], *parts, *results, layout="zigzag")
    )
    with pytest.raises(MemoryError if COMM.rank == LAST else fastattn.mpi.RankError, match="no memory") as caught:
        call()
    if COMM.rank != LAST:
        assert str(caught.value).startswith(f"rank {LAST} failed: MemoryError")
    monkeypatch.undo()
    again = attend(COMM, *parts, layout="zigzag")  # and the next call is as if nothing had been
    np.testing.assert_array_equal(again, results[0])


# --- the model of scale ---------------------------------------------------------------------------

MODEL = Path(os.environ.get("FASTATTN_SOURCE", Path(__file__).parent.parent)) / "bench" / "model_scale.py"


@pytest.mark.skipif(not MODEL.exists(), reason="bench/ is not beside the tests")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_ring_sends_as_many_bytes_as_the_model_says(recorded, backward, dtype):
    model = runpy.run_path(str(MODEL))
    tokens = 48 * COMM.size
    query, key, value = qkv(make_rng(), (1, HEADS, KV_HEADS, 48, 48, HEAD_DIM), (dtype, dtype))
    how = {"layout": "striped", "causal": True}
    results = fastattn.mpi.ring_attention(COMM, query, key, value, return_lse=True, **how)
    if backward:
        fastattn.mpi.ring_attention_backward(recorded, query, query, key, value, *results, **how)
    else:
        fastattn.mpi.ring_attention(recorded, query, key, value, **how)
    work = model["Work"](tokens, 1, HEADS, KV_HEADS, HEAD_DIM, dtype.itemsize, True, backward)
    assert sum(Recorded.sizes) == model["ring_bytes"](work, COMM.size)
