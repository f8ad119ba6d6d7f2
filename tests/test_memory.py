"""No byte is touched that is not the caller's to be touched, offsets are 64-bit, and memory that is refused raises."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from oracle import DTYPE_IDS, DTYPES, F32, assert_close, check, exact, make_rng, normal, qkv, run_script, tolerances

import fastattn

SPACED = '''
import numpy as np, fastattn
from guarded import guarded
from oracle import DTYPES, F32, F64, make_rng, normal, qkv

def spaced(x, step, end):
    """x with gaps between the elements of a row, but none behind its last one."""
    wide = np.repeat(x[..., ::-1] if step < 0 else x, abs(step), axis=-1)[..., : (x.shape[-1] - 1) * abs(step) + 1]
    return guarded(wide, end)[..., ::step]
'''

GUARDED = (
    SPACED
    + """
query_dtype, kv_dtype = DTYPES[{dtypes}]
rng = make_rng()
for end in (True, False):
    for shape in [(1, 1, 1, 1, 1, 1), (1, 2, 1, 1, 33, 7), (1, 2, 2, 17, 65, 33), (2, 4, 2, 50, 70, 64),
                  (1, 3, 1, 97, 129, 5), (1, 1, 1, 3, 600, 80), (1, 8, 2, 1, 1100, 64)]:
        for head_dim_v in (1, 15, 64):
            batch, heads, _, seqlen_q, seqlen_k, head_dim = shape
            arrays = [guarded(x, end) for x in qkv(rng, shape, (query_dtype, kv_dtype), head_dim_v)]
            out = guarded(np.zeros((batch, heads, seqlen_q, head_dim_v), query_dtype), end)
            mask = guarded(rng.random((batch, 1, seqlen_q, seqlen_k)) < 0.9, end)
            bias = guarded(normal(rng, (heads, seqlen_q, seqlen_k), kv_dtype), end)
            lengths = guarded(np.full(batch, seqlen_k), end)
            slopes, sinks = (guarded(np.ones(heads, F32), end) for _ in range(2))
            small = dict(alibi_slopes=slopes, sinks=sinks, key_lengths=lengths)
            fastattn.attention(*arrays, out=out)
            fastattn.attention(*arrays, out=out, causal=True, mask=mask, bias=bias, **small)
            fastattn.attention(*arrays, mask=mask, return_lse=True, return_weights=True)
            turned = [guarded(np.ascontiguousarray(x.swapaxes(-1, -2)), end).swapaxes(-1, -2) for x in arrays]
            fastattn.attention(*turned, causal=True)
            for step in (2, -1, -2, 3):
                fastattn.attention(*[spaced(x, step, end) for x in arrays], causal=True)
"""
)

# Gradients lie between guards, too. The first shape has one of everything, the last splits its rows.
GUARDED_BACKWARD = (
    SPACED
    + """
