"""Any number of threads, any company in the batch: the same bits. And the pool lives well with Python's own ways."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from oracle import (
    DTYPE_IDS,
    DTYPES,
    F32,
    F64,
    HANG_SECONDS,
    assert_close,
    assert_same_bits,
    exact,
    make_rng,
    normal,
    qkv,
    run_script,
    tolerances,
)
from strategies import backward_cases, cases

import fastattn
from fastattn import _core

each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")

# Tiles of queries, rows of groups, one long row split along its keys.
SHAPES = [(2, 4, 4, 130, 200, 32), (3, 8, 2, 5, 700, 64), (2, 4, 1, 1, 5000, 64)]


def call(query, key, value, **keywords):
    return fastattn.attention(query, key, value, **keywords, return_lse=True, return_weights=True)


def assert_same_results(actual, expected):
    for a, e, what in zip(actual, expected, ("out", "lse", "weights"), strict=True):
        assert_same_bits(a, e, what)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keywords", [{}, {"causal": True, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("num_threads", [2, 3, 5, 16])
def test_same_bits_for_any_number_of_threads(dtypes, shape, keywords, num_threads):
    arrays = qkv(make_rng(*shape), shape, dtypes)
    one = call(*arrays, num_threads=1, **keywords)
    plain = fastattn.attention(*arrays, num_threads=1, **keywords)
    assert_same_results(call(*arrays, num_threads=num_threads, **keywords), one)
    assert_same_bits(fastattn.attention(*arrays, num_threads=num_threads, **keywords), plain)


@settings(max_examples=80)
@given(case=cases())
def test_same_bits_for_any_number_of_threads_in_any_call(case):
    case.keywords.pop("num_threads", None)
    one, three = (call(case.query, case.key, case.value, **case.keywords, num_threads=n) for n in (1, 3))
    assert_same_results(three, one)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_alone_and_in_a_batch(dtypes, shape):
    query, key, value = qkv(make_rng(*shape), shape, dtypes)
    lengths = np.array([shape[4] - 7 * b for b in range(shape[0])])
    together = call(query, key, value, causal=True, key_lengths=lengths)
    for b in range(shape[0]):
        alone = call(query[b], key[b], value[b], causal=True, key_lengths=lengths[b])
        assert_same_results(alone, [x[b] for x in together])


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_for_a_head_alone(dtypes, shape):
    query, key, value = qkv(make_rng(*shape), shape, dtypes)
    group = shape[1] // shape[2]
    together = call(query, key, value)
    for kv_head in range(shape[2]):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        alone = call(query[:, heads], key[:, kv_head : kv_head + 1], value[:, kv_head : kv_head + 1])
        assert_same_results(alone, [x[:, heads] for x in together])


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_whatever_lies_past_key_lengths(dtypes, shape):
    """key_lengths is the same as slicing, and as other keys past the length."""
    query, key, value = qkv(make_rng(*shape), shape, dtypes)
    for length in (1, shape[4] // 3, shape[4] - 1):
        by_length = call(query, key, value, causal=True, key_lengths=length)
        sliced = call(query, key[:, :, :length], value[:, :, :length], causal=True)
        assert_same_bits(by_length[0], sliced[0])
        assert_same_bits(by_length[1], sliced[1], "lse")
        assert_same_bits(np.ascontiguousarray(by_length[2][..., :length]), sliced[2], "weights")
        other = [np.concatenate([x[:, :, :length], x[:, :, length:][:, :, ::-1]], axis=2) for x in (key, value)]
        assert_same_results(call(query, *other, causal=True, key_lengths=length), by_length)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("position", [0, 1, 63, 64, 130, 298])
def test_same_bits_for_a_causal_row_and_its_own_slice(dtypes, position):
    """A row that sees keys up to its position gives what it gives when the later keys are not there."""
    query, key, value = qkv(make_rng(), (1, 4, 2, 1, 300, 32), dtypes)
    causal = fastattn.attention(query, key, value, causal=True, query_offset=position)
    sliced = fastattn.attention(query, key[:, :, : position + 1], value[:, :, : position + 1])
    assert_same_bits(causal, sliced)


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize(
    "keywords", [{}, {"causal": True}, {"window": (40, 3)}, {"window": (90, 0), "softcap": 4.0}], ids=str
)
@pytest.mark.parametrize(("begin", "end"), [(0, 150), (30, 130), (77, 200), (101, 160)])
def test_same_bits_for_some_of_the_rows(dtypes, keywords, begin, end):
    """Rows in other company lie in other tiles, which begin at other keys."""
    query, key, value = qkv(make_rng(), (1, 4, 2, 200, 200, 32), dtypes)
    together = call(query, key, value, query_offset=0, **keywords)
    some = call(query[:, :, begin:end], key, value, query_offset=begin, **keywords)
    assert_same_results(some, [x[:, :, begin:end] for x in together])


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("kind", ["bias", "alibi", "softcap", "softcap and bias", "mask"])
@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize(("begin", "end"), [(0, 150), (30, 130), (101, 160)])
def test_same_bits_whatever_modifies_other_rows(dtypes, kind, causal, begin, end):
    """Which modifiers meet a tile depends on all of its rows; head_dim 32, whose scale is no power of two."""
    rng = make_rng()
    query, key, value = qkv(rng, (1, 2, 2, 200, 200, 32), dtypes)
    bias, seen = rng.standard_normal((200, 200), np.float32), rng.random((200, 200)) < 0.9
    keywords = {
        "bias": {"bias": bias},
        "alibi": {"alibi_slopes": np.array([0.1, 0.3])},
        "softcap": {"softcap": 3.0},
        "softcap and bias": {"softcap": 3.0, "bias": bias},
        "mask": {"mask": seen},
    }[kind]
    own_mask = keywords.get("mask", np.ones((200, 200), bool))
    hides = own_mask.copy()
    hides[:40, ::3] = False  # of the first rows only
    alike = call(query, key, value, causal=causal, **{**keywords, "mask": own_mask})
    other = call(query, key, value, causal=causal, **{**keywords, "mask": hides})
    assert_same_results([x[:, :, 40:] for x in other], [x[:, :, 40:] for x in alike])
    part = {name: x[begin:end] if name in ("bias", "mask") else x for name, x in keywords.items()}
    together = call(query, key, value, query_offset=0, causal=causal, **keywords)
    some = call(query[:, :, begin:end], key, value, query_offset=begin, causal=causal, **part)
    assert_same_results(some, [x[:, :, begin:end] for x in together])


@pytest.mark.isa
@each_dtype
@pytest.mark.parametrize("keywords", [{"alibi_slopes": np.full(8, 0.1)}, {"softcap": 2.0}], ids=["alibi", "softcap"])
@pytest.mark.parametrize("num_threads", [2, 3, 4])
def test_same_bits_for_any_number_of_threads_of_long_rows(dtypes, keywords, num_threads):
    """More threads cut the rows in other tiles."""
    arrays = qkv(make_rng(), (1, 8, 8, 1040, 200, 32), dtypes)
    one = fastattn.attention(*arrays, causal=True, query_offset=0, num_threads=1, **keywords)
    more = fastattn.attention(*arrays, causal=True, query_offset=0, num_threads=num_threads, **keywords)
    assert_same_bits(more, one)


# --- gradients

# A group whose rows are split, and more groups than threads; rows of a group; fewer rows than lanes.
BACKWARD_SHAPES = [(1, 2, 2, 2100, 70, 32), (3, 8, 2, 40, 300, 64), (1, 4, 1, 600, 130, 16), (2, 4, 1, 3, 900, 64)]
BACKWARD_KEYWORDS = {
    "plain": {},
    "causal, softcap": {"causal": True, "softcap": 5.0},
    "dropout": {"dropout": 0.3, "seed": 7, "window": (90, 5)},
}
each_backward_shape = pytest.mark.parametrize("shape", BACKWARD_SHAPES, ids=str)
each_backward_keywords = pytest.mark.parametrize("keywords", BACKWARD_KEYWORDS.values(), ids=BACKWARD_KEYWORDS)


def with_cotangents(rng, query, key, value):
    """Return the arrays, after random gradients of their result and of its lse."""
    rows = (*np.broadcast_shapes(query.shape[:-3], key.shape[:-3]), *query.shape[-3:-1])
    grad_out = normal(rng, (*rows, value.shape[-1]), query.dtype)
    return grad_out, normal(rng, rows, F64 if query.dtype == F64 else F32), query, key, value


def call_backward(grad_out, grad_lse, query, key, value, **keywords):
    """Return the gradients, all that can be asked for."""
    asked = {f"return_grad_{name}": True for name in ("bias", "sinks") if keywords.get(name) is not None}
    out, lse = fastattn.attention(query, key, value, **keywords, return_lse=True)
    return fastattn.attention_backward(grad_out, query, key, value, out, lse, grad_lse=grad_lse, **keywords, **asked)


def assert_same_gradients(actual, expected):
    for a, e, what in zip(actual, expected, ("query", "key", "value", "bias", "sinks"), strict=False):
        assert_same_bits(a, e, f"grad_{what}")


def score_arrays(rng, shape):
    """A bias that is summed over the batch, and one more logit a head."""
    return {"bias": normal(rng, (shape[1], 1, shape[4]), F32), "sinks": normal(rng, shape[1], F32)}


@pytest.mark.isa
@each_dtype
@each_backward_shape
@each_backward_keywords
@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_same_gradients_for_any_number_of_threads(dtypes, shape, keywords, num_threads):
    rng = make_rng(*shape)
    arrays = with_cotangents(rng, *qkv(rng, shape, dtypes))
    keywords = {**keywords, **score_arrays(rng, shape)}
    one = call_backward(*arrays, **keywords, num_threads=1)
    assert_same_gradients(call_backward(*arrays, **keywords, num_threads=num_threads), one)


@settings(max_examples=80)
@given(case=backward_cases())
def test_same_gradients_for_any_number_of_threads_in_any_call(case):
    case, grad_out, grad_lse = case
    case.keywords.pop("num_threads", None)
    arrays = grad_out, grad_lse, case.query, case.key, case.value
    one, three = (call_backward(*arrays, **case.keywords, num_threads=n) for n in (1, 3))
    assert_same_gradients(three, one)


@each_dtype
def test_rows_of_some_shapes_are_split(dtypes):
    """Or the tests of sums over splits would say nothing."""
    plans = [fastattn.plan(*qkv(make_rng(), s, dtypes), num_threads=3, backward=True) for s in BACKWARD_SHAPES]
    assert [plan.splits > 1 for plan in plans] == [True, False, True, False]
    assert [plan.shared_bytes > 0 for plan in plans] == [True, False, True, False]


@pytest.mark.isa
@each_dtype
@each_backward_shape
@pytest.mark.parametrize("keywords", [{}, {"causal": True, "softcap": 5.0}], ids=str)
def test_same_gradients_alone_and_in_a_batch(dtypes, shape, keywords):
    """Whatever the others hold, be it NaN."""
    rng = make_rng(*shape)
    arrays = with_cotangents(rng, *qkv(rng, (3, *shape[1:]), dtypes))
    for x in arrays:
        x[1] = np.nan
    lengths = np.array([shape[4] - 7 * b for b in range(3)])
    together = call_backward(*arrays, key_lengths=lengths, **keywords)
    for b in (0, 2):
        alone = call_backward(*(x[b] for x in arrays), key_lengths=lengths[b], **keywords)
        assert_same_gradients(alone, [x[b] for x in together])


@pytest.mark.isa
@each_dtype
@each_backward_shape
def test_same_gradients_for_heads_in_calls_of_their_own(dtypes, shape):
    rng = make_rng(*shape)
    arrays = with_cotangents(rng, *qkv(rng, shape, dtypes))
    grad_out, grad_lse, query, key, value = arrays
    group = shape[1] // shape[2]
    together = call_backward(*arrays)
    for kv_head in range(shape[2]):
        heads, own = slice(kv_head * group, (kv_head + 1) * group), slice(kv_head, kv_head + 1)
        alone = call_backward(grad_out[:, heads], grad_lse[:, heads], query[:, heads], key[:, own], value[:, own])
        assert_same_gradients(alone, [together[0][:, heads], together[1][:, own], together[2][:, own]])


@pytest.mark.isa
@each_dtype
@each_backward_shape
@pytest.mark.parametrize("share", [3, 1])
def test_same_gradients_whatever_lies_past_key_lengths(dtypes, shape, share):
    """key_lengths is the same as slicing, and keys past it have gradients of 0."""
    rng = make_rng(*shape)
    length = shape[4] // share - 1
    *of_results, query, key, value = with_cotangents(rng, *qkv(rng, shape, dtypes))
    by_length = call_backward(*of_results, query, key, value, causal=True, key_lengths=length)
    sliced = call_backward(*of_results, query, key[:, :, :length], value[:, :, :length], causal=True)
    assert_same_gradients([by_length[0], *(np.ascontiguousarray(x[:, :, :length]) for x in by_length[1:])], sliced)
    for grad in by_length[1:]:
        assert (grad[:, :, length:] == 0).all()


@each_dtype
def test_gradients_in_several_python_threads(dtypes):
    jobs = [with_cotangents(make_rng(i), *qkv(make_rng(i), s, dtypes)) for i, s in enumerate(BACKWARD_SHAPES * 2)]
    expected = [call_backward(*job, causal=True) for job in jobs]
    with ThreadPoolExecutor(4) as executor:
        results = list(executor.map(lambda job: call_backward(*job, causal=True, num_threads=2), jobs))
    for result, e in zip(results, expected, strict=True):
        assert_same_gradients(result, e)


# --- Python


@each_dtype
def test_several_python_threads(dtypes):
    jobs = [qkv(make_rng(i), shape, dtypes) for i, shape in enumerate(SHAPES * 4)]
    expected = [fastattn.attention(*job, causal=True) for job in jobs]
    with ThreadPoolExecutor(6) as executor:
        for _ in range(3):
            results = list(executor.map(lambda job: fastattn.attention(*job, causal=True, num_threads=2), jobs))
            for result, e in zip(results, expected, strict=True):
                assert_same_bits(result, e)


def long_call():
    """Return arguments that keep one thread busy for about half a second or more."""
    return tuple(np.broadcast_to(x, (1, 4, 6144, 64)) for x in qkv(make_rng(), (1, 4, 4, 1, 1, 64)))


def test_gil_is_released():
    arrays = long_call()
    fastattn.attention(*arrays, num_threads=1)  # first touch of memory
    stamps, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.002)

    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.perf_counter()
    fastattn.attention(*arrays, num_threads=1)
    end = time.perf_counter()
    stop.set()
    ticker.join()
    during = sum(begin < stamp < end for stamp in stamps)
    # With the GIL held there would be none but the first and last.
    assert during > 2


INTERRUPTED = """
{before}
import signal
import numpy as np
import fastattn
from fastattn import reference
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
row = np.broadcast_to(np.ones((1, 1, 1, 64), np.float32), (1, 16, 32768, 64))
out = np.full(row.shape, np.nan, np.float32)
print("started", flush=True)
try:
    fastattn.attention(row, row, row, out=out, num_threads={threads})
