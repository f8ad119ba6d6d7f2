"""The definition of fastattn's functions in plain NumPy, and the oracle of its tests.

Everything is computed in float64, one head at a time, with the whole score matrix in memory, and rounded
once at the end. Input is assumed to be valid: the messages about bad input belong to `fastattn.attention`.

Notes
-----
The scores before the softmax, which `fastattn.attention` never holds, are these steps; ONNX's Attention returns them by
its ``qk_matmul_output_mode``, of which 3 is ``return_weights=True``. For fewer heads of keys than of queries give
``np.repeat(key, group_size, axis=-3)``.

>>> import numpy as np
>>> import fastattn
>>> from fastattn import reference
>>> rng = np.random.default_rng(0)
>>> query, key, value = rng.standard_normal((3, 2, 4, 5, 8))
>>> bias = rng.standard_normal((4, 5, 5))
>>> mask = np.tri(5, dtype=bool)
>>> mode_0 = reference.scaled_scores(query, key, 8**-0.5)
>>> mode_1 = reference.soft_capped(mode_0, 20.0)
>>> mode_2 = np.where(mask, mode_1 + bias, -np.inf)

From the last the softmax makes the weights, so that it can also be had from what `fastattn.attention` returns, at the
weights' precision:

>>> out, lse, weights = fastattn.attention(
...     query, key, value, softcap=20.0, bias=bias, mask=mask, return_lse=True, return_weights=True
... )
>>> bool(np.allclose(weights, np.exp(mode_2 - lse[..., None])))
True
>>> with np.errstate(divide="ignore"):
...     bool(np.allclose(mode_2, np.log(weights) + lse[..., None]))
True
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Never, Unpack, cast

import numpy as np
from numpy.typing import ArrayLike

from fastattn._arguments import misfit, typed_like
from fastattn._checks import (
    HALF,
    as_array,
    as_grads,
    refuse_as_result,
    refuse_beside_add_to,
    refuse_masked,
    refuse_plus_infinity,
)
from fastattn._keywords import PACKED, SCORES, Array, Grads, PackedKeywords, ScoreKeywords, Window, takes
from fastattn._philox import NO_DROPOUT, Dropout, checked_dropout
from fastattn.api import attention as fast_attention
from fastattn.api import attention_backward as fast_backward
from fastattn.api import attention_varlen as fast_varlen
from fastattn.api import attention_varlen_backward as fast_varlen_backward
from fastattn.api import merge as fast_merge
from fastattn.api import top_keys as fast_top_keys

__all__ = [
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "merge",
    "top_keys",
]


def scaled_scores(query: Array, key: Array, scale: float) -> Array:
    """Return q·k · scale for every pair of a query row and a key: (..., Sq, D) and (..., Sk, D) to (..., Sq, Sk)."""
    scores: Array = (query @ key.swapaxes(-1, -2)) * scale
    return scores


def soft_capped(scores: Array, softcap: float | None) -> Array:
    """Return the scores squeezed smoothly into (-softcap, softcap)."""
    return scores if softcap is None else softcap * np.tanh(scores / softcap)


def alibi(slope: float, position: Array, seqlen_k: int) -> Array:
    """Return the penalty that grows linearly with the distance between a query's position and a key."""
    return -slope * np.abs(position[:, None] - np.arange(seqlen_k))


def visible_keys(
    position: Array,
    seqlen_k: int,
    key_length: int,
    causal: bool,
    window: Window | None,
) -> Array:
    """Return which keys each query row sees, by position alone."""
    key_index = np.arange(seqlen_k)
    distance = key_index - position[:, None]
    left, right = window or (None, None)
    visible = np.broadcast_to(key_index < key_length, distance.shape).copy()
    if causal:
        visible &= distance <= 0
    if left is not None:
        visible &= distance >= -left
    if right is not None:
        visible &= distance <= right
    return visible


def softmax(scores: Array, sink: float) -> tuple[Array, Array]:
    """Return softmax over the keys, and the natural log of its denominator.

    The sink is one more logit in the maximum and in the denominator. A row that has neither a key nor a
    sink has weights 0 and lse -inf. A key whose score is -inf has weight 0 even in a row that is NaN.
    """
    row_max = np.max(scores, axis=-1, keepdims=True, initial=sink)
    shift = np.where(row_max == -np.inf, 0.0, row_max)
    p = np.exp(scores - shift)
    row_sum = p.sum(axis=-1, keepdims=True) + np.exp(sink - shift)
    weights = np.where(scores == -np.inf, 0.0, p / np.where(row_sum == 0.0, 1.0, row_sum))
    return weights, (shift + np.log(row_sum))[:, 0]


