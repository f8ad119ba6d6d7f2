"""How keys and values lie in the pages of a cache, and the memory that pages lie in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastattn._checks import HALF, Array, checked_integer, refuse_masked

# Page sizes are multiples of this: each part of a page is then a multiple of 64 bytes, whatever its dtype and
# head_dim, and a block of keys of the kernel lies within one page.
PAGE_STEP = 64
PAGE_SIZE = 256  # csrc/fastattn.h: FA_NARROW_KEYS
ALIGNMENT = 64
DTYPES = ("float32", *HALF, "int8")
MAX_HEAD_DIM = 512  # as in csrc/fastattn.h


def checked_page_size(page_size: int) -> int:
    number = checked_integer("page_size", page_size, PAGE_STEP)
    if number % PAGE_STEP:
        raise ValueError(f"page_size must be a multiple of {PAGE_STEP}, but is {number}")
    return number


def checked_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """bfloat16 is recognised by its name: ml_dtypes is never imported."""
    accepted = "accepted are float32, float16, bfloat16 (of ml_dtypes, which must have been imported) and int8"
    try:
        found = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype is {dtype!r}; {accepted}") from None
    if found.name not in DTYPES or not found.isnative:
        raise TypeError(f"dtype is {found}; {accepted}")
    return found


def store_bytes(store: Array, alignment: int) -> NDArray[np.uint8]:
    """Return the bytes of a store, or raise if pages cannot lie in it."""
    if not isinstance(store, np.ndarray):
        raise TypeError(f"store must be an ndarray, not {type(store).__name__}")
    refuse_masked("store", store)
    if store.dtype.hasobject:
        raise TypeError(f"store has dtype {store.dtype}; accepted is any that holds no Python objects")
    if not store.flags.c_contiguous:
        raise ValueError(f"store must be C-contiguous, but has shape {store.shape} and strides {store.strides}")
    if not store.flags.writeable:
        raise ValueError("store is read-only")
    if store.ctypes.data % alignment:
        raise ValueError(f"store must begin at a multiple of {alignment} bytes, but begins at {store.ctypes.data:#x}")
    return np.asarray(store).reshape(-1).view(np.uint8)


def new_store(nbytes: int) -> NDArray[np.uint8]:
    """Return memory whose pages begin at cache lines; it is not touched."""
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + nbytes]


# --- int8 -----------------------------------------------------------------------------------------


def quantized(name: str, x: Array) -> tuple[Array, Array]:
    """Return x / scale rounded to int8, and the scales: one for each token and head."""
    with np.errstate(all="ignore"):  # What float32 does not hold becomes inf, which is refused below.
        x = x.astype(np.float32, copy=False)
        largest = np.abs(x).max(axis=-1)
    if not np.isfinite(largest).all():
        raise ValueError(f"{name} holds NaN, or a number that is not finite in float32; int8 has no place for it")
    scales = largest / np.float32(127)
    divisor = np.where(scales == 0, np.float32(1), scales)[..., None]
    # A scale below the normal range is itself rounded, so that the quotient may exceed 127.
    return np.clip(np.rint(x / divisor), -127, 127).astype(np.int8), scales


# --- pages ----------------------------------------------------------------------------------------


def page_layout(
    num_kv_heads: int, head_dim: int, head_dim_v: int, dtype: np.dtype[Any], page_size: int
) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return dtype and shape of what lies in a page, in this order and without gaps."""
    rows = (num_kv_heads, page_size)
    parts: list[tuple[np.dtype[Any], tuple[int, ...]]] = [(dtype, (*rows, head_dim)), (dtype, (*rows, head_dim_v))]
    if dtype == np.int8:
        parts += [(np.dtype(np.float32), rows)] * 2
    return parts


def bytes_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def part_views(store: NDArray[np.uint8], parts: list[tuple[np.dtype[Any], tuple[int, ...]]]) -> list[Array]:
    """Return an array (num_pages, *shape) for each part, over a store of (num_pages, page_bytes)."""
    views: list[Array] = []
    offset = 0
    for dtype, shape in parts:
        within = np.empty(shape, dtype).strides
        strides = (store.strides[0], *within)
        views.append(np.ndarray((store.shape[0], *shape), dtype, store, offset, strides))
        offset += bytes_of(dtype, shape)
    return views
