"""A rank's part of attention over sequences that are divided among ranks: all tokens, of some heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import fastattn
from fastattn._checks import Array, as_array
from fastattn._messages import exchange
from fastattn._partials import partial_backward, partial_dtype, rounded
from fastattn._ranks import Arrays, Description, divided


class Ulysses:
    """The heads of each rank, and how arrays go from all heads of some tokens to all tokens of some heads."""

    def __init__(self, comm: Any, arrays: Arrays, descriptions: list[Description]):
        self.comm, self.arrays = comm, arrays
        self.tokens = divided(descriptions)
        self.heads_axis = 1 if arrays.packed else -3
        num_heads, num_kv_heads = (arrays[name].shape[self.heads_axis] for name in ("query", "key"))
        size = comm.size
        if num_heads % size or not num_kv_heads or (num_kv_heads % size and size % num_kv_heads):
            raise ValueError(
                f"query has {num_heads} heads and key {num_kv_heads}, which {size} ranks cannot share: the first must "
                "be a multiple of the ranks, the second a multiple or a part; ring_attention takes any"
            )
        share, group = num_heads // size, max(num_heads // num_kv_heads, 1)
        self.query_heads = [slice(rank * share, (rank + 1) * share) for rank in range(size)]
        self.key_heads = [slice(cut.start // group, -(-cut.stop // group)) for cut in self.query_heads]

    def heads_of(self, name: str) -> list[slice]:
        return self.key_heads if name in ("key", "value") else self.query_heads

    def axes(self, columns: bool) -> tuple[int, int]:
        """Return the axes of heads and tokens, of an array with or without head_dim."""
        if self.arrays.packed:
            return 1, 0
        return (-3, -2) if columns else (-2, -1)

    def by_heads(self, name: str) -> Array:
        """Return all tokens of this rank's heads, of an array of which each rank has all heads of its tokens."""
        x = self.arrays[name]
        columns = name not in ("lse", "grad_lse")
        heads_axis, tokens_axis = self.axes(columns)
        heads, shards = self.heads_of(name), self.tokens["key" if name in ("key", "value") else "query"]
        parts = [taken(x, heads_axis, cut) for cut in heads]
        own = heads[self.comm.rank]
        shapes = [
            resized(x.shape, {heads_axis: own.stop - own.start, tokens_axis: shards.length(rank)})
            for rank in range(self.comm.size)
        ]
        received = exchange(self.comm, parts, shapes)
        whole = np.empty(resized(received[0].shape, {tokens_axis: shards.bounds[-1]}), x.dtype)
        for rank, part in enumerate(received):
            np.moveaxis(whole, tokens_axis, 0)[shards.positions(rank)] = np.moveaxis(part, tokens_axis, 0)
        return whole

    def by_tokens(self, x: Array, like: str, columns: bool = True) -> list[Array]:
        """Return this rank's tokens of the heads of each, of an array of which each has all tokens of its heads."""
        heads_axis, tokens_axis = self.axes(columns)
        heads, shards = self.heads_of(like), self.tokens["key" if like in ("key", "value") else "query"]
        parts = [np.take(x, shards.positions(rank), axis=tokens_axis) for rank in range(self.comm.size)]
        own = shards.length(self.comm.rank)
        shapes = [resized(x.shape, {heads_axis: cut.stop - cut.start, tokens_axis: own}) for cut in heads]
        return exchange(self.comm, parts, shapes)

    def scores(self) -> dict[str, Any]:
        """Return the keywords, of this rank's heads."""
        scores = dict(self.arrays.scores)
        own = self.query_heads[self.comm.rank]
        for name in ("alibi_slopes", "sinks"):
            if name in scores:
                scores[name] = as_array(name, scores[name])[..., own]
        return scores

    def bounds(self) -> tuple[Any, ...]:
        return (self.arrays.bounds, self.arrays.bounds) if self.arrays.packed else ()

    def result_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of out and lse, of all tokens of this rank's heads."""
        heads_axis, tokens_axis = self.axes(columns=False)
        share = self.query_heads[0].stop - self.query_heads[0].start
        sizes = {heads_axis: share, tokens_axis: self.tokens["query"].bounds[-1]}
        rows = resized(self.arrays.result_rows(), sizes)
        return (*rows, self.arrays["value"].shape[-1]), rows

    def attend(self, guard: Callable[[Callable[[], None]], None]) -> tuple[Array, Array]:
        query, key, value = (self.by_heads(name) for name in ("query", "key", "value"))
        out_shape, lse_shape = self.result_shapes()
        out: Array = np.zeros(out_shape, query.dtype)
        lse: Array = np.zeros(lse_shape, partial_dtype(query.dtype))

        def compute() -> None:
            call: Any = fastattn.attention_varlen if self.arrays.packed else fastattn.attention
            _, lse[...] = call(query, key, value, *self.bounds(), out=out, return_lse=True, **self.scores())

        guard(compute)
        whole = np.concatenate(self.by_tokens(out, "query"), axis=self.heads_axis)
        rows = np.concatenate(self.by_tokens(lse, "query", columns=False), axis=self.axes(False)[0])
        return (whole[0], rows[0]) if self.arrays.single_head else (whole, rows)

    def differentiate(self, guard: Callable[[Callable[[], None]], None]) -> list[Array]:
        names = [name for name in ("grad_out", "query", "key", "value", "out", "lse", "grad_lse")
                 if name in self.arrays.arrays]  # fmt: skip
        arrays = {name: self.by_heads(name) for name in names}
        dtype = partial_dtype(arrays["query"].dtype)
        grads = [np.zeros(arrays[name].shape, dtype) for name in ("query", "key", "value")]

        def compute() -> None:
            bounds = self.bounds() or None
            grads[:] = partial_backward(**arrays, bounds=bounds, **self.scores())

        guard(compute)
        return [self.summed(name, grad) for name, grad in zip(("query", "key", "value"), grads, strict=True)]

    def summed(self, name: str, grad: Array) -> Array:
        """Return the gradient of this rank's tokens: of a head that several ranks had, the sum of theirs."""
        like = self.arrays[name]
        total = np.zeros(like.shape, grad.dtype)
        for cut, part in zip(self.heads_of(name), self.by_tokens(grad, name), strict=True):
            taken(total, self.heads_axis, cut)[...] += part
        total = rounded(total, like.dtype)
        return total[0] if self.arrays.single_head else total


def taken(x: Array, axis: int, cut: slice) -> Array:
    """Return a view of a part of an axis."""
    return x[(slice(None),) * (axis % x.ndim) + (cut,)]


def resized(shape: Sequence[int], sizes: dict[int, int]) -> tuple[int, ...]:
    new = list(shape)
    for axis, size in sizes.items():
        new[axis] = size
    return tuple(new)
