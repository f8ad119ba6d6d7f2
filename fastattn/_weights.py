"""What a view is made of: weights, the keys that they belong to, queries and keys, each checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn import _tensors
from fastattn._checks import EPSILON, Array, as_array, check_dtype, checked_integer

Integers = NDArray[np.integer[Any]]


def checked_floats(weights: ArrayLike) -> Array:
    array = as_array("weights", weights)
    check_dtype("weights", array, native=False)
    if not 2 <= array.ndim <= 4:
        batch = (
            "; if its second axis is the batch, give one item, as weights[:, 0], or as [layer[0] for layer in weights]"
        )
        raise ValueError(
            f"weights has shape {array.shape}; accepted are (Sq, Sk), (heads, Sq, Sk) and (layers, heads, Sq, Sk)"
            f"{batch if array.ndim == 5 else ''}"
        )
    if 0 in array.shape:
        raise ValueError(f"weights has shape {array.shape}; at least one of everything is needed")
    return array


def place(shape: tuple[int, ...], flat: np.intp) -> str:
    """Say where an element or a row is, by the indices that the caller's own array has."""
    return f"weights[{', '.join(str(int(i)) for i in np.unravel_index(flat, shape))}]"


def precision_of(weights: Array) -> float:
    """Return the epsilon of the weights: that of their dtype or, where they were cast from a half type, of that one.

    It is found from the last bit that any of them uses, and is at most bfloat16's.
    """
    wide = weights.astype(np.float64 if weights.dtype == np.float64 else np.float32)
    unsigned, epsilon = (np.uint64, EPSILON["float64"]) if wide.itemsize == 8 else (np.uint32, EPSILON["float32"])
    bits = int(np.bitwise_or.reduce(wide.view(unsigned), axis=None))
    last = bits & -bits
    return max(EPSILON[weights.dtype.name], min(last * epsilon, EPSILON["bfloat16"]))


def check_distributions(weights: Array, num_keys: int, complete: bool | Array) -> None:
    """Raise unless each row is 0 or sums to 1; to at most 1 where it may lack keys, which is not complete.

    Rounding each weight moves a row's sum by at most half the epsilon of what they were rounded to; so does a sum of
    exponentials that was itself rounded before they were divided by it. Sums over keys and logarithms of sums, which
    are up to 2**10, are rounded in float32, or float64 for float64; that also bounds what is lost of weights below
    float16's normal range, at most 2**-25 each.
    """
    # Written so that NaN is found, too.
    wrong = ~(weights >= 0)
    if wrong.any():
        first = np.argmax(wrong)
        raise ValueError(f"{place(weights.shape, first)} is {weights.flat[first]}; weights must be 0 or more")
    epsilon = precision_of(weights)
    tolerance = epsilon + (num_keys + 2**10) * min(epsilon, EPSILON["float32"])
    sums = weights.sum(axis=-1, dtype=np.float64)
    wrong = ~(sums <= 1 + tolerance) | (complete & (sums != 0) & (sums < 1 - tolerance))
    if wrong.any():
        first = np.argmax(wrong)
        accepted = "at most 1, and to 1 where all keys that are seen are listed: give a sink's share as one more key"
        if complete is True:
            accepted = "1, or 0 where no key is seen"
        raise ValueError(f"{place(sums.shape, first)} sums to {sums.flat[first]:.6g}; a row must sum to {accepted}")


def check_keys(indices: Integers, weights: Array, num_keys: int) -> None:
    """Raise unless each row lists different keys that exist, or -1 with weight 0."""
    if indices.dtype.kind not in "iu":
        raise TypeError(f"indices has dtype {indices.dtype}; accepted are integers")
    if indices.shape != weights.shape:
        raise ValueError(f"indices and weights must have one shape, but have {indices.shape} and {weights.shape}")
    if indices.min() < -1 or indices.max() >= num_keys:
        raise ValueError(f"indices must be from -1 to {num_keys - 1}, but are {indices.min()} to {indices.max()}")
    if weights[indices == -1].any():
        raise ValueError("weights must be 0 where indices are -1")
    ordered = np.sort(indices, axis=-1)
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        raise ValueError("indices must list a key at most once in a row")


def dense(places: Integers, weights: Array, size: int, complete: bool) -> Array:
    """Return rows of so many keys, each weight at its place, and behind them the share of all other keys.

    Whatever belongs there has a place behind the last, or -1. Where not every weight is listed, a row sums to 1.
    """
    rows = np.zeros((*weights.shape[:-1], size + 1), weights.dtype)
    np.put_along_axis(rows, places, weights, axis=-1)
    sums = weights.sum(axis=-1)
    totals = sums if complete else np.where(sums > 0, 1, 0)
    rows[..., -1] = np.maximum(totals - rows[..., :-1].sum(axis=-1), 0)
    return rows


def checked_vectors(name: str, vectors: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Return queries or keys as float32, with as many axes as the weights, of which they have the layers and tokens."""
    array = as_array(name, vectors)
    check_dtype(name, array, native=False)
    axis = -2 if name == "queries" else -1
    like = (*shape[:-2], shape[axis], "D")
    shared = "" if name == "queries" else ", or with fewer heads that each serve several"
    wrong = ValueError(f"{name} has shape {array.shape}; accepted is ({', '.join(map(str, like))}){shared}")
    if array.ndim != len(shape) or 0 in array.shape or array.shape[-2] != shape[axis]:
        raise wrong
    *layers, heads = shape[:-2] or (1,)
    *own_layers, own_heads = array.shape[:-2] or (1,)
    if layers != own_layers or heads % own_heads or (name == "queries" and heads != own_heads):
        raise wrong
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite")
    return array.astype(np.float32)


def layer_of_transformers(index: int, layer: Any, item: int) -> Array:
    """Return the weights (heads, Sq, Sk) of an item of the batch."""
    name = f"attentions[{index}]"
    if layer is None:
        raise ValueError(f'{name} is None: the model gave no weights, as only attn_implementation="eager" does')
    array = as_array(name, layer.detach() if hasattr(layer, "detach") else layer)
    if array.ndim != 4:
        raise ValueError(f"{name} has shape {array.shape}; accepted is (batch, heads, Sq, Sk)")
    checked_integer("item", item, 0, len(array) - 1)
    return _tensors.converted(array[item], np.dtype(np.float32)) if _tensors.is_bits(array.dtype) else array[item]
