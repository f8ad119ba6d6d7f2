"""Attention over dask arrays, chunk by chunk, for what does not fit in memory.

>>> import dask.array as da
>>> import fastattn.dask
>>> query, key, value = da.random.default_rng(0).standard_normal((3, 2, 5000, 64), chunks=(1, 2, 2500, 64))
>>> out = fastattn.dask.attention(query, key, value, causal=True)  # nothing is computed yet
>>> out.shape, out.chunks[1]
((2, 5000, 64), (2500, 2500))
>>> bool(abs(out[:, :2].mean()).compute() < 1)  # of the first two rows: most key chunks are not even loaded
True
"""

from __future__ import annotations

import functools
import itertools
import operator
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Never, Unpack

import numpy as np

try:
    import dask.array as da
    from dask.base import tokenize
    from dask.highlevelgraph import HighLevelGraph
except ImportError as _failure:
    raise ImportError("fastattn.dask needs the package dask: pip install 'fastattn[dask]'") from _failure

from fastattn._arguments import misfit
from fastattn._checks import Array, checked_integer, gradient_dtype
from fastattn._chunks import INPUTS, RESULTS, Call, DaskArray, Index
from fastattn._keywords import SCORES, ScoreKeywords, takes
from fastattn._partials import (
    Part,
    empty_part,
    gradient_of_sinks,
    merge_parts,
    partial_attention,
    partial_backward,
    partial_dtype,
    rounded,
    with_sinks,
)

__all__ = ["FewKeysWarning", "attention", "attention_backward"]

Graph = dict[Any, Any]

# With fewer keys in a chunk, much of the time goes into merging its result.
FEWEST_KEYS = 2048


class FewKeysWarning(UserWarning):
    """The chunks of the keys are so small that merging their results takes much of the time."""


@takes(ScoreKeywords)
def attention(
    query: Any,
    key: Any,
    value: Any,
    *others: Never,
    return_lse: bool = False,
    split_every: int = 4,
    **scores: Unpack[ScoreKeywords],
) -> Any:
    """`fastattn.attention` of dask arrays, lazily: a task for each chunk of queries and chunk of keys that it sees.

    Results over chunks of keys are merged, exactly, in a tree. Chunks that no query of a chunk sees, for ``causal``,
    ``window`` or ``key_lengths``, are not loaded for it.

    Parameters
    ----------
    query, key, value : dask.array.Array
        Shapes and dtypes as for `fastattn.attention`; chunked along any axis. The chunks of key along its sequence
        hold for value, mask and bias, too, and query's along batch and heads for all; ``head_dim`` becomes one chunk.
    mask, bias : dask.array.Array or array_like, optional
        As for `fastattn.attention`.
    **scores
        As for `fastattn.attention`. Arrays among them are small, and not lazy.
    return_lse : bool
        Whether to return the log-sum-exp of each row's scores, too.
    split_every : int
        How many results are merged at once.
    num_threads : int, optional
        Of each task; default 1, for dask's own threads and workers are as many as there are cores.

    Returns
    -------
    out : dask.array.Array, shape (..., H, Sq, Dv)
        In query's dtype, in query's chunks. What a half type rounds is rounded once, after merging.
    lse : dask.array.Array, shape (..., H, Sq)
        float64 for float64, else float32. Returned with ``return_lse``.

    Raises
    ------
    TypeError, ValueError
        As `fastattn.attention`, and for a sink of +inf, at once; values in lazy arrays are met when the result is
        computed.

    Warns
    -----
    FewKeysWarning
        If chunks hold less than 2048 keys, each.

    See Also
    --------
    attention_backward : Its gradients.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastattn.dask
    >>> x = da.ones((4, 6000, 16), chunks=(4, 2000, 16))
    >>> fastattn.dask.attention(x, x.rechunk({1: 3000}), x, window=(100, 0)).chunks
    ((4,), (2000, 2000, 2000), (16,))
    """
    if others or not scores.keys() <= SCORES:
        raise misfit(attention, others, scores)
    every = checked_integer("split_every", split_every, 2)
    call = Call(query, key, value, dict(scores))
    warn_of_few_keys(call.chunks[call.keys_axis])
    packed = forward(call, every)
    out = unpacked(packed, 0, call.query.dtype, call.columns)
    lse = unpacked(packed, 1, partial_dtype(call.query.dtype))
    results = (out[0], lse[0]) if call.single_head else (out, lse)
    return results if return_lse else results[0]


