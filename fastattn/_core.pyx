# cython: language_level=3, boundscheck=False, wraparound=False
# Plain built-in functions, called at least cost, with signatures that `inspect` can read.
# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""Validates a call, describes it to the C library, allocates its results, and raises."""

import os
import sys
import threading

import numpy as np

cimport cython
cimport numpy as cnp
from cpython.object cimport PyTypeObject
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New
from cpython.ref cimport Py_INCREF, Py_XDECREF, PyObject
from libc.math cimport isfinite, sqrt
from libc.stdint cimport uintptr_t
from libc.string cimport memset, strstr

from fastattn._core cimport *

from fastattn import _arguments, _checks, _tensors
from fastattn._fork import after_fork_in_child
from fastattn._philox import checked_dropout
from fastattn._visible import count_visible


cdef extern from "Python.h":
    # Not Cython's declaration of it: the exception must stay set when `interrupted` returns.
    int PyErr_CheckSignals() noexcept
    void PyErr_SetString(PyObject *, const char *) noexcept
    unsigned long PyThread_get_thread_ident()
    unsigned long PyThread_get_thread_native_id()


cdef extern from *:
    const char *COMPILER "__VERSION__"


cdef extern from "numpy/arrayobject.h":
    cnp.ndarray PyArray_NewFromDescr(PyTypeObject *kind, cnp.dtype dtype, int ndim, const cnp.npy_intp *dims,
                                     const cnp.npy_intp *strides, void *data, int flags, PyObject *prototype)
    bint PyArray_EquivTypes(cnp.dtype a, cnp.dtype b)
    cnp.ndarray PyArray_Empty(int ndim, const cnp.npy_intp *dims, cnp.dtype dtype, int fortran)
    cnp.ndarray PyArray_Zeros(int ndim, const cnp.npy_intp *dims, cnp.dtype dtype, int fortran)


cnp.import_array()

cdef enum:
    MAX_AXES = FA_MAX_BATCH_DIMS + 3
    MAX_TOP_KEYS = 1024  # so that a tile's lists fit in the scratch

# Positions and bounds beyond this are refused or clamped, so that sums of them cannot overflow.
cdef int64_t FARTHEST = <int64_t>1 << 60

cdef int bfloat16_type_num = -1  # ml_dtypes gives its type a number when it is imported

cdef cnp.dtype float32 = np.dtype(np.float32)

# A tensor's bfloat16 where there is no ml_dtypes: told from other bytes by being this very object.
cdef cnp.dtype bfloat16_bits = np.dtype((np.void, 2), metadata={"dtype": "bfloat16"})


# --- dtypes ---------------------------------------------------------------------------------------


cdef bint is_bfloat16(cnp.ndarray array):
    """Whether the dtype is ml_dtypes' bfloat16, recognised without importing ml_dtypes."""
    global bfloat16_type_num
    cdef int type_num = cnp.PyArray_TYPE(array)
    if type_num < 256:  # NumPy's first user-defined type
        return type_num == cnp.NPY_VOID and array.descr is bfloat16_bits
    if type_num == bfloat16_type_num:
        return True
    if array.dtype.name != "bfloat16":
        return False
    bfloat16_type_num = type_num
    return True


cdef int float_dtype(cnp.ndarray array, str name) except -1:
    cdef int type_num = cnp.PyArray_TYPE(array)
    if cnp.PyArray_ISNOTSWAPPED(array):
        if type_num == cnp.NPY_FLOAT:
            return FA_FLOAT32
        if type_num == cnp.NPY_DOUBLE:
            return FA_FLOAT64
        if type_num == cnp.NPY_FLOAT16:
            return FA_FLOAT16
        if is_bfloat16(array):
            return FA_BFLOAT16
    raise TypeError(
        f"{name} has dtype {array.dtype}; accepted are float32, float64, float16 and bfloat16 (of ml_dtypes) "
        f"in native byte order{_checks.how_to_convert(name, array.dtype)}"
    )


cdef int set_dtypes(fa_problem *p, cnp.ndarray query, cnp.ndarray key, cnp.ndarray value) except -1:
    p.query.dtype = <fa_dtype>float_dtype(query, "query")
    p.key.dtype = <fa_dtype>float_dtype(key, "key")
    p.value.dtype = <fa_dtype>float_dtype(value, "value")
    if p.key.dtype != p.value.dtype:
        raise TypeError(f"key and value must share a dtype, but key has {key.dtype} and value has {value.dtype}")
    if p.query.dtype == p.key.dtype:
        return 0
    if p.query.dtype == FA_FLOAT32 and (p.key.dtype == FA_FLOAT16 or p.key.dtype == FA_BFLOAT16):
        return 0
    raise TypeError(
        f"query has dtype {query.dtype} but key has {key.dtype}; accepted are the same dtype for all, or a float32 "
        "query with float16 or bfloat16 key and value"
    )


# --- shapes ---------------------------------------------------------------------------------------


cdef tuple as_shape(int ndim, const cnp.npy_intp *dims):
    cdef int axis
    return tuple([dims[axis] for axis in range(ndim)])


cdef tuple shape_of(cnp.ndarray array):
    return as_shape(cnp.PyArray_NDIM(array), cnp.PyArray_DIMS(array))


cdef tuple batch_shape_of(const fa_problem *p):
    return tuple([p.batch_shape[axis] for axis in range(p.batch_ndim)])


cdef int check_ndim(cnp.ndarray array, str name, int query_ndim) except -1:
    """All 2-D (one head), or all with an axis of heads."""
    cdef int ndim = cnp.PyArray_NDIM(array)
    if (ndim == 2 and query_ndim == 2) or (2 < ndim <= MAX_AXES and query_ndim > 2):
        return 0
    if ndim < 2:
        raise ValueError(f"{name} has shape {shape_of(array)}; accepted are (..., heads, seqlen, head_dim) and "
                         "(seqlen, head_dim)")
    if ndim > MAX_AXES:
        raise ValueError(f"{name} has {ndim} axes; at most {MAX_AXES} are accepted")
    raise ValueError(f"{name} has {ndim} axes but query has {query_ndim}: either all of query, key and value are 2-D "
                     "(one head), or all have an axis of heads")


cdef int broadcast_batch(fa_problem *p, cnp.ndarray array, str name) except -1:
    """Broadcasts the batch shape with an array's leading axes."""
    cdef int ndim = max(cnp.PyArray_NDIM(array) - 3, 0)
    cdef int axis
    cdef int64_t size
    while p.batch_ndim < ndim:
        for axis in range(p.batch_ndim, 0, -1):
            p.batch_shape[axis] = p.batch_shape[axis - 1]
        p.batch_shape[0] = 1
        p.batch_ndim += 1
    for axis in range(ndim):
        size = array.shape[axis]
        if p.batch_shape[p.batch_ndim - ndim + axis] == 1:
            p.batch_shape[p.batch_ndim - ndim + axis] = size
        elif size != 1 and size != p.batch_shape[p.batch_ndim - ndim + axis]:
            raise ValueError(f"{name} has batch axes {shape_of(array)[:ndim]}, which do not broadcast with "
                             f"{batch_shape_of(p)} of the arrays before it")
    return 0


cdef void describe(fa_array *view, const fa_problem *p, cnp.ndarray array, int core_ndim) noexcept:
    """Strides by axis, 0 along axes of size 1 and along those that the array lacks.

    The last core_ndim axes are, from the left, head, row and column; those before them are the batch.
    """
    cdef int ndim = cnp.PyArray_NDIM(array)
    cdef int axis, core
    cdef Py_ssize_t stride
    view.data = cnp.PyArray_BYTES(array)
    for axis in range(ndim):
        stride = cnp.PyArray_STRIDE(array, axis) if cnp.PyArray_DIM(array, axis) > 1 else 0
        core = axis - (ndim - core_ndim)
        if core < 0:
            view.batch[p.batch_ndim + core] = stride
        elif core == 0:
            view.head = stride
        elif core == 1:
            view.row = stride
        else:
            view.col = stride


cdef void describe_packed(fa_array *view, cnp.ndarray array) noexcept:
    """Strides of (row, head, col), or without columns."""
    view.data = cnp.PyArray_BYTES(array)
    view.row = cnp.PyArray_STRIDE(array, 0)
    view.head = cnp.PyArray_STRIDE(array, 1)
    if cnp.PyArray_NDIM(array) > 2:
        view.col = cnp.PyArray_STRIDE(array, 2)


cdef void describe_pages(fa_array *view, cnp.ndarray array) noexcept:
    """Strides of (page, head, row, col), or without columns."""
    view.data = cnp.PyArray_BYTES(array)
    view.page = cnp.PyArray_STRIDE(array, 0)
    view.head = cnp.PyArray_STRIDE(array, 1)
    view.row = cnp.PyArray_STRIDE(array, 2)
    if cnp.PyArray_NDIM(array) > 3:
        view.col = cnp.PyArray_STRIDE(array, 3)


cdef int check_packed_ndim(cnp.ndarray array, str name) except -1:
    if cnp.PyArray_NDIM(array) != 3:
        raise ValueError(f"{name} has shape {shape_of(array)}; accepted is (total, heads, head_dim)")
    return 0


cdef cnp.ndarray boundaries(cnp.ndarray array, str name, cnp.ndarray packed, str packed_name):
    """A copy of the row at which each sequence begins, and the end of the last; checked."""
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}; accepted are integers")
    if cnp.PyArray_NDIM(array) != 1 or array.shape[0] < 1:
        raise ValueError(f"{name} has shape {shape_of(array)}; accepted is (sequences + 1,)")
    array = array.copy()  # what is checked is what is read, whoever writes to it meanwhile
    # Neighbours are compared in the dtype that came: differences and conversions would wrap.
    if array[0] != 0 or array[len(array) - 1] != packed.shape[0] or (array[1:] < array[:len(array) - 1]).any():
        raise ValueError(f"{name} must rise from 0 to the {packed.shape[0]} rows of {packed_name}, but is {array}")
    return array.astype(np.int64, copy=False)


cdef int64_t longest(cnp.ndarray cu_seqlens) except -1:
    return np.diff(cu_seqlens).max(initial=0)


cdef int64_t largest(cnp.ndarray lengths) noexcept:
    """Of int64, C-contiguous; 0 of none. What a step does beside attention finds no cache warm."""
    cdef const int64_t *length = <const int64_t *>cnp.PyArray_DATA(lengths)
    cdef int64_t most = 0
    for n in range(lengths.shape[0]):
        most = max(most, length[n])
    return most


cdef int check_query_of_cache(const fa_problem *p, cnp.ndarray query, cnp.ndarray key) except -1:
    if p.query.dtype == FA_FLOAT32 or p.query.dtype == p.key.dtype:
        return 0
    if p.key.dtype == FA_INT8 and p.query.dtype != FA_FLOAT64:
        return 0
    raise TypeError(f"query has dtype {query.dtype} but the cache {key.dtype}; accepted are float32, the cache's own, "
                    "and on an int8 cache float16 and bfloat16 too")


