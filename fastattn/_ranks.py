"""What a rank gives of sequences that are divided among ranks, and what all must have alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import fastattn
from fastattn._checks import Array, as_array, as_integer, check_dtype
from fastattn._messages import agreed
from fastattn._partials import refuse_infinite_sinks
from fastattn._shards import LAYOUTS, Shards


class Description(NamedTuple):
    """What a rank tells the others of its call: what must be the same on all, and how many tokens it holds."""

    alike: dict[str, Any]
    lengths: dict[str, int]


def checked_layout(layout: object) -> str:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, but is {layout!r}")
    return str(layout)


def checked_bounds(cu_seqlens: Any) -> tuple[int, ...] | None:
    if cu_seqlens is None:
        return None
    array = as_array("cu_seqlens", cu_seqlens)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"cu_seqlens must be a 1-D array of ints, but has shape {array.shape} and dtype {array.dtype}")
    if not array.size or array[0] != 0 or (np.diff(array.astype(np.int64)) < 0).any():
        raise ValueError(f"cu_seqlens must begin with 0 and never fall, but is {array.tolist()}")
    return tuple(array.tolist())


def checked_axis(axis: object, name: str, array: Array) -> int:
    """Return the axis of an array along which its tokens are."""
    number = as_integer("axis", axis)
    if not -array.ndim <= number < array.ndim:
        accepted = f"from {-array.ndim} to {array.ndim - 1}" if array.ndim else "none"
        raise ValueError(f"axis must be an axis of {name}, which has shape {array.shape}, but is {number}; "
                         f"accepted is {accepted}")  # fmt: skip
    return number


def plain(x: Any) -> Any:
    """Return what is compared: lists of arrays, which have no single answer to whether they are alike."""
    return x.tolist() if isinstance(x, (np.ndarray, np.generic)) else tuple(x) if isinstance(x, list) else x


class Arrays:
    """The arrays of a rank, of sequences along axis -2, or of packed ones along axis 0."""

    def __init__(self, given: dict[str, Any], layout: object, cu_seqlens: Any, scores: dict[str, Any], **asked: Any):
        self.layout, self.bounds = checked_layout(layout), checked_bounds(cu_seqlens)
        arrays = {name: as_array(name, x) for name, x in given.items() if x is not None}
        self.packed = self.bounds is not None
        self.single_head = not self.packed and arrays["query"].ndim == 2
        for name, x in arrays.items():
            without_columns = name in ("lse", "grad_lse")
            if not without_columns:
                check_dtype(name, x)
            if (self.packed and x.ndim != 3 - without_columns) or x.ndim < 2 - without_columns:
                axes = "(tokens, heads, head_dim)" if self.packed else "(..., heads, seqlen, head_dim)"
                raise ValueError(f"{name} has shape {x.shape}; accepted is {axes}{' less the last' * without_columns}")
            if name in ("out", "grad_out", "lse", "grad_lse"):
                tokens = (x.shape if without_columns else x.shape[:-1])[0 if self.packed else -1]
                wanted = arrays["query"].shape[0 if self.packed else -2]
                if tokens != wanted:
                    raise ValueError(f"{name} has {tokens} tokens, but query {wanted}")
        if self.single_head:
            arrays = {name: x[None] if x.ndim < 3 else x for name, x in arrays.items()}
        self.arrays = arrays
        self.axis = 0 if self.packed else -2
        self.scores = {name: x for name, x in scores.items() if x is not None}
        self.large = {name: as_array(name, self.scores.pop(name)) for name in ("mask", "bias") if name in self.scores}
        self.asked = asked  # what else all ranks must have alike
        self.check_scores()
        self.check_results()

    def result_rows(self) -> tuple[int, ...]:
        """Return the shape of lse, and of out without its columns, of this rank's tokens."""
        rows = self["query"].shape[:-1]
        if self.packed:
            return rows
        batch = np.broadcast_shapes(*(self[name].shape[:-3] for name in ("query", "key", "value")))
        return (*batch, *rows[-2:])

    def check_results(self) -> None:
        """Raise unless results and their gradients are of the shapes that attention gives them."""
        rows, columns = self.result_rows(), self["value"].shape[-1]
        for name in ("grad_out", "out", "lse", "grad_lse"):
            wanted = rows if name in ("lse", "grad_lse") else (*rows, columns)
            if name in self.arrays and self[name].shape != wanted:
                raise ValueError(f"{name} has shape {self[name].shape}; accepted is {wanted}")

    def check_scores(self) -> None:
        """Raise what `fastattn.attention` would, but for what the whole sequence is needed for."""
        if self.packed:
            for name in (*self.large, "query_offset"):
                if name in self.scores or name in self.large:
                    raise TypeError(f"{name} and cu_seqlens cannot be given together")
        own = {name: x for name, x in self.scores.items() if name not in ("key_lengths", "query_offset")}
        plan: Any = fastattn.plan
        plan(*(self[name].swapaxes(0, 1) if self.packed else self[name] for name in ("query", "key", "value")), **own)
        if "sinks" in self.scores:
            self.scores["sinks"] = as_array("sinks", self.scores["sinks"])
            refuse_infinite_sinks(self.scores["sinks"])

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def describe(self) -> Description:
        alike: dict[str, Any] = {"layout": self.layout, "cu_seqlens": self.bounds, **self.asked}
        for name in self.arrays:
            alike[f"{name}'s dtype"] = self[name].dtype.name
        for name in ("query", "key", "value"):
            shape = list(self[name].shape)
            shape[self.axis] = 0
            alike[f"{name}'s shape but for the tokens"] = tuple(shape)
        for name in ("scale", "causal", "window", "softcap", "query_offset"):
            alike[name] = plain(self.scores.get(name))
        alike["what is given"] = sorted([*self.arrays, *self.large, *self.scores.keys() - {"num_threads"}])
        return Description(alike, {name: self[name].shape[self.axis] for name in ("query", "key", "value")})


