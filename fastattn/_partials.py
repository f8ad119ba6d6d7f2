"""Attention over a part of the keys, and what becomes of the parts: of `fastattn.dask` and `fastattn.mpi`.

Parts are float32 (float64 for float64) whatever the arrays are, so that their number costs no accuracy: a result of a
half type is rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import fastattn
from fastattn import _tensors
from fastattn._checks import Array, sink_gradients

Part = tuple[Array, Array]  # out and lse


def partial_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def partial_attention(query: Array, key: Array, value: Array, bounds: Any = None, **scores: Any) -> Part:
    """Return out and lse of some keys, or with ``add_to=`` of these and those before them.

    `bounds` are the cumulative lengths of queries and keys, if these are packed.
    """
    attend: Any = fastattn.attention if bounds is None else fastattn.attention_varlen
    part: Part = attend(query, key, value, *(bounds or ()), unrounded=True, return_lse=True, **scores)
    return part


def partial_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    bounds: Any = None,
    **scores: Any,
) -> tuple[Array, ...]:
    """Return the share of some keys in the gradients, given out and lse of all keys: in the precision of parts."""
    if scores.get("return_grad_bias"):
        scores["bias"] = rounded(scores["bias"], partial_dtype(query.dtype))
    differentiate: Any = fastattn.attention_backward if bounds is None else fastattn.attention_varlen_backward
    found: tuple[Array, ...] = differentiate(
        grad_out, query, key, value, out, lse, *(bounds or ()), unrounded=True, **scores
    )
    return found


def merge_parts(parts: Sequence[Part], num_threads: int | None = None) -> Part:
    if len(parts) == 1:
        return parts[0]
    return fastattn.merge(*zip(*parts, strict=True), num_threads=num_threads)


def refuse_infinite_sinks(sinks: Array) -> None:
    """Raise of a sink of which nothing is to be merged with the results of keys: its weight is inf / inf."""
    logits = _tensors.converted(sinks, np.dtype(np.float64))
    if (logits == np.inf).any():
        raise ValueError(
            f"sinks holds +inf, for head {int(np.argmax(logits))}; accepted are finite logits, and -inf where a head "
            "has no sink"
        )


def with_sinks(part: Part, sinks: Array | None, *, packed: bool = False, num_threads: int | None = None) -> Part:
    """Let the sinks join the softmax over all keys: they are a set of keys of their own, whose values are 0."""
    if sinks is None:
        return part
    out, lse = part
    most = np.finfo(lse.dtype).max  # for which attention takes larger ones
    with np.errstate(over="ignore"):
        logits = np.minimum(_tensors.converted(sinks, np.dtype(np.float64)), most).astype(lse.dtype)
    logits = logits[None] if packed else logits[:, None]
    nothing = np.zeros((*logits.shape, out.shape[-1]), out.dtype)
    return fastattn.merge([out, nothing], [lse, logits], num_threads=num_threads)


def gradient_of_sinks(sinks: Array, grad_out: Array, out: Array, lse: Array, grad_lse: Array | None) -> Array:
    """Return the gradient of each head's sink; axis -3 of out is heads."""
    wide = np.dtype(np.float64)
    wide_out = _tensors.converted(out, wide)
    with np.errstate(invalid="ignore", over="ignore"):  # 0 where out is: of a row that sees no key
        delta = np.where(wide_out == 0, 0, _tensors.converted(grad_out, wide) * wide_out).sum(axis=-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    return sink_gradients(_tensors.converted(np.asarray(sinks), wide), lse, delta)


def empty_part(rows: tuple[int, ...], columns: int, dtype: np.dtype[Any]) -> Part:
    """Return what rows are that have seen no key."""
    return np.zeros((*rows, columns), dtype), np.full(rows, -np.inf, dtype)


def rounded(array: Array, dtype: np.dtype[Any]) -> Array:
    return array if array.dtype == dtype else _tensors.converted(array, dtype)