cdef int check_shapes(fa_problem *p, cnp.ndarray query, cnp.ndarray key, cnp.ndarray value) except -1:
    """Reads the extents, and checks those that the arrays share."""
    cdef int q = cnp.PyArray_NDIM(query), k = cnp.PyArray_NDIM(key), v = cnp.PyArray_NDIM(value)
    cdef int64_t value_heads = value.shape[v - 3] if v > 2 else 1
    p.num_heads = query.shape[q - 3] if q > 2 else 1
    p.num_kv_heads = key.shape[k - 3] if k > 2 else 1
    p.seqlen_q = query.shape[q - 2]
    p.seqlen_k = key.shape[k - 2]
    p.head_dim = query.shape[q - 1]
    p.head_dim_v = value.shape[v - 1]
    check_shared_extents(p, query, key, value, key.shape[k - 1], value.shape[v - 2], value_heads)
    return check_limits(p)


cdef int check_shared_extents(const fa_problem *p, cnp.ndarray query, cnp.ndarray key, cnp.ndarray value,
                              int64_t key_dim, int64_t num_values, int64_t value_heads) except -1:
    if key_dim != p.head_dim:
        raise ValueError(f"query and key must have the same head_dim, but query has shape {shape_of(query)} and key "
                         f"{shape_of(key)}{order_of_axes(p)}")
    if num_values != p.seqlen_k:
        raise ValueError(f"key and value must have the same number of keys, but key has shape {shape_of(key)} and "
                         f"value {shape_of(value)}")
    if value_heads != p.num_kv_heads:
        raise ValueError(f"key and value must have the same number of heads, but key has shape {shape_of(key)} and "
                         f"value {shape_of(value)}{order_of_axes(p)}")
    return 0


cdef str order_of_axes(const fa_problem *p):
    """A clause for the end of a message about heads, which a wrong order of axes is the likeliest cause of."""
    if p.cu_seqlens_q != NULL:
        return ": packed axes are (total, heads, head_dim)"
    return (": axes are (batch, heads, seqlen, head_dim); arrays in the order (batch, seqlen, heads, head_dim) are "
            "passed as x.swapaxes(1, 2)")


cdef int check_limits(const fa_problem *p) except -1:
    if p.num_heads != 0 and (p.num_kv_heads == 0 or p.num_heads % p.num_kv_heads != 0):
        raise ValueError(f"the number of query heads must be a multiple of the number of key heads, but query has "
                         f"{p.num_heads} and key {p.num_kv_heads}{order_of_axes(p)}")
    if p.head_dim > FA_MAX_HEAD_DIM:
        raise ValueError(f"query and key have head_dim {p.head_dim}; at most {FA_MAX_HEAD_DIM} is accepted")
    if p.head_dim_v > FA_MAX_HEAD_DIM:
        raise ValueError(f"value has head_dim {p.head_dim_v}; at most {FA_MAX_HEAD_DIM} is accepted")
    return 0


cdef int check_broadcast(const fa_problem *p, cnp.ndarray array, str name, tuple target, str hint="") except -1:
    """Whether an array broadcasts to `target` without enlarging it."""
    cdef tuple shape = shape_of(array)
    cdef int extra = len(target) - len(shape)
    cdef bint fits = extra >= 0
    cdef int axis
    if fits:
        for axis in range(len(shape)):
            if shape[axis] != 1 and shape[axis] != target[extra + axis]:
                fits = False
    if not fits:
        raise ValueError(f"{name} has shape {shape}, which does not broadcast to {target}{hint}")
    return 0


cdef str missing_axes(const fa_problem *p, cnp.ndarray array, str name):
    """A clause for the end of a message about a mask or a bias that has batch axes, but none of heads."""
    cdef tuple batch = batch_shape_of(p), shape = shape_of(array)
    cdef int axis = len(batch)
    if axis == 0 or shape[:axis] != batch:
        return ""
    leading = ", ".join([":"] * axis)
    if shape == (*batch, p.seqlen_k):
        lengths = ", or, where keys are hidden at the end only, key_lengths=" if name == "mask" else ""
        return f": give {name}[{leading}, None, None, :]{lengths}"
    if len(shape) == axis + 2 and shape[axis] in (1, p.seqlen_q) and shape[axis + 1] in (1, p.seqlen_k):
        return f": give {name}[{leading}, None, :, :]"
    return ""


cdef tuple score_shape(const fa_problem *p, bint single_head):
    if single_head:
        return (p.seqlen_q, p.seqlen_k)
    return (*batch_shape_of(p), p.num_heads, p.seqlen_q, p.seqlen_k)


# --- numbers --------------------------------------------------------------------------------------


cdef double real_number(object value, str name) except? -1.0:
    if isinstance(value, (bool, np.bool_, str)):
        raise TypeError(f"{name} must be a real number, not {value!r}")
    if type(value) is not float:
        refuse_derivatives(value, name)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number, not {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} must be finite, and {type(value).__name__} holds more than a float can") from None


cdef int64_t window_bound(object value, str name) except? -2:
    if value is None:
        return FA_UNBOUNDED
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int or None, not {value!r}")
    bound = value.__index__()
    if bound < 0:
        raise ValueError(f"{name} must not be negative, but is {bound}; None, not -1, is unbounded")
    return min(bound, 2 * FARTHEST)  # more than two positions can be apart


cdef int set_window(fa_problem *p, object window, object causal) except -1:
    if causal is not False and causal is not True and not isinstance(causal, np.bool_):
        raise TypeError(f"causal must be a bool, not {causal!r}")
    p.left = p.right = FA_UNBOUNDED
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(f"window must be a pair (left, right) of ints or None, not {window!r}")
        p.left = window_bound(window[0], "window's left bound")
        p.right = window_bound(window[1], "window's right bound")
    if causal:
        p.right = 0  # the least that a right bound can be
    return 0


cdef double finite_number(object value, str name) except? -1.0:
    cdef double number = real_number(value, name)
    if not isfinite(number):
        raise ValueError(f"{name} must be finite, but is {value}")
    return number


cdef double positive_number(object value, str name) except? -1.0:
    cdef double number = real_number(value, name)
    if not (isfinite(number) and number > 0):
        raise ValueError(f"{name} must be finite and greater than 0, but is {value}")
    return number


cdef int thread_count(object num_threads) except -1:
    if isinstance(num_threads, (bool, np.bool_)) or not hasattr(num_threads, "__index__"):
        raise TypeError(f"num_threads must be an int, not {num_threads!r}")
    count = num_threads.__index__()
    if count < 1:
        raise ValueError(f"num_threads must be at least 1, but is {count}")
    return min(count, 1 << 20)


# --- optional arrays ------------------------------------------------------------------------------


cdef cnp.ndarray as_array(object x, str name):
    if type(x) is cnp.ndarray:  # not np.ndarray, which would be looked up in each call
        return x
    return _checks.as_array(name, x)


cdef int set_mask(fa_problem *p, cnp.ndarray array, tuple target) except -1:
    if cnp.PyArray_TYPE(array) != cnp.NPY_BOOL:
        hint = "; for numbers that are added to the scores use bias=" if array.dtype.kind in "fV" else ""
        if array.dtype.kind in "iu":
            hint = ": convert with np.asarray(mask).astype(bool)"
        raise TypeError(f"mask has dtype {array.dtype}; accepted is bool, True where a query sees a key{hint}")
    check_broadcast(p, array, "mask", target, missing_axes(p, array, "mask"))
    describe(&p.mask, p, array, 3)
    return 0


cdef int set_bias(fa_problem *p, cnp.ndarray array, tuple target) except -1:
    if cnp.PyArray_TYPE(array) == cnp.NPY_BOOL:
        raise TypeError("bias has dtype bool; accepted are real floats, added to the scores; for a boolean mask use "
                        "mask=")
    p.bias.dtype = <fa_dtype>float_dtype(array, "bias")
    check_broadcast(p, array, "bias", target, missing_axes(p, array, "bias"))
    describe(&p.bias, p, array, 3)
    return 0


cdef cnp.ndarray float64_array(cnp.ndarray array, str name):
    if array.dtype.kind not in "fiu" and not is_bfloat16(array):
        raise TypeError(f"{name} has dtype {array.dtype}; accepted are real numbers"
                        f"{_checks.how_to_convert(name, array.dtype)}")
    return _tensors.converted(array, np.dtype(np.float64))


cdef cnp.ndarray set_alibi_slopes(fa_problem *p, cnp.ndarray alibi_slopes, bint single_head):
    cdef cnp.ndarray array = float64_array(alibi_slopes, "alibi_slopes")
    check_broadcast(p, array, "alibi_slopes", () if single_head and array.ndim == 0
                    else (*batch_shape_of(p), p.num_heads))
    describe(&p.alibi_slopes, p, array, 1)
    return array


cdef cnp.ndarray set_sinks(fa_problem *p, cnp.ndarray sinks):
    cdef cnp.ndarray array = float64_array(sinks, "sinks")
    if shape_of(array) != (p.num_heads,):
        raise ValueError(f"sinks has shape {shape_of(array)}; accepted is one logit a head, ({p.num_heads},)")
    describe(&p.sinks, p, array, 1)
    return array


cdef cnp.ndarray set_integers(fa_array *view, fa_problem *p, cnp.ndarray array, str name, object lowest,
                              object highest):
    """An integer, or one for each batch item, from lowest to highest."""
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}; accepted are an integer, or integers for each batch item")
    check_broadcast(p, array, name, batch_shape_of(p))
    array = array.copy()  # what is checked is what is read, whoever writes to it meanwhile
    if array.size and not (lowest <= int(array.min()) and int(array.max()) <= highest):
        raise ValueError(f"{name} must be from {lowest} to {highest}, but holds {array.min()} to {array.max()}")
    array = array.astype(np.int64, copy=False)
    describe(view, p, array, 0)
    return array


# --- results --------------------------------------------------------------------------------------


cdef bint overlaps_itself(object array):
    """Whether two elements may share memory: some axis steps within the extent of the finer ones."""
    cdef Py_ssize_t extent = array.itemsize
    if array.size <= 1:
        return False
    axes = zip(array.strides, array.shape, strict=True)
    for stride, size in sorted((abs(stride), size) for stride, size in axes if size > 1):
        if stride < extent:
            return True
        extent += stride * (size - 1)
    return False


cdef struct Extent:
    uintptr_t begin, end


cdef Extent extent_of(cnp.ndarray array):
    """Where the array's elements lie."""
    cdef uintptr_t begin = <uintptr_t>cnp.PyArray_DATA(array), end = begin + cnp.PyArray_ITEMSIZE(array)
    cdef Py_ssize_t span
    cdef int axis
    for axis in range(cnp.PyArray_NDIM(array)):
        if cnp.PyArray_DIM(array, axis) == 0:
            return Extent(begin, begin)
        span = (cnp.PyArray_DIM(array, axis) - 1) * cnp.PyArray_STRIDE(array, axis)
        if span < 0:
            begin += span
        else:
            end += span
    return Extent(begin, end)


cdef bint lie_apart(cnp.ndarray a, cnp.ndarray b):
    cdef Extent x = extent_of(a), y = extent_of(b)
    return x.end <= y.begin or y.end <= x.begin


cdef bint is_half(cnp.ndarray array):
    """Whether it is of a half type, in native byte order."""
    if not cnp.PyArray_ISNOTSWAPPED(array):
        return False
    return cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT16 or is_bfloat16(array)


cdef bint is_float32(cnp.ndarray array):
    return cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT and cnp.PyArray_ISNOTSWAPPED(array)


cdef bint same_dtype(cnp.ndarray a, cnp.ndarray b):
    return a.descr is b.descr or PyArray_EquivTypes(a.descr, b.descr)