@takes(ScoreKeywords)
def attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    *others: Never,
    grad_lse: Any = None,
    return_grad_bias: bool = False,
    return_grad_sinks: bool = False,
    split_every: int = 4,
    **scores: Unpack[ScoreKeywords],
) -> tuple[Any, ...]:
    """`fastattn.attention_backward` of dask arrays, lazily: a task for each two chunks that `attention` has one for.

    Parameters
    ----------
    grad_out : dask.array.Array, shape (..., H, Sq, Dv)
        The gradient of a scalar with respect to `out`; in query's dtype.
    query, key, value
        As for `attention`.
    out, lse : dask.array.Array
        What `attention` returned with ``return_lse=True``; of a half type, `out` may be float32, not yet rounded.
    mask, bias : dask.array.Array or array_like, optional
        As for `fastattn.attention`.
    **scores
        As for `attention`.
    grad_lse : dask.array.Array, shape (..., H, Sq), optional
        The gradient with respect to `lse`; default 0.
    return_grad_bias, return_grad_sinks : bool
        Whether to return the gradients of ``bias`` and ``sinks``, too.
    split_every : int
        How many shares of a gradient are summed at once.
    num_threads : int, optional
        Of each task; default 1, for dask's own threads and workers are as many as there are cores.

    Returns
    -------
    grad_query, grad_key, grad_value : dask.array.Array
        Of the shape and dtype of their arrays, in the chunks that `attention` has them in; summed in float32 (float64
        for float64). Compute them together, by ``dask.compute``: they share their tasks.
    grad_bias : dask.array.Array
        Of bias's shape and dtype. Returned with ``return_grad_bias``.
    grad_sinks : dask.array.Array, shape (H,)
        Returned with ``return_grad_sinks``.

    Raises
    ------
    TypeError, ValueError
        As `fastattn.attention_backward`, at once.

    See Also
    --------
    attention : The forward pass.

    Examples
    --------
    >>> import dask
    >>> import dask.array as da
    >>> import fastattn.dask
    >>> query, key, value, grad_out = da.random.default_rng(0).standard_normal((4, 2, 5000, 8), chunks=(1, 2, 2500, 8))
    >>> out, lse = fastattn.dask.attention(query, key, value, return_lse=True)
    >>> grads = fastattn.dask.attention_backward(grad_out, query, key, value, out, lse)
    >>> [x.shape for x in dask.compute(*grads)]
    [(2, 5000, 8), (2, 5000, 8), (2, 5000, 8)]
    """
    if others or not scores.keys() <= SCORES:
        raise misfit(attention_backward, others, scores)
    every = checked_integer("split_every", split_every, 2)
    call = Call(query, key, value, dict(scores))
    if return_grad_bias and "bias" not in call.arrays:
        raise ValueError("return_grad_bias is given without bias")
    if return_grad_sinks and "sinks" not in call.small:
        raise ValueError("return_grad_sinks is given without sinks")
    call.add_results(grad_out=grad_out, out=out, lse=lse, grad_lse=grad_lse)
    names = ["query", "key", "value", *["bias"] * return_grad_bias]
    grads = backward(call, names, every)
    if call.single_head:
        grads = [grad[0] if name != "bias" else grad for name, grad in zip(names, grads, strict=True)]
    grads = [grad.reshape(call.given_shapes[name]) for name, grad in zip(names, grads, strict=True)]
    if return_grad_sinks:
        grads.append(backward_of_sinks(call, every))
    return tuple(grads)


def warn_of_few_keys(sizes: tuple[int, ...]) -> None:
    usual = statistics.median(sizes)
    if len(sizes) > 1 and usual < FEWEST_KEYS:
        warnings.warn(
            f"key has chunks of {usual:.0f} keys; with less than {FEWEST_KEYS}, merging takes much of the time: give "
            f"key.rechunk({{-2: {2 * FEWEST_KEYS}}}), whose chunks value, mask and bias follow",
            FewKeysWarning,
            stacklevel=3,
        )


# --- graphs ---------------------------------------------------------------------------------------


def tree(graph: Graph, name: str, index: Index, keys: list[Any], combine: Callable[..., Any], every: int) -> list[Any]:
    """Add tasks that combine so many at once, until not more are left; return their keys."""
    for level in itertools.count():
        if len(keys) <= every:
            return keys
        groups = [keys[i : i + every] for i in range(0, len(keys), every)]
        keys = [(f"{name}-{level}", *index, i) for i in range(len(groups))]
        graph.update(zip(keys, ((combine, group) for group in groups), strict=True))
    raise AssertionError  # of a count that ends


def new_array(graph: Graph, name: str, call: Call, chunks: Sequence[Any], dtype: np.dtype[Any], *more: Any) -> Any:
    dependencies = [*call.arrays.values(), *more]
    layers = HighLevelGraph.from_collections(name, graph, dependencies=dependencies)
    return da.Array(layers, name, tuple(chunks), meta=np.empty((0,) * len(chunks), dtype))


def forward(call: Call, every: int) -> DaskArray:
    """Return an array whose chunks are pairs: out and lse."""
    name = f"attention-{tokenize(call.arrays, call.small, call.numbers, every)}"
    graph: Graph = {}
    merge = functools.partial(merge_parts, num_threads=call.numbers["num_threads"])
    for row in call.rows():
        visible = call.visible(row)
        keys = [(f"{name}-part", *row, j) for j in visible]
        graph.update(
            (key, chunk_task(call, partial_attention, INPUTS, (*row, j))) for key, j in zip(keys, visible, strict=True)
        )
        finish = functools.partial(
            finish_rows,
            empty=(call.sizes(row), call.columns),
            dtype=call.query.dtype,
            sinks=call.sinks(row),
            num_threads=call.numbers["num_threads"],
        )
        graph[(name, *row)] = (finish, tree(graph, f"{name}-merge", row, keys, merge, every))
    return new_array(graph, name, call, call.chunks[:-1], call.query.dtype)


