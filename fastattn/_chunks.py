"""A call on dask arrays: the chunks that all of them are in, and which chunks of keys a chunk of queries sees."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import dask.array as da
import numpy as np

import fastattn
from fastattn._checks import Array, as_array, refuse_masked
from fastattn._partials import partial_dtype, refuse_infinite_sinks

Index = tuple[int, ...]
DaskArray = Any  # dask.array.Array, whose type is not known where dask is not installed

# What is a dask array, of which some are as large as the scores; what is small, and not lazy.
INPUTS, RESULTS = ("query", "key", "value", "mask", "bias"), ("grad_out", "out", "lse", "grad_lse")
LARGE, SMALL = INPUTS[3:], ("alibi_slopes", "sinks", "key_lengths", "query_offset")


class Call:
    """The arrays of a call by the axes of their chunks: batch, heads, queries, keys, and two that are one chunk."""

    given_shapes: dict[str, tuple[int, ...]]
    arrays: dict[str, DaskArray]
    axes: dict[str, tuple[int | None, ...]]  # of each array; None is one that is one chunk
    small: dict[str, Array]
    numbers: dict[str, Any]
    single_head: bool
    shape: tuple[int, ...]  # of the scores
    group: int
    heads_axis: int
    queries_axis: int
    keys_axis: int
    chunks: list[tuple[int, ...]]  # of each axis of the scores
    starts: list[list[int]]
    lengths: Array
    offsets: Array

    def __init__(self, query: Any, key: Any, value: Any, scores: dict[str, Any]):
        given = {"query": query, "key": key, "value": value}
        given |= {name: scores.pop(name) for name in LARGE if scores.get(name) is not None}
        arrays = {name: as_dask(name, x) for name, x in given.items()}
        self.given_shapes = {name: x.shape for name, x in arrays.items()}
        self.small = {name: small_array(name, scores.pop(name)) for name in SMALL if scores.get(name) is not None}
        self.numbers = {name: x for name, x in scores.items() if name not in (*LARGE, *SMALL)}
        self.numbers["num_threads"] = 1 if scores.get("num_threads") is None else scores["num_threads"]
        check(arrays, self.small, self.numbers)
        if "sinks" in self.small:
            refuse_infinite_sinks(self.small["sinks"])

        self.single_head = arrays["query"].ndim == 2
        for name in ("query", "key", "value"):
            arrays[name] = arrays[name][None] if arrays[name].ndim == 2 else arrays[name]
        batch = np.broadcast_shapes(*(arrays[name].shape[:-3] for name in ("query", "key", "value")))
        heads, seqlen_q = arrays["query"].shape[-3:-1]
        kv_heads, seqlen_k = arrays["key"].shape[-3:-1]
        self.shape = (*batch, heads, seqlen_q, seqlen_k)
        self.group = max(heads // kv_heads, 1) if kv_heads else 1
        num_batch = len(batch)
        self.heads_axis, self.queries_axis, self.keys_axis = num_batch, num_batch + 1, num_batch + 2
        self.chunks = self.chosen_chunks(arrays)
        self.starts = [np.concatenate([[0], np.cumsum(sizes)]).tolist() for sizes in self.chunks]
        self.axes, self.arrays = {}, {}
        leading = (*range(num_batch), self.heads_axis)
        self.add("query", arrays["query"], (*leading, self.queries_axis, None))
        for name in ("key", "value"):
            self.add(name, arrays[name], (*leading, self.keys_axis, None))
        for name in LARGE:
            if name in arrays:
                self.add(name, arrays[name], (*leading, self.queries_axis, self.keys_axis))
        self.lengths = np.broadcast_to(np.asarray(self.small.get("key_lengths", seqlen_k), np.int64), batch)
        offsets = np.asarray(self.small.get("query_offset", self.lengths - seqlen_q), np.int64)
        self.offsets = np.broadcast_to(offsets, batch)

    @property
    def query(self) -> DaskArray:
        return self.arrays["query"]

    @property
    def columns(self) -> int:
        return int(self.arrays["value"].shape[-1])

    def chosen_chunks(self, arrays: dict[str, DaskArray]) -> list[tuple[int, ...]]:
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

    def add(self, name: str, x: DaskArray, axes: Sequence[int | None]) -> None:
        """Add an array whose last axes are these, in their chunks; None is an axis that is one chunk."""
        own = axes[len(axes) - x.ndim :]
        wanted: dict[int, tuple[int, ...]] = {}
        for i, (axis, size) in enumerate(zip(own, x.shape, strict=True)):
            if axis is None:
                wanted[i] = (size,)
            elif name in ("key", "value") and axis == self.heads_axis and self.shape[axis]:
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
            own = self.query.dtype
            accepted = [own, partial_dtype(own)] if name == "out" else [own] if is_out else [np.float32, np.float64]
            dtypes = list(dict.fromkeys(map(np.dtype, accepted)))
            if x.dtype not in dtypes:
                raise TypeError(f"{name} has dtype {x.dtype}; accepted is {' or '.join(map(str, dtypes))}")
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


def as_dask(name: str, x: Any) -> DaskArray:
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


def axis_size(x: DaskArray, axis: int) -> int | None:
    """Return the size of an axis counted from the end; None where there is none."""
    return x.shape[axis] if -axis <= x.ndim else None


def check(arrays: dict[str, DaskArray], small: dict[str, Array], numbers: dict[str, Any]) -> None:
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
    batch = np.broadcast_shapes(*(arrays[name].shape[:-3] for name in INPUTS[:3]))
    full = (*batch, plan.query.heads, plan.query.seqlen, plan.key.seqlen)
    try:
        fits = np.broadcast_shapes(mask.shape, full) == full
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"mask has shape {mask.shape}, which does not broadcast to {full}")