cdef int check_out_dtype(cnp.ndarray out, str name, cnp.ndarray like, str like_name, bint unrounded,
                         str others="") except -1:
    """That of `like`, or, where this is half, that of sums."""
    cdef bint in_float32 = is_half(like) and is_float32(out)
    if in_float32 or (same_dtype(out, like) and not (unrounded and is_half(like))):
        return 0
    accepted = f"that of {like_name}, {like.dtype}{others}"
    if unrounded and is_half(like):
        accepted = "float32, with unrounded"
    elif is_half(like):
        accepted += ", or float32"
    order = "" if (<object>out).dtype.isnative else ", in native byte order"
    raise TypeError(f"{name} has dtype {out.dtype}; accepted is {accepted}{order}")


cdef bint has_shape(cnp.ndarray array, int ndim, const cnp.npy_intp *dims) noexcept:
    cdef int axis
    if cnp.PyArray_NDIM(array) != ndim:
        return False
    for axis in range(ndim):
        if cnp.PyArray_DIM(array, axis) != dims[axis]:
            return False
    return True


cdef int check_out(cnp.ndarray out, str name, int ndim, const cnp.npy_intp *dims, dict inputs) except -1:
    """Whether results of that shape can be stored in `out`."""
    if not has_shape(out, ndim, dims):
        raise ValueError(f"{name} has shape {shape_of(out)}; accepted is {as_shape(ndim, dims)}")
    if not cnp.PyArray_ISWRITEABLE(out):
        raise ValueError(f"{name} is read-only")
    if not cnp.PyArray_IS_C_CONTIGUOUS(out) and overlaps_itself(out):
        raise ValueError(f"{name} overlaps itself: it has shape {shape_of(out)} and strides "
                         f"{(<object>out).strides}")
    for other, array in inputs.items():
        if not lie_apart(out, array) and share_memory(out, array):
            raise ValueError(f"{name} overlaps {other} in memory")
    return 0


cdef bint share_memory(object out, object array):
    try:
        return np.shares_memory(out, array, max_work=1_000_000)
    except np.exceptions.TooHardError:
        return True  # not proved to be apart


# --- tensors --------------------------------------------------------------------------------------


cdef dict tables = {}  # of each type that has come: the address of its DLPack exchange table, or 0
cdef dict forward_ad = {}  # what there is in PyTorch's module of that name, once a tensor has come


cdef uintptr_t find_table(object kind) except? 1:
    """The address of a type's exchange table of DLPack 1, or 0 if it has none."""
    global forward_ad
    capsule = getattr(kind, "__dlpack_c_exchange_api__", None)
    cdef const DLPackExchangeHeader *header = NULL
    if PyCapsule_IsValid(capsule, "dlpack_exchange_api"):
        header = <const DLPackExchangeHeader *>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
        while header != NULL and header.version.major != 1:
            header = header.older
        if header != NULL and (<const DLPackExchangeTable *>header).describe_borrowed == NULL:
            header = NULL
    tables[kind] = <uintptr_t>header
    module = sys.modules.get("torch.autograd.forward_ad")
    if module is not None:
        forward_ad = module.__dict__
    return <uintptr_t>header


cdef int refuse_derivatives(object x, str name) except -1:
    """Raise of a tensor whose gradient or tangent would be lost."""
    if getattr(x, "requires_grad", False):
        raise RuntimeError(f"{name} requires a gradient, which would be lost: give {name}.detach(), or call the "
                           "functions of fastattn.torch, which have one")
    if forward_ad.get("_current_level", -1) >= 0 and has_tangent(x):
        raise RuntimeError(f"{name} has a tangent, of forward-mode differentiation, which would be lost: give "
                           f"torch.autograd.forward_ad.unpack_dual({name}).primal, or call PyTorch's own attention")
    return 0


cdef bint has_tangent(object x) except -1:
    is_floating_point = getattr(x, "is_floating_point", None)
    return is_floating_point is not None and is_floating_point() and forward_ad["unpack_dual"](x).tangent is not None


cdef const DLPackExchangeTable *table_of(object x) except? NULL:
    """NULL for what is no tensor, or only has `__dlpack__`."""
    cdef object kind = type(x)
    cdef object address = tables.get(kind)
    if address is None:
        address = find_table(kind)
    return <const DLPackExchangeTable *><uintptr_t>address


cdef cnp.dtype dtype_of(const DLDataType *dtype, str name):
    if dtype.lanes == 1:
        if dtype.code == kDLBfloat and dtype.bits == 16:
            return _tensors.bfloat16() or bfloat16_bits
        letter = {kDLFloat: "f", kDLInt: "i", kDLUInt: "u", kDLBool: "b"}.get(dtype.code)
        if letter == "b" and dtype.bits == 8:
            return np.dtype(np.bool_)
        if letter is not None and letter != "b" and dtype.bits in (16, 32, 64, 8)[:3 if letter == "f" else 4]:
            return np.dtype(f"{letter}{dtype.bits // 8}")
    raise TypeError(f"{name} has a dtype (DLPack's code {dtype.code}, {dtype.bits} bits) that is none of NumPy's or "
                    "bfloat16")


cdef dict dtypes = {}  # by code and bits


cdef cnp.ndarray view_of(const DLTensor *tensor, object owner, str name, bint writeable):
    """An array of what a tensor describes, which keeps its owner."""
    cdef cnp.npy_intp dims[MAX_AXES]
    cdef cnp.npy_intp strides[MAX_AXES]
    cdef cnp.npy_intp *given_strides = strides if tensor.strides != NULL else NULL
    cdef char *data = <char *>tensor.data + tensor.byte_offset
    cdef cnp.ndarray array
    cdef int axis
    cdef bint is_empty = False
    cdef cnp.dtype dtype
    if tensor.device.device_type != kDLCPU:
        raise TypeError(f"{name} is not in the CPU's memory (DLPack's device {tensor.device.device_type}): give "
                        f"{name}.cpu()")
    if tensor.ndim > MAX_AXES:
        raise ValueError(f"{name} has {tensor.ndim} axes; at most {MAX_AXES} are accepted")
    cdef object code = tensor.dtype.code << 8 | tensor.dtype.bits | <int>tensor.dtype.lanes << 16
    dtype = dtypes.get(code)
    if dtype is None:
        dtype = dtypes[code] = dtype_of(&tensor.dtype, name)
    for axis in range(tensor.ndim):
        dims[axis] = tensor.shape[axis]
        is_empty |= dims[axis] == 0
        if given_strides != NULL:
            strides[axis] = tensor.strides[axis] * dtype.itemsize
    if tensor.data == NULL:
        if not is_empty:
            raise TypeError(f"{name} holds no data: it stands for a tensor, as while a function is traced or "
                            "transformed")
        data = <char *>strides  # never read
    Py_INCREF(dtype)  # the new array takes it over
    array = PyArray_NewFromDescr(
        <PyTypeObject *>cnp.ndarray, dtype, tensor.ndim, dims, given_strides, data,
        cnp.NPY_ARRAY_WRITEABLE if writeable else 0, NULL,
    )
    cnp.set_array_base(array, owner)
    return array


cdef int refuse_negated(object x, str name) except -1:
    is_neg = getattr(x, "is_neg", None)
    if is_neg is not None and is_neg():
        raise TypeError(f"{name} is a view whose numbers are negated as they are read: give {name}.resolve_neg()")


cdef cnp.ndarray view_of_tensor(object x, const DLPackExchangeTable *table, str name):
    """A tensor's memory as an array, whose base is the tensor."""
    cdef DLTensor tensor
    refuse_derivatives(x, name)
    try:
        table.describe_borrowed(<void *>x, &tensor)
    except Exception as failure:
        raise TypeError(f"{name} cannot be read by DLPack: {_checks.first_line(failure)}") from failure
    refuse_negated(x, name)
    return view_of(&tensor, x, name, True)


def from_dlpack(x, str name):
    """Read an object that has `__dlpack__` alone; of bfloat16, too, which NumPy's function refuses."""
    cdef DLManagedTensorVersioned *versioned
    try:
        try:
            capsule = x.__dlpack__(max_version=(1, 0))
        except TypeError:  # of DLPack before 1.0
            capsule = x.__dlpack__()
    except Exception as failure:
        raise TypeError(f"{name} cannot be read by DLPack: {_checks.first_line(failure)}") from failure
    if PyCapsule_IsValid(capsule, "dltensor_versioned"):
        versioned = <DLManagedTensorVersioned *>PyCapsule_GetPointer(capsule, "dltensor_versioned")
        if versioned.version.major != 1:
            raise TypeError(f"{name} speaks DLPack {versioned.version.major}; accepted is 1")
        return view_of(&versioned.dl_tensor, capsule, name, not versioned.flags & DLPACK_READ_ONLY)
    return view_of(&(<DLManagedTensor *>PyCapsule_GetPointer(capsule, "dltensor")).dl_tensor, capsule, name, False)


cdef void set_error(void *context, const char *kind, const char *message) noexcept with gil:
    cdef bint lacks_memory = strstr(message, "memory") != NULL or strstr(message, "overflow") != NULL
    PyErr_SetString(<PyObject *>MemoryError if lacks_memory else <PyObject *>RuntimeError, message)


cdef cnp.ndarray new_tensor(const DLPackExchangeTable *table, int ndim, cnp.npy_intp *dims, cnp.dtype dtype,
                            const int *order):
    """An array whose base is a new tensor; the axes lie in memory in that order."""
    cdef int64_t shape[MAX_AXES]
    cdef DLTensor prototype
    cdef DLManagedTensorVersioned *managed
    cdef void *made
    cdef int axis
    for axis in range(ndim):
        shape[axis] = dims[order[axis]]
    prototype.data = NULL
    prototype.device = DLDevice(kDLCPU, 0)
    prototype.ndim = ndim
    prototype.dtype = dlpack_dtype(dtype)
    prototype.shape = shape
    prototype.strides = NULL
    prototype.byte_offset = 0
    table.allocate(&prototype, &managed, NULL, set_error)
    table.import_owned(managed, &made)
    cdef object tensor = <object>made
    Py_XDECREF(<PyObject *>made)
    for axis in range(ndim):
        if order[axis] != axis:
            tensor = tensor.permute([place for _, place in sorted([(order[i], i) for i in range(ndim)])])
            break
    cdef DLTensor described
    table.describe_borrowed(<void *>tensor, &described)
    return view_of(&described, tensor, "out", True)


cdef DLDataType dlpack_dtype(cnp.dtype dtype):
    cdef DLDataType to
    if dtype.kind == b"f":
        to.code = kDLFloat
    elif dtype.kind == b"i":
        to.code = kDLInt
    else:  # results are of no others
        to.code = kDLBfloat
    to.bits = dtype.itemsize * 8
    to.lanes = 1
    return to


cdef object as_kind_of(const DLPackExchangeTable *table, cnp.ndarray array):
    """A result as a tensor, if the arguments are such: the one whose memory it is, or a copy."""
    cdef int order[MAX_AXES]
    cdef cnp.ndarray copy
    cdef int axis
    if table == NULL:
        return array
    base = cnp.get_array_base(array)
    if base is not None and table_of(base) == table:
        return base
    for axis in range(cnp.PyArray_NDIM(array)):
        order[axis] = axis
    copy = new_tensor(table, cnp.PyArray_NDIM(array), cnp.PyArray_DIMS(array), array.descr, order)
    copy[...] = array
    return cnp.get_array_base(copy)


