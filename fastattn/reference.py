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

import math
from collections.abc import Mapping
from typing import Any, Never, Unpack, cast

import numpy as np
from numpy.typing import ArrayLike

from fastattn._arguments import misfit, typed_like
from fastattn._checks import as_array, refuse_masked
from fastattn._keywords import PACKED, SCORES, Array, PackedKeywords, ScoreKeywords, takes
from fastattn._merge import refuse_plus_infinity
from fastattn.api import attention as fast_attention
from fastattn.api import attention_varlen as fast_varlen
from fastattn.api import merge as fast_merge
from fastattn.api import top_keys as fast_top_keys

__all__ = ["attention", "attention_varlen", "merge", "top_keys"]


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
    window: tuple[int | None, int | None] | None,
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
    return_lse: bool = False,
    return_weights: bool = False,
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
    return_lse, return_weights : bool
        Whether to return the log-sum-exp of each row, and the attention weights.
    num_threads : int, optional
        Ignored.

    Returns
    -------
    out : ndarray, shape (..., H, Sq, Dv)
        In query's dtype, rounded once. With ``return_lse`` or ``return_weights`` a tuple
        ``(out[, lse][, weights])``.

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
    result, lse, weights, _ = attention_steps(query, key, value, return_weights, **scores)
    if out is not None:
        refuse_masked("out", out)
        np.copyto(out, result)
        result = out
    extras = [lse] * return_lse + [weights] * return_weights
    return (result, *extras) if extras else result


