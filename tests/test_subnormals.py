"""Subnormal numbers: taken for 0 in float32 and bfloat16, kept in float64 and float16, and nobody else is affected."""

import signal
import threading

import ml_dtypes
import numpy as np
import pytest
from oracle import BF16, F16, F32, F64, make_rng, qkv

import fastattn
from fastattn import KVCache

pytestmark = pytest.mark.isa
SMALLEST_NORMAL = 2.0**-126

# Shapes of a wide tile, of a narrow one and of a single row.
SHAPES = [(1, 2, 2, 70, 130, 32), (1, 4, 2, 2, 130, 32), (1, 1, 1, 1, 130, 32)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def subnormals_work():
    return np.float32(2.0**-140) * np.float32(0.5) > 0 and np.float64(2.0**-1070) / 2 > 0


def peaky(shape, dtype, factor):
    """Arrays whose weights fall from 1 to below the smallest number."""
    query, key, value = qkv(make_rng(*shape), shape, (dtype, dtype))
    return query, (key.astype(F64) * factor).astype(dtype), value


@each_shape
@pytest.mark.parametrize("dtype", [F64, F16], ids=lambda dtype: dtype.name)
def test_subnormal_values_are_kept(dtype, shape):
    smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal) * 8
    batch, heads, kv_heads, seqlen_q, seqlen_k, dim = shape
    value = np.full((batch, kv_heads, seqlen_k, dim), smallest, dtype)
    query = np.zeros((batch, heads, seqlen_q, dim), dtype)
    out = fastattn.attention(query, np.zeros_like(value), value)
    np.testing.assert_array_equal(out, np.full_like(out, smallest))


@each_shape
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16)], ids=str)
def test_subnormal_values_are_0(dtypes, shape):
    batch, heads, kv_heads, seqlen_q, seqlen_k, dim = shape
    value = np.full((batch, kv_heads, seqlen_k, dim), 2.0**-130, dtypes[1])
    assert (value > 0).all()
    query = np.zeros((batch, heads, seqlen_q, dim), dtypes[0])
    out = fastattn.attention(query, np.zeros_like(value), value)
    np.testing.assert_array_equal(out, np.zeros_like(out))


@each_shape
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=lambda dtype: dtype.name)
def test_no_weight_is_subnormal_in_float32(dtype, shape):
    query, key, value = peaky(shape, dtype, 30)
    _, weights = fastattn.attention(query.astype(F32), key.astype(F32), value.astype(F32), return_weights=True)
    assert ((weights > 0) & (weights < 2.0**-100)).any(), "the case is not one of small weights"
    assert not ((weights > 0) & (weights < SMALLEST_NORMAL)).any()


@each_shape
def test_no_weight_is_near_the_subnormal_numbers_of_float64(shape):
    query, key, value = peaky(shape, F64, 400)
    _, weights = fastattn.attention(query, key, value, return_weights=True)
    _, expected = fastattn.reference.attention(query, key, value, return_weights=True)
    assert ((expected > 0) & (expected < 2.0**-980)).any(), "the case is not one of small weights"
    assert not ((weights > 0) & (weights < 2.0**-975)).any()


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64], ids=lambda dtype: dtype.name)
def test_the_calling_thread_keeps_its_own_mode(dtype, num_threads):
    query, key, value = qkv(make_rng(), (2, 4, 4, 300, 300, 64), (dtype, dtype))
    fastattn.attention(query, key, value, num_threads=num_threads)
    assert subnormals_work()
    fastattn.top_keys(query, key, num_threads=num_threads)
    assert subnormals_work()


def test_a_cache_leaves_the_mode_alone():
    cache = KVCache(2, 64, num_pages=2)
    _, key, value = qkv(make_rng(), (1, 2, 2, 1, 100, 64), (F32, F32))
    sequence = cache.add(key[0], value[0])
    cache.attention(np.ones((1, 2, 1, 64), F32), [sequence])
    assert subnormals_work()


def test_a_signal_handler_within_a_call_finds_its_own_mode():
    """And so does who comes after an exception that ends the call."""
    seen = []

    class Stop(Exception):
        pass

    def handler(signum, frame):
        seen.append(subnormals_work())
        if len(seen) == 2:
            raise Stop

    query, key, value = qkv(make_rng(), (1, 8, 8, 2048, 2048, 64), (F32, F32))

    def call_until_stopped():
        while True:
            fastattn.attention(query, key, value, num_threads=1)

    previous = signal.signal(signal.SIGUSR1, handler)
    stop = threading.Event()

    def send():
        while not stop.wait(0.02):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(Stop):
            call_until_stopped()
    finally:
        stop.set()
        sender.join()
        signal.signal(signal.SIGUSR1, previous)
    assert len(seen) >= 2
    assert all(seen)
    assert subnormals_work()