def is_tensor(x):
    """Whether results for such an argument are tensors, too."""
    return table_of(x) != NULL


def tensor_to_array(x, str name):
    """A tensor's memory as an array of a dtype that NumPy computes with."""
    cdef cnp.ndarray array = view_of_tensor(x, table_of(x), name)
    if array.descr is bfloat16_bits:
        raise TypeError(f"{name} is of bfloat16, for which this function needs the package ml_dtypes")
    return array


def array_to_tensor(cnp.ndarray array not None, like):
    """A result in the kind of an argument."""
    return as_kind_of(table_of(like), array)


# --- the call -------------------------------------------------------------------------------------


cdef void sort_axes(int *order, int ndim, cnp.ndarray like) noexcept:
    """Axes by their strides in `like`, whose axes are the last ones, as order='K' of NumPy's functions has them: those
    of one element or of stride 0 keep their places."""
    cdef int lead = ndim - cnp.PyArray_NDIM(like), axis, place, to
    cdef Py_ssize_t stride, other
    for axis in range(max(lead, 0) + 1, ndim):
        stride = spacing(like, axis - lead)
        to = axis
        for place in range(axis - 1, max(lead, 0) - 1, -1):
            other = spacing(like, order[place] - lead)
            if stride == 0 or other == 0:
                continue
            if stride <= other:
                break
            to = place
        for place in range(axis, to, -1):
            order[place] = order[place - 1]
        order[to] = axis


cdef Py_ssize_t spacing(cnp.ndarray array, int axis) noexcept:
    return abs(cnp.PyArray_STRIDE(array, axis)) if cnp.PyArray_DIM(array, axis) > 1 else 0


@cython.final
cdef class Call:
    """A validated problem, and the arrays that its pointers lead into."""

    cdef fa_problem problem
    cdef bint single_head
    cdef bint packed  # queries are (total, heads, head_dim)
    cdef bint unrounded  # results for half queries stay in float32
    cdef cnp.ndarray query, key, value, mask, bias
    cdef cnp.ndarray alibi_slopes, sinks, key_lengths, query_offset, cu_seqlens_q, cu_seqlens_k  # copies
    cdef cnp.ndarray page_table, key_scales, value_scales
    cdef dict inputs  # by name, what `out` must not overlap; None without `out`
    cdef str first  # the first argument that is an array or a tensor
    cdef object first_type
    cdef const DLPackExchangeTable *table  # of the tensors that the arguments are; NULL for arrays

    cdef cnp.ndarray taken(self, object x, str name):
        """An argument as an array, as which it is kept apart from `out`."""
        cdef cnp.ndarray array = self.array_of(x, name)
        if self.inputs is not None:
            self.inputs[name] = array
        return array

    cdef cnp.ndarray array_of(self, object x, str name):
        """An argument as an array. The first that is an array or a tensor decides which all of them are to be."""
        cdef const DLPackExchangeTable *table = NULL
        if type(x) is not cnp.ndarray:
            table = table_of(x)
            if table == NULL and not isinstance(x, np.ndarray):
                return _checks.as_array(name, x)
        if self.first is None:
            self.first = name
            self.first_type = type(x)
            self.table = table
        elif self.table != table:
            raise TypeError(f"{name} is {_checks.kind_of(type(x))}, but {self.first} is "
                            f"{_checks.kind_of(self.first_type)}: all arrays of a call must be of one kind")
        return as_array(x, name) if table == NULL else view_of_tensor(x, table, name)

    cdef cnp.ndarray target(self, object out, str name):
        """Where results are to be stored."""
        if not isinstance(out, np.ndarray) and table_of(out) == NULL:
            raise TypeError(f"{name} must be {'an ndarray' if self.table == NULL else 'a tensor'}, not "
                            f"{type(out).__name__}")
        return self.array_of(out, name)

    cdef object given(self, cnp.ndarray result):
        """A result in the kind of the arguments."""
        return result if self.table == NULL else as_kind_of(self.table, result)

    cdef int set_arrays(self, object query, object key, object value, bint of_no_columns=False) except -1:
        cdef fa_problem *p = &self.problem
        cdef cnp.ndarray q = self.taken(query, "query"), k = self.taken(key, "key"), v
        if of_no_columns:
            v = k[..., :0] if k.ndim > 0 else k
        else:
            v = self.taken(value, "value")
        set_dtypes(p, q, k, v)
        check_ndim(q, "query", cnp.PyArray_NDIM(q))
        check_ndim(k, "key", cnp.PyArray_NDIM(q))
        check_ndim(v, "value", cnp.PyArray_NDIM(q))
        self.single_head = cnp.PyArray_NDIM(q) == 2
        broadcast_batch(p, q, "query")
        broadcast_batch(p, k, "key")
        broadcast_batch(p, v, "value")
        check_shapes(p, q, k, v)
        describe(&p.query, p, q, 3)
        describe(&p.key, p, k, 3)
        describe(&p.value, p, v, 3)
        self.query = q
        self.key = k
        self.value = v
        return 0

    cdef int set_packed_query(self, cnp.ndarray query, object cu_seqlens_q) except -1:
        cdef fa_problem *p = &self.problem
        check_packed_ndim(query, "query")
        self.packed = True
        self.query = query
        self.cu_seqlens_q = boundaries(self.taken(cu_seqlens_q, "cu_seqlens_q"), "cu_seqlens_q", query, "query")
        p.cu_seqlens_q = <const int64_t *>cnp.PyArray_DATA(self.cu_seqlens_q)
        p.batch_ndim = 1
        p.batch_shape[0] = self.cu_seqlens_q.shape[0] - 1
        p.seqlen_q = longest(self.cu_seqlens_q)
        p.num_heads = query.shape[1]
        p.head_dim = query.shape[2]
        describe_packed(&p.query, query)
        return 0

    cdef int set_packed_arrays(self, object query, object key, object value, object cu_seqlens_q,
                               object cu_seqlens_k) except -1:
        cdef fa_problem *p = &self.problem
        cdef cnp.ndarray q = self.taken(query, "query"), k = self.taken(key, "key"), v = self.taken(value, "value")
        set_dtypes(p, q, k, v)
        self.set_packed_query(q, cu_seqlens_q)
        check_packed_ndim(k, "key")
        check_packed_ndim(v, "value")
        self.key = k
        self.value = v
        self.cu_seqlens_k = boundaries(self.taken(cu_seqlens_k, "cu_seqlens_k"), "cu_seqlens_k", k, "key")
        if self.cu_seqlens_k.shape[0] != self.cu_seqlens_q.shape[0]:
            raise ValueError(f"cu_seqlens_q and cu_seqlens_k must have the same length, but have "
                             f"{self.cu_seqlens_q.shape[0]} and {self.cu_seqlens_k.shape[0]}")
        p.cu_seqlens_k = <const int64_t *>cnp.PyArray_DATA(self.cu_seqlens_k)
        p.num_kv_heads = k.shape[1]
        p.head_dim_v = v.shape[2]
        p.seqlen_k = k.shape[0]
        check_shared_extents(p, q, k, v, k.shape[2], v.shape[0], v.shape[1])
        p.seqlen_k = longest(self.cu_seqlens_k)
        describe_packed(&p.key, k)
        describe_packed(&p.value, v)
        return check_limits(p)

    cdef int set_paged_arrays(self, object query, object cu_seqlens_q, cnp.ndarray key, cnp.ndarray value,
                              cnp.ndarray key_scales, cnp.ndarray value_scales, cnp.ndarray page_table,
                              cnp.ndarray lengths) except -1:
        """Keys in pages (page, head, row, col), which the cache answers for: only the query is checked.

        page_table and lengths are int64, C-contiguous, and the cache's own.
        """
        cdef fa_problem *p = &self.problem
        cdef cnp.ndarray q = self.taken(query, "query")
        p.query.dtype = <fa_dtype>float_dtype(q, "query")
        p.key.dtype = p.value.dtype = FA_INT8 if key_scales is not None else <fa_dtype>float_dtype(key, "key")
        check_query_of_cache(p, q, key)
        if cu_seqlens_q is not None:
            self.set_packed_query(q, cu_seqlens_q)
        else:
            self.set_dense_query(q)
        if p.batch_shape[0] != lengths.shape[0]:
            raise ValueError(f"query must have as many batch items as there are sequences, {lengths.shape[0]}, but has "
                             f"{p.batch_shape[0]}")
        p.num_kv_heads = key.shape[1]
        p.head_dim_v = value.shape[3]
        p.page_size = key.shape[2]
        p.seqlen_k = largest(lengths)
        if key.shape[3] != p.head_dim:
            raise ValueError(f"query and the cache must have the same head_dim, but query has shape {shape_of(q)} and "
                             f"the cache {key.shape[3]}")
        describe_pages(&p.key, key)
        describe_pages(&p.value, value)
        if key_scales is not None:
            describe_pages(&p.key_scale, key_scales)
            describe_pages(&p.value_scale, value_scales)
        self.key, self.value, self.key_scales, self.value_scales = key, value, key_scales, value_scales
        self.key_lengths = lengths
        self.page_table = page_table
        describe(&p.key_lengths, p, lengths, 0)
        describe(&p.page_table, p, page_table, 1)
        return check_limits(p)

    cdef int set_dense_query(self, cnp.ndarray query) except -1:
        cdef fa_problem *p = &self.problem
        if cnp.PyArray_NDIM(query) != 4:
            raise ValueError(f"query has shape {shape_of(query)}; accepted is (sequences, heads, seqlen, head_dim), or "
                             "(total, heads, head_dim) with cu_seqlens_q")
        broadcast_batch(p, query, "query")
        p.num_heads = query.shape[1]
        p.seqlen_q = query.shape[2]
        p.head_dim = query.shape[3]
        describe(&p.query, p, query, 3)
        self.query = query
        return 0

    cdef int set_scores(self, object scale, object causal, object query_offset, object window, object mask,
                        object bias, object alibi_slopes, object softcap, object sinks, object key_lengths,
                        object num_threads) except -1:
        """What attention's keywords say of the scores, and how many threads compute them."""
        cdef fa_problem *p = &self.problem
        cdef tuple target
        set_window(p, window, causal)
        p.scale = 1.0 / sqrt(<double>max(p.head_dim, 1)) if scale is None else finite_number(scale, "scale")
        if softcap is not None:
            p.softcap = positive_number(softcap, "softcap")
        p.num_threads = fa_get_num_threads() if num_threads is None else thread_count(num_threads)
        if mask is not None or bias is not None:
            target = score_shape(p, self.single_head)
            if mask is not None:
                self.mask = self.taken(mask, "mask")
                set_mask(p, self.mask, target)
            if bias is not None:
                self.bias = self.taken(bias, "bias")
                set_bias(p, self.bias, target)
        if alibi_slopes is not None:
            self.alibi_slopes = set_alibi_slopes(p, self.taken(alibi_slopes, "alibi_slopes"), self.single_head)
        if sinks is not None:
            self.sinks = set_sinks(p, self.taken(sinks, "sinks"))
        if key_lengths is not None:
            self.key_lengths = set_integers(&p.key_lengths, p, self.taken(key_lengths, "key_lengths"), "key_lengths",
                                            0, p.seqlen_k)
        if query_offset is not None:
            self.query_offset = set_integers(&p.query_offset, p, self.taken(query_offset, "query_offset"),
                                             "query_offset", -FARTHEST, FARTHEST)
        return 0

    cdef int set_dropout(self, object dropout, object seed) except -1:
        if seed is None and type(dropout) is float and dropout == 0.0:
            return 0
        self.problem.dropout, self.problem.seed = checked_dropout(dropout, seed)
        return 0

    cdef int read_scores(self, dict scores) except -1:
        """`set_scores` from a dict, in which a keyword that was not given is not there."""
        return self.set_scores(
            scores.get("scale"), scores.get("causal", False), scores.get("query_offset"), scores.get("window"),
            scores.get("mask"), scores.get("bias"), scores.get("alibi_slopes"), scores.get("softcap"),
            scores.get("sinks"), scores.get("key_lengths"), scores.get("num_threads"),
        )

    cdef int result_dims(self, int64_t columns, cnp.npy_intp *dims) noexcept:
        """(..., H, Sq, columns), or (total, H, columns), without the last axis if columns is -1; how many they are."""
        cdef const fa_problem *p = &self.problem
        cdef int ndim = 0, axis
        if self.packed:
            dims[0] = self.query.shape[0]
            dims[1] = p.num_heads
            ndim = 2
        else:
            for axis in range(p.batch_ndim):
                dims[axis] = p.batch_shape[axis]
            ndim = p.batch_ndim
            if not self.single_head:
                dims[ndim] = p.num_heads
                ndim += 1
            dims[ndim] = p.seqlen_q
            ndim += 1
        if columns >= 0:
            dims[ndim] = columns
            ndim += 1
        return ndim

    cdef cnp.ndarray new_array(self, cnp.dtype dtype, int64_t columns, cnp.ndarray like=None):
        cdef cnp.npy_intp dims[MAX_AXES]
        cdef int ndim = self.result_dims(columns, dims)
        return self.empty(ndim, dims, dtype, like)

    cdef cnp.ndarray empty(self, int ndim, cnp.npy_intp *dims, cnp.dtype dtype, cnp.ndarray like):
        """A new array, or the array of a new tensor, with the axes in memory in the order of those of `like`."""
        cdef cnp.npy_intp strides[MAX_AXES]
        cdef int order[MAX_AXES]
        cdef cnp.npy_intp stride = dtype.itemsize
        cdef int axis
        cdef bint c_order = like is None or cnp.PyArray_IS_C_CONTIGUOUS(like)
        if c_order and self.table == NULL:
            Py_INCREF(dtype)  # the new array takes it over
            return PyArray_Empty(ndim, dims, dtype, 0)
        for axis in range(ndim):
            order[axis] = axis
        if not c_order:
            sort_axes(order, ndim, like)
        if self.table != NULL:
            return new_tensor(self.table, ndim, dims, dtype, order)
        for axis in range(ndim - 1, -1, -1):
            strides[order[axis]] = stride
            stride *= dims[order[axis]]
        Py_INCREF(dtype)
        return PyArray_NewFromDescr(<PyTypeObject *>cnp.ndarray, dtype, ndim, dims, strides, NULL, 0, NULL)

    cdef cnp.dtype result_dtype(self, cnp.ndarray like):
        return float32 if self.unrounded and is_half(like) else like.descr

    cdef cnp.ndarray set_out(self, object out):
        cdef cnp.ndarray array
        cdef cnp.npy_intp dims[MAX_AXES]
        if out is None:
            array = self.new_array(self.result_dtype(self.query), self.problem.head_dim_v, self.query)
        else:
            array = self.target(out, "out")
            check_out_dtype(array, "out", self.query, "query", self.unrounded)
            check_out(array, "out", self.result_dims(self.problem.head_dim_v, dims), dims, self.inputs)
        self.describe_out(array)
        return array

    cdef void describe_out(self, cnp.ndarray array):
        cdef fa_problem *p = &self.problem
        if self.packed:
            describe_packed(&p.out, array)
        else:
            describe(&p.out, p, array, 3)
        p.out.dtype = FA_FLOAT32 if is_float32(array) else p.query.dtype

    cdef cnp.dtype lse_dtype(self):
        return np.dtype(np.float64 if self.problem.query.dtype == FA_FLOAT64 else np.float32)

    cdef cnp.ndarray set_lse(self):
        cdef cnp.ndarray array = self.new_array(self.lse_dtype(), -1)
        self.describe_lse(array)
        return array

    cdef void describe_lse(self, cnp.ndarray array):
        cdef fa_problem *p = &self.problem
        if self.packed:
            describe_packed(&p.lse, array)
        else:
            describe(&p.lse, p, array, 2)
        p.lse.dtype = FA_FLOAT64 if p.query.dtype == FA_FLOAT64 else FA_FLOAT32

    cdef tuple set_result_before(self, object add_to):
        """Results go to where one over other keys is, which they join."""
        cdef cnp.ndarray array, lse
        cdef cnp.npy_intp dims[MAX_AXES]
        if not isinstance(add_to, (tuple, list)) or len(add_to) != 2:
            _checks.refuse_as_result(add_to)
        array, lse = self.target(add_to[0], "add_to[0]"), self.target(add_to[1], "add_to[1]")
        for name, each in (("add_to[0]", array), ("add_to[1]", lse)):
            if each.dtype != self.lse_dtype() or not each.dtype.isnative:
                raise TypeError(f"{name} has dtype {each.dtype}; accepted is {self.lse_dtype()}"
                                f"{', as of unrounded=True' if is_half(self.query) else ''}")
        check_out(array, "add_to[0]", self.result_dims(self.problem.head_dim_v, dims), dims, self.inputs)
        check_out(lse, "add_to[1]", self.result_dims(-1, dims), dims, self.inputs | {"add_to[0]": array})
        _checks.refuse_plus_infinity("add_to[1]", lse)
        self.describe_out(array)
        self.describe_lse(lse)
        self.problem.adds = True
        return array, lse

    cdef cnp.ndarray set_weights(self):
        cdef fa_problem *p = &self.problem
        cdef cnp.ndarray array = self.new_array(self.query.descr, p.seqlen_k)
        memset(cnp.PyArray_DATA(array), 0, cnp.PyArray_NBYTES(array))
        describe(&p.weights, p, array, 3)
        p.weights.dtype = p.query.dtype
        return array