def weighted_values(weights: Array, visible: Array, value: Array) -> Array:
    """Return weights @ value, in which a key that a row does not see adds nothing, not even 0 · NaN."""
    finite = np.isfinite(value)
    out: Array = weights @ np.where(finite, value, 0.0)
    for n in np.flatnonzero(~finite.all(axis=-1)):
        seen = visible[:, n, None] & ~finite[n]
        out += np.where(seen, weights[:, n, None] * value[n], 0.0)
    return out


@typed_like(fast_attention)
@takes(ScoreKeywords)
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *others: Never,
    out: Array | None = None,
    add_to: tuple[Array, Array] | None = None,
    unrounded: bool = False,
    return_lse: bool = False,
    return_weights: bool = False,
    dropout: float = 0.0,
    seed: int | None = None,
    **scores: Unpack[ScoreKeywords],
) -> Any:
    """Multi-head attention, ``softmax(query @ key.T * scale + bias) @ value``, in float64.

    The parameters and results are those of `fastattn.attention`, where they are described in full.

    Parameters
    ----------
    query : array_like, shape (..., H, Sq, D)
    key : array_like, shape (..., Hkv, Sk, D)
    value : array_like, shape (..., Hkv, Sk, Dv)
    **scores
        As in `fastattn.attention`.
    out : ndarray, shape (..., H, Sq, Dv), optional
        Where to store the result.
    add_to : (out, lse), optional
        Results over other keys, which these join in place, as by `merge`.
    unrounded : bool
        Whether the result for a float16 or bfloat16 query is float32.
    return_lse, return_weights : bool
        Whether to return the log-sum-exp of each row, and the attention weights: with `dropout` those that are left.
    dropout : float
        Share of the weights that are dropped, after the softmax: at least 0, less than 1, and rounded to a multiple
        of 2**-16. The others are divided by ``1 - dropout``. Neither lse nor a sink's part changes.
    seed : int, optional
        From 0 to 2**64 - 1, and needed with `dropout`: the same seed drops the same weights, wherever the arrays are
        cut into blocks of rows (of the same positions), and another seed other ones. Which they are depends on the
        batch item's index, the head, the query's position and the key alone.
    num_threads : int, optional
        Ignored.

    Returns
    -------
    out : ndarray, shape (..., H, Sq, Dv)
        In query's dtype, rounded once. With ``return_lse`` or ``return_weights`` a tuple
        ``(out[, lse][, weights])``.

    See Also
    --------
    fastattn.attention : The same, fast.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.2.1.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import reference
    >>> query, key = np.array([[1.0, 0.0]]), np.array([[4.0, 0.0], [0.0, 4.0]])
    >>> value = np.array([[1.0], [0.0]])
    >>> reference.attention(query, key, value).round(4)
    array([[0.9442]])
    >>> reference.attention(query, key, value, mask=[[False, True]])
    array([[0.]])
    """
    if others or not scores.keys() <= SCORES:
        raise misfit(attention, others, scores)
    kept = checked_dropout(dropout, seed)
    refuse_masked("out", out)
    if add_to is not None:
        refuse_beside_add_to(out, return_weights)
    dtype = dtype_of_result(as_array("query", query), out, add_to, unrounded)
    result, lse, weights, _ = attention_steps(query, key, value, scores, return_weights, kept, dtype=dtype)
    if add_to is not None:
        result, lse = joined(add_to, (result, lse), query=query, key=key, value=value)
    elif out is not None:
        np.copyto(out, result)
        result = out
    extras = [lse] * return_lse + [weights] * return_weights
    return (result, *extras) if extras else result


def joined(before: tuple[Array, Array], new: tuple[Array, Array], **inputs: ArrayLike) -> tuple[Array, Array]:
    """Add to a result that over other keys, in place."""
    if not isinstance(before, (tuple, list)) or len(before) != 2:
        refuse_as_result(before)
    for i, (x, like) in enumerate(zip(before, new, strict=True)):
        check_joined(
            f"add_to[{i}]", x, like.shape, new[1].dtype, inputs | {f"add_to[{j}]": before[j] for j in range(i)}
        )
    refuse_plus_infinity("add_to[1]", before[1])
    before[0][...], before[1][...] = merge(*zip(before, new, strict=True))
    return before


def check_joined(
    name: str, x: Array, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: Mapping[str, ArrayLike]
) -> None:
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name} must be an ndarray, not {type(x).__name__}")
    refuse_masked(name, x)
    if x.dtype != dtype or not x.dtype.isnative:
        raise TypeError(f"{name} has dtype {x.dtype}; accepted is {dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}; accepted is {shape}")
    if not x.flags.writeable:
        raise ValueError(f"{name} is read-only")
    for other, array in inputs.items():
        if isinstance(array, np.ndarray) and np.shares_memory(x, array):
            raise ValueError(f"{name} overlaps {other} in memory")


