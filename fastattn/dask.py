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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Never, Unpack

import numpy as np

try:
    import dask.array as da
    from dask.base import tokenize
    from dask.highlevelgraph import HighLevelGraph
except ImportError as _failure:
    raise ImportError("fastattn.dask needs the package dask: pip install 'fastattn[dask]'") from _failure

import fastattn
from fastattn._arguments import misfit
from fastattn._checks import Array, as_array, checked_integer, refuse_masked
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

__all__ = ["attention", "attention_backward"]

Index = tuple[int, ...]
Graph = dict[Any, Any]

# With fewer keys in a chunk, to merge its result takes more than a tenth of the time.
FEWEST_KEYS = 2048
# What is a dask array, of which some are as large as the scores; what is small, and not lazy.
INPUTS, RESULTS = ("query", "key", "value", "mask", "bias"), ("grad_out", "out", "lse", "grad_lse")
LARGE, SMALL = INPUTS[3:], ("alibi_slopes", "sinks", "key_lengths", "query_offset")


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
        As `fastattn.attention`, at once; NaN or other values in arrays are met when the result is computed.

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
        What `attention` returned with ``return_lse=True``.
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


# --- a call: its arrays, the chunks of each axis, and what each chunk sees ------------------------


class Call:
    """The arrays of a call by the axes of their chunks: batch, heads, queries, keys, and two that are one chunk."""

    def __init__(self, query: Any, key: Any, value: Any, scores: dict[str, Any]):
        given = {"query": query, "key": key, "value": value}
        given |= {name: scores.pop(name) for name in LARGE if scores.get(name) is not None}
        arrays = {name: as_dask(name, x) for name, x in given.items()}
        self.given_shapes = {name: x.shape for name, x in arrays.items()}
        self.small = {name: small_array(name, scores.pop(name)) for name in SMALL if scores.get(name) is not None}
        self.numbers = {name: x for name, x in scores.items() if name not in (*LARGE, *SMALL)}
        self.numbers["num_threads"] = 1 if scores.get("num_threads") is None else scores["num_threads"]
        check(arrays, self.small, self.numbers)

        self.single_head = arrays["query"].ndim == 2
        for name in ("query", "key", "value"):
            arrays[name] = arrays[name][None] if arrays[name].ndim == 2 else arrays[name]
        batch = np.broadcast_shapes(*(arrays[name].shape[:-3] for name in ("query", "key", "value")))
        heads, seqlen_q = arrays["query"].shape[-3:-1]
        kv_heads, seqlen_k = arrays["key"].shape[-3:-1]
        self.shape = (*batch, heads, seqlen_q, seqlen_k)
        self.group = heads // kv_heads if kv_heads else 1
        num_batch = len(batch)
        self.heads_axis, self.queries_axis, self.keys_axis = num_batch, num_batch + 1, num_batch + 2
        self.chunks = self.chosen_chunks(arrays)
        self.starts = [np.concatenate([[0], np.cumsum(sizes)]).tolist() for sizes in self.chunks]
        self.axes: dict[str, tuple[int | None, ...]] = {}
        self.arrays: dict[str, da.Array] = {}
        leading = (*range(num_batch), self.heads_axis)
        self.add("query", arrays["query"], (*leading, self.queries_axis, None))
        for name in ("key", "value"):
            self.add(name, arrays[name], (*leading, self.keys_axis, None))
        for name in LARGE:
            if name in arrays:
                self.add(name, arrays[name], (*leading, self.queries_axis, self.keys_axis))
        self.lengths = np.broadcast_to(self.small.get("key_lengths", seqlen_k), batch)
        self.offsets = np.broadcast_to(self.small.get("query_offset", self.lengths - seqlen_q), batch)

    @property
    def query(self) -> da.Array:
        return self.arrays["query"]

    @property
    def columns(self) -> int:
        return int(self.arrays["value"].shape[-1])

    def chosen_chunks(self, arrays: dict[str, da.Array]) -> list[tuple[int, ...]]:
        query, key = arrays["query"], arrays["key"]
        chunks = []
        for axis, size in enumerate(self.shape[:-3]):
            alike = [x for x in arrays.values() if axis_size(x, axis - len(self.shape)) == size]
            chunks.append(alike[0].chunks[axis - len(self.shape)])
        if any(size % self.group for size in query.chunks[-3]):
            chunks.append(tuple(size * self.group for size in key.chunks[-3]))
        else:
            chunks.append(query.chunks[-3])
        return [*chunks, query.chunks[-2], key.chunks[-2]]

    def add(self, name: str, x: da.Array, axes: Sequence[int | None]) -> None:
        """Add an array whose last axes are these, in their chunks; None is an axis that is one chunk."""
        own = axes[len(axes) - x.ndim :]
        wanted: dict[int, tuple[int, ...]] = {}
        for i, (axis, size) in enumerate(zip(own, x.shape, strict=True)):
            if axis is None:
                wanted[i] = (size,)
            elif name in ("key", "value") and axis == self.heads_axis:
                wanted[i] = tuple(heads // self.group for heads in self.chunks[axis])
            else:
                wanted[i] = self.chunks[axis] if size == self.shape[axis] else (size,)
        self.axes[name], self.arrays[name] = tuple(own), x.rechunk(wanted)

    def add_results(self, **results: Any) -> None:
        """Add results of the forward pass, and their gradients."""
        rows = self.shape[1:-1] if self.single_head else self.shape[:-1]
        columns = self.arrays["value"].shape[-1:]
        for name, given in results.items():
            if given is None:
                continue
            x, is_out = as_dask(name, given), name in ("out", "grad_out")
            if x.shape != rows + columns * is_out:
                raise ValueError(f"{name} has shape {x.shape}; accepted is {rows + columns * is_out}, that of what "
                                 f"attention returns as {'out' if is_out else 'lse'}")  # fmt: skip
            dtypes = (self.query.dtype,) if is_out else (np.float32, np.float64)
            if x.dtype not in dtypes:
                raise TypeError(
                    f"{name} has dtype {x.dtype}; accepted is {' or '.join(str(np.dtype(d)) for d in dtypes)}"
                )
            axes = (*range(self.keys_axis), *[None] * is_out)
            self.add(name, x[None] if self.single_head else x, axes)

    def rows(self) -> Iterator[Index]:
        """Go through the chunks of batch, heads and queries."""
        return itertools.product(*(range(len(sizes)) for sizes in self.chunks[:-1]))

    def cut(self, index: Index, axis: int) -> slice:
        return slice(self.starts[axis][index[axis]], self.starts[axis][index[axis] + 1])

    def visible(self, row: Index) -> range:
        """Return which chunks of keys a chunk of queries sees."""
        batch = tuple(self.cut(row, axis) for axis in range(self.heads_axis))
        lengths, offsets, rows = self.lengths[batch], self.offsets[batch], self.cut(row, self.queries_axis)
        if not lengths.size or rows.start == rows.stop:
            return range(0)
        left, right = self.numbers.get("window") or (None, None)
        if self.numbers.get("causal"):
            right = 0 if right is None else min(right, 0)
        first = 0 if left is None else max(0, int(offsets.min()) + rows.start - left)
        end = int(lengths.max())
        if right is not None:
            end = min(end, int(offsets.max()) + rows.stop + right)
        starts = self.starts[self.keys_axis]
        return range(
            int(np.searchsorted(starts, first, "right")) - 1,
            int(np.searchsorted(starts, end, "left")) if end > first else 0,
        )

    def task_key(self, name: str, index: Index) -> Any:
        """Return the key of an array's chunk in the graph, for chunks of batch, heads, queries and keys."""
        x = self.arrays[name]
        own = (0 if axis is None or len(sizes) == 1 else index[axis]
               for axis, sizes in zip(self.axes[name], x.chunks, strict=True))  # fmt: skip
        return (x.name, *own)

    def scores(self, index: Index) -> dict[str, Any]:
        """Return the keywords for one chunk of queries and one of keys: positions count from its first."""
        batch = tuple(self.cut(index, axis) for axis in range(self.heads_axis))
        rows, keys = self.cut(index, self.queries_axis), self.cut(index, self.keys_axis)
        local = dict(self.numbers)
        local["query_offset"] = as_number(self.offsets[batch] + (rows.start - keys.start))
        if "key_lengths" in self.small:
            local["key_lengths"] = as_number(np.clip(self.lengths[batch] - keys.start, 0, keys.stop - keys.start))
        if "alibi_slopes" in self.small:
            slopes = self.small["alibi_slopes"]
            own = [*batch, self.cut(index, self.heads_axis)][-slopes.ndim :]
            local["alibi_slopes"] = slopes[tuple(cut if size > 1 else slice(None)
                                                 for cut, size in zip(own, slopes.shape, strict=True))]  # fmt: skip
        return local

    def sinks(self, row: Index) -> Array | None:
        return self.small["sinks"][self.cut(row, self.heads_axis)] if "sinks" in self.small else None

    def sizes(self, row: Index) -> tuple[int, ...]:
        return tuple(sizes[i] for sizes, i in zip(self.chunks, row, strict=False))


def as_dask(name: str, x: Any) -> da.Array:
    if not isinstance(x, da.Array):
        x = da.asarray(as_array(name, x))
    refuse_masked(name, x._meta)
    if any(np.isnan(size) for size in x.shape):
        raise ValueError(f"{name} has chunks of unknown size, shape {x.shape}: give {name}.compute_chunk_sizes()")
    return x


def small_array(name: str, x: Any) -> Array:
    return as_array(name, x.compute() if isinstance(x, da.Array) else x)


def as_number(array: Array) -> Any:
    return int(array.flat[0]) if array.size == 1 else np.ascontiguousarray(array)


def axis_size(x: da.Array, axis: int) -> int:
    """Return the size of an axis counted from the end; 1 where there is none."""
    return x.shape[axis] if -axis <= x.ndim else 1


def check(arrays: dict[str, da.Array], small: dict[str, Array], numbers: dict[str, Any]) -> None:
    """Raise what `fastattn.attention` would of such arguments: with arrays of one element that look as large."""
    stand_ins = {name: np.broadcast_to(np.zeros((), x.dtype), x.shape) for name, x in arrays.items()}
    mask = stand_ins.pop("mask", None)
    described: Any = fastattn.plan
    plan = described(**stand_ins, **small, **numbers)
    if mask is None:
        return
    if mask.dtype != bool:
        raise TypeError(f"mask has dtype {mask.dtype}; accepted is bool, in which True means attend; floats that are "
                        "added to the scores go in bias=")  # fmt: skip
    full = (*plan.query.batch, plan.query.heads, plan.query.seqlen, plan.key.seqlen)
    try:
        fits = np.broadcast_shapes(mask.shape, full) == full
    except ValueError:
        fits = False
    if not fits and (arrays["query"].ndim > 2 or mask.ndim > 2):
        raise ValueError(f"mask has shape {mask.shape}, which does not broadcast to {full}")


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


def new_array(graph: Graph, name: str, call: Call, chunks: Sequence[Any], dtype: np.dtype[Any], *more: Any) -> da.Array:
    dependencies = [*call.arrays.values(), *more]
    layers = HighLevelGraph.from_collections(name, graph, dependencies=dependencies)
    return da.Array(layers, name, tuple(chunks), meta=np.empty((0,) * len(chunks), dtype))


def forward(call: Call, every: int) -> da.Array:
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


def unpacked(packed: da.Array, item: int, dtype: np.dtype[Any], columns: int | None = None) -> da.Array:
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


def backward(call: Call, names: list[str], every: int) -> list[da.Array]:
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
    call: Call, name: str, of: str, item: int, shares: dict[Index, list[Any]], every: int, shared: da.Array
) -> da.Array:
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