# threading's idents may be those of greenlets; to ask the system for its own in each call would show.
cdef unsigned long main_thread_ident = 0  # 0: the main thread has not called yet
cdef unsigned long main_thread_native_id = threading.main_thread().native_id


def forget_main_thread():
    """A child's main thread is the one that forked."""
    global main_thread_ident, main_thread_native_id
    main_thread_ident = 0
    main_thread_native_id = PyThread_get_thread_native_id()


after_fork_in_child(forget_main_thread)


cdef bint in_main_thread() noexcept:
    """Whether Python runs signal handlers in this thread."""
    global main_thread_ident
    cdef unsigned long ident = PyThread_get_thread_ident()
    if main_thread_ident == 0 and PyThread_get_thread_native_id() == main_thread_native_id:
        main_thread_ident = ident
    return ident == main_thread_ident


cdef c_bool interrupted() noexcept with gil:
    return PyErr_CheckSignals() != 0


cdef int raise_pending() except -1:
    """Lets the exception that `interrupted` met go on its way."""
    return -1


ctypedef fa_status (*fa_pass)(const fa_problem *problem) noexcept nogil


cdef int raise_for(fa_status status) except -1:
    if status == FA_NO_MEMORY:
        raise MemoryError("no memory for the scratch of a thread")
    if status == FA_INTERRUPTED:
        raise_pending()
    return 0


cdef int run(Call call, fa_pass compute) except -1:
    cdef fa_status status
    if in_main_thread():
        call.problem.interrupted = interrupted
    with nogil:
        status = compute(&call.problem)
    return raise_for(status)


cdef object compute(Call call, object out, object add_to, bint return_lse, bint return_weights):
    """The results of a call of which all else is set."""
    cdef cnp.ndarray result
    cdef cnp.ndarray lse = None
    if add_to is None:
        result = call.set_out(out)
        if return_lse:
            lse = call.set_lse()
    else:
        _checks.refuse_beside_add_to(out, return_weights)
        result, lse = call.set_result_before(add_to)
    cdef cnp.ndarray weights = call.set_weights() if return_weights else None
    run(call, fa_forward)
    if weights is None and not return_lse:
        return call.given(result)
    return tuple([call.given(x) for x in (result, lse, weights) if x is not None])