query_dtype, kv_dtype = DTYPES[{dtypes}]
lse_dtype = F64 if query_dtype == F64 else F32
rng = make_rng()
for shape in [(1, 1, 1, 1, 1, 1), (1, 2, 2, 17, 65, 33), (2, 4, 2, 50, 70, 64), (1, 3, 1, 97, 129, 5),
              (1, 2, 1, 1030, 70, 16)]:
    for end in (True, False):
        for head_dim_v in (1, 15, 64):
            batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim = shape
            rows = (batch, heads, seqlen_q)
            arrays = [guarded(x, end) for x in qkv(rng, shape, (query_dtype, kv_dtype), head_dim_v)]
            grad_out = guarded(normal(rng, (*rows, head_dim_v), query_dtype), end)
            grad_lse = guarded(normal(rng, rows, lse_dtype), end)
            grads = tuple(guarded(x, end) for x in arrays)
            mask = guarded(rng.random((batch, 1, seqlen_q, seqlen_k)) < 0.9, end)
            bias = guarded(normal(rng, (heads, seqlen_q, seqlen_k), kv_dtype), end)
            lengths = guarded(np.full(batch, seqlen_k), end)
            slopes, sinks = (guarded(np.ones(heads, F32), end) for _ in range(2))
            small = dict(alibi_slopes=slopes, sinks=sinks, key_lengths=lengths)
            all_of_them = dict(causal=True, mask=mask, bias=bias, softcap=3.0, dropout=0.2, seed=1, **small)
            for keywords in (dict(), all_of_them):
                asked = dict(return_grad_bias=True, return_grad_sinks=True) if keywords else dict()
                results = [guarded(x, end) for x in fastattn.attention(*arrays, **keywords, return_lse=True)]
                fastattn.attention_backward(
                    grad_out, *arrays, *results, grad_lse=grad_lse, grads=grads, **keywords, **asked
                )
            for step in (2, -1, 3):
                apart = [spaced(x, step, end) for x in (grad_out, *arrays, results[0])]
                into = tuple(spaced(x, step, end) for x in arrays)
                fastattn.attention_backward(*apart, results[1], grads=into)
            turned = [guarded(np.ascontiguousarray(x.swapaxes(-1, -2)), end).swapaxes(-1, -2)
                      for x in (grad_out, *arrays, results[0], *grads)]
            fastattn.attention_backward(*turned[:5], results[1], grads=tuple(turned[5:]))
            packed = [guarded(x[0].swapaxes(0, 1), end) for x in (grad_out, *arrays, *results)]
            into = tuple(guarded(x, end) for x in packed[1:4])
            bounds = [guarded(np.array([0, n // 2, n // 2, n]), end) for n in (seqlen_q, seqlen_k)]
            fastattn.attention_varlen_backward(*packed, *bounds, grads=into)
"""
)

# 64 float32 are 256 bytes, so 16 rows fill a page of 4096; other dtypes and pages take their share.
NEVER_READ = """
import numpy as np, fastattn
from guarded import PAGE, guarded
from oracle import DTYPES, make_rng, qkv

dtypes = DTYPES[{dtypes}]
rows = PAGE // (64 * dtypes[1].itemsize)
for seqlen_q in (1, 3, 40):
    seqlen_k = 6 * rows
    query, key, value = (x[0, 0] for x in qkv(make_rng(), (1, 1, 1, seqlen_q, seqlen_k, 64), dtypes))
    for pages in (1, 2, 5):
        readable = pages * PAGE
        k, v = guarded(key, True, readable), guarded(value, True, readable)
        last = pages * rows - 1
        fastattn.attention(query, k, v, key_lengths=last + 1)
        fastattn.attention(query, k, v, key_lengths=last + 1, causal=True)
        fastattn.attention(query, k, v, causal=True, query_offset=last - (seqlen_q - 1))
        fastattn.attention(query, k, v, window=(None, 7), query_offset=last - 7 - (seqlen_q - 1))
        fastattn.attention(query, k, v, window=(40, 7), query_offset=last - 7 - (seqlen_q - 1), return_weights=True)
        # The same from the other side: reversed, the keys before the window are the forbidden ones.
        first = seqlen_k - 1 - last
        fastattn.attention(query, k[::-1], v[::-1], window=(5, None), query_offset=first + 5)
"""


NEVER_READ_BY_BACKWARD = """
import numpy as np, fastattn
from guarded import PAGE, guarded
from oracle import DTYPES, make_rng, qkv

dtypes = DTYPES[{dtypes}]
rows = PAGE // (64 * dtypes[1].itemsize)
for seqlen_q in (1, 40):
    seqlen_k = 6 * rows
    query, key, value = (x[0, 0] for x in qkv(make_rng(), (1, 1, 1, seqlen_q, seqlen_k, 64), dtypes))
    for pages in (1, 2, 5):
        k, v = (guarded(x, True, pages * PAGE) for x in (key, value))
        last = pages * rows - 1
        first = seqlen_k - 1 - last
        for of_keys, keywords in [
            ((k, v), dict(key_lengths=last + 1)),
            ((k, v), dict(key_lengths=last + 1, dropout=0.5, seed=1)),
            ((k, v), dict(causal=True, query_offset=last - (seqlen_q - 1))),
            ((k, v), dict(window=(40, 7), query_offset=last - 7 - (seqlen_q - 1), bias=np.zeros((1, seqlen_k)))),
            ((k[::-1], v[::-1]), dict(window=(5, None), query_offset=first + 5)),
        ]:
            out, lse = fastattn.attention(query, *of_keys, **keywords, return_lse=True)
            asked = dict(return_grad_bias="bias" in keywords)
            fastattn.attention_backward(out, query, *of_keys, out, lse, **keywords, **asked)
"""


@pytest.mark.parametrize("dtypes", range(len(DTYPES)), ids=DTYPE_IDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_guard_pages(dtypes, threads):
    run_script(GUARDED.format(dtypes=dtypes), FASTATTN_NUM_THREADS=str(threads))


@pytest.mark.parametrize("dtypes", range(len(DTYPES)), ids=DTYPE_IDS)
@pytest.mark.parametrize("threads", [1, pytest.param(3, marks=pytest.mark.isa)])  # kernels read alike on any number
def test_guard_pages_of_backward(dtypes, threads):
    run_script(GUARDED_BACKWARD.format(dtypes=dtypes), FASTATTN_NUM_THREADS=str(threads))


@pytest.mark.parametrize("dtypes", range(len(DTYPES)), ids=DTYPE_IDS)
def test_keys_nobody_sees_are_never_read(dtypes):
    run_script(NEVER_READ.format(dtypes=dtypes))


@pytest.mark.isa
@pytest.mark.parametrize("dtypes", range(len(DTYPES)), ids=DTYPE_IDS)
def test_keys_nobody_sees_are_never_read_by_backward(dtypes):
    run_script(NEVER_READ_BY_BACKWARD.format(dtypes=dtypes))


@pytest.mark.parametrize(("end", "stride"), [(True, 64), (False, -64)])
def test_guard_pages_do_guard(end, stride):
    """The tests above can fail: a read one element past the guarded end dies."""
    source = f"""
import numpy as np
from guarded import guarded
from numpy.lib.stride_tricks import as_strided
x = guarded(np.ones(8), {end})
assert x.sum() == 8
as_strided(x, (2,), ({stride},)).sum()
"""
    with pytest.raises(AssertionError, match="exit status -11"):
        run_script(source)


FAR = 2**31 + 5  # elements between two rows


def far_apart(path, x):
    """The rows of x in a sparse file, further apart than 32-bit offsets reach."""
    rows, columns = x.shape
    size = (rows - 1) * FAR + columns
    with path.open("wb") as file:
        file.truncate(size * x.dtype.itemsize)
    memory = np.memmap(path, x.dtype if x.dtype.isbuiltin else np.uint16, "r+", shape=(size,)).view(x.dtype)
    view = as_strided(np.asarray(memory), (rows, columns), (FAR * x.dtype.itemsize, x.dtype.itemsize))
    view[...] = x
    return view


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
def test_offsets_past_two_to_the_31_elements(tmp_path, dtypes):
    query, key, value = (x[0, 0] for x in qkv(make_rng(), (1, 1, 1, 3, 5, 20), dtypes))
    expected = exact(query, key, value)
    out = far_apart(tmp_path / "out", np.zeros_like(query))
    far = [far_apart(tmp_path / name, x) for name, x in (("query", query), ("key", key), ("value", value))]
    fastattn.attention(*far, out=out)
    assert_close(np.ascontiguousarray(out), expected, tolerances(query, key, value)[0])


def test_mask_and_bias_offsets_past_two_to_the_31_elements(tmp_path):
    rng = make_rng()
    query, key, value = (x[0, 0] for x in qkv(rng, (1, 1, 1, 3, 70, 20)))
    mask, bias = rng.random((3, 70)) < 0.5, normal(rng, (3, 70), F32)
    expected = exact(query, key, value, mask=mask, bias=bias)
    far_mask, far_bias = far_apart(tmp_path / "mask", mask), far_apart(tmp_path / "bias", bias)
    assert_close(
        fastattn.attention(query, key, value, mask=far_mask, bias=far_bias),
        expected,
        tolerances(query, key, value, bias=bias)[0],
    )


def test_more_scores_than_two_to_the_31():
    """Row and key numbers multiply past 2³¹; a window keeps the work small."""
    seqlen = 46_400
    rng = make_rng()
    query, key, value = (normal(rng, (seqlen, 8), F32) for _ in range(3))
    bias = np.broadcast_to(normal(rng, (1, seqlen), F32), (seqlen, seqlen))
    assert bias.size > 2**31
    out = fastattn.attention(query, key, value, bias=bias, window=(3, 0))
    tail = slice(seqlen - 60, None)
    near = {"bias": bias[tail, tail], "window": (3, 0)}
    expected = exact(query[tail], key[tail], value[tail], **near)
    tolerance = tolerances(query[tail], key[tail], value[tail], **near)[0]
    # The first three rows of the slice miss keys before it.
    assert_close(out[tail][3:], expected[3:], tolerance[3:])


def test_large_batch_by_broadcasting():
    """More work items than 16 bits count, all on the same bytes."""
    query, key, value = qkv(make_rng(), (1, 1, 1, 2, 3, 4))
    many = np.broadcast_to(query, (70_000, 1, 2, 4))
    out = fastattn.attention(many, key, value)
    expected = fastattn.attention(query, key, value)
    np.testing.assert_array_equal(out, np.broadcast_to(expected, out.shape))


def test_refused_memory_raises():
    one = np.zeros((1, 1, 1, 4), F32)
    with pytest.raises(MemoryError):
        fastattn.attention(np.broadcast_to(one, (2**20, 2**10, 2**16, 4)), one, one)
    rows = np.broadcast_to(np.zeros((1, 4), F32), (2**24, 4))
    with pytest.raises(MemoryError):
        fastattn.attention(rows, rows, rows, return_weights=True)


def test_refused_scratch_raises_or_is_not_needed():
    """With no address space left a call may find room in the heap; else it raises, and never dies."""
    printed = run_script(
        """
import resource, numpy as np, fastattn
x = np.ones((1, 2, 300, 512), np.float64)
out = np.empty_like(x)
small = np.ones((4, 4), np.float32)
fastattn.attention(small, small, small, num_threads=1)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
outcomes = []
for threads in (1, 2):
    try:
        fastattn.attention(x, x, x, out=out, num_threads=threads)
        outcomes.append("done")
    except MemoryError as error:
        outcomes.append("MemoryError")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
fastattn.attention(x, x, x, out=out, num_threads=2)
print(*outcomes, float(abs(out - 1).max()) < 1e-12)
"""
    )
    assert printed.split()[-1] == "True"
    assert set(printed.split()[:-1]) <= {"done", "MemoryError"}


def test_refused_scratch_leaves_gradients_as_they_were():
    """Sums for 2**17 keys take 64 MiB and more; the second sequence has keys and no queries."""
    printed = run_script(
        """
import resource, numpy as np, fastattn
query = np.ones((1, 1, 64), np.float32)
key = np.broadcast_to(query, (2**17 + 3, 1, 64))
grads = np.ones_like(query), np.ones(key.shape, np.float32), np.ones(key.shape, np.float32)
arrays = query, query, key, key, query, np.zeros((1, 1), np.float32), [0, 1, 1], [0, 2**17, 2**17 + 3]
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, resource.RLIM_INFINITY))
try:
    fastattn.attention_varlen_backward(*arrays, grads=grads, num_threads=1)
except MemoryError:
    print("MemoryError", all((grad == 1).all() for grad in grads))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
fastattn.attention_varlen_backward(*arrays, grads=grads, num_threads=1)
print((grads[1][2**17:] == 0).all(), (grads[2][2**17:] == 0).all())
"""
    )
    assert printed == "MemoryError True\nTrue True\n"


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 512])
@pytest.mark.parametrize("seqlen", [1024, 2**20])
def test_scratch_does_not_grow_with_the_sequence(dtypes, head_dim, seqlen):
    row = [np.zeros((1, head_dim), dtype) for dtype in (dtypes[0], dtypes[1], dtypes[1])]
    arrays = [np.broadcast_to(x, (seqlen, head_dim)) for x in row]
    assert fastattn.plan(*arrays).scratch_bytes <= 2**20


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_memory_is_not_leaked(passes):
    resource = pytest.importorskip("resource")
    query, key, value = qkv(make_rng(), (1, 4, 4, 64, 64, 64))
    check(query, key, value)

    def peak():
        for _ in range(300):
            keywords = {"mask": np.ones((64, 64), bool), "bias": np.ones((4, 64, 64), F32)}
            out, lse = fastattn.attention(query, key, value, return_lse=True, **keywords)
            if passes == "backward":
                fastattn.attention_backward(out, query, key, value, out, lse, return_grad_bias=True, **keywords)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux

    before = peak()
    # 300 calls that lost one of their outputs of 64 KiB would add about 19 MiB.
    assert peak() - before < 4096