def dtype_of_result(
    like: Array, out: Array | None, add_to: tuple[Array, Array] | None, unrounded: bool
) -> np.dtype[Any]:
    """Return that of `out`, if it is given, else that of the array, or for half arrays float32 if not rounded.

    What is added to another result is not rounded before.
    """
    if add_to is not None:
        return np.dtype(np.float64)
    if out is not None:
        return out.dtype
    return np.dtype(np.float32) if unrounded and like.dtype.name in HALF else like.dtype


def attention_steps(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    keywords: ScoreKeywords,
    keep: bool = False,
    dropout: Dropout = NO_DROPOUT,
    item: int = 0,
    dtype: np.dtype[Any] | None = None,
) -> tuple[Array, Array, Any, Any]:
    """Return the result, lse and, if they are kept, weights and scores; the score of a hidden key is -inf.

    `dtype` is that of the result; default: query's. `item` is the index of the first batch item, by which dropout tells
    it from others.
    """
    heads = Heads(query, key, value, keywords, dropout, item)
    own = heads.query.dtype
    result = np.zeros((*heads.shape, heads.seqlen_q, heads.value.shape[-1]), dtype or own)
    lse = np.zeros(result.shape[:-1], np.float64 if own == np.float64 else np.float32)
    kept: Any = np.zeros((2, *lse.shape, heads.seqlen_k), own) if keep else (None, None)
    with np.errstate(all="ignore"):
        for index in np.ndindex(*heads.shape):
            head = heads[index]
            head_weights, lse[index] = softmax(head.scores, head.sink)
            head_weights *= head.dropout
            result[index] = weighted_values(head_weights, head.visible, head.value)
            if keep:
                kept[0][index], kept[1][index] = head_weights, head.scores

    if heads.single:
        return result[0], lse[0], *((x[0] for x in kept) if keep else kept)
    return result, lse, *kept


class Head(NamedTuple):
    """What one head of one batch item attends with, in float64."""

    query: Array
    key: Array
    value: Array
    capped: Array  # the scores before bias and ALiBi
    scores: Array  # what the softmax is of; -inf hides a key
    visible: Array
    sink: float
    dropout: Array  # what the weights are multiplied by