except KeyboardInterrupt:
    print("interrupted", "midway" if np.isnan(out).any() else "at the end", flush=True)
x = np.random.default_rng(0).standard_normal((2, 2, 100, 64)).astype(np.float32)
error = abs(fastattn.attention(x, x, x, num_threads=2) - reference.attention(x, x, x)).max()
print("usable", error < 1e-5, flush=True)
"""

GEVENT = "from gevent import monkey; monkey.patch_all()"

# What comes before the first import of fastattn. Of them gevent gives threads idents of its own.
BEFORE_INTERRUPTED = {
    "plain": "",
    "gevent": GEVENT,
    "gevent, imported elsewhere": f"{GEVENT}\nimport gevent, importlib\n"
    "gevent.get_hub().threadpool.apply(importlib.import_module, ['fastattn'])",
    "imported elsewhere": "import threading, importlib\n"
    "t = threading.Thread(target=importlib.import_module, args=['fastattn'])\nt.start()\nt.join()",
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("before", BEFORE_INTERRUPTED)
def test_ctrl_c(before, threads):
    """16 heads of 32768 by 32768 take many seconds; Ctrl-C ends them midway."""
    if "gevent" in before:
        pytest.importorskip("gevent")
    script = INTERRUPTED.format(before=BEFORE_INTERRUPTED[before], threads=threads)
    child = subprocess.Popen([sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "started\n"
        time.sleep(0.7)
        child.send_signal(signal.SIGINT)
        printed, _ = child.communicate(timeout=HANG_SECONDS)
    finally:
        child.kill()
    assert printed == "interrupted midway\nusable True\n"


INTERRUPTED_BACKWARD = """
import os, signal, threading, time
import numpy as np
import fastattn
from fastattn import reference
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
row = np.broadcast_to(np.ones((1, 1, 64), np.float32), {shape})
lse = np.broadcast_to(np.float32(np.log({shape}[1]) + 8), {shape}[:2])
grads = tuple(np.full(row.shape, np.nan, np.float32) for _ in range(3))