def attention(query, key, value, *, scale=None, causal=False, query_offset=None, window=None, mask=None, bias=None,
              alibi_slopes=None, softcap=None, sinks=None, key_lengths=None, dropout=0.0, seed=None, out=None,
              add_to=None, bint unrounded=False, bint return_lse=False, bint return_weights=False, num_threads=None):
    """Exact multi-head attention, ``softmax(query @ key.T * scale + bias) @ value``.

    The order of the axes is (batch, heads, seqlen, head_dim). Arrays in the order (batch, seqlen, heads, head_dim)
    are passed as ``x.swapaxes(1, 2)``: no shape can tell that they are not meant as they come, and where they fit
    they are computed with. `plan` shows what each axis is taken for.

    Scores are computed in the order: ``q·k * scale``, softcap, bias, ALiBi, then whatever hides a key
    (``mask``, ``causal``, ``window``, ``key_lengths``), then the softmax, which a sink joins. All
    keywords compose. A key that is hidden contributes nothing, not even if it or its value is NaN.
    The score matrix is never stored; memory beyond the results is at most 1 MiB a thread, and less than a
    twentieth of the keys' where few query rows share long keys.

    Parameters
    ----------
    query : array_like, shape (..., H, Sq, D)
        float32, float64, float16 or bfloat16 (of ml_dtypes), of any strides. ``D`` is at most 512.
        Axis -3 is heads; those left of it are batch axes, which broadcast. 2-D arrays are one head.
    key : array_like, shape (..., Hkv, Sk, D)
        ``H`` must be a multiple of ``Hkv``; query head ``h`` reads key head ``h // (H // Hkv)``. In
        query's dtype, or float16 or bfloat16 under a float32 query.
    value : array_like, shape (..., Hkv, Sk, Dv)
        In key's dtype. ``Dv`` is at most 512.
    scale : float, optional
        Any finite number, 0 and negative ones included; default ``1 / sqrt(D)``.
    causal : bool
        Whether the query at position ``p`` sees key ``j`` only if ``j <= p``.
    query_offset : int or array_like of int, optional
        Position of query row 0, or one for each batch item; row ``i`` is at ``i + query_offset``.
        Default ``Sk - Sq`` (``key_lengths - Sq``): the last query sees the last key. 0 is the
        alignment of PyTorch and ONNX.
    window : (left, right), optional
        The query at ``p`` sees key ``j`` only if ``p - left <= j <= p + right``; None is unbounded.
    mask : array_like of bool, broadcastable to (..., H, Sq, Sk), optional
        True where a query may see a key. It broadcasts as NumPy does, from the last axis on: (Sq, Sk), also where
        Sq is the batch's size. One of (batch, Sk), for padding, is given as ``mask[:, None, None, :]``; (1, Sk) hides
        the same keys from all, whichever of the two it is meant as.
    bias : array_like of floats, broadcastable to (..., H, Sq, Sk), optional
        Added to the scores. -inf hides the key.
    alibi_slopes : array_like, shape (H,) or (..., H), optional
        ``-slope * abs(p - j)`` is added to the scores [3]_.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``. Must be greater than 0.
    sinks : array_like, shape (H,), optional
        One more logit a head, neither scaled nor capped, which takes part in the softmax but has no
        value: weights then sum to less than 1.
    key_lengths : int or array_like of int, broadcastable to the batch shape, optional
        Keys from there on do not exist, and are not read.
    dropout : float
        The share of the weights that is dropped, from 0 to below 1, for training; rounded to a multiple of 2**-16. The
        others are divided by ``1 - dropout``. Neither lse nor a sink's part changes.
    seed : int, optional
        From 0 to 2**64 - 1, and needed with `dropout`: which weights are dropped. It depends on the seed, the batch
        item, the head, the query's position and the key alone, by Philox4x32-10 [4]_; give another for each call.
    out : ndarray, shape (..., H, Sq, Dv), optional
        Where to store the result: in query's dtype, or float32 where that is half, of any strides, apart from the
        inputs in memory.
    add_to : (out, lse), optional
        What a call with ``return_lse=True`` and ``unrounded=True`` returned for the same queries and other keys, and
        where to store the results: over the keys of both, as `merge` would make them, in one pass. A sink must take
        part in one of the calls only.
    unrounded : bool
        Whether the result for a float16 or bfloat16 query stays in float32, in which it is accumulated: as one of
        several results for `merge`, after which it is rounded once.
    return_lse, return_weights : bool
        Whether to return the log-sum-exp of each row's scores, and the attention weights, too. Weights
        take memory and a second pass.
    num_threads : int, optional
        At most this many, and no more than the CPUs that the process may use; default `get_num_threads`. Results
        are the same to the last bit for any.

    Returns
    -------
    out : ndarray, shape (..., H, Sq, Dv)
        In query's dtype. 0 for a query that sees no key. float16 and bfloat16 are accumulated in
        float32, and rounded at the end, if at all; bfloat16 probabilities are rounded before they meet the values
        where the CPU multiplies bfloat16 by itself. Its axes lie in memory in the order of query's, as ``order="K"``
        of NumPy has them: of ``x.swapaxes(1, 2)``, where x is (batch, seq, heads, dim) in C order, comes a result
        that is in C order when it is swapped back.
    lse : ndarray, shape (..., H, Sq)
        Natural logarithm; float64 for float64, else float32. -inf for a query that sees no key, or its
        sink. Returned with ``return_lse``.
    weights : ndarray, shape (..., H, Sq, Sk)
        In query's dtype; with `dropout`, those that are left. Returned with ``return_weights``.

    Raises
    ------
    TypeError
        A dtype or kind that is not accepted.
    ValueError
        A shape or a value that is not accepted, or `out` or `add_to` that overlaps an input.
    MemoryError
        No memory for a result or for scratch.
        In each of these cases nothing has been written.
    KeyboardInterrupt
        After Ctrl-C, within a fraction of a second; `out` is then partly written, and so is what `add_to` holds.

    See Also
    --------
    attention_varlen : Packed sequences of different lengths.
    attention_backward : Its gradients.
    KVCache.attention : To keys and values in a cache.
    plan : What a call would do.
    reference.attention : The definition, in plain NumPy.

    Notes
    -----
    Arrays may all be tensors of PyTorch (2.13 or later) in the CPU's memory, or of another library that has DLPack's
    exchange table: these are read in place, and so are masks and lengths, and results are such tensors, too; bfloat16
    then needs no ml_dtypes. A tensor that requires a gradient is refused: `fastattn.torch` has functions with one. Of
    objects that have ``__dlpack__`` alone the results are arrays.

    The method is the online softmax [1]_ over blocks of keys, fused with both products as in [2]_, with
    queries in the lanes of vector registers.

    The result is the same to the last bit for any number of threads, whatever else is in the batch, and however
    the batch or the heads are cut into calls. It need not be for another number of query rows: few rows are
    computed in another way than many, so a row decoded alone can differ by rounding errors from the same row of
    a prefill. Nor need it be on another instruction set.

    References
    ----------
    .. [1] Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
    .. [2] Dao, Fu, Ermon, Rudra and Ré, "FlashAttention", 2022; Dao, "FlashAttention-2", 2023.
    .. [3] Press, Smith and Lewis, "Train Short, Test Long", 2021.
    .. [4] Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 2, 8, 100, 64), dtype=np.float32)
    >>> fastattn.attention(query, key, value, causal=True).shape
    (2, 8, 100, 64)
    >>> out, weights = fastattn.attention(query, key, value, window=(2, 0), return_weights=True)
    >>> int(np.count_nonzero(weights[0, 0, 50]))
    3
    """
    cdef Call call = Call.__new__(Call)
    if out is not None or add_to is not None:
        call.inputs = {}
    call.set_arrays(query, key, value)
    call.set_scores(scale, causal, query_offset, window, mask, bias, alibi_slopes, softcap, sinks, key_lengths,
                    num_threads)
    call.set_dropout(dropout, seed)
    call.unrounded = unrounded
    return compute(call, out, add_to, return_lse, return_weights)


# `attention` as it is called: itself, and a function before it that looks at the arguments if it raised a TypeError.
# The right call passes through without a reference counted.

cdef extern from "Python.h":
    ctypedef PyObject *(*PyCFunction)(PyObject *, PyObject *)
    ctypedef struct PyMethodDef:
        const char *ml_name
        PyCFunction ml_meth
        int ml_flags
        const char *ml_doc
    int METH_FASTCALL
    PyCFunction PyCFunction_GetFunction(PyObject *)
    int PyCFunction_GetFlags(PyObject *)
    object PyCFunction_NewEx(PyMethodDef *, PyObject *, PyObject *)
    bint PyErr_ExceptionMatches(PyObject *) noexcept
    void PyErr_Fetch(PyObject **, PyObject **, PyObject **) noexcept
    void PyErr_Restore(PyObject *, PyObject *, PyObject *) noexcept

# Which of the two calling conventions Cython takes depends on the Python that it builds for.
ctypedef PyObject *(*tuple_call)(PyObject *, PyObject *, PyObject *) noexcept
ctypedef PyObject *(*vector_call)(PyObject *, PyObject *const *, Py_ssize_t, PyObject *) noexcept

cdef object attention_itself = attention
cdef PyCFunction attention_function = PyCFunction_GetFunction(<PyObject *>attention_itself)


cdef PyObject *attention_by_tuple(PyObject *self, PyObject *args, PyObject *keywords) except NULL:
    cdef PyObject *result = (<tuple_call>attention_function)(self, args, keywords)
    if result == NULL:
        explain_type_error(len(<tuple>args), keywords)
    return result


cdef PyObject *attention_by_vector(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                   PyObject *names) except NULL:
    cdef PyObject *result = (<vector_call>attention_function)(self, args, count, names)
    if result == NULL:
        explain_type_error(count, names)
    return result


cdef int explain_type_error(Py_ssize_t count, PyObject *keywords) except -1:
    """Put another in the place of the TypeError that is set, if the arguments were too many or of other names."""
    cdef PyObject *kind = NULL
    cdef PyObject *error = NULL
    cdef PyObject *traceback = NULL
    if not PyErr_ExceptionMatches(<PyObject *>TypeError):
        return 0
    PyErr_Fetch(&kind, &error, &traceback)
    better = _arguments.misfit_of(attention_itself, count, <object>keywords if keywords != NULL else ())
    if better is None:
        PyErr_Restore(kind, error, traceback)
        return 0
    Py_XDECREF(kind)
    Py_XDECREF(error)
    Py_XDECREF(traceback)
    raise better


cdef bytes attention_doc = f"attention{attention.__text_signature__}\n--\n\n{attention.__doc__}".encode()
cdef PyMethodDef attention_def = PyMethodDef(
    b"attention", NULL, PyCFunction_GetFlags(<PyObject *>attention_itself), attention_doc
)
if attention_def.ml_flags & METH_FASTCALL:
    attention_def.ml_meth = <PyCFunction>attention_by_vector
else:
    attention_def.ml_meth = <PyCFunction>attention_by_tuple
attention_module = "fastattn"
attention = PyCFunction_NewEx(&attention_def, NULL, <PyObject *>attention_module)


def top_keys(query, key, k, dict scores not None, bint return_totals):
    # Attention to values of no columns: scores and their softmax are all there is to compute.
    cdef Call call = Call.__new__(Call)
    call.set_arrays(query, key, None, of_no_columns=True)
    call.read_scores(scores)
    cdef fa_problem *p = &call.problem
    p.top_count = top_count(k)
    call.set_out(None)
    cdef cnp.ndarray indices = call.new_array(np.dtype(np.int64), p.top_count)
    cdef cnp.ndarray weights = call.new_array(call.query.descr, p.top_count)
    cdef cnp.ndarray column_sums = None
    describe(&p.top_indices, p, indices, 3)
    describe(&p.top_weights, p, weights, 3)
    p.top_weights.dtype = p.query.dtype
    if return_totals:
        *rows, _ = score_shape(p, call.single_head)
        column_sums = np.zeros((*rows[:len(rows) - 1], p.seqlen_k), np.int64)
        describe(&p.column_sums, p, column_sums, 2)
        # The largest total is the number of rows; it must stay below 2**63.
        p.fixed_point_scale = 2.0 ** (61 - int(p.seqlen_q).bit_length())
        p.column_sums.col, p.column_sums.row = p.column_sums.row, 0
    run(call, fa_forward)
    if not return_totals:
        return call.given(indices), call.given(weights)
    dtype = np.float64 if p.query.dtype == FA_FLOAT64 else np.float32
    totals = (column_sums / p.fixed_point_scale).astype(dtype)
    return call.given(indices), call.given(weights), call.given(totals)


cdef int64_t top_count(object k) except -1:
    if isinstance(k, (bool, np.bool_)) or not hasattr(k, "__index__"):
        raise TypeError(f"k must be an int, not {k!r}")
    count = k.__index__()
    if not 1 <= count <= MAX_TOP_KEYS:
        raise ValueError(f"k must be from 1 to {MAX_TOP_KEYS}, but is {count}")
    return count


def attention_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, dict scores not None, dropout, seed, out,
                     add_to, bint unrounded, bint return_lse):
    cdef Call call = Call.__new__(Call)
    if out is not None or add_to is not None:
        call.inputs = {}
    call.set_packed_arrays(query, key, value, cu_seqlens_q, cu_seqlens_k)
    call.read_scores(scores)
    call.set_dropout(dropout, seed)
    call.unrounded = unrounded
    return compute(call, out, add_to, return_lse, False)


def attention_paged(query, cu_seqlens_q, cnp.ndarray key_pages not None, cnp.ndarray value_pages not None,
                    cnp.ndarray key_scales, cnp.ndarray value_scales, cnp.ndarray page_table not None,
                    cnp.ndarray lengths not None, tuple scores not None, out, bint unrounded, bint return_lse,
                    bint return_weights):
    if return_weights and cu_seqlens_q is not None:
        raise ValueError("return_weights and cu_seqlens_q cannot be given together: the rows see different keys")
    cdef Call call = Call.__new__(Call)
    if out is not None:
        call.inputs = {"the cache's keys": key_pages, "the cache's values": value_pages}
        if key_scales is not None:
            call.inputs |= {"the cache's key scales": key_scales, "the cache's value scales": value_scales}
    call.set_paged_arrays(query, cu_seqlens_q, key_pages, value_pages, key_scales, value_scales, page_table, lengths)
    scale, causal, query_offset, window, alibi_slopes, softcap, sinks, num_threads = scores
    call.set_scores(scale, causal, query_offset, window, None, None, alibi_slopes, softcap, sinks, None, num_threads)
    call.unrounded = unrounded
    return compute(call, out, None, return_lse, return_weights)


