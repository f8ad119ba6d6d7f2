"""The limit of a case: the shortest time in which this machine could do it, by how fast it does each part alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from statistics import median
from typing import NamedTuple

from fastattn import _core

__all__ = [
    "Limit",
    "MachineSpeed",
    "PathSpeed",
    "PathWork",
    "Work",
    "limit_of",
    "measure_machine",
    "median_limit",
    "split_effort",
]


class PathWork(NamedTuple):
    """What falls to one path of `fastattn.plan`."""

    flops: int  # of the two products
    scores: int
    effort: float = 1.0  # products that are made for each that the path's rate counts


# Into how many parts "split" splits a stored number.
PARTS = {"float32": 3, "float16": 2, "bfloat16": 1, "int8": 3}


def split_effort(query: str, key: str) -> float:
    """Return the products of parts that "split" makes over the six of float32, for stored dtypes by name."""
    values = sum(a + b < max(PARTS[key], PARTS[query]) for a in range(PARTS[key]) for b in range(PARTS[query]))
    scores = PARTS[key] * PARTS[query] if query == "float16" else values
    return (scores + values) / 2 / 6


class Work(NamedTuple):
    """What a case computes, and what it moves."""

    paths: dict[str, PathWork]
    nbytes: int  # of queries, keys, values and results, each once
    footprint: int  # of the arrays that are read in turn, which says what holds them: a cache or memory

    @property
    def flops(self) -> int:
        """Those of all paths."""
        return sum(work.flops for work in self.paths.values())


class PathSpeed(NamedTuple):
    """What the kernel of a path does at most."""

    flops: float  # FLOP/s of its products
    scores: float  # /s through its softmax
    side_by_side: bool  # both at a time


class MachineSpeed(NamedTuple):
    """What the machine can do at most."""

    paths: dict[str, PathSpeed]
    bandwidth: float  # bytes/s


@dataclass(frozen=True)
class Limit:
    """The seconds that each part of the work takes at least, and the whole."""

    products: float
    softmax: float
    reading: float
    seconds: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("products", "softmax", "reading"), key=vars(self).__getitem__)


def median_limit(limits: Iterable[Limit]) -> Limit:
    """Return the median of each part."""
    return Limit(*map(median, zip(*map(astuple, limits), strict=True)))


def limit_of(work: Work, speed: MachineSpeed) -> Limit:
    """Return the least time for the work.

    Vector units compute products and softmax one after the other, a tile unit leaves them the softmax; reading goes on
    beside both. The longest of what goes on at a time is the limit.
    """
    products = softmax = seconds = 0.0
    for path, (flops, scores, effort) in work.paths.items():
        rate = speed.paths[path]
        multiplying, softening = flops * effort / rate.flops, scores / rate.scores
        products += multiplying
        softmax += softening
        seconds += max(multiplying, softening) if rate.side_by_side else multiplying + softening
    reading = work.nbytes / speed.bandwidth
    return Limit(products, softmax, reading, max(seconds, reading))


def measure_machine(work: Work, num_threads: int, measure_bandwidth: Callable[[int], float]) -> MachineSpeed:
    """Measure what the work asks of the machine; `measure_bandwidth` takes a footprint in bytes."""
    paths = {path: PathSpeed(*_core.measure_limits(path, num_threads)) for path in work.paths}
    return MachineSpeed(paths, measure_bandwidth(work.footprint))