def described(comm: Any, prepare: Callable[[], Arrays]) -> tuple[Arrays, list[Description]]:
    """Return a rank's arrays, once all ranks have told the others of theirs."""
    kept: list[Arrays] = []

    def describe() -> Description:
        kept.append(prepare())
        return kept[0].describe()

    descriptions = agreed(comm, describe)
    return kept[0], descriptions


def check_alike(ranks: Sequence[dict[str, Any]]) -> None:
    """Raise, on every rank the same, if what should be alike is not."""
    for rank, other in enumerate(ranks):
        for name, value in other.items():
            if value != ranks[0][name]:
                raise ValueError(f"{name} must be the same on all ranks, but is {ranks[0][name]} on rank 0 and {value} "
                                 f"on rank {rank}")  # fmt: skip


def shards_of(name: str, layout: str, bounds: Sequence[int] | None, lengths: Sequence[int]) -> Shards:
    """Return how the sequences of an array are divided, or raise if its parts are not those of the layout."""
    size = len(lengths)
    if bounds is None and layout == "contiguous":
        return Shards(layout, size, [0, sum(lengths)], lengths)
    shards = Shards(layout, size, [0, sum(lengths)] if bounds is None else bounds)
    for rank, length in enumerate(lengths):
        if length != shards.length(rank):
            raise ValueError(
                f"{name} holds {length} tokens on rank {rank}, where layout {layout!r} has {shards.length(rank)} of "
                f"{shards.bounds[-1]} on {size} ranks: make parts by fastattn.mpi.shard"
                + ("" if bounds else ", or give layout='contiguous', whose parts may be of any length")
            )
    return shards


def divided(descriptions: list[Description]) -> dict[str, Shards]:
    """Return how queries and keys are divided, or raise on all ranks if their arrays do not fit together."""
    check_alike([each.alike for each in descriptions])
    alike = descriptions[0].alike
    lengths = {name: [each.lengths[name] for each in descriptions] for name in ("query", "key", "value")}
    if lengths["key"] != lengths["value"]:
        raise ValueError(f"key and value must hold as many tokens, but hold {lengths['key']} and {lengths['value']} on "
                         "the ranks")  # fmt: skip
    return {name: shards_of(name, alike["layout"], alike["cu_seqlens"], lengths[name]) for name in ("query", "key")}