# --- merging --------------------------------------------------------------------------------------


cdef void describe_result_rows(fa_array *view, const fa_problem *axes, cnp.ndarray array, int core_ndim):
    describe(view, axes, array, core_ndim)
    view.dtype = <fa_dtype>float_dtype(array, "a result")


def check_merged_out(cnp.ndarray array not None, tuple shape, list outs, list lses):
    """Whether the merge of `outs` can be stored in the array, which may be one of them."""
    cdef cnp.ndarray first = outs[0]
    cdef cnp.npy_intp dims[MAX_AXES]
    for axis, size in enumerate(shape):
        dims[axis] = size
    if not (is_half(array) and is_float32(first)):
        check_out_dtype(array, "out", first, "outs[0]", False, ", or a half type" if is_float32(first) else "")
    inputs = {f"lses[{i}]": lse for i, lse in enumerate(lses)}
    inputs |= {f"outs[{i}]": x for i, x in enumerate(outs) if not is_same_view(array, x)}
    check_out(array, "out", len(shape), dims, inputs)


cdef bint is_same_view(cnp.ndarray a, cnp.ndarray b):
    """Whether each element has the same place in memory in both."""
    return (cnp.PyArray_DATA(a) == cnp.PyArray_DATA(b) and same_dtype(a, b) and shape_of(a) == shape_of(b)
            and (<object>a).strides == (<object>b).strides)


def merge(list outs, list lses, cnp.ndarray out not None, cnp.ndarray lse not None, num_threads):
    """Stores in `out` and `lse` the merge of what has been checked, and broadcasts to them."""
    cdef fa_merge_problem m
    cdef fa_problem axes  # of which `describe` asks the number of batch axes
    cdef Py_ssize_t n = len(outs), i
    cdef int ndim = cnp.PyArray_NDIM(lse), axis
    cdef bytearray memory = bytearray(2 * n * sizeof(fa_array))
    cdef fa_array *views = <fa_array *><char *>memory
    cdef fa_status status
    memset(&m, 0, sizeof(m))
    memset(&axes, 0, sizeof(axes))
    m.batch_ndim = axes.batch_ndim = max(ndim - 2, 0)
    for axis in range(m.batch_ndim):
        m.batch_shape[axis] = cnp.PyArray_DIM(lse, axis)
    m.num_heads = cnp.PyArray_DIM(lse, ndim - 2) if ndim > 1 else 1
    m.seqlen = cnp.PyArray_DIM(lse, ndim - 1) if ndim > 0 else 1
    m.columns = cnp.PyArray_DIM(out, ndim)
    for i in range(n):
        describe_result_rows(&views[i], &axes, outs[i], 3)
        describe_result_rows(&views[n + i], &axes, lses[i], 2)
    describe_result_rows(&m.out, &axes, out, 3)
    describe_result_rows(&m.lse, &axes, lse, 2)
    m.num_sets, m.outs, m.lses = n, views, views + n
    m.num_threads = fa_get_num_threads() if num_threads is None else thread_count(num_threads)
    if in_main_thread():
        m.interrupted = interrupted
    with nogil:
        status = fa_merge(&m)
    raise_for(status)


# --- gradients ------------------------------------------------------------------------------------


cdef class Gradients:
    """Of a call: what comes of its results, and where the gradients of its arguments go."""

    cdef fa_gradients gradients
    cdef Call call
    cdef cnp.ndarray grad_out, out, lse, grad_lse
    cdef list results  # of query, key and value
    cdef list targets  # where each is to go, or None
    cdef cnp.ndarray delta

    cdef cnp.ndarray checked(self, object x, str name, bint columns):
        """An argument that has the shape of `out`, or of `lse`."""
        cdef cnp.ndarray array = self.call.taken(x, name)
        cdef cnp.npy_intp dims[MAX_AXES]
        cdef int ndim = self.call.result_dims(self.call.problem.head_dim_v if columns else -1, dims)
        if not has_shape(array, ndim, dims):
            raise ValueError(f"{name} has shape {shape_of(array)}; accepted is {as_shape(ndim, dims)}, that of what "
                             f"attention returns as {'out' if columns else 'lse'}")
        if name == "out":
            check_out_dtype(array, "out", self.call.query, "query", False)
        elif columns and array.dtype != self.call.query.dtype:
            raise TypeError(f"{name} has dtype {array.dtype}; accepted is that of query, {self.call.query.dtype}")
        if not columns and array.dtype.type not in (np.float32, np.float64):
            raise TypeError(f"{name} has dtype {array.dtype}; accepted are float32 and float64: lse as attention "
                            "returned it, and its gradient, which fewer bits would make wrong")
        return array

    cdef int describe_result(self, fa_array *view, cnp.ndarray array, str name, int core_ndim) except -1:
        view.dtype = <fa_dtype>float_dtype(array, name)
        if self.call.packed:
            describe_packed(view, array)
        else:
            describe(view, &self.call.problem, array, core_ndim)
        return 0

    cdef int set_results(self, object grad_out, object out, object lse, object grad_lse) except -1:
        """What the forward pass has returned, and its gradients."""
        cdef fa_problem *p = &self.call.problem
        self.grad_out = self.checked(grad_out, "grad_out", True)
        self.out = self.checked(out, "out", True)
        self.lse = self.checked(lse, "lse", False)
        self.describe_result(&self.gradients.grad_out, self.grad_out, "grad_out", 3)
        self.describe_result(&p.out, self.out, "out", 3)
        self.describe_result(&p.lse, self.lse, "lse", 2)
        if grad_lse is not None:
            self.grad_lse = self.checked(grad_lse, "grad_lse", False)
            self.describe_result(&self.gradients.grad_lse, self.grad_lse, "grad_lse", 2)
        p.gradients = &self.gradients
        return 0

    cdef cnp.ndarray new_gradient(self, fa_array *view, cnp.ndarray like, str name, object given):
        """Where the gradient of an array goes: `given`, or a new array. A batch that it was broadcast to has one for
        each item, in the precision of sums."""
        cdef fa_problem *p = &self.call.problem
        cdef cnp.ndarray array
        cdef tuple shape = shape_of(like)
        if not self.call.packed and not self.call.single_head:
            shape = (*batch_shape_of(p), *shape[len(shape) - 3:])
        if shape != shape_of(like):
            array = np.zeros(shape, np.float64 if p.query.dtype == FA_FLOAT64 else np.float32)
        elif given is not None:
            array = given
        else:
            array = self.call.empty(cnp.PyArray_NDIM(like), cnp.PyArray_DIMS(like), self.call.result_dtype(like), like)
        self.describe_result(view, array, name, 3)
        return array

    cdef int check_grads(self, list given) except -1:
        cdef Call call = self.call
        cdef dict arrays = {"query": call.query, "key": call.key, "value": call.value}
        cdef cnp.ndarray of
        for (name, like), array in zip(arrays.items(), given, strict=True):
            if array is not None:
                of = like
                check_out_dtype(array, f"grads' {name}", of, name, call.unrounded)
                check_out(array, f"grads' {name}", cnp.PyArray_NDIM(of), cnp.PyArray_DIMS(of), call.inputs)
                call.inputs[f"grads' {name}"] = array
        return 0

    cdef int clear_keys_without_queries(self) except -1:
        """Keys of which there is no work, once there can be no error any more."""
        cdef const fa_problem *p = &self.call.problem
        if p.num_heads == 0 or p.seqlen_q == 0:
            for array in self.results:
                array.fill(0)
        elif self.call.packed:
            bounds = self.call.cu_seqlens_k
            for b in np.flatnonzero(np.diff(self.call.cu_seqlens_q) == 0):
                for array in self.results[1:]:
                    array[bounds[b]:bounds[b + 1]] = 0
        return 0

    cdef int set_grads(self, object grads) except -1:
        cdef Call call = self.call
        cdef fa_gradients *g = &self.gradients
        cdef list given = [None, None, None] if grads is None else _checks.as_grads(grads)
        names = ("query", "key", "value")
        self.targets = [None if x is None else call.target(x, f"grads' {name}")
                        for name, x in zip(names, given, strict=True)]
        self.check_grads(self.targets)
        self.results = [
            self.new_gradient(&g.grad_query, call.query, "query", self.targets[0]),
            self.new_gradient(&g.grad_key, call.key, "key", self.targets[1]),
            self.new_gradient(&g.grad_value, call.value, "value", self.targets[2]),
        ]
        return 0

    cdef int set_delta(self) except -1:
        self.delta = self.call.new_array(np.dtype(np.float64), -1)
        self.describe_result(&self.gradients.delta, self.delta, "delta", 2)
        return 0

    cdef cnp.ndarray new_bias_gradient(self):
        cdef fa_array *view = &self.gradients.grad_bias
        cdef cnp.ndarray array = np.zeros(shape_of(self.call.bias), self.call.bias.dtype)
        view.dtype = self.call.problem.bias.dtype
        describe(view, &self.call.problem, array, 3)
        return array

    cdef cnp.ndarray sink_gradients(self, object sinks):
        cdef cnp.ndarray lse = self.lse, delta = self.delta
        if self.call.packed:
            lse, delta = lse.T, delta.T
        elif self.call.single_head:
            lse, delta = lse[None], delta[None]
        return _checks.sink_gradients(self.call.array_of(sinks, "sinks"), lse, delta)

    cdef list summed(self):
        """The results, in which the batch axes along which an array was broadcast are summed."""
        cdef list arrays = [self.call.query, self.call.key, self.call.value]
        return [_checks.sum_to(result, array.shape, self.call.result_dtype(array) if out is None else out.dtype, out)
                for result, array, out in zip(self.results, arrays, self.targets, strict=True)]


def attention_backward(grad_out, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, dict scores not None,
                       dropout, seed, grad_lse, bint unrounded, bint return_grad_bias, bint return_grad_sinks, grads):
    cdef Call call = Call.__new__(Call)
    call.unrounded = unrounded
    cdef Gradients gradients = Gradients.__new__(Gradients)
    call.inputs = {}
    gradients.call = call
    if cu_seqlens_q is None:
        call.set_arrays(query, key, value)
    else:
        call.set_packed_arrays(query, key, value, cu_seqlens_q, cu_seqlens_k)
    call.read_scores(scores)
    call.set_dropout(dropout, seed)
    gradients.set_results(grad_out, out, lse, grad_lse)
    gradients.set_grads(grads)
    if return_grad_sinks:
        gradients.set_delta()
    bias = gradients.new_bias_gradient() if return_grad_bias else None
    if return_grad_bias:  # first: if it lacks memory, nothing has been written to grads
        run(call, fa_bias_gradient)
    run(call, fa_backward)
    gradients.clear_keys_without_queries()
    results = gradients.summed()
    if return_grad_bias:
        results.append(bias)
    if return_grad_sinks:
        results.append(gradients.sink_gradients(scores["sinks"]))
    return tuple([call.given(result) for result in results])