class Heads:
    """The arguments of attention, each broadcast over the batch axes and, but for key and value, the heads.

    ``heads[index]`` is one head, for each index of ``np.ndindex(*heads.shape)``; 2-D arrays are one, too.
    """

    single: bool
    shape: tuple[int, ...]  # (..., H)
    seqlen_q: int
    seqlen_k: int
    group_size: int
    query: Array
    key: Array
    value: Array
    scale: float
    softcap: float | None
    causal: bool
    window: Window | None
    mask: Array
    bias: Array
    alibi_slopes: Array
    sinks: Array
    key_lengths: Array
    query_offset: Array
    dropout: Dropout
    item: int

    def __init__(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        keywords: ScoreKeywords,
        dropout: Dropout = NO_DROPOUT,
        item: int = 0,
    ) -> None:
        query, key, value = as_array("query", query), as_array("key", key), as_array("value", value)
        self.single = query.ndim == 2
        if self.single:
            query, key, value = query[None], key[None], value[None]
        batch = np.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        self.query, self.key, self.value = (np.broadcast_to(x, batch + x.shape[-3:]) for x in (query, key, value))

        num_heads, self.seqlen_q, head_dim = query.shape[-3:]
        num_kv_heads, self.seqlen_k, _ = value.shape[-3:]
        self.shape = (*batch, num_heads)
        self.dropout, self.item = dropout, item
        self.group_size = num_heads // num_kv_heads if num_kv_heads else 1

        given: Mapping[str, Any] = {name: x for name, x in keywords.items() if x is not None}

        def broadcast(name: str, default: ArrayLike, shape: tuple[int, ...]) -> Array:
            return np.broadcast_to(as_array(name, given.get(name, default)), shape)

        scores = (*self.shape, self.seqlen_q, self.seqlen_k)
        self.scale = float(given.get("scale", 1.0 / math.sqrt(max(head_dim, 1))))
        self.softcap = given.get("softcap")
        self.causal, self.window = given.get("causal", False), given.get("window")
        self.mask, self.bias = broadcast("mask", True, scores), broadcast("bias", 0.0, scores)
        self.alibi_slopes = broadcast("alibi_slopes", 0.0, self.shape)
        self.sinks = broadcast("sinks", -np.inf, (num_heads,))
        self.key_lengths = broadcast("key_lengths", self.seqlen_k, batch)
        # By default the last query sees the last key.
        by_default = self.key_lengths.astype(np.int64) - self.seqlen_q
        self.query_offset = broadcast("query_offset", by_default, batch)

    def kv_index(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """Return the index of the head of keys and values that a head of queries reads."""
        *batch, head = index
        return (*batch, head // self.group_size)

    def __getitem__(self, index: tuple[int, ...]) -> Head:
        *batch, head = index
        item = tuple(batch)
        arrays = self.query[index], self.key[self.kv_index(index)], self.value[self.kv_index(index)]
        query, key, value = (x.astype(np.float64) for x in arrays)
        position = np.arange(self.seqlen_q) + self.query_offset[item]
        bias = self.bias[index].astype(np.float64)

        capped = soft_capped(scaled_scores(query, key, self.scale), self.softcap)
        scores = capped + bias + alibi(float(self.alibi_slopes[index]), position, self.seqlen_k)
        visible = visible_keys(position, self.seqlen_k, int(self.key_lengths[item]), self.causal, self.window)
        visible &= self.mask[index] & (bias != -np.inf)
        scores = np.where(visible, scores, -np.inf)
        flat_item = self.item + int(np.ravel_multi_index(item, self.shape[:-1])) if item else self.item
        dropout = self.dropout.factors(flat_item, head, position, self.seqlen_k)
        return Head(query, key, value, capped, scores, scores != -np.inf, float(self.sinks[head]), dropout)


@typed_like(fast_varlen)
@takes(PackedKeywords)
def attention_varlen(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *others: Never,
    out: Array | None = None,
    add_to: tuple[Array, Array] | None = None,
    unrounded: bool = False,
    return_lse: bool = False,
    dropout: float = 0.0,
    seed: int | None = None,
    **scores: Unpack[PackedKeywords],
) -> Any:
    """`attention` of each sequence of packed arrays by itself.

    The parameters and results are those of `fastattn.attention_varlen`.

    Parameters
    ----------
    query : array_like, shape (total_q, H, D)
    key : array_like, shape (total_k, Hkv, D)
    value : array_like, shape (total_k, Hkv, Dv)
    cu_seqlens_q, cu_seqlens_k : array_like of int, shape (B + 1,)
    query_offset : int or array_like of int, shape (B,), optional
    alibi_slopes : array_like, shape (H,) or (B, H), optional
    **scores
        As in `fastattn.attention`.
    out, add_to, unrounded, return_lse
        As in `fastattn.attention_varlen`.
    dropout, seed
        As in `reference.attention`, where sequence ``b`` is batch item ``b``.

    Returns
    -------
    out : ndarray, shape (total_q, H, Dv)
        With ``return_lse`` the tuple ``(out, lse)``.

    See Also
    --------
    fastattn.attention_varlen : The same, fast.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import reference
    >>> x = np.eye(3)[:, None]
    >>> reference.attention_varlen(x, x, x, [0, 1, 3], [0, 1, 3], causal=True)[:2, 0]
    array([[1., 0., 0.],
           [0., 1., 0.]])
    """
    if others or not scores.keys() <= PACKED:
        raise misfit(attention_varlen, others, scores)
    query, key, value = as_array("query", query), as_array("key", key), as_array("value", value)
    refuse_masked("out", out)
    kept = checked_dropout(dropout, seed)
    if add_to is not None:
        refuse_beside_add_to(out, return_weights=False)
    dtype = dtype_of_result(query, out, add_to, unrounded)
    result = np.zeros((*query.shape[:2], value.shape[-1]), dtype) if out is None else out
    lse = np.zeros(query.shape[:2], np.float64 if query.dtype == np.float64 else np.float32)
    sequences = sequences_of(cu_seqlens_q, cu_seqlens_k, query.shape[1], scores)
    for b, (of_queries, of_keys, own) in enumerate(sequences):
        result[of_queries], lse[of_queries] = (
            x.swapaxes(0, 1)
            for x in attention_steps(
                query[of_queries].swapaxes(0, 1),
                key[of_keys].swapaxes(0, 1),
                value[of_keys].swapaxes(0, 1),
                cast(ScoreKeywords, own),
                dropout=kept,
                item=b,
                dtype=dtype,
            )[:2]
        )
    if add_to is not None:
        result, lse = joined(add_to, (result, lse), query=query, key=key, value=value)
    return (result, lse) if return_lse else result


def sequences_of(
    cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike, num_heads: int, scores: PackedKeywords
) -> Iterator[tuple[slice, slice, PackedKeywords]]:
    """Yield each sequence's rows of queries, its rows of keys, and its keywords."""
    rows, keys = as_array("cu_seqlens_q", cu_seqlens_q), as_array("cu_seqlens_k", cu_seqlens_k)
    num_sequences = len(rows) - 1
    # Of these each sequence has its own.
    shapes = {"query_offset": (num_sequences,), "alibi_slopes": (num_sequences, num_heads)}
    each = {
        name: np.broadcast_to(as_array(name, x), shapes[name])
        for name, x in scores.items()
        if name in shapes and x is not None
    }
    for b in range(num_sequences):
        own = cast(PackedKeywords, {**scores, **{name: x[b] for name, x in each.items()}})
        yield slice(rows[b], rows[b + 1]), slice(keys[b], keys[b + 1]), own


class HeadGradients(NamedTuple):
    """The gradients of what one head attends with, in float64."""

    query: Array
    key: Array
    value: Array
    bias: Array
    sink: float


def head_gradients(
    head: Head, scale: float, softcap: float | None, grad_out: Array, out: Array, lse: Array, grad_lse: Array
) -> HeadGradients:
    """Return the gradients of one head. A hidden key adds nothing to any of them, not even 0 · NaN.

    With s the scores, p = exp(s - lse) the weights, out = p V and L the loss:

        dL/dp = grad_out Vᵀ,  dp/ds = p (1 - p) and -p p' in the row,  dlse/ds = p,  so that
        dL/ds = p (dL/dp - Σ p' dL/dp' + grad_lse) = p (dL/dp - delta).

    Σ p' dL/dp' is grad_out · out: it takes no other keys of the row, so that `out` and `lse` may be those of more.
    Dropout multiplies p where it meets V, and so dL/dp.
    """
    weights = np.where(head.visible, np.exp(head.scores - lse[:, None]), 0.0)
    # The result of a row without keys is 0 whatever its gradient, NaN included.
    delta = np.where(out == 0.0, 0.0, grad_out * out).sum(axis=-1) - grad_lse
    grad_weights = (grad_out @ head.value.T) * head.dropout
    grad_scores = np.where(weights == 0.0, 0.0, weights * (grad_weights - delta[:, None]))
    grad_capped = grad_scores
    if softcap is not None:
        slope = 1.0 - (head.capped / softcap) ** 2
        grad_capped = np.where(grad_scores == 0.0, 0.0, grad_scores * slope)
    sink_weights = np.where(head.sink == -np.inf, 0.0, np.exp(np.minimum(head.sink - lse, 0.0)))
    return HeadGradients(
        query=scale * weighted_values(grad_capped, head.visible, head.key),
        key=scale * weighted_values(grad_capped.T, head.visible.T, head.query),
        value=weighted_values((weights * head.dropout).T, head.visible.T, grad_out),
        bias=grad_scores,
        sink=-float(np.sum(sink_weights * delta)),
    )


def summed_to(shape: tuple[int, ...], grad: Array) -> Array:
    """Return a gradient summed over the axes along which an array of that shape was broadcast."""
    grad = np.asarray(grad.sum(axis=tuple(range(grad.ndim - len(shape)))))
    stretched = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return np.asarray(grad.sum(axis=stretched, keepdims=True))


def gradient_steps(
    arrays: Mapping[str, Array],
    results: Mapping[str, Array],
    keywords: ScoreKeywords,
    dropout: Dropout,
    item: int = 0,
) -> dict[str, Array]:
    """Return the gradients of query, key, value, bias and sinks, in float64 and in their own shapes.

    All are by their names; arrays are the first three, results are out, lse and the gradients of both.
    """
    heads = Heads(**arrays, keywords=keywords, dropout=dropout, item=item)
    rows = (*heads.shape, heads.seqlen_q)
    of_rows = {
        name: np.broadcast_to(x, rows if "lse" in name else (*rows, heads.value.shape[-1]))
        for name, x in results.items()
    }
    grads = {
        "query": np.zeros(heads.query.shape),
        "key": np.zeros(heads.key.shape),
        "value": np.zeros(heads.value.shape),
        "bias": np.zeros((*rows, heads.seqlen_k)),
        "sinks": np.zeros(heads.shape[-1]),
    }
    with np.errstate(all="ignore"):
        for index in np.ndindex(*heads.shape):
            of_head = {name: x[index].astype(np.float64) for name, x in of_rows.items()}
            each = head_gradients(heads[index], heads.scale, heads.softcap, **of_head)
            grads["query"][index] = each.query
            # The heads of a group read the same keys and values.
            grads["key"][heads.kv_index(index)] += each.key
            grads["value"][heads.kv_index(index)] += each.value
            grads["bias"][index] = each.bias
            grads["sinks"][index[-1]] += each.sink
    inputs: dict[str, Any] = {**arrays, **keywords}
    return {
        name: summed_to(np.shape(inputs[name]), grad) for name, grad in grads.items() if inputs.get(name) is not None
    }


def results_by_name(
    grad_out: ArrayLike, out: ArrayLike, lse: ArrayLike, grad_lse: ArrayLike | None
) -> dict[str, Array]:
    """Return results and their gradients as arrays by their names."""
    array = as_array("lse", lse)
    return {
        "grad_out": as_array("grad_out", grad_out),
        "out": as_array("out", out),
        "lse": array,
        "grad_lse": np.zeros(array.shape) if grad_lse is None else as_array("grad_lse", grad_lse),
    }


def returned_gradients(
    grads: Mapping[str, Array],
    inputs: Mapping[str, object],
    return_grad_bias: bool,
    return_grad_sinks: bool,
    into: Grads | None,
    unrounded: bool,
) -> tuple[Array, ...]:
    """Return the gradients that are asked for, each in the dtype of its array; in the arrays of `into` if given."""
    targets = [None] * 3 if into is None else as_grads(into)
    names = ["query", "key", "value", *["bias"] * return_grad_bias, *["sinks"] * return_grad_sinks]
    for name in names:
        if name not in grads:
            raise ValueError(f"return_grad_{name} is given, but {name} is not")
    results = []
    for name, target in itertools.zip_longest(names, targets):
        refuse_masked(f"grads' {name}", target)
        of_query_key_value = name in names[:3]
        dtype = dtype_of_result(as_array(name, inputs[name]), target, None, unrounded and of_query_key_value)
        with np.errstate(over="ignore"):
            grad = grads[name].astype(dtype)
        if target is not None:
            np.copyto(target, grad)
        results.append(grad if target is None else target)
    return tuple(results)


@typed_like(fast_backward)
@takes(ScoreKeywords)
def attention_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *others: Never,
    dropout: float = 0.0,
    seed: int | None = None,
    grad_lse: ArrayLike | None = None,
    unrounded: bool = False,
    return_grad_bias: bool = False,
    return_grad_sinks: bool = False,
    grads: Grads | None = None,
    **scores: Unpack[ScoreKeywords],
) -> Any:
    """Return the gradients of query, key and value, given that of the result of `attention`, in float64.

    Parameters
    ----------
    grad_out : array_like, shape (..., H, Sq, Dv)
        The gradient of a loss in respect to `out`.
    query : array_like, shape (..., H, Sq, D)
    key : array_like, shape (..., Hkv, Sk, D)
    value : array_like, shape (..., Hkv, Sk, Dv)
    out : array_like, shape (..., H, Sq, Dv)
        What `attention` returned for these arrays and keywords, or `merge` for these keys and others: the gradients are
        then the share of these keys.
    lse : array_like, shape (..., H, Sq)
        Likewise.
    **scores
        As they were for `fastattn.attention`. There is no gradient of `alibi_slopes`, which are not trained.
    grad_lse : array_like, shape (..., H, Sq), optional
        The gradient of the loss in respect to `lse`. Default: 0, for a loss that does not depend on it.
    unrounded : bool
        Whether gradients of float16 and bfloat16 arrays are float32.
    return_grad_bias, return_grad_sinks : bool
        Whether to return the gradient of `bias` and of `sinks`, which then must be given.
    dropout, seed
        As they were for `attention`.
    grads : (ndarray, ndarray, ndarray), optional
        Where to store the gradients of query, key and value. Each may be None.
    num_threads : int, optional
        Ignored.

    Returns
    -------
    grad_query, grad_key, grad_value : ndarray
        Each in the shape and dtype of its array, rounded once: summed over the heads that share one of keys and
        values, and over the axes along which the array was broadcast. Of a hidden key they are 0, and NaN in it, or in
        a row that does not see it, reaches none of them.
    grad_bias, grad_sinks : ndarray
        Returned with ``return_grad_bias`` and ``return_grad_sinks``, likewise.

    Raises
    ------
    ValueError
        ``return_grad_bias`` without `bias`, or ``return_grad_sinks`` without `sinks`.

    See Also
    --------
    fastattn.attention_backward : The same, fast.

    References
    ----------
    .. [1] Dao, Fu, Ermon, Rudra and Ré, "FlashAttention: Fast and Memory-Efficient Exact Attention with
       IO-Awareness", 2022, appendix B.2.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import reference
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
    >>> out, lse = reference.attention(query, key, value, causal=True, return_lse=True)

    The loss ``0.5 * (out**2).sum()`` has the gradient ``out``:

    >>> grads = reference.attention_backward(out, query, key, value, out, lse, causal=True)
    >>> [grad.shape for grad in grads]
    [(2, 5, 4), (2, 5, 4), (2, 5, 4)]
    >>> step = 1e-6 * grads[1]
    >>> change = reference.attention(query, key + step, value, causal=True) - out
    >>> bool(np.isclose((change * out).sum(), (step * grads[1]).sum(), rtol=1e-4))
    True
    """
    if others or not scores.keys() <= SCORES:
        raise misfit(attention_backward, others, scores)
    arrays = {"query": as_array("query", query), "key": as_array("key", key), "value": as_array("value", value)}
    results = results_by_name(grad_out, out, lse, grad_lse)
    found = gradient_steps(arrays, results, scores, checked_dropout(dropout, seed))
    return returned_gradients(found, {**arrays, **scores}, return_grad_bias, return_grad_sinks, grads, unrounded)


@typed_like(fast_varlen_backward)
@takes(PackedKeywords)
def attention_varlen_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *others: Never,
    dropout: float = 0.0,
    seed: int | None = None,
    grad_lse: ArrayLike | None = None,
    unrounded: bool = False,
    return_grad_sinks: bool = False,
    grads: Grads | None = None,
    **scores: Unpack[PackedKeywords],
) -> Any:
    """`attention_backward` of each sequence of packed arrays by itself.

    Parameters
    ----------
    grad_out : array_like, shape (total_q, H, Dv)
        The gradient of a loss in respect to `out`.
    query : array_like, shape (total_q, H, D)
    key : array_like, shape (total_k, Hkv, D)
    value : array_like, shape (total_k, Hkv, Dv)
    out : array_like, shape (total_q, H, Dv)
        What `attention_varlen` returned for these arrays and keywords, or `merge` for these keys and others.
    lse : array_like, shape (total_q, H)
        Likewise.
    cu_seqlens_q, cu_seqlens_k : array_like of int, shape (B + 1,)
    query_offset : int or array_like of int, shape (B,), optional
    alibi_slopes : array_like, shape (H,) or (B, H), optional
    **scores
        As they were for `fastattn.attention_varlen`.
    grad_lse : array_like, shape (total_q, H), optional
        The gradient of the loss in respect to `lse`. Default: 0.
    unrounded : bool
        Whether gradients of float16 and bfloat16 arrays are float32.
    return_grad_sinks : bool
        Whether to return the gradient of `sinks`, which then must be given.
    dropout, seed
        As they were for `attention_varlen`.
    grads : (ndarray, ndarray, ndarray), optional
        Where to store the gradients of query, key and value. Each may be None.
    num_threads : int, optional
        Ignored.

    Returns
    -------
    grad_query, grad_key, grad_value : ndarray
        Each in the shape and dtype of its array, rounded once.
    grad_sinks : ndarray
        Returned with ``return_grad_sinks``, likewise.

    Raises
    ------
    ValueError
        ``return_grad_sinks`` without `sinks`.

    See Also
    --------
    fastattn.attention_varlen_backward : The same, fast.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import reference
    >>> x = np.eye(3)[:, None]
    >>> out, lse = reference.attention_varlen(x, x, x, [0, 1, 3], [0, 1, 3], causal=True, return_lse=True)
    >>> _, _, grad_value = reference.attention_varlen_backward(
    ...     np.ones_like(out), x, x, x, out, lse, [0, 1, 3], [0, 1, 3], causal=True
    ... )
    >>> grad_value[:, 0].sum(axis=-1).round(4)
    array([3.    , 4.0786, 1.9214])
    """
    if others or not scores.keys() <= PACKED:
        raise misfit(attention_varlen_backward, others, scores)
    arrays = {"query": as_array("query", query), "key": as_array("key", key), "value": as_array("value", value)}
    results = results_by_name(grad_out, out, lse, grad_lse)
    kept = checked_dropout(dropout, seed)
    inputs: dict[str, Any] = {**arrays, **scores}
    found = {name: np.zeros(x.shape) for name, x in arrays.items()}
    if inputs.get("sinks") is not None:
        found["sinks"] = np.zeros(np.shape(inputs["sinks"]))
    sequences = sequences_of(cu_seqlens_q, cu_seqlens_k, arrays["query"].shape[1], scores)
    for b, (of_queries, of_keys, own) in enumerate(sequences):
        where = {"query": of_queries, "key": of_keys, "value": of_keys}
        each = gradient_steps(
            {name: x[where[name]].swapaxes(0, 1) for name, x in arrays.items()},
            {name: x[of_queries].swapaxes(0, 1) for name, x in results.items()},
            cast(ScoreKeywords, own),
            kept,
            b,
        )
        for name, part in where.items():
            found[name][part] = each[name].swapaxes(0, 1)
        if "sinks" in found:
            found["sinks"] += each["sinks"]
    return returned_gradients(found, inputs, False, return_grad_sinks, grads, unrounded)


