"""A rank's part of attention over sequences that are divided among ranks, while keys go round."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import fastattn
from fastattn._checks import Array, as_array
from fastattn._messages import Guard, Transfer, transfer
from fastattn._partials import (
    Part,
    empty_part,
    gradient_of_sinks,
    partial_attention,
    partial_backward,
    partial_dtype,
    rounded,
    with_sinks,
)
from fastattn._ranks import Arrays, Description, divided
from fastattn._shards import Run, cumulative, offsets_between, scores_between


class Meeting(NamedTuple):
    """Some of a rank's queries and some of another's keys, by their places, and the keywords between them."""

    rows: slice
    part: slice
    scores: dict[str, Any]


def joined(meetings: list[Meeting]) -> list[Meeting]:
    """Make one of two that lie side by side, where all see all: fewer and larger calls."""
    found: list[Meeting] = []
    for each in meetings:
        last = found[-1] if found else None
        if last and not last.scores and not each.scores:
            if last.rows == each.rows and last.part.stop == each.part.start:
                found[-1] = last._replace(part=slice(last.part.start, each.part.stop))
                continue
            if last.part == each.part and last.rows.stop == each.rows.start:
                found[-1] = last._replace(rows=slice(last.rows.start, each.rows.stop))
                continue
        found.append(each)
    return found


class Ring:
    """What a rank computes while keys go round: its queries by the keys of one rank after the other."""

    def __init__(self, arrays: Arrays, rank: int, descriptions: list[Description]):
        self.arrays, self.rank, self.size = arrays, rank, len(descriptions)
        self.queries, self.keys = divided(descriptions).values()
        scores = dict(arrays.scores)
        seqlens = self.queries.bounds[-1], self.keys.bounds[-1]
        self.sinks = scores.pop("sinks", None)
        self.offset = scores.pop("query_offset", 0 if arrays.packed else seqlens[1] - seqlens[0])
        window: tuple[int | None, int | None] = scores.pop("window", None) or (None, None)
        self.left, self.right = window
        if scores.pop("causal", False):
            self.right = 0 if self.right is None else min(self.right, 0)
        self.large = arrays.large
        self.scores, self.num_threads = scores, scores.get("num_threads")
        if "alibi_slopes" in scores and self.size > 1 and self.queries.layout == "striped":
            raise ValueError("alibi_slopes cannot be given with layout='striped', in which the distance of two tokens "
                             "is not that of their places: give layout='zigzag'")  # fmt: skip

    def check(self) -> None:
        """Raise if mask or bias are not for this rank's queries and all keys, by arrays that look as large as these."""
        if not self.large:
            return
        whole = {"query": self.arrays["query"]}
        for name in ("key", "value"):
            shape = list(self.arrays[name].shape)
            shape[-2] = self.keys.bounds[-1]
            whole[name] = np.broadcast_to(np.zeros((), self.arrays[name].dtype), shape)
        plan: Any = fastattn.plan
        plan(**whole, **self.large)

    def shape_of(self, name: str, source: int) -> tuple[int, ...]:
        """Return the shape of the keys or values of a rank."""
        shape = list(self.arrays[name].shape)
        shape[self.arrays.axis] = self.keys.length(source)
        return tuple(shape)

    def cut(self, array: Array, part: slice, *, columns: bool = True) -> Array:
        """Return some tokens; without columns, of an array that has no head_dim."""
        if self.arrays.packed:
            return array[part]
        return array[..., part, :] if columns else array[..., part]

    def meetings(self, source: int) -> list[Meeting]:
        """Return which runs of queries meet which of another rank's keys, and how these see them."""
        if source == self.rank and self.is_causal_alone():
            tokens = slice(0, self.queries.length(self.rank))
            return [Meeting(tokens, tokens, {"causal": True})]
        own = zip(self.queries.runs(self.rank), self.queries.cuts(self.rank), strict=True)
        theirs = zip(self.keys.runs(source), self.keys.cuts(source), strict=True)
        found = []
        for (queries, rows), (keys, part) in itertools.product(own, theirs):
            scores = scores_between(queries, keys, self.offset, self.left, self.right)
            if scores is not None:
                if "alibi_slopes" in self.scores:
                    scores |= {"query_offset": offsets_between(queries, keys, self.offset)}
                found.append(Meeting(rows, part, scores | self.between(queries, keys, rows)))
        return joined(joined(found))  # keys of a run of queries; then runs of queries

    def is_causal_alone(self) -> bool:
        """Return whether a rank's own tokens, which are in order in any layout, see what is before them and no more."""
        plain = not self.arrays.packed and not self.large and "alibi_slopes" not in self.scores
        alike = self.queries.runs(self.rank) == self.keys.runs(self.rank)
        return plain and alike and (self.offset, self.left, self.right) == (0, None, 0)

    def between(self, queries: list[Run], keys: list[Run], rows: slice) -> dict[str, Any]:
        """Return what else depends on two runs: their part of mask and bias, or their bounds if they are packed."""
        if self.arrays.packed:
            return {"bounds": (cumulative(queries), cumulative(keys))}
        (run,) = keys
        columns = slice(run.start, run.start + run.length * run.stride, run.stride)
        found: dict[str, Any] = {}
        for name, x in self.large.items():
            own = x[..., columns] if x.shape[-1] > 1 else x
            found[name] = own[..., rows, :] if own.ndim > 1 and own.shape[-2] > 1 else own
        return found

    # --- forward

    def start(self) -> None:
        query, columns = self.arrays["query"], self.arrays["value"].shape[-1]
        self.out, self.lse = empty_part(self.arrays.result_rows(), columns, partial_dtype(query.dtype))

    def attend(self, source: int, key: Array, value: Array) -> None:
        for rows, part, scores in self.meetings(source):
            arrays = {"query": self.cut(self.arrays["query"], rows)}
            arrays |= {"key": self.cut(key, part), "value": self.cut(value, part)}
            before = self.cut(self.out, rows), self.cut(self.lse, rows, columns=False)
            partial_attention(**arrays, **scores, **self.scores, add_to=before)

    def finish(self) -> Part:
        packed, threads = self.arrays.packed, self.num_threads
        out, lse = with_sinks((self.out, self.lse), self.sinks, packed=packed, num_threads=threads)
        out = rounded(out, self.arrays["query"].dtype)
        return (out[0], lse[0]) if self.arrays.single_head else (out, lse)

    # --- backward

    def start_backward(self) -> None:
        dtype = partial_dtype(self.arrays["query"].dtype)
        self.grad_query = np.zeros(self.arrays["query"].shape, dtype)

    def differentiate(self, source: int, key: Array, value: Array) -> tuple[Array, Array]:
        """Return this rank's share of the gradients of another's keys and values, and add to that of its queries."""
        grad_key, grad_value = (np.zeros(x.shape, self.grad_query.dtype) for x in (key, value))

        for rows, part, scores in self.meetings(source):
            named = {name: self.cut(self.arrays[name], rows) for name in ("grad_out", "query", "out")}
            for name in ("lse", "grad_lse"):
                if name in self.arrays.arrays:
                    named[name] = self.cut(self.arrays[name], rows, columns=False)
            keys = {"key": self.cut(key, part), "value": self.cut(value, part)}
            shares = partial_backward(**named, **keys, **scores, **self.scores)
            for grad, where, share in zip(
                (self.grad_query, grad_key, grad_value), (rows, part, part), shares, strict=True
            ):
                self.cut(grad, where)[...] += share
        return grad_key, grad_value