cdef tuple axes_of(cnp.ndarray array):
    """Batch axes, heads, seqlen and head_dim."""
    *batch, heads, seqlen, head_dim = (1, *shape_of(array)) if array.ndim == 2 else shape_of(array)
    return tuple(batch), heads, seqlen, head_dim


def plan(query, key, value, dict scores not None, dropout, seed, bint return_weights, bint backward):
    cdef Call call = Call.__new__(Call)
    cdef Gradients gradients = Gradients.__new__(Gradients)
    call.set_arrays(query, key, value)
    call.read_scores(scores)
    call.set_dropout(dropout, seed)
    cdef fa_problem *p = &call.problem
    cdef fa_plan chosen
    # Of the five products of the backward pass, three are over D and two over Dv.
    cdef int64_t multiply_adds = 3 * p.head_dim + 2 * p.head_dim_v if backward else p.head_dim + p.head_dim_v
    if backward:
        p.gradients = &gradients.gradients
    elif return_weights:
        p.weights.data = <char *>p  # there are some
        multiply_adds += p.head_dim  # the scores once more
    if fa_plan_problem(p, &chosen) == FA_NO_MEMORY:
        raise MemoryError("no memory for the plan")
    return {
        "query": axes_of(call.query),
        "key": axes_of(call.key),
        "value": axes_of(call.value),
        "isa": chosen.isa.decode(),
        "path": chosen.kernel.decode() + ("-decode" if chosen.is_decode else ""),
        "tile": (chosen.tile_rows, chosen.key_block),
        "splits": chosen.num_splits,
        "items": chosen.num_items,
        "threads": chosen.num_threads,
        "scratch_bytes": chosen.scratch_bytes,
        "shared_bytes": chosen.shared_bytes,
        "flops": 2 * multiply_adds * count_visible(
            score_shape(p, False),
            None if p.left == FA_UNBOUNDED else p.left,
            None if p.right == FA_UNBOUNDED else p.right,
            call.key_lengths,
            call.query_offset,
            call.mask,
        ),
    }


# --- XLA ------------------------------------------------------------------------------------------


# NumPy's dtypes by XLA's numbers.
cdef dict xla_dtypes = {number: np.dtype(name) for number, name in [
    (1, "?"), (2, "i1"), (3, "i2"), (4, "i4"), (5, "i8"), (6, "u1"), (7, "u2"), (8, "u4"), (9, "u8"),
    (10, "f2"), (11, "f4"), (12, "f8"),
]}
cdef enum:
    XLA_BF16 = 16


cdef cnp.ndarray view_of_buffer(const XLA_FFI_Buffer *buffer, bint writeable):
    """A buffer of XLA's as an array, for the time of a call."""
    cdef cnp.npy_intp dims[MAX_AXES]
    cdef int axis
    cdef cnp.dtype dtype = _tensors.bfloat16() if buffer.dtype == XLA_BF16 else xla_dtypes[buffer.dtype]
    if buffer.rank > MAX_AXES:
        raise ValueError(f"an array has {buffer.rank} axes; at most {MAX_AXES} are accepted")
    for axis in range(buffer.rank):
        dims[axis] = buffer.dims[axis]
    Py_INCREF(dtype)  # the new array takes it over
    return PyArray_NewFromDescr(
        <PyTypeObject *>cnp.ndarray, dtype, <int>buffer.rank, dims, NULL, buffer.data,
        cnp.NPY_ARRAY_CARRAY if writeable else cnp.NPY_ARRAY_CARRAY_RO, NULL,
    )


cdef list views_of_buffers(const XLA_FFI_Buffers *of, bint writeable):
    return [view_of_buffer(<const XLA_FFI_Buffer *>of.buffers[i], writeable) for i in range(of.size)]


cdef XLA_FFI_Error *xla_error(const XLA_FFI_CallFrame *frame, object failure) noexcept:
    cdef XLA_FFI_Error_Create_Args args
    cdef bytes message = b"the call failed, and so did saying why"  # NULL for an error would be success
    try:
        message = f"{type(failure).__name__}: {failure}".encode(errors="backslashreplace")
    except Exception:
        pass
    memset(&args, 0, sizeof(args))
    args.struct_size = sizeof(args)
    args.message = message
    args.errc = XLA_FFI_RESOURCE_EXHAUSTED if isinstance(failure, MemoryError) else XLA_FFI_INVALID_ARGUMENT
    return frame.api.Error_Create(&args)


cdef XLA_FFI_Error *handle_xla_call(XLA_FFI_CallFrame *frame) noexcept with gil:
    """Called by XLA: with a request for the version that this was written for, or with arrays and one attribute, which
    tells fastattn.jax what to compute."""
    cdef XLA_FFI_Metadata *metadata
    cdef const XLA_FFI_ByteSpan *attribute
    if frame.extension_start != NULL and frame.extension_start.type == XLA_FFI_Extension_Metadata:
        metadata = (<XLA_FFI_Metadata_Extension *>frame.extension_start).metadata
        metadata.api_version.major_version = XLA_FFI_MAJOR
        metadata.api_version.minor_version = XLA_FFI_MINOR
        metadata.traits = 0
        return NULL
    try:
        if frame.attrs.size != 1 or frame.attrs.types[0] != XLA_FFI_AttrType_STRING:
            raise ValueError("the call has no attribute that says what to compute")
        attribute = <const XLA_FFI_ByteSpan *>frame.attrs.attrs[0]
        xla_compute(attribute.ptr[:attribute.len], views_of_buffers(&frame.args, False),
                    views_of_buffers(&frame.rets, True))
    except BaseException as failure:
        return xla_error(frame, failure)
    return NULL


cdef object xla_compute = None


def xla_target(compute):
    """A capsule of the function to register with XLA, which calls ``compute(attribute, arguments, results)``."""
    global xla_compute
    xla_compute = compute
    return PyCapsule_New(<void *>handle_xla_call, "xla._CUSTOM_CALL_TARGET", NULL)


# --- the process ----------------------------------------------------------------------------------


compiler_version = COMPILER.decode()


def selected_isa():
    return fa_selected_isa().decode()


def known_isas():
    """Return (name, what it needs, whether it is there) of each instruction set that has kernels, best first."""
    cdef fa_isa isa
    cdef int i = 0
    isas = []
    while fa_describe_isa(i, &isa):
        isas.append((isa.name.decode(), isa.needs.decode(), isa.is_supported))
        i += 1
    return isas


def available_isas():
    return [name for name, _, is_supported in known_isas() if is_supported]


def get_num_threads():
    return fa_get_num_threads()


def set_num_threads(num_threads):
    fa_set_num_threads(thread_count(num_threads))


def quota_cpus(root):
    return fa_quota_cpus(os.fsencode(root))


def assume_cpus(int cpus):
    fa_assume_cpus(cpus)


def measure_peak(dtype, num_threads=None):
    """Measure the rate of multiply-adds in registers: what no kernel can exceed.

    About 20 ms; the best of some slices, because other work on the machine only ever slows a slice.

    Parameters
    ----------
    dtype : dtype_like
        float32 and float16: float32 multiply-adds. float64: its own. bfloat16, by its name also without ml_dtypes:
        its tile or dot product where the instruction set in use has one, else float32 multiply-adds.
    num_threads : int, optional
        Default `get_num_threads`.

    Returns
    -------
    float
        FLOP/s; a multiply-add is two.

    Raises
    ------
    TypeError, ValueError
        A dtype that `attention` does not take, or not a number of threads.

    See Also
    --------
    measure_bandwidth : How fast the machine reads.
    plan : The FLOPs of a call.

    Examples
    --------
    >>> import fastattn
    >>> fastattn.measure_peak("float32") > 1e8
    True
    """
    cdef bint by_name = isinstance(dtype, str) and dtype == "bfloat16"  # which NumPy knows from ml_dtypes only
    cdef fa_dtype code = FA_BFLOAT16 if by_name else <fa_dtype>float_dtype(np.empty(0, dtype), "dtype")
    cdef int threads = fa_get_num_threads() if num_threads is None else thread_count(num_threads)
    cdef double rate
    with nogil:
        rate = fa_measure_peak(code, threads)
    return rate


def measure_limits(path, num_threads):
    """Return what the kernel of a plan's path does at most: FLOP/s, scores a second through the softmax, and whether
    it does both at a time."""
    kernel, _, kind = path.partition("-")
    cdef bytes name = kernel.encode()
    cdef char *kernel_name = name
    cdef bint is_decode = kind == "decode"
    cdef int threads = thread_count(num_threads)
    cdef fa_limits limits
    cdef bint known
    with nogil:
        known = fa_measure_limits(kernel_name, is_decode, threads, &limits)
    if not known:
        raise ValueError(f"path is {path!r}, which no plan has under the instruction set {selected_isa()}")
    return limits.flops, limits.scores, limits.runs_side_by_side


def measure_bandwidth(Py_ssize_t nbytes, num_threads=None):
    """Measure the rate at which that many bytes are read, again and again, from the cache or memory that holds them.

    Parameters
    ----------
    nbytes : int
        At least 1. More than the last cache holds: memory; less: the cache.
    num_threads : int, optional
        Default `get_num_threads`.

    Returns
    -------
    float
        Bytes/s, the best of sixteen passes.

    Raises
    ------
    TypeError, ValueError
        Not a number of bytes or of threads.

    See Also
    --------
    measure_peak : How fast the machine multiplies and adds.

    Examples
    --------
    >>> import fastattn
    >>> fastattn.measure_bandwidth(1 << 24) > 1e8
    True
    """
    if nbytes < 1:
        raise ValueError(f"nbytes must be at least 1, but is {nbytes}")
    cdef cnp.ndarray data = np.ones(nbytes + 63, np.uint8)
    cdef char *start = cnp.PyArray_BYTES(data)
    start += -<Py_ssize_t>start & 63  # whole lines: caches give those fastest
    cdef int threads = fa_get_num_threads() if num_threads is None else thread_count(num_threads)
    cdef double rate
    with nogil:
        rate = fa_measure_bandwidth(start, nbytes, threads)
    return rate


def select_isa_from_environment():
    name = os.environ.get("FASTATTN_ISA")
    if name and not fa_select_isa(name.encode()):
        raise RuntimeError(f"FASTATTN_ISA is {name!r}; this CPU has {', '.join(available_isas())}")


def set_split_mode_from_environment():
    modes = {"": FA_SPLIT_IF_FASTER, "0": FA_SPLIT_NEVER, "1": FA_SPLIT_IF_FASTER, "always": FA_SPLIT_ALWAYS}
    text = os.environ.get("FASTATTN_SPLIT", "").strip()
    if text not in modes:
        raise RuntimeError(f"FASTATTN_SPLIT is {text!r}; accepted are 0, 1 and always")
    fa_set_split_mode(modes[text])


def splits():
    return fa_splits()


def check_num_threads_from_environment():
    """C reads the number by itself, when it is first needed, and would take what is none for an unset variable."""
    text = os.environ.get("FASTATTN_NUM_THREADS", "").strip()
    if text and not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise RuntimeError(f"FASTATTN_NUM_THREADS is {text!r}; accepted is a whole number from 1 up")


select_isa_from_environment()
set_split_mode_from_environment()
check_num_threads_from_environment()