def attention_steps(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, keep: bool, **keywords: Unpack[ScoreKeywords]
) -> tuple[Array, Array, Any, Any]:
    """Return the result, lse and, if they are kept, weights and scores; the score of a hidden key is -inf."""
    query, key, value = as_array("query", query), as_array("key", key), as_array("value", value)
    single_head = query.ndim == 2
    if single_head:
        query, key, value = query[None], key[None], value[None]

    num_heads, seqlen_q, head_dim = query.shape[-3:]
    num_kv_heads, seqlen_k, head_dim_v = value.shape[-3:]
    group_size = num_heads // num_kv_heads if num_kv_heads else 1
    batch = np.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    heads = (*batch, num_heads)

    def per_batch(array: Array) -> Array:
        return np.broadcast_to(array, batch + array.shape[-3:])

    given: Mapping[str, Any] = {name: x for name, x in keywords.items() if x is not None}

    def broadcast(name: str, default: ArrayLike, shape: tuple[int, ...]) -> Array:
        return np.broadcast_to(as_array(name, given.get(name, default)), shape)

    query, key, value = per_batch(query), per_batch(key), per_batch(value)
    scale = float(given.get("scale", 1.0 / math.sqrt(max(head_dim, 1))))
    softcap, causal, window = given.get("softcap"), given.get("causal", False), given.get("window")
    mask = broadcast("mask", True, (*heads, seqlen_q, seqlen_k))
    bias = broadcast("bias", 0.0, (*heads, seqlen_q, seqlen_k))
    alibi_slopes = broadcast("alibi_slopes", 0.0, heads)
    sinks = broadcast("sinks", -np.inf, (num_heads,))
    key_lengths = broadcast("key_lengths", seqlen_k, batch)
    # By default the last query sees the last key.
    query_offset = broadcast("query_offset", key_lengths.astype(np.int64) - seqlen_q, batch)

    result = np.zeros((*heads, seqlen_q, head_dim_v), query.dtype)
    lse = np.zeros((*heads, seqlen_q), np.float64 if query.dtype == np.float64 else np.float32)
    kept: Any = np.zeros((2, *heads, seqlen_q, seqlen_k), query.dtype) if keep else (None, None)
    with np.errstate(all="ignore"):
        for index in np.ndindex(*heads):
            *b, h = index
            kv_index = (*b, h // group_size)
            position = np.arange(seqlen_q) + query_offset[tuple(b)]
            head_bias = bias[index].astype(np.float64)

            q, k, v = (x.astype(np.float64) for x in (query[index], key[kv_index], value[kv_index]))
            scores = soft_capped(scaled_scores(q, k, scale), softcap)
            scores = scores + head_bias + alibi(float(alibi_slopes[index]), position, seqlen_k)
            visible = visible_keys(position, seqlen_k, int(key_lengths[tuple(b)]), causal, window)
            visible &= mask[index] & (head_bias != -np.inf)
            scores = np.where(visible, scores, -np.inf)

            head_weights, lse[index] = softmax(scores, float(sinks[h]))
            result[index] = weighted_values(head_weights, scores != -np.inf, v)
            if keep:
                kept[0][index], kept[1][index] = head_weights, scores

    if single_head:
        return result[0], lse[0], *((x[0] for x in kept) if keep else kept)
    return result, lse, *kept


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
    return_lse: bool = False,
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
    out, return_lse
        As in `fastattn.attention_varlen`.

    Returns
    -------
    out : ndarray, shape (total_q, H, Dv)
        With ``return_lse`` the tuple ``(out, lse)``.

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
    rows, keys = as_array("cu_seqlens_q", cu_seqlens_q), as_array("cu_seqlens_k", cu_seqlens_k)
    num_sequences = len(rows) - 1
    result = np.zeros((*query.shape[:2], value.shape[-1]), query.dtype) if out is None else out
    lse = np.zeros(query.shape[:2], np.float64 if query.dtype == np.float64 else np.float32)
    # Of these each sequence has its own.
    shapes = {"query_offset": (num_sequences,), "alibi_slopes": (num_sequences, query.shape[1])}
    each = {
        name: np.broadcast_to(as_array(name, x), shapes[name])
        for name, x in scores.items()
        if name in shapes and x is not None
    }
    for b in range(num_sequences):
        of_queries, of_keys = slice(rows[b], rows[b + 1]), slice(keys[b], keys[b + 1])
        own = cast(PackedKeywords, {**scores, **{name: x[b] for name, x in each.items()}})
        result[of_queries], lse[of_queries] = (
            x.swapaxes(0, 1)
            for x in attention(
                query[of_queries].swapaxes(0, 1),
                key[of_keys].swapaxes(0, 1),
                value[of_keys].swapaxes(0, 1),
                return_lse=True,
                **own,
            )
        )
    return (result, lse) if return_lse else result


@typed_like(fast_merge)
def merge(outs: Any, lses: Any) -> tuple[Array, Array]:
    """Combine results over disjoint sets of keys: ``Σ out_i e^lse_i / Σ e^lse_i``, in float64.

    The parameters and results are those of `fastattn.merge`.

    Parameters
    ----------
    outs : sequence of array_like, shape (..., H, Sq, Dv)
    lses : sequence of array_like, shape (..., H, Sq)

    Returns
    -------
    out : ndarray, shape (..., H, Sq, Dv)
    lse : ndarray, shape (..., H, Sq)

    Examples
    --------
    >>> from fastattn import reference
    >>> out, lse = reference.merge([[[1.0]], [[3.0]]], [[0.0], [0.0]])
    >>> out, lse.round(4)
    (array([[2.]]), array([0.6931]))
    """
    outs = [as_array(f"outs[{i}]", out) for i, out in enumerate(outs)]
    lses = [as_array(f"lses[{i}]", lse) for i, lse in enumerate(lses)]
    refuse_plus_infinity(lses)
    dtypes = outs[0].dtype, np.result_type(*lses)
    logs = np.stack(np.broadcast_arrays(*lses)).astype(np.float64)
    parts = np.stack(np.broadcast_arrays(*outs)).astype(np.float64)
    with np.errstate(all="ignore"):
        weights, lse = softmax(logs.reshape(len(logs), -1).T, -np.inf)
        # A set without keys adds nothing, whatever its result holds.
        terms = np.where(logs[..., None] == -np.inf, 0.0, weights.T.reshape(logs.shape)[..., None] * parts)
    return terms.sum(axis=0).astype(dtypes[0]), lse.reshape(logs.shape[1:]).astype(dtypes[1])


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
    _, _, weights, steps = attention_steps(query, key, key[..., :0], True, **scores)
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
