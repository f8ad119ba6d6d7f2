"""What tensors of other libraries need of NumPy: bfloat16 without ml_dtypes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def bfloat16() -> np.dtype[Any] | None:
    """Return the dtype of ml_dtypes, or None if that is not installed."""
    try:
        import ml_dtypes
    except ImportError:
        return None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def is_bits(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "V" and dtype.type is np.void and dtype.itemsize == 2


def converted(array: Array, dtype: np.dtype[Any]) -> Array:
    """Convert, also from and to the bits of bfloat16 that stand for it without ml_dtypes."""
    if is_bits(array.dtype):
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if is_bits(dtype):
        return round_to_bits(array).view(dtype)
    return array.astype(dtype)


def round_to_bits(array: Array) -> NDArray[np.uint16]:
    """Make bits of bfloat16 of floats, to the nearest, ties to even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)
