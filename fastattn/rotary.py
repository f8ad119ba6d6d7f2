"""Rotary positions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from fastattn._checks import Array, as_array, check_dtype, checked_integer, checked_out

__all__ = ["RotaryOptions", "rotary"]

# Elements of x that are rotated at a time: what is computed on the way then stays in a core's cache.
ROTARY_BLOCK = 2**16

# Beyond it float64, in which angles are computed, does not tell neighbours apart.
MAX_POSITION = 2**53


class RotaryOptions(TypedDict, total=False):
    """Keywords of `rotary` that belong to a model."""

    base: float
    dim: int | None
    interleaved: bool


# --- rotary positions -----------------------------------------------------------------------------


def rotary(
    x: ArrayLike,
    positions: ArrayLike | None = None,
    *,
    base: float = 10000.0,
    dim: int | None = None,
    interleaved: bool = False,
    inverse: bool = False,
    out: Array | None = None,
) -> Array:
    """Rotary position embedding: rotate pairs of elements by angles that grow with the position.

    Pair ``i`` of a row at position ``p`` is rotated by ``p * base ** (-2 i / dim)``. A product of a rotated
    query and a rotated key then depends on their positions only by the difference [1]_.

    Parameters
    ----------
    x : array_like, shape (..., heads, seq, head_dim)
        float32, float64, float16 or bfloat16 (of ml_dtypes), of any strides. 2-D arrays are one head.
    positions : int or array_like of int, optional
        The position of the first row, or those of all rows, broadcastable to (..., seq): batch axes, then
        rows, the same for all heads. From -2**53 to 2**53; default 0.
    base : float
        Greater than 0.
    dim : int, optional
        Only the first `dim` elements of a row are rotated. Even, from 2 to head_dim; default head_dim.
    interleaved : bool
        Whether a pair is elements ``2 i`` and ``2 i + 1`` (RoFormer, GPT-J), or else elements ``i`` and
        ``i + dim / 2`` (GPT-NeoX, Llama).
    inverse : bool
        Whether to rotate back. As rotations have their transposes for inverses, this also makes the gradient of x of
        that of the result.
    out : ndarray, shape (..., heads, seq, head_dim), optional
        Where to store the result, in x's dtype: x itself, or memory apart from it.

    Returns
    -------
    ndarray, shape (..., heads, seq, head_dim)
        In x's dtype. Angles are computed in float64; float16 and bfloat16 are rotated in float32 and
        rounded once.

    Raises
    ------
    TypeError
        A dtype or kind that is not accepted.
    ValueError
        A shape or a value that is not accepted, or `out` that overlaps x without being x.
        In each of these cases nothing has been written.

    See Also
    --------
    MultiHeadAttention : The layer, which does so with its keyword ``rotary``.

    References
    ----------
    .. [1] Su, Lu, Pan, Murtadha, Wen and Liu, "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", 2021.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> query, key = np.random.default_rng(0).standard_normal((2, 8, 1, 64))
    >>> def score(p, q):
    ...     return (fastattn.rotary(query, p) * fastattn.rotary(key, q)).sum(axis=-1)
    >>> bool(np.allclose(score(7, 3), score(1007, 1003)))
    True
    """
    array = as_array("x", x)
    check_dtype("x", array)
    if array.ndim < 2:
        raise ValueError(f"x has shape {array.shape}; accepted is (..., heads, seq, head_dim), or (seq, head_dim)")
    rotary_dim = checked_rotary(array.shape[-1], base, dim, interleaved)
    if not isinstance(inverse, (bool, np.bool_)):
        raise TypeError(f"inverse must be a bool, not {inverse!r}")
    rows = checked_positions(positions, array.shape)
    result = np.empty(array.shape, array.dtype) if out is None else checked_out(out, array.shape, array.dtype)
    if not same_place(result, array):
        if np.shares_memory(result, array):
            raise ValueError("out overlaps x in memory, but is not x itself")
        result[..., rotary_dim:] = array[..., rotary_dim:]

    frequencies = float(base) ** (np.arange(0, rotary_dim, 2) / -rotary_dim)
    if inverse:
        frequencies = -frequencies
    low, high = (slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)) if interleaved else halves(rotary_dim)
    work = np.float64 if array.dtype == np.float64 else np.float32
    for block in row_blocks(array.shape):
        angles = rows[..., block, None] * frequencies
        if angles.ndim > 2:
            angles = np.expand_dims(angles, -3)
        rotate(array[..., block, :], result[..., block, :], low, high, angles, work)
    return result


def rotate(x: Array, out: Array, low: slice, high: slice, angles: Array, work: type[np.floating[Any]]) -> None:
    """Multiply the complex numbers x[low] + i x[high] by exp(i angles); out may be x."""
    cos, sin = np.cos(angles).astype(work), np.sin(angles).astype(work)
    real, imaginary = x[..., low].astype(work), x[..., high].astype(work)
    part = real * cos
    part -= imaginary * sin
    out[..., low] = part
    real *= sin
    imaginary *= cos
    imaginary += real
    out[..., high] = imaginary


def halves(dim: int) -> tuple[slice, slice]:
    return slice(0, dim // 2), slice(dim // 2, dim)


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Return slices of the axis of rows, over which a block of all else has about ROTARY_BLOCK elements."""
    seq = shape[-2]
    step = max(1, ROTARY_BLOCK * seq // max(math.prod(shape), 1))
    return (slice(begin, begin + step) for begin in range(0, seq, step))


def same_place(a: Array, b: Array) -> bool:
    """Return whether two arrays of one shape and dtype are the same elements in memory."""
    steps = ((i, j) for i, j, size in zip(a.strides, b.strides, a.shape, strict=True) if size > 1)
    return a.ctypes.data == b.ctypes.data and all(i == j for i, j in steps)


# --- checks ---------------------------------------------------------------------------------------


def checked_rotary(head_dim: int, base: float, dim: int | None, interleaved: bool) -> int:
    """Return how many elements of a row are rotated."""
    if not isinstance(interleaved, (bool, np.bool_)):
        raise TypeError(f"interleaved must be a bool, not {interleaved!r}")
    if not (isinstance(base, (int, float, np.integer, np.floating)) and 0 < base < math.inf):
        raise ValueError(f"base must be a finite number greater than 0, but is {base!r}")
    rotary_dim = head_dim if dim is None else checked_integer("dim", dim, 2, head_dim)
    if rotary_dim % 2:
        raise ValueError(f"dim must be even, but is {rotary_dim}, of a head_dim of {head_dim}")
    return rotary_dim


def checked_positions(positions: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    """Return the positions of the rows of x, (seq,) or (..., seq)."""
    seq = shape[-2]
    array = as_array("positions", 0 if positions is None else positions)
    large = array.dtype.kind == "O" and array.size > 0 and all(type(each) is int for each in array.flat)
    if array.dtype.kind not in "iu" and not large:
        raise TypeError(f"positions must be an int or an array of ints, but has dtype {array.dtype}")
    # Arrays of int64 would take microseconds to look through; at worst, beyond 2**53, their angles are not exact.
    if large or array.ndim == 0 or array.dtype == np.uint64:
        check_positions(array)
    if array.ndim == 0:
        return np.arange(int(array), int(array) + seq)
    rows = (*shape[:-3], seq)
    try:
        np.broadcast_to(array, rows)
    except ValueError:
        raise ValueError(f"positions has shape {array.shape}; accepted is one that broadcasts to {rows}") from None
    # Batch axes that it lacks stay away, so that angles are not computed again for each item.
    return np.broadcast_to(array, (*array.shape[:-1], seq))


def check_positions(array: Array) -> None:
    lowest, highest = (
        (int(array), int(array)) if array.ndim == 0 else (int(array.min(initial=0)), int(array.max(initial=0)))
    )
    if lowest < -MAX_POSITION or highest > MAX_POSITION:
        raise ValueError(f"positions must be from -2**53 to 2**53, which float64 tells apart, but holds {lowest} to "
                         f"{highest}")  # fmt: skip


def checked_options(options: RotaryOptions, head_dim: int) -> RotaryOptions:
    if not isinstance(options, Mapping):
        raise TypeError(f"rotary must be a dict of base, dim and interleaved, or None, not {options!r}")
    unknown = set(options) - {"base", "dim", "interleaved"}
    if unknown:
        raise TypeError(f"rotary has {', '.join(sorted(unknown))}; accepted are base, dim and interleaved")
    checked_rotary(head_dim, options.get("base", 10000.0), options.get("dim"), options.get("interleaved", False))
    return options.copy()