def go_round(comm: Any, ring: Ring, attend: Callable[[int, Array, Array], None]) -> None:
    """Call a function with the keys and values of each rank, while those of the next are on their way."""
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    key, value = ring.arrays["key"], ring.arrays["value"]
    for step in range(comm.size):
        holder = (comm.rank - step) % comm.size
        with transfer(comm) as messages:
            following = key, value
            if step < comm.size - 1:
                following = pass_on(messages, ring, (key, value), to, source, (holder - 1) % comm.size)
                messages.start()
            attend(holder, key, value)
        key, value = following


def pass_on(
    messages: Transfer, ring: Ring, keys: tuple[Array, Array], to: int, source: int, holder: int
) -> tuple[Array, Array]:
    """Send keys and values to the next rank, and receive those of `holder` from the one before."""
    key, value = (
        messages.receive(ring.shape_of(name, holder), x.dtype, source, tag)
        for tag, (name, x) in enumerate(zip(("key", "value"), keys, strict=True))
    )
    for tag, x in enumerate(keys):
        messages.send(x, to, tag)
    return key, value


def go_round_with_gradients(comm: Any, ring: Ring, guard: Guard) -> tuple[Array, Array]:
    """Have keys and values go round, and after them the sums of their gradients; return those of this rank's own.

    A rank adds its share while the sum of those before it is on its way.
    """
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    dtype = partial_dtype(ring.arrays["query"].dtype)
    key, value = ring.arrays["key"], ring.arrays["value"]
    sums: list[Array] = []
    for step in range(comm.size):
        holder = (comm.rank - step) % comm.size
        shapes = [ring.shape_of(name, holder) for name in ("key", "value")]
        shares: list[Array] = []
        with transfer(comm) as messages:
            arriving = []
            if step:
                arriving = [messages.receive(shape, dtype, source, 2 + i) for i, shape in enumerate(shapes)]
                for i, x in enumerate(sums):
                    messages.send(x, to, 2 + i)
            following = key, value
            if step < comm.size - 1:
                following = pass_on(messages, ring, (key, value), to, source, (holder - 1) % comm.size)
            messages.start()
            guard(lambda held=(holder, key, value), into=shares: into.extend(ring.differentiate(*held)))  # type: ignore[misc]
        sums = shares if guard.failure is None else [np.zeros(shape, dtype) for shape in shapes]
        for x, y in zip(sums, arriving, strict=False):
            x += y
        key, value = following
    if comm.size == 1:
        return sums[0], sums[1]
    with transfer(comm) as messages:
        shapes = [ring.shape_of(name, comm.rank) for name in ("key", "value")]
        own = [messages.receive(shape, dtype, source, 2 + i) for i, shape in enumerate(shapes)]
        for i, x in enumerate(sums):
            messages.send(x, to, 2 + i)
    return own[0], own[1]


def finished_gradients(ring: Ring, grads: tuple[Array, Array]) -> list[Array]:
    names = ("query", "key", "value")
    found = [
        rounded(grad, ring.arrays[name].dtype) for name, grad in zip(names, (ring.grad_query, *grads), strict=True)
    ]
    return [grad[0] for grad in found] if ring.arrays.single_head else found


def own_gradient_of_sinks(ring: Ring) -> Array:
    names = ("grad_out", "out", "lse", "grad_lse")
    grad_out, out, lse, grad_lse = (ring.arrays.arrays.get(name) for name in names)
    assert grad_out is not None and out is not None and lse is not None  # noqa: PT018
    if ring.arrays.packed:  # heads before tokens
        grad_out, out, lse = grad_out.swapaxes(0, 1), out.swapaxes(0, 1), lse.T
        grad_lse = None if grad_lse is None else grad_lse.T
    return gradient_of_sinks(as_array("sinks", ring.sinks), grad_out, out, lse, grad_lse)
