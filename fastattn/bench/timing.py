"""Times baselines fairly: checked first, then in alternation, with the machine's own speed read in between."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from statistics import median
from typing import Any

from fastattn.bench.baselines import Baseline, Variant
from fastattn.bench.limits import MachineSpeed
from fastattn.bench.shapes import Problem

__all__ = ["Entry", "WrongResult", "alternate", "prepare", "ratio"]

ROUNDS = 8
# A clock reading takes some 50 ns; calls are timed in batches at least this long.
SHORTEST_SAMPLE = 50e-6
# A round this many times slower than the best is not the baseline's speed.
STALL = 3.0


class WrongResult(Exception):
    """A baseline's result is not attention."""


@dataclass
class Entry:
    """One baseline on one problem: what to run and, later, how long it took."""

    baseline: Baseline
    variant: Variant
    error: float  # of its result, relative
    call_time: float  # a first estimate
    rejected: list[str]  # the baseline's variants that failed or were wrong, and how
    rounds: list[list[float]] = field(default_factory=list)  # seconds a call, sample by sample

    @property
    def best(self) -> float:
        return min(map(min, self.rounds))

    @property
    def median(self) -> float:
        return median(sample for samples in self.rounds for sample in samples)


def prepare(baseline: Baseline, problem: Problem) -> Entry:
    """Return the fastest of the baseline's variants that gives the right result.

    Raises
    ------
    WrongResult
        If it has no such variant; the message says what happened to each.
    """
    right: list[Entry] = []
    rejected: list[str] = []
    for make in baseline.variants(problem):
        try:
            variant = make()
            call_time, error = first_call(baseline, variant, problem)
        # Each library raises its own types, for an operator it lacks at this dtype and for much else.
        except Exception as failure:
            rejected.append(f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}")
            continue
        if error <= problem.tolerance:
            right.append(Entry(baseline, variant, error, call_time, rejected))
        else:
            rejected.append(f"{variant.name}: error {error:.1e}, allowed {problem.tolerance:.1e}")
    if not right:
        raise WrongResult("; ".join(rejected))
    return min(right, key=lambda entry: entry.call_time)


def first_call(baseline: Baseline, variant: Variant, problem: Problem) -> tuple[float, float]:
    """Return about how long a call takes, and the relative error of its result."""
    wait_until_idle()
    with baseline.context():
        start = time.perf_counter()
        result = variant.run()
        call_time = time.perf_counter() - start
        error = problem.error(variant.read(result))
        if call_time < 0.5:  # the first call's set-up may be a good part of that
            call_time = min(timed(variant.run, 1) for _ in range(3))
    return call_time, error


def alternate(entries: list[Entry], read_machine: Callable[[], MachineSpeed], seconds: float) -> list[MachineSpeed]:
    """Time the entries in turns; return what was read of the machine in each round, before the first entry's turn.

    A machine's speed drifts by the second, with its clock and its neighbours. Turns expose every entry and
    the peak to the same seconds, so that quotients within a round are sound where absolute figures are not.

    Parameters
    ----------
    entries : list of Entry
        Their `rounds` are filled.
    read_machine : callable
        Measures the machine.
    seconds : float
        Time for each entry over all rounds. One whose calls take longer sits out after two rounds.
    """
    speeds: list[MachineSpeed] = []
    with no_garbage_collection():
        for index in range(ROUNDS):
            playing = [entry for entry in entries if index < 2 or sum(map(sum, entry.rounds)) < seconds]
            if entries[0] not in playing:
                break
            for entry in playing:
                wait_until_idle()
                if entry is entries[0]:
                    speeds.append(read_machine())
                entry.rounds.append(burst(entry, seconds / ROUNDS))
    return speeds


def burst(entry: Entry, seconds: float) -> list[float]:
    """Return the times of calls made back to back, the first of which wakes the threads and is not counted."""
    turns = entry.variant.turns  # of layers, whose mean counts: a cache keeps more of some than of others
    number = turns * max(1, round(SHORTEST_SAMPLE / entry.call_time / turns))
    samples: list[float] = []
    with entry.baseline.context():
        if entry.call_time < seconds:
            timed(entry.variant.run, number)
        end = time.perf_counter() + seconds
        while not samples or time.perf_counter() < end:
            samples.append(timed(entry.variant.run, number))
    return samples


def timed(run: Callable[[], Any], number: int) -> float:
    start = time.perf_counter()
    for _ in repeat(None, number):
        run()
    return (time.perf_counter() - start) / number


def wait_until_idle() -> None:
    """Sleep until no thread of this process is running.

    Thread pools spin for a while after a call, to be quick at the next: some 10 ms in an OpenMP runtime, 40 ms
    in ONNX Runtime, over 100 ms in OpenBLAS. That is each library's best setting for calls back to back, so it
    stays as it is; but whoever comes next must not find a core taken by it.
    """
    window = 0.02  # several ticks of the 4 ms clock that some kernels account other threads' time with
    for _ in range(50):
        before = time.process_time()
        time.sleep(window)
        if time.process_time() - before < window / 4:
            return


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def ratio(other: Entry, entry: Entry) -> float:
    """Return how many times longer other takes than entry: the median over the rounds in which both ran well.

    On a machine that has other work too, the two spinning threads of an OpenMP runtime may meet on one core, and a
    call of 8 µs then takes a tick of the scheduler, 4 to 8 ms, for a whole burst. It would flatter whoever is
    compared with that to count it, so rounds far from an entry's own best are left out.
    """
    rounds = [(min(theirs), min(ours)) for theirs, ours in zip(other.rounds, entry.rounds, strict=False)]
    sound = [theirs / ours for theirs, ours in rounds if theirs < STALL * other.best and ours < STALL * entry.best]
    return median(sound) if sound else other.best / entry.best