@typed_like(fast_merge)
def merge(outs: Any, lses: Any, *, out: Array | None = None, num_threads: int | None = None) -> tuple[Array, Array]:
    """Combine results over disjoint sets of keys: ``Σ out_i e^lse_i / Σ e^lse_i``, in float64.

    The parameters and results are those of `fastattn.merge`.

    Parameters
    ----------
    outs : sequence of array_like, shape (..., H, Sq, Dv)
    lses : sequence of array_like, shape (..., H, Sq)
    out : ndarray, shape (..., H, Sq, Dv), optional
        Where to store the result.
    num_threads : int, optional
        Ignored.

    Returns
    -------
    out : ndarray, shape (..., H, Sq, Dv)
    lse : ndarray, shape (..., H, Sq)

    See Also
    --------
    fastattn.merge : The same, fast.

    Examples
    --------
    >>> from fastattn import reference
    >>> out, lse = reference.merge([[[1.0]], [[3.0]]], [[0.0], [0.0]])
    >>> out, lse.round(4)
    (array([[2.]]), array([0.6931]))
    """
    outs = [as_array(f"outs[{i}]", part) for i, part in enumerate(outs)]
    lses = [as_array(f"lses[{i}]", lse) for i, lse in enumerate(lses)]
    for i, log in enumerate(lses):
        refuse_plus_infinity(f"lses[{i}]", log)
    dtypes = outs[0].dtype, np.result_type(*lses)
    logs = np.stack(np.broadcast_arrays(*lses)).astype(np.float64)
    parts = np.stack(np.broadcast_arrays(*outs)).astype(np.float64)
    with np.errstate(all="ignore"):
        weights, lse = softmax(logs.reshape(len(logs), -1).T, -np.inf)
        # A set without keys adds nothing, whatever its result holds.
        terms = np.where(logs[..., None] == -np.inf, 0.0, weights.T.reshape(logs.shape)[..., None] * parts)
    merged = terms.sum(axis=0)
    if out is None:
        out = merged.astype(dtypes[0])
    else:
        refuse_masked("out", out)
        out[...] = merged
    return out, lse.reshape(logs.shape[1:]).astype(dtypes[1])