def count_unwritten():
    return [np.isnan(grad[..., 0]).sum() for grad in grads]

def interrupt():
    \"\"\"Ctrl-C, when some gradients of queries are there, or while there are none yet.\"\"\"
    while {waits}:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

begin = time.monotonic()
threading.Thread(target=interrupt, daemon=True).start()
try:
    fastattn.attention_backward(row, row, row, row, row, lse, grads=grads, num_threads={threads}, {keywords})
except KeyboardInterrupt:
    unwritten, size = sum(count_unwritten()), sum(grad[..., 0].size for grad in grads)
    print("interrupted", "before that" if unwritten == size else "midway" if unwritten else "at the end", flush=True)
x = np.random.default_rng(0).standard_normal((2, 2, 100, 64)).astype(np.float32)
out, lse = fastattn.attention(x, x, x, return_lse=True)
results = (module.attention_backward(x, x, x, x, out, lse) for module in (fastattn, reference))
print("usable", all(abs(a - b).max() < 1e-4 for a, b in zip(*results)), flush=True)
"""
SOME = "count_unwritten()[0] == grads[0][..., 0].size"
NONE = "time.monotonic() < begin + 0.3"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("shape", "keywords", "waits", "when"),
    [
        pytest.param((16, 32768, 64), "causal=False", SOME, "midway", id="groups"),
        pytest.param((1, 65536, 64), "causal=False", SOME, "midway", id="splits of rows"),
        # It comes first.
        pytest.param(
            (4, 32768, 64), "bias=np.zeros(32768), return_grad_bias=True", NONE, "before that", id="gradient of a bias"
        ),
    ],
)
def test_ctrl_c_amid_gradients(threads, shape, keywords, waits, when):
    """What is left to do takes a second or many; Ctrl-C ends it midway."""
    printed = run_script(INTERRUPTED_BACKWARD.format(shape=shape, keywords=keywords, waits=waits, threads=threads))
    assert printed == f"interrupted {when}\nusable True\n"


def gradients_of(query, key, value, num_threads=None):
    """Gradients of queries, from results whose numbers are anybody's."""
    lse = np.full(query.shape[:-1], 10, F32)
    return fastattn.attention_backward(value, query, key, value, value, lse, num_threads=num_threads)[0]


