"""How sequences are divided among ranks: which tokens each holds, and which of its queries see which keys of another.

A rank's part of a sequence is one run of tokens (two in zigzag), equally far from each other. Of packed sequences each
is divided by itself, and a rank's tokens are the first run of each sequence, then the second.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LAYOUTS = ("zigzag", "striped", "contiguous")


class Run(NamedTuple):
    """Tokens of a sequence, `stride` apart."""

    start: int
    length: int
    stride: int


class Shards:
    """The parts of all ranks: of sequences between bounds (cumulative lengths), or of one in parts of given lengths."""

    def __init__(self, layout: str, size: int, bounds: Sequence[int], lengths: Sequence[int] | None = None):
        self.layout, self.size, self.bounds = layout, size, bounds
        self.starts = list(itertools.accumulate(lengths, initial=0)) if lengths else None

    def runs(self, rank: int) -> list[list[Run]]:
        """Return the runs of each sequence that a rank holds: first those that are first in their sequence."""
        if self.starts:
            return [[Run(self.starts[rank], self.starts[rank + 1] - self.starts[rank], 1)]]
        each = [self.divided(end - begin, rank) for begin, end in itertools.pairwise(self.bounds)]
        return [list(runs) for runs in zip(*each, strict=True)]

    def divided(self, seqlen: int, rank: int) -> list[Run]:
        if self.layout == "striped":
            return [Run(rank, len(range(rank, seqlen, self.size)), self.size)]
        if self.layout == "contiguous":
            return [chunk(seqlen, rank, self.size)]
        return [chunk(seqlen, i, 2 * self.size) for i in (rank, 2 * self.size - 1 - rank)]

    def length(self, rank: int) -> int:
        return sum(run.length for runs in self.runs(rank) for run in runs)

    def cuts(self, rank: int) -> list[slice]:
        """Return where each run of a rank (of all sequences) lies among its tokens."""
        ends = itertools.accumulate((sum(run.length for run in runs) for runs in self.runs(rank)), initial=0)
        return [slice(begin, end) for begin, end in itertools.pairwise(ends)]

    def positions(self, rank: int) -> NDArray[np.int64]:
        """Return where the tokens of a rank lie among all tokens."""
        begins = self.bounds[:-1]
        pieces = [
            begin + run.start + run.stride * np.arange(run.length)
            for runs in self.runs(rank)
            for begin, run in zip(begins, runs, strict=True)
        ]
        return np.concatenate([np.empty(0, np.int64), *pieces])


def chunk(seqlen: int, index: int, count: int) -> Run:
    """Return one of `count` chunks, of which the first may have a token more than the last."""
    small, larger = divmod(seqlen, count)
    start = index * small + min(index, larger)
    return Run(start, small + (index < larger), 1)


def cumulative(runs: list[Run]) -> NDArray[np.int64]:
    """Return cu_seqlens of the runs."""
    return np.cumsum([0, *(run.length for run in runs)])


def scores_between(
    queries: list[Run], keys: list[Run], offset: int, left: int | None, right: int | None
) -> dict[str, Any] | None:
    """Return the keywords by which queries see keys as they do in their sequences; None if they see none of these.

    There are no keywords where all queries see all keys.

    Query i of a sequence is at position i + offset, and sees keys from `left` before to `right` after it. A run of
    queries and one of keys are as if they were sequences: key b is seen by query a from a - low to a + high. Between
    tokens that are `stride` apart, low and high are rounded down.
    """
    bounds = [
        band(query.start + offset - key.start, query.stride, left, right)
        for query, key in zip(queries, keys, strict=True)
    ]
    if not any(map(sees_any, queries, keys, bounds)):
        return None
    if all(map(sees_all, queries, keys, bounds)):
        return {}
    strides = {run.stride for run in (*queries, *keys)}
    if strides <= {1}:
        return {"query_offset": offsets_between(queries, keys, offset), "window": (left, right)}
    low, high = bounds[0]  # of all sequences the same, for the runs of a rank all start at the same place
    offset = high if high is not None else -min(low, 0) if low is not None else 0
    return {"query_offset": offset, "window": (None if low is None else offset + low, None if high is None else 0)}


def offsets_between(queries: list[Run], keys: list[Run], offset: int) -> Any:
    """Return the positions of the first queries, counted from the first keys, of runs whose tokens are neighbours."""
    offsets = [query.start + offset - key.start for query, key in zip(queries, keys, strict=True)]
    return offsets if len(offsets) > 1 else offsets[0]


def band(distance: int, stride: int, left: int | None, right: int | None) -> tuple[int | None, int | None]:
    """Return how far before and after its own index a query of a run sees keys of another run."""
    return (
        None if left is None else (left - distance) // stride,
        None if right is None else (right + distance) // stride,
    )


def sees_any(query: Run, key: Run, bounds: tuple[int | None, int | None]) -> bool:
    low, high = bounds
    if not query.length or not key.length:
        return False
    if low is not None and -low > key.length - 1:
        return False
    if high is not None and query.length - 1 + high < 0:
        return False
    return low is None or high is None or low + high >= 0


def sees_all(query: Run, key: Run, bounds: tuple[int | None, int | None]) -> bool:
    low, high = bounds
    return (low is None or query.length - 1 - low <= 0) and (high is None or key.length - 1 <= high)