@typed_like(fast_top_keys)
@takes(ScoreKeywords)
def top_keys(
    query: ArrayLike,
    key: ArrayLike,
    k: int = 8,
    *others: Never,
    return_totals: bool = False,
    **scores: Unpack[ScoreKeywords],
) -> Any:
    """The keys that each query attends most, from all weights in float64.

    The parameters and results are those of `fastattn.top_keys`.

    Parameters
    ----------
    query : array_like, shape (..., H, Sq, D)
    key : array_like, shape (..., Hkv, Sk, D)
    k : int
    **scores
        As in `fastattn.attention`.
    return_totals
        As in `fastattn.top_keys`.

    Returns
    -------
    indices, weights : ndarray, shape (..., H, Sq, k)
        With ``return_totals`` also the totals (..., H, Sk).

    See Also
    --------
    fastattn.top_keys : The same, fast.

    Examples
    --------
    >>> from fastattn import reference
    >>> indices, weights = reference.top_keys([[1.0]], [[0.0], [5.0]], k=3)
    >>> indices, weights.round(3)
    (array([[ 1,  0, -1]]), array([[0.993, 0.007, 0.   ]]))
    """
    if others or not scores.keys() <= SCORES:
        raise misfit(top_keys, others, scores)
    queries, keys = as_array("query", query), as_array("key", key)
    dtype = queries.dtype
    query, key = queries.astype(np.float64), keys.astype(np.float64)
    _, _, weights, steps = attention_steps(query, key, key[..., :0], scores, True)
    # Listed by their scores, which tell keys apart whose weights are both 0. Hidden keys and NaN are not listed.
    beyond = [(0, 0)] * (steps.ndim - 1) + [(0, k)]
    listed = np.pad(np.where(np.isnan(steps), -np.inf, steps), beyond, constant_values=-np.inf)
    order = np.argsort(-listed, axis=-1, kind="stable")[..., :k]
    seen = np.take_along_axis(listed, order, axis=-1) > -np.inf
    largest = np.where(seen, np.take_along_axis(np.pad(weights, beyond), order, axis=-1), 0.0)
    results = np.where(seen, order, -1), largest.astype(dtype)
    # A query whose weights are NaN adds nothing.
    totals = np.nansum(weights, axis=-2).astype(np.float64 if dtype == np.float64 else np.float32)
    return (*results, totals) if return_totals else results
