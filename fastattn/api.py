"""The public functions: signatures, defaults and what they mean. `fastattn._core` does the work.

`attention` itself is `_core`'s, with its docstring: one more function between would cost small calls a tenth of their
time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Never, Protocol, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn import _core
from fastattn._arguments import misfit
from fastattn._keywords import (
    PACKED,
    SCORES,
    Array,
    AttentionFunction,
    BackwardKeywords,
    Grads,
    PackedKeywords,
    ScoreKeywords,
    VarlenBackwardKeywords,
    VarlenKeywords,
    takes,
)
from fastattn._merge import merge_results

__version__ = "0.1.0"


attention: AttentionFunction = _core.attention


@overload
def attention_varlen(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **scores: Unpack[VarlenKeywords],
) -> Array: ...
@overload
def attention_varlen(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_lse: Literal[True],
    **scores: Unpack[VarlenKeywords],
) -> tuple[Array, Array]: ...
@overload
def attention_varlen(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_lse: bool = False,
    **scores: Unpack[VarlenKeywords],
) -> Array | tuple[Array, Array]: ...
@takes(PackedKeywords)
def attention_varlen(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *others: Never,
    dropout: float = 0.0,
    seed: int | None = None,
    out: Array | None = None,
    add_to: tuple[Array, Array] | None = None,
    unrounded: bool = False,
    return_lse: bool = False,
    **scores: Unpack[PackedKeywords],
) -> Any:
    """`attention` over packed sequences of different lengths, without padding.

    Sequence ``b`` has the query rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` and the keys
    ``cu_seqlens_k[b]`` to ``cu_seqlens_k[b + 1]``, and sees no others. Its result is that of `attention`
    on these rows alone, to the last bit.

    Parameters
    ----------
    query : array_like, shape (total_q, H, D)
        Dtypes and strides as for `attention`.
    key : array_like, shape (total_k, Hkv, D)
    value : array_like, shape (total_k, Hkv, Dv)
    cu_seqlens_q, cu_seqlens_k : array_like of int, shape (B + 1,)
        Cumulative lengths: 0 first, never falling, ``total_q`` and ``total_k`` last. Sequences may be empty.
    query_offset : int or array_like of int, shape (B,), optional
        Position of a sequence's first query. Default: its last query sees its last key.
    **scores
        As for `attention`; `alibi_slopes` may be (B, H).
    out : ndarray, shape (total_q, H, Dv), optional
        Where to store the result: in query's dtype, or float32 where that is half, of any strides, apart from the
        inputs in memory.
    add_to : (out, lse), optional
        Results over other keys, which these join in place, as for `attention`.
    unrounded : bool
        Whether the result for a float16 or bfloat16 query stays in float32.
    return_lse : bool
        Whether to return the log-sum-exp of each row's scores, too.

    Returns
    -------
    out : ndarray, shape (total_q, H, Dv)
        In query's dtype. 0 for a query that sees no key.
    lse : ndarray, shape (total_q, H)
        float64 for float64, else float32. Returned with ``return_lse``.

    Raises
    ------
    TypeError, ValueError, MemoryError, KeyboardInterrupt
        As `attention`, and ValueError for cumulative lengths that do not fit. Nothing has then been written.

    See Also
    --------
    attention : One length for the whole batch, or padding by ``key_lengths``.
    attention_varlen_backward : Its gradients.
    KVCache : Sequences that grow.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 10, 8, 64), np.float32)
    >>> lengths = [0, 3, 3, 10]  # of 3, 0 and 7 tokens
    >>> out = fastattn.attention_varlen(query, key, value, lengths, lengths, causal=True)
    >>> alone = fastattn.attention(*(x[3:].swapaxes(0, 1) for x in (query, key, value)), causal=True)
    >>> bool((out[3:] == alone.swapaxes(0, 1)).all())
    True
    """
    if others or not scores.keys() <= PACKED:
        raise misfit(attention_varlen, others, scores)
    return _core.attention_varlen(
        query, key, value, cu_seqlens_q, cu_seqlens_k, scores, dropout, seed, out, add_to, unrounded, return_lse
    )


@overload
def attention_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *,
    return_grad_bias: Literal[False] = False,
    return_grad_sinks: Literal[False] = False,
    **scores: Unpack[BackwardKeywords],
) -> tuple[Array, Array, Array]: ...
@overload
def attention_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *,
    return_grad_bias: Literal[True],
    return_grad_sinks: Literal[False] = False,
    **scores: Unpack[BackwardKeywords],
) -> tuple[Array, Array, Array, Array]: ...
@overload
def attention_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *,
    return_grad_bias: Literal[False] = False,
    return_grad_sinks: Literal[True],
    **scores: Unpack[BackwardKeywords],
) -> tuple[Array, Array, Array, Array]: ...
@overload
def attention_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *,
    return_grad_bias: Literal[True],
    return_grad_sinks: Literal[True],
    **scores: Unpack[BackwardKeywords],
) -> tuple[Array, Array, Array, Array, Array]: ...
@overload
def attention_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *,
    return_grad_bias: bool = False,
    return_grad_sinks: bool = False,
    **scores: Unpack[BackwardKeywords],
) -> tuple[Array, ...]: ...
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
    """Gradients of `attention`: from that of its result to those of its arguments.

    Scores are computed anew, block by block, from what the forward pass has returned with ``return_lse=True``; the
    score matrix is never stored. Keywords are those of the forward pass.

    Parameters
    ----------
    grad_out : array_like, shape (..., H, Sq, Dv)
        The gradient of a scalar with respect to `out`; in query's dtype.
    query, key, value
        As for `attention`.
    out : array_like, shape (..., H, Sq, Dv)
        What `attention` returned, or `merge` of it and results over other keys: then the gradients are those of the
        union, and these keys' share of query's.
    lse : array_like, shape (..., H, Sq)
        What it returned with ``return_lse=True``, or `merge` did.
    **scores
        As for `attention`. ``alibi_slopes`` are constants, without a gradient.
    grad_lse : array_like, shape (..., H, Sq), optional
        The gradient with respect to `lse`, where the scalar depends on it; default 0.
    unrounded : bool
        Whether gradients of float16 and bfloat16 arrays stay in float32, in which they are accumulated: as these keys'
        or these queries' share of a sum.
    return_grad_bias, return_grad_sinks : bool
        Whether to return the gradients of ``bias`` and ``sinks``, too.
    grads : (ndarray, ndarray, ndarray), optional
        Where to store the gradients of query, key and value: of their shapes and dtypes, or float32 where that is
        half, of any strides, apart from the inputs and each other in memory. Each may be None.

    Returns
    -------
    grad_query, grad_key, grad_value : ndarray
        Of the shape and dtype of their arrays, summed over the query heads of a group and over batch axes along which
        an array was broadcast; accumulated in float32 (float64 for float64), and rounded once. 0 for what no query
        sees, and for queries that see nothing, even where these are NaN.
    grad_bias : ndarray
        Of bias's shape and dtype. Returned with ``return_grad_bias``.
    grad_sinks : ndarray, shape (H,)
        Of the dtype of sinks; float64 where these are integers. Returned with ``return_grad_sinks``.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `attention`, and for gradients or results of another shape or dtype. Nothing has then been written.
    KeyboardInterrupt
        After Ctrl-C, within a fraction of a second; `grads` are then partly written.

    See Also
    --------
    attention : The forward pass.
    attention_varlen_backward : Of packed sequences.
    MultiHeadAttention.backward : Of a whole layer.

    Notes
    -----
    With ``p = exp(score - lse)`` and ``delta = sum(grad_out * out) - grad_lse`` of a row, the gradient of a score is
    ``p * (grad_out @ value.T - delta)`` [1]_: five products in place of the forward pass's two. The gradients are the
    same to the last bit for any number of threads, and whatever else is in the batch. Each thread takes about a
    mebibyte, and sums of the gradients of a head's keys and values: `plan` tells how much with ``backward=True``.

    References
    ----------
    .. [1] Dao, Fu, Ermon, Rudra and Ré, "FlashAttention", 2022; Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value, grad_out = rng.standard_normal((4, 8, 100, 64))
    >>> out, lse = fastattn.attention(query, key, value, causal=True, return_lse=True)
    >>> grads = fastattn.attention_backward(grad_out, query, key, value, out, lse, causal=True)
    >>> step = 1e-6 * rng.standard_normal(query.shape)  # the scalar is sum(grad_out * out)
    >>> change = fastattn.attention(query + step, key, value, causal=True) - out
    >>> bool(np.isclose((grad_out * change).sum(), (grads[0] * step).sum(), rtol=1e-4))
    True
    """
    if others or not scores.keys() <= SCORES:
        raise misfit(attention_backward, others, scores)
    if return_grad_bias and scores.get("bias") is None:
        raise ValueError("return_grad_bias is given without bias")
    if return_grad_sinks and scores.get("sinks") is None:
        raise ValueError("return_grad_sinks is given without sinks")
    return _core.attention_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        None,
        None,
        scores,
        dropout,
        seed,
        grad_lse,
        unrounded,
        return_grad_bias,
        return_grad_sinks,
        grads,
    )


@overload
def attention_varlen_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_grad_sinks: Literal[False] = False,
    **scores: Unpack[VarlenBackwardKeywords],
) -> tuple[Array, Array, Array]: ...
@overload
def attention_varlen_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_grad_sinks: Literal[True],
    **scores: Unpack[VarlenBackwardKeywords],
) -> tuple[Array, Array, Array, Array]: ...
@overload
def attention_varlen_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_grad_sinks: bool = False,
    **scores: Unpack[VarlenBackwardKeywords],
) -> tuple[Array, ...]: ...
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
    """Gradients of `attention_varlen`, as `attention_backward` has them.

    Parameters
    ----------
    grad_out : array_like, shape (total_q, H, Dv)
        The gradient of a scalar with respect to `out`; in query's dtype.
    query, key, value, cu_seqlens_q, cu_seqlens_k
        As for `attention_varlen`.
    out : array_like, shape (total_q, H, Dv)
    lse : array_like, shape (total_q, H)
        What `attention_varlen` returned with ``return_lse=True``.
    query_offset : int or array_like of int, shape (B,), optional
        Position of a sequence's first query. Default: its last query sees its last key.
    **scores
        As for `attention_varlen`.
    grad_lse : array_like, shape (total_q, H), optional
        The gradient with respect to `lse`; default 0.
    unrounded : bool
        Whether gradients of float16 and bfloat16 arrays stay in float32.
    return_grad_sinks : bool
        Whether to return the gradient of ``sinks``, too.
    grads : (ndarray, ndarray, ndarray), optional
        Where to store the gradients of query, key and value, as for `attention_backward`.

    Returns
    -------
    grad_query, grad_key, grad_value : ndarray
        Of the shape and dtype of their arrays.
    grad_sinks : ndarray, shape (H,)
        Likewise; float64 where sinks are integers. Returned with ``return_grad_sinks``.

    Raises
    ------
    TypeError, ValueError, MemoryError, KeyboardInterrupt
        As `attention_backward`, and ValueError for cumulative lengths that do not fit.

    See Also
    --------
    attention_varlen : The forward pass.
    attention_backward : Of one length for the whole batch.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> query, key, value, grad_out = np.random.default_rng(0).standard_normal((4, 10, 8, 64), np.float32)
    >>> lengths = [0, 3, 3, 10]  # of 3, 0 and 7 tokens
    >>> out, lse = fastattn.attention_varlen(query, key, value, lengths, lengths, return_lse=True)
    >>> grad_query, _, _ = fastattn.attention_varlen_backward(grad_out, query, key, value, out, lse, lengths, lengths)
    >>> grad_query.shape
    (10, 8, 64)
    """
    if others or not scores.keys() <= PACKED:
        raise misfit(attention_varlen_backward, others, scores)
    if return_grad_sinks and scores.get("sinks") is None:
        raise ValueError("return_grad_sinks is given without sinks")
    return _core.attention_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        scores,
        dropout,
        seed,
        grad_lse,
        unrounded,
        False,
        return_grad_sinks,
        grads,
    )


@overload
def top_keys(
    query: ArrayLike,
    key: ArrayLike,
    k: int = 8,
    *,
    return_totals: Literal[False] = False,
    **scores: Unpack[ScoreKeywords],
) -> tuple[NDArray[np.int64], Array]: ...
@overload
def top_keys(
    query: ArrayLike,
    key: ArrayLike,
    k: int = 8,
    *,
    return_totals: Literal[True],
    **scores: Unpack[ScoreKeywords],
) -> tuple[NDArray[np.int64], Array, Array]: ...
@overload
def top_keys(
    query: ArrayLike,
    key: ArrayLike,
    k: int = 8,
    *,
    return_totals: bool = False,
    **scores: Unpack[ScoreKeywords],
) -> tuple[NDArray[np.int64], Array] | tuple[NDArray[np.int64], Array, Array]: ...
@takes(ScoreKeywords)
def top_keys(
    query: ArrayLike,
    key: ArrayLike,
    k: int = 8,
    *others: Never,
    return_totals: bool = False,
    **scores: Unpack[ScoreKeywords],
) -> Any:
    """Find the keys that each query attends most, without ever holding all weights.

    In one pass over the keys, with memory that grows with ``Sq + Sk`` and not with their product. The weights
    are those that `attention` would return.

    Parameters
    ----------
    query : array_like, shape (..., H, Sq, D)
    key : array_like, shape (..., Hkv, Sk, D)
        Dtypes, strides and broadcasting as for `attention`.
    k : int
        How many keys to list for each query, from 1 to 1024.
    **scores
        As for `attention`.
    return_totals : bool
        Whether to return how much each key is attended by all queries of a head together, too. It takes a second
        pass.

    Returns
    -------
    indices : ndarray of int64, shape (..., H, Sq, k)
        In order of falling weight; of equal ones the earlier key first. -1 where a query sees fewer keys.
    weights : ndarray, shape (..., H, Sq, k)
        In query's dtype. 0 where the index is -1.
    totals : ndarray, shape (..., H, Sk)
        Sums of the weights over the queries; float64 for float64, else float32. Returned with
        ``return_totals``. A query whose weights are NaN adds nothing.

    Raises
    ------
    TypeError, ValueError, MemoryError, KeyboardInterrupt
        As `attention`, and for a `k` that is not accepted.

    See Also
    --------
    attention : All weights, with ``return_weights=True``.
    AttentionView.from_top_keys : To look at them.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> query, key = np.random.default_rng(0).standard_normal((2, 8, 100, 64), np.float32)
    >>> indices, weights, totals = fastattn.top_keys(query, key, k=3, causal=True, return_totals=True)
    >>> indices[0, 0]
    array([ 0, -1, -1])
    >>> bool(np.allclose(totals.sum(axis=-1), 100))
    True
    """
    if others or not scores.keys() <= SCORES:
        raise misfit(top_keys, others, scores)
    return _core.top_keys(query, key, k, scores, return_totals)


def merge(
    outs: Sequence[ArrayLike],
    lses: Sequence[ArrayLike],
    *,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Array]:
    """Combine results of `attention` over disjoint sets of keys into that over their union.

    For a prefix that many sequences share, or keys that do not fit in memory: attend each set with
    ``return_lse=True``, and merge. A sink must take part in one of the sets only. Under half queries each set is best
    attended with ``unrounded=True``: merged sets are then as accurate as one call. Where sets come one after the other,
    ``attention(..., add_to=(out, lse))`` adds each to those before it, in one pass.

    Parameters
    ----------
    outs : sequence of array_like, shape (..., H, Sq, Dv)
        One for each set, of one dtype. Leading axes broadcast.
    lses : sequence of array_like, shape (..., H, Sq)
        One for each of `outs`. Where it is -inf the set has no key for the query, and adds nothing. +inf, by which
        FlashAttention says that, is refused.
    out : ndarray, shape (..., H, Sq, Dv), optional
        Where to store the result: in the dtype of `outs`, or float32 where that is half, or half where that is float32;
        of any strides. It may be one of `outs`, and is else apart from them in memory.
    num_threads : int, optional
        At most this many; default `get_num_threads`. Results are the same to the last bit for any.

    Returns
    -------
    out : ndarray, shape (..., H, Sq, Dv)
        In the dtype of `outs`, accumulated in float32 (float64 for float64) and rounded once. 0 where no set
        has a key.
    lse : ndarray, shape (..., H, Sq)
        float64 if any of `lses` is, else float32.

    Raises
    ------
    TypeError
        Dtypes that differ or are not accepted.
    ValueError
        No sets, not as many lses as outs, shapes that do not match or broadcast, an lse of +inf, or `out` that
        overlaps an input otherwise. In each of these cases nothing has been written.
    KeyboardInterrupt
        After Ctrl-C; `out` is then partly written.

    See Also
    --------
    attention : With ``return_lse=True``, what is merged.

    Notes
    -----
    With weights ``exp(lse_i - lse)``, where ``lse`` is the log of the sum of all ``exp(lse_i)``, the sum of
    ``weight_i * out_i`` is exact: the softmax over a union is a mean of those over its parts [1]_.

    Gradients pass through it in one of two ways, as the last example has them. `attention_backward` takes the merged
    ``out`` and ``lse`` in place of a set's own: what it returns is then that set's share of the union's gradients. Or
    the gradients of each set's results are ``weight_i * grad_out``, and
    ``weight_i * (sum(grad_out * (out_i - out)) + grad_lse)`` of its lse, which go into `attention_backward` with
    ``grad_lse=``.

    References
    ----------
    .. [1] Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 8, 100, 64), np.float32)
    >>> parts = [
    ...     fastattn.attention(query, key[:, keys], value[:, keys], return_lse=True)
    ...     for keys in (slice(0, 30), slice(30, None))
    ... ]
    >>> out, lse = fastattn.merge(*zip(*parts))
    >>> bool(np.allclose(out, fastattn.attention(query, key, value), atol=1e-6))
    True

    The gradients of one of the sets, by the merged results, and through the merge itself:

    >>> grad_out = np.random.default_rng(1).standard_normal(out.shape, np.float32)
    >>> first = query, key[:, :30], value[:, :30]
    >>> share = fastattn.attention_backward(grad_out, *first, out, lse)
    >>> own_out, own_lse = parts[0]
    >>> weight = np.exp(own_lse - lse)
    >>> grad_own_lse = weight * (grad_out * (own_out - out)).sum(axis=-1)
    >>> through = fastattn.attention_backward(
    ...     weight[..., None] * grad_out, *first, own_out, own_lse, grad_lse=grad_own_lse
    ... )
    >>> all(np.allclose(one, other, atol=1e-5) for one, other in zip(share, through))
    True
    """
    return merge_results(outs, lses, out, num_threads)


class Axes(NamedTuple):
    """What each axis of an array is taken for; 2-D arrays are one head."""

    batch: tuple[int, ...]
    heads: int
    seqlen: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a call of `attention`, or of `attention_backward`, would do.

    Attributes
    ----------
    query, key, value : Axes
        What each axis is taken for: ``batch``, ``heads``, ``seqlen`` and ``head_dim``. Arrays in the order
        (batch, seqlen, heads, head_dim) show here by heads and seqlen the wrong way round.
    isa : str
        Instruction set of the kernel.
    path : str
        What the kernel computes in: "float32", "float64", "bf16dot", "bf16tile" or "split", which
        is float32 and float16 in parts that a tile unit for bfloat16 multiplies; with "-decode" for a few query
        rows, which are served at the speed at which keys are read. A CPU with a tile unit computes those of bfloat16
        in float32.
    tile : (int, int)
        Query rows that are worked on together, and keys between two updates of the softmax.
    splits : int
        Parts of the keys whose results are merged; backward, parts of the query rows whose shares of the keys'
        gradients are added up. They depend on the shape alone.
    items : int
        Units of work that threads share.
    threads : int
        Threads that would take part.
    scratch_bytes : int
        Memory that each of them uses, and keeps for its next call if it is at most 16 MiB. Backward, some of it is for
        sums that become the gradients of a head's keys and values, in the precision of sums.
    shared_bytes : int
        Memory, for the time of the call, of results of splits that wait to be merged.
    flops : int
        Floating-point operations: 2 (D + Dv) for every score that mask, causal, window and key_lengths
        leave; with weights, which take the scores once more, 2 (2 D + Dv); backward, 2 (3 D + 2 Dv).

    See Also
    --------
    plan : Makes one.
    """

    query: Axes
    key: Axes
    value: Axes
    isa: str
    path: str
    tile: tuple[int, int]
    splits: int
    items: int
    threads: int
    scratch_bytes: int
    shared_bytes: int
    flops: int


class PlanFunction(Protocol):
    """The type of `plan`."""

    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        *,
        dropout: float = 0.0,
        seed: int | None = None,
        return_weights: bool = False,
        backward: bool = False,
        **scores: Unpack[ScoreKeywords],
    ) -> Plan: ...


def plan_function(function: Callable[..., Any]) -> PlanFunction:
    return function


@plan_function
@takes(ScoreKeywords)
def plan(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *others: Never,
    dropout: float = 0.0,
    seed: int | None = None,
    return_weights: bool = False,
    backward: bool = False,
    **scores: Unpack[ScoreKeywords],
) -> Plan:
    """Say what `attention` would do with the same arguments, without doing it.

    Parameters
    ----------
    query, key, value, return_weights
        As for `attention`. Arrays are checked, but neither read nor written, except for the mask and the
        small arrays.
    **scores
        As for `attention`.
    backward : bool
        Whether to say it of `attention_backward`, without the gradient of a bias.

    Returns
    -------
    Plan

    Raises
    ------
    TypeError, ValueError
        As `attention` would.

    See Also
    --------
    attention : The call.
    show_config : What the machine can.
    measure_peak : The rate to hold FLOPs against.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> x = np.zeros((1, 12, 1024, 64), np.float32)
    >>> plan = fastattn.plan(x, x, x, causal=True)
    >>> plan.query
    Axes(batch=(1,), heads=12, seqlen=1024, head_dim=64)
    >>> plan.flops == 4 * 64 * 12 * 1024 * 1025 // 2
    True
    >>> fastattn.plan(x, x, x, causal=True, backward=True).flops / plan.flops
    2.5
    """
    if others or not scores.keys() <= SCORES:
        raise misfit(plan, others, scores)
    chosen = _core.plan(query, key, value, scores, dropout, seed, return_weights, backward)
    return Plan(**chosen | {name: Axes(*chosen[name]) for name in ("query", "key", "value")})


def get_num_threads() -> int:
    """Return how many threads a call may use if it does not say.

    At first FASTATTN_NUM_THREADS, else OMP_NUM_THREADS, else the CPUs that affinity and control group
    leave to this process.

    Returns
    -------
    int

    See Also
    --------
    set_num_threads : Sets it.

    Examples
    --------
    >>> import fastattn
    >>> fastattn.get_num_threads() >= 1
    True
    """
    return _core.get_num_threads()


def set_num_threads(num_threads: int) -> None:
    """Set how many threads a call may use if it does not say.

    Parameters
    ----------
    num_threads : int
        At least 1. For the whole process. Of more than the CPUs that it may use, by affinity and by the quota of its
        control groups, only as many run.

    Raises
    ------
    TypeError, ValueError
        Not an int, or less than 1.

    See Also
    --------
    get_num_threads : What it is now.

    Examples
    --------
    >>> import fastattn
    >>> before = fastattn.get_num_threads()
    >>> fastattn.set_num_threads(1)
    >>> fastattn.get_num_threads()
    1
    >>> fastattn.set_num_threads(before)
    """
    _core.set_num_threads(num_threads)


def unused_isas() -> dict[str, str]:
    """Return why each instruction set that is faster than the one in use is not used; where there is none, that."""
    import platform  # here alone: importing it takes longer than all else that this function does

    known, selected = _core.known_isas(), _core.selected_isa()
    if selected not in {name for name, _, _ in known}:
        return {}  # one that is for tests
    faster = list(itertools.takewhile(lambda isa: isa[0] != selected, known))
    if [name for name, _, _ in known] == ["baseline"]:
        return {"any": f"fastattn has none for {platform.machine()}"}
    return {
        name: "FASTATTN_ISA chose another" if is_supported else f"the CPU or the operating system lacks {needs}"
        for name, needs, is_supported in faster
    }


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Show the version, instruction sets, threads, NumPy and compiler.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Whether to print, or to return a dict. `isas` are the instruction sets that this CPU has, best first;
        `unused` tells of each that is faster than the one in use why it is not used. `split` is whether float32 and
        float16 are computed in parts on a unit that multiplies bfloat16, where that is faster; the environment variable
        FASTATTN_SPLIT says otherwise by 0.

    Returns
    -------
    dict or None

    Raises
    ------
    ValueError
        Another mode.

    See Also
    --------
    plan : What a call would do.
    get_num_threads : The number of threads.

    Examples
    --------
    >>> import fastattn
    >>> sorted(fastattn.show_config(mode="dicts"))
    ['compiler', 'isa', 'isas', 'numpy', 'split', 'threads', 'unused', 'version']
    """
    config: dict[str, Any] = {
        "version": __version__,
        "isa": _core.selected_isa(),
        "isas": _core.available_isas(),
        "unused": unused_isas(),
        "split": _core.splits(),
        "threads": get_num_threads(),
        "numpy": np.__version__,
        "compiler": _core.compiler_version,
    }
    if mode == "dicts":
        return config
    if mode != "stdout":
        raise ValueError(f'mode must be "stdout" or "dicts", not {mode!r}')
    for name, setting in config.items():
        if isinstance(setting, list):
            setting = " ".join(setting)
        elif isinstance(setting, dict):
            setting = "; ".join(f"{isa}: {reason}" for isa, reason in setting.items()) or "none"
        print(f"{name:<9} {setting}")
    return None