def backward_of_sinks(call: Call, every: int) -> da.Array:
    name = f"grad-sinks-{tokenize(call.arrays, call.small, call.numbers, every)}"
    graph: Graph = {}
    of_chunk: dict[int, list[Any]] = {}
    results = [x for x in RESULTS if x in call.arrays]
    for row in call.rows():
        key = (f"{name}-share", *row)
        run = functools.partial(sinks_chunk, call.sinks(row))
        graph[key] = (run, *(call.task_key(x, (*row, 0)) for x in results))
        of_chunk.setdefault(row[call.heads_axis], []).append(key)
    rows = np.zeros((0, 1))
    dtype = sinks_chunk(call.small["sinks"][:0], rows[..., None], rows[..., None], rows).dtype
    for i, size in enumerate(call.chunks[call.heads_axis]):
        finish = functools.partial(finish_sum, shape=(size,), dtype=dtype)
        graph[(name, i)] = (finish, tree(graph, f"{name}-sum", (i,), of_chunk.get(i, []), sum_arrays, every))
    return new_array(graph, name, call, [call.chunks[call.heads_axis]], dtype)


def sinks_chunk(sinks: Any, grad_out: Array, out: Array, lse: Array, grad_lse: Array | None = None) -> Array:
    return gradient_of_sinks(sinks, grad_out, out, lse, grad_lse)