@pytest.mark.parametrize("function", [fastattn.attention, gradients_of], ids=["forward", "backward"])
def test_python_signal_handler_runs_during_a_call(function):
    """A handler that returns lets the call go on to its right result."""
    arrays = long_call()
    expected = function(*arrays)
    ran = []
    previous = signal.signal(signal.SIGALRM, lambda *_: ran.append(time.perf_counter()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        begin = time.perf_counter()
        result = function(*arrays, num_threads=1)
        end = time.perf_counter()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert_same_bits(result, expected)
    assert any(begin < moment < end - 0.01 for moment in ran)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_works_with_threads():
    printed = run_script(
        """
import os, signal, warnings, numpy as np, fastattn
warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of any fork with threads
x = np.random.default_rng(0).standard_normal((4, 4, 300, 64)).astype(np.float32)
expected = fastattn.attention(x, x, x, num_threads=2)
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(3600)  # as oracle.HANG_SECONDS
        same = all(np.array_equal(fastattn.attention(x, x, x, num_threads=2), expected) for _ in range(20))
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if np.array_equal(fastattn.attention(x, x, x, num_threads=3), expected) else 1)
        same &= os.waitpid(grandchild, 0)[1] == 0
        os._exit(0 if same else 1)
    assert np.array_equal(fastattn.attention(x, x, x, num_threads=2), expected)
    assert os.waitpid(child, 0)[1] == 0
print("done")
"""
    )
    assert printed == "done\n"


@needs_proc
def test_child_of_fork_amid_other_threads_calls_has_a_pool():
    """Wherever they are, their first call too. A child that hangs is ended after two minutes."""
    run_script(
        """
import os, signal, threading, warnings
import numpy as np
import fastattn
from fastattn import _core
warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of any fork with threads
_core.assume_cpus(2)
x = np.random.default_rng(0).standard_normal((4, 4, 100, 64)).astype(np.float32)
expected = fastattn.attention(x, x, x, num_threads=1)
stop = threading.Event()
def call_often():
    while not stop.is_set():
        fastattn.attention(x, x, x, num_threads=2)
callers = [threading.Thread(target=call_often) for _ in range(2)]
for caller in callers:
    caller.start()
try:
    for _ in range(60):
        child = os.fork()
        if child == 0:
            signal.alarm(3600)  # as oracle.HANG_SECONDS
            same = all(np.array_equal(fastattn.attention(x, x, x, num_threads=2), expected) for _ in range(3))
            os._exit(0 if same and len(os.listdir("/proc/self/task")) == 2 else 1)
        assert os.waitpid(child, 0)[1] == 0
finally:
    stop.set()
""",
        OPENBLAS_NUM_THREADS="1",
    )


def test_idle_workers_do_not_keep_python_from_its_end():
    run_script(
        "import numpy as np, fastattn\n"
        "x = np.ones((4, 4, 300, 64), np.float32)\n"
        "fastattn.attention(x, x, x, num_threads=4)\n"
    )


def printed_num_threads(before="", **environment):
    return int(run_script(f"{before}\nimport fastattn; print(fastattn.get_num_threads())", **environment))


def test_number_of_threads_from_the_environment():
    assert printed_num_threads(FASTATTN_NUM_THREADS="3") == 3
    assert printed_num_threads(FASTATTN_NUM_THREADS="", OMP_NUM_THREADS="5") == 5
    assert printed_num_threads(FASTATTN_NUM_THREADS="3", OMP_NUM_THREADS="5") == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_number_of_threads_follows_the_affinity():
    one_cpu = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"
    assert printed_num_threads(one_cpu, FASTATTN_NUM_THREADS="", OMP_NUM_THREADS="") == 1
    cpus = len(os.sched_getaffinity(0))
    assert 1 <= printed_num_threads(FASTATTN_NUM_THREADS="", OMP_NUM_THREADS="") <= cpus


THREADS_OF = """
import os
import numpy as np
import fastattn
{before}
x = np.ones((4, 8, 256, 64), np.float32)
fastattn.attention(x, x, x, num_threads=64)
print(fastattn.plan(x, x, x, num_threads=64).threads, len(os.listdir("/proc/self/task")), fastattn.get_num_threads())
"""


@needs_proc
@pytest.mark.parametrize("before", ["", "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"], ids=["all", "one"])
def test_no_more_threads_run_than_there_are_cpus(before):
    """They would wait for each other. What was asked for stays what is told."""
    environment = {"FASTATTN_NUM_THREADS": "50", "OPENBLAS_NUM_THREADS": "1"}
    planned, threads, told = map(int, run_script(THREADS_OF.format(before=before), **environment).split())
    cpus = 1 if before else len(os.sched_getaffinity(0))
    assert planned == threads <= cpus
    assert told == 50


@needs_proc
def test_a_change_of_the_affinity_is_seen():
    """Within a tenth of a second; this waits a minute at most."""
    planned = run_script(
        """
import os, time
import numpy as np
import fastattn
x = np.ones((4, 8, 256, 64), np.float32)
def planned():
    return fastattn.plan(x, x, x, num_threads=64).threads
before = planned()
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
for _ in range(600):
    if planned() == 1:
        break
    time.sleep(0.1)
print(before, planned())
"""
    ).split()
    assert 1 <= int(planned[0]) <= len(os.sched_getaffinity(0))
    assert planned[1] == "1"


# /proc/self/cgroup, the mounts (root, mount point, type, options), the files of groups, and the CPUs granted.
V2 = ("/", "/sys/fs/cgroup", "cgroup2", "rw,nsdelegate")
V1 = ("/", "/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct")
QUOTAS = {
    "none": ("", [], {}, 0),
    "version 2": ("0::/a", [V2], {"sys/fs/cgroup/a/cpu.max": "200000 100000"}, 2),
    "version 2, rounded up": ("0::/a", [V2], {"sys/fs/cgroup/a/cpu.max": "210000 100000"}, 3),
    "version 2, less than one": ("0::/a", [V2], {"sys/fs/cgroup/a/cpu.max": "1000 100000"}, 1),
    "version 2, no limit": ("0::/a", [V2], {"sys/fs/cgroup/a/cpu.max": "max 100000"}, 0),
    "version 2, limit above": (
        "0::/a/b/c",
        [V2],
        {"sys/fs/cgroup/a/cpu.max": "300000 100000", "sys/fs/cgroup/a/b/c/cpu.max": "max 100000"},
        3,
    ),
    "version 2, least of all": (
        "0::/a/b/c",
        [V2],
        {
            "sys/fs/cgroup/a/cpu.max": "400000 100000",
            "sys/fs/cgroup/a/b/cpu.max": "100000 50000",
            "sys/fs/cgroup/a/b/c/cpu.max": "800000 100000",
        },
        2,
    ),
    "version 2, of other groups": (
        "0::/a/b",
        [V2],
        {"sys/fs/cgroup/a/c/cpu.max": "1 1", "sys/fs/cgroup/b/cpu.max": "1 1", "sys/fs/cgroup/a/b/c/cpu.max": "1 1"},
        0,
    ),
    "version 2, in a namespace": ("0::/", [V2], {"sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
    "version 2, out of its namespace": (
        "0::/../b",
        [V2],
        {"sys/fs/cgroup/cpu.max": "200000 100000", "sys/fs/b/cpu.max": "1 1"},
        2,
    ),
    "version 2, a part mounted": (
        "0::/docker/x/y",
        [("/docker/x", *V2[1:])],
        {"sys/fs/cgroup/cpu.max": "500000 100000", "sys/fs/cgroup/y/cpu.max": "300000 100000"},
        3,
    ),
    "version 2, a name that begins alike": (
        "0::/docker/xy",
        [("/docker/x", *V2[1:])],
        {"sys/fs/cgroup/y/cpu.max": "1 1", "sys/fs/cgroup/cpu.max": "500000 100000"},
        5,
    ),
    "version 2, mounted elsewhere": (
        "0::/a",
        [("/", "/my\\040cgroups", *V2[2:])],
        {"my cgroups/a/cpu.max": "200000 100000"},
        2,
    ),
    "version 1": (
        "5:cpuacct,cpu:/a/b",
        [V1],
        {
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "50000",
            "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000",
        },
        3,
    ),
    "version 1, another controller": (
        "5:cpuset,cpuacct:/a",
        [("/", "/c", "cgroup", "rw,cpuset,cpuacct")],
        {"c/a/cpu.cfs_quota_us": "100000", "c/a/cpu.cfs_period_us": "100000"},
        0,
    ),
    "both versions": (
        "5:cpu:/a\n0::/b",
        [V1, ("/", "/sys/fs/cgroup/unified", *V2[2:])],
        {
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "600000",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/unified/b/cpu.max": "500000 100000",
        },
        5,
    ),
    "escapes cut off": (
        "0::/a",
        [("/", "/c\\0", *V2[2:]), ("/", "/c\\", *V2[2:]), ("/", "/c\\9x", *V2[2:])],
        {"c\\9x/a/cpu.max": "200000 100000"},
        2,
    ),
    "nonsense": ("::\n:\n0::", [V2], {"sys/fs/cgroup/cpu.max": "many few"}, 0),
    "path too long": ("0::" + "/a" * 5000, [V2], {"sys/fs/cgroup/cpu.max": "300000 100000"}, 0),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_quota_of_control_groups(case, tmp_path):
    groups, mounts, files, cpus = QUOTAS[case]
    lines = [f"31 23 0:28 {top} {point} rw shared:9 - {kind} x {options}" for top, point, kind, options in mounts]
    files = {**files, "proc/self/cgroup": groups, "proc/self/mountinfo": "\n".join(["", *lines])}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert _core.quota_cpus(tmp_path) == cpus


def test_quota_where_there_is_no_proc(tmp_path):
    assert _core.quota_cpus(tmp_path) == 0


@pytest.fixture
def number_of_threads():
    """Set back, at the end, how many threads calls use."""
    before = fastattn.get_num_threads()
    yield before
    fastattn.set_num_threads(before)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.usefixtures("number_of_threads")
def test_set_num_threads(number):
    arrays = qkv(make_rng(), (4, 8, 8, 256, 256, 64))
    fastattn.set_num_threads(number)
    assert fastattn.get_num_threads() == number
    assert fastattn.plan(*arrays).threads <= number
    assert fastattn.plan(*arrays, num_threads=2).threads == 2, "the argument comes first"
    assert_close(fastattn.attention(*arrays), exact(*arrays), tolerances(*arrays)[0])


@pytest.mark.parametrize(
    ("bad", "exception"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError), (None, TypeError)]
)
def test_a_bad_number_of_threads_changes_nothing(number_of_threads, bad, exception):
    with pytest.raises(exception):
        fastattn.set_num_threads(bad)
    assert fastattn.get_num_threads() == number_of_threads


def test_threadpoolctl_sees_and_limits():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    (mine,) = [info for info in threadpoolctl.threadpool_info() if info["user_api"] == "fastattn"]
    assert mine["num_threads"] == fastattn.get_num_threads()
    before = fastattn.get_num_threads()
    with threadpoolctl.threadpool_limits(limits=1, user_api="fastattn"):
        assert fastattn.get_num_threads() == 1
    assert fastattn.get_num_threads() == before


def test_more_threads_than_work():
    query, key, value = (x.astype(F32) for x in qkv(make_rng(), (1, 1, 1, 2, 3, 4)))
    assert_same_bits(
        fastattn.attention(query, key, value, num_threads=10_000), fastattn.attention(query, key, value, num_threads=1)
    )


NESTED_CALLS = """
import signal
import numpy as np
import fastattn

long = np.random.default_rng(0).standard_normal((1, 4, 4096, 64), dtype=np.float32)
wide = np.random.default_rng(1).standard_normal((1, 2, 100, 512), dtype=np.float32)  # more scratch
expected_long, expected_wide = (fastattn.attention(x, x, x) for x in (long, wide))
calls = []

def handler(*_):
    calls.append(np.array_equal(fastattn.attention(wide, wide, wide), expected_wide))

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
while len(calls) < 5:
    assert np.array_equal(fastattn.attention(long, long, long), expected_long)
signal.setitimer(signal.ITIMER_REAL, 0)
assert all(calls)
"""


def test_a_signal_handler_may_call_within_a_call():
    """Handlers run while a long call polls for signals, on its thread, whose scratch is in use."""
    run_script(NESTED_CALLS)