def chunk_task(call: Call, compute: Callable[..., Any], names: Sequence[str], index: Index, **more: Any) -> Any:
    """Return the task that computes something of the chunks of these arrays, as far as there are such."""
    given = [name for name in names if name in call.arrays]
    run = functools.partial(compute_chunk, compute, given, call.scores(index) | more)
    return (run, *(call.task_key(name, index) for name in given))


def compute_chunk(compute: Callable[..., Any], names: list[str], scores: dict[str, Any], *arrays: Array) -> Any:
    return compute(**dict(zip(names, arrays, strict=True)), **scores)


def finish_rows(
    parts: list[Part],
    *,
    empty: tuple[tuple[int, ...], int],
    dtype: np.dtype[Any],
    sinks: Array | None,
    num_threads: int,
) -> Part:
    merged = merge_parts(parts, num_threads) if parts else empty_part(*empty, partial_dtype(dtype))
    out, lse = with_sinks(merged, sinks, num_threads=num_threads)
    return rounded(out, dtype), lse


def unpacked(packed: DaskArray, item: int, dtype: np.dtype[Any], columns: int | None = None) -> DaskArray:
    """Return one array of an array of pairs; it may have columns, where these have rows alone."""
    rows = tuple(range(packed.ndim))
    axes = rows if columns is None else (*rows, packed.ndim)
    return da.blockwise(
        operator.itemgetter(item),
        axes,
        packed,
        rows,
        new_axes=None if columns is None else {packed.ndim: columns},
        dtype=dtype,
        meta=np.empty((0,) * len(axes), dtype),
        name=f"{packed.name}-{item}",
    )


def backward(call: Call, names: list[str], every: int) -> list[DaskArray]:
    """Return the gradients of these arrays."""
    token = tokenize(call.arrays, call.small, call.numbers, names, every)
    shares = f"attention-backward-{token}"
    pairs: Graph = {}
    of_chunk: dict[str, dict[Index, list[Any]]] = {name: {} for name in names}
    for row in call.rows():
        for j in call.visible(row):
            index = (*row, j)
            pairs[(shares, *index)] = chunk_task(
                call, partial_backward, (*RESULTS, *INPUTS), index, return_grad_bias="bias" in names
            )
            for name in names:
                of_chunk[name].setdefault(call.task_key(name, index)[1:], []).append((shares, *index))
    shared = new_array(pairs, shares, call, call.chunks, call.query.dtype)
    return [
        sum_of_shares(call, f"grad-{name}-{token}", name, i, of_chunk[name], every, shared)
        for i, name in enumerate(names)
    ]


def sum_of_shares(
    call: Call, name: str, of: str, item: int, shares: dict[Index, list[Any]], every: int, shared: DaskArray
) -> DaskArray:
    x = call.arrays[of]
    graph: Graph = {}
    for index in itertools.product(*(range(len(sizes)) for sizes in x.chunks)):
        keys = [(f"{name}-share", *index, i) for i in range(len(shares.get(index, [])))]
        graph.update(
            (key, (operator.itemgetter(item), pair)) for key, pair in zip(keys, shares.get(index, []), strict=True)
        )
        size = tuple(sizes[i] for sizes, i in zip(x.chunks, index, strict=True))
        finish = functools.partial(finish_sum, shape=size, dtype=x.dtype)
        graph[(name, *index)] = (finish, tree(graph, f"{name}-sum", index, keys, sum_arrays, every))
    return new_array(graph, name, call, x.chunks, x.dtype, shared)


def sum_arrays(arrays: list[Array]) -> Array:
    return functools.reduce(operator.add, arrays)


def finish_sum(arrays: list[Array], *, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    return rounded(sum_arrays(arrays), dtype) if arrays else np.zeros(shape, dtype)


def backward_of_sinks(call: Call, every: int) -> DaskArray:
    name = f"grad-sinks-{tokenize(call.arrays, call.small, call.numbers, every)}"
    graph: Graph = {}
    of_chunk: dict[int, list[Any]] = {}
    results = [x for x in RESULTS if x in call.arrays]
    for row in call.rows():
        key = (f"{name}-share", *row)
        run = functools.partial(sinks_chunk, call.sinks(row))
        graph[key] = (run, *(call.task_key(x, (*row, 0)) for x in results))
        of_chunk.setdefault(row[call.heads_axis], []).append(key)
    dtype = gradient_dtype(call.small["sinks"])
    for i, size in enumerate(call.chunks[call.heads_axis]):
        finish = functools.partial(finish_sum, shape=(size,), dtype=dtype)
        graph[(name, i)] = (finish, tree(graph, f"{name}-sum", (i,), of_chunk.get(i, []), sum_arrays, every))
    return new_array(graph, name, call, [call.chunks[call.heads_axis]], dtype)


def sinks_chunk(sinks: Any, grad_out: Array, out: Array, lse: Array, grad_lse: Array | None = None) -> Array:
    return gradient_of_sinks(sinks, grad_out, out, lse, grad_lse)
