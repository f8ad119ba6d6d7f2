"""Runs cases one after the other and gathers what was measured."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np

import fastattn
from fastattn.bench.baselines import PEERS, Baseline, FastAttn
from fastattn.bench.limits import Limit, MachineSpeed, Work, limit_of, measure_machine, median_limit
from fastattn.bench.models import absence, problem_for
from fastattn.bench.shapes import Case, find_dtype
from fastattn.bench.timing import Entry, WrongResult, alternate, prepare, ratio

__all__ = ["PeerTime", "Row", "Run", "run"]

# No more is needed to read from memory rather than from a cache.
MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class PeerTime:
    """A peer's times on one case, or why it has none."""

    absent: str | None = None
    rejected: list[str] = field(default_factory=list)  # variants that failed or were wrong, while another was right
    variant: str | None = None
    error: float | None = None
    best_ms: float | None = None
    median_ms: float | None = None
    ratio: float | None = None  # its time over fastattn's
    attention_share: float | None = None  # of a model's time


@dataclass(frozen=True)
class Row:
    """What was measured on one case at one dtype."""

    name: str
    shape: str
    dtype: str
    num_threads: int
    flops: int
    error: float  # relative, Frobenius norm
    best_ms: float
    median_ms: float
    gflops: float  # at the best time
    peak_gflops: float  # of the unit that computes the products
    share: float  # of that peak: the median over the rounds
    gbytes: float | None  # GB/s of keys and values, at the best time; None: reading is not what it waits for
    bandwidth_share: float | None  # of the read bandwidth, as share
    paths: tuple[str, ...]  # of `fastattn.plan`
    scores: int
    nbytes: int  # of all that is read and written, each byte once
    footprint: int  # bytes of all layers that take turns
    limit: Limit  # the shortest time, in seconds, in which this machine could do it
    limit_share: float  # that time over fastattn's: the median over the rounds
    bound: str  # the part of the limit that takes longest: "products", "softmax" or "reading"
    peers: dict[str, PeerTime]
    baseline: str | None = None
    baseline_ratio: float | None = None  # fastattn's time over its time on the baseline case
    per_flop: bool = False  # whether these are times per flop
    attention_share: float | None = None  # of a model's time


@dataclass(frozen=True)
class Run:
    """All rows, and what they were measured on."""

    cpu: str
    isa: str
    num_threads: int
    other_load: float | None  # CPUs' worth of work that was not the benchmark's; None: unknown
    versions: dict[str, str]
    notes: list[str]
    rows: list[Row]

    def means(self) -> dict[str, dict[str, float]]:
        """Return the geometric mean of the ratios to each peer, for each dtype: ``means()[peer][dtype]``."""
        ratios: dict[str, dict[str, list[float]]] = {}
        for row in self.rows:
            for name, peer in row.peers.items():
                if peer.ratio is not None:
                    ratios.setdefault(name, {}).setdefault(row.dtype, []).append(peer.ratio)
        return {
            name: {dtype: geometric_mean(values) for dtype, values in dtypes.items()} for name, dtypes in ratios.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Return everything in dicts, lists, strings and numbers, as JSON has them."""
        return dataclasses.asdict(self) | {"means": self.means()}


def run(
    cases: Iterable[Case],
    dtypes: Iterable[str],
    peers: Iterable[str],
    num_threads: int,
    seconds: float = 1.0,
) -> Run:
    """Measure the cases at the dtypes, against those of the peers that are installed.

    Parameters
    ----------
    cases : iterable of Case
        See `find_cases`.
    dtypes : iterable of str
        Names from `DTYPES`.
    peers : iterable of str
        Names from `PEERS`.
    num_threads : int
        Threads for everyone.
    seconds : float
        Time for each baseline on each case.

    Returns
    -------
    Run
        Progress goes to stderr meanwhile, if that is a terminal.
    """
    notes = []
    known: dict[str, np.dtype[Any]] = {}
    for name in dtypes:
        try:
            known[name] = find_dtype(name)
        except ImportError:
            notes.append(f"{name} skipped: it needs the package ml_dtypes")
    us = FastAttn(num_threads)
    them = []
    for name in peers:
        if PEERS[name].available():
            them.append(PEERS[name](num_threads))
        else:
            notes.append(f"{name} skipped: it needs {' and '.join(PEERS[name].packages)}")

    start = time.perf_counter(), time.process_time(), machine_time()
    pairs = [(case, dtype) for case in cases for dtype in known.values()]
    work = [(case, dtype) for case, dtype in pairs if dtype.name in case.dtypes and not absence(case)]
    notes += skipped(pairs)
    missing = {case.name: absence(case) for case, _ in pairs}
    notes += [f"{name} skipped: {needed}" for name, needed in missing.items() if needed]
    rows = []
    for index, (case, dtype) in enumerate(work, 1):
        tell(f"[{index}/{len(work)}] {case.name} {case.shape} {dtype.name}")
        row = measure(case, dtype, us, them, seconds)
        tell(f": {summary(row)}\n")
        rows.append(row)
    elapsed, own, machine = (
        end - begin
        for end, begin in zip((time.perf_counter(), time.process_time(), machine_time()), start, strict=True)
    )
    return Run(
        cpu=cpu_name(),
        isa=fastattn.show_config(mode="dicts")["isa"],
        num_threads=num_threads,
        other_load=None if math.isnan(machine) else max(0.0, machine - own) / elapsed,
        versions={baseline.name: baseline.version for baseline in (us, *them)},
        notes=notes,
        rows=rows,
    )


def tell(progress: str) -> None:
    """Show progress, if somebody looks."""
    if sys.stderr.isatty():
        print(progress, end="", file=sys.stderr, flush=True)


def skipped(pairs: list[tuple[Case, np.dtype[Any]]]) -> list[str]:
    """Return a note for each dtype that some of the cases are not about."""
    names: dict[str, list[str]] = {}
    for case, dtype in pairs:
        if dtype.name not in case.dtypes:
            names.setdefault(dtype.name, []).append(case.name)
    reasons = {"int8": "only a KVCache stores it, for decoding"}
    return [
        f"{dtype} skipped for {', '.join(cases)}: {reasons.get(dtype, 'not among their dtypes')}"
        for dtype, cases in names.items()
    ]


def summary(row: Row) -> str:
    parts = [f"{row.limit_share:.0%} of limit ({row.bound})", f"{row.share:.0%} of peak"]
    if row.bandwidth_share is not None:
        parts.append(f"{row.bandwidth_share:.0%} of read")
    parts += [f"{peer.ratio:.2f}x {name}" for name, peer in row.peers.items() if peer.ratio is not None]
    return ", ".join(parts)


def measure(case: Case, dtype: np.dtype[Any], us: FastAttn, them: list[Baseline], seconds: float) -> Row:
    problem = problem_for(case, dtype)
    num_threads = case.num_threads or us.num_threads
    entry = prepare(us, problem)
    base = problem_for(case.baseline, dtype) if case.baseline else None
    baseline = prepare(us, base) if base else None
    entries = [entry, baseline] if baseline else [entry]
    peers = {}
    running = {}
    for peer in them:
        absent = peer.refuses(case, dtype.name)
        if absent is None:
            try:
                running[peer.name] = prepare(peer, problem)
            except WrongResult as complaint:
                absent = str(complaint)
        peers[peer.name] = PeerTime(absent=absent)

    speeds = alternate([*entries, *running.values()], lambda: machine_speed(problem.work, num_threads), seconds)
    limits = [limit_of(problem.work, speed) for speed in speeds]
    for name, their in running.items():
        peers[name] = PeerTime(
            rejected=their.rejected,
            variant=their.variant.name,
            error=their.error,
            best_ms=1e3 * their.best,
            median_ms=1e3 * their.median,
            ratio=ratio(their, entry),
            attention_share=attention_share(their),
        )
    cost = ratio(entry, baseline) if baseline else None
    if case.per_flop and base and cost:
        cost *= base.flops / problem.flops
    limit = median_limit(limits)
    return Row(
        name=case.name,
        shape=case.shape,
        dtype=dtype.name,
        num_threads=num_threads,
        flops=problem.flops,
        error=entry.error,
        best_ms=1e3 * entry.best,
        median_ms=1e3 * entry.median,
        gflops=problem.flops / entry.best / 1e9,
        peak_gflops=problem.flops / limit.products / 1e9,
        share=median_share(entry, [each.products for each in limits]),
        gbytes=problem.kv_bytes / entry.best / 1e9 if problem.is_read_bound else None,
        bandwidth_share=median_share(entry, [problem.kv_bytes / speed.bandwidth for speed in speeds])
        if problem.is_read_bound
        else None,
        paths=tuple(problem.work.paths),
        scores=sum(work.scores for work in problem.work.paths.values()),
        nbytes=problem.work.nbytes,
        footprint=problem.work.footprint,
        limit=limit,
        limit_share=median_share(entry, [each.seconds for each in limits]),
        bound=limit.bound,
        peers=peers,
        baseline=case.baseline.name if case.baseline else None,
        baseline_ratio=cost,
        per_flop=case.per_flop,
        attention_share=attention_share(entry),
    )


def attention_share(entry: Entry) -> float | None:
    """Return the share of attention in the time of a whole model."""
    return entry.variant.attention_share() if entry.variant.attention_share else None


def machine_speed(work: Work, num_threads: int) -> MachineSpeed:
    return measure_machine(work, num_threads, lambda nbytes: read_bandwidth(nbytes, num_threads))


def read_bandwidth(nbytes: int, num_threads: int) -> float:
    return fastattn.measure_bandwidth(max(1, min(nbytes, MOST_BYTES)), num_threads=num_threads)


def median_share(entry: Entry, least: list[float]) -> float:
    """Return the share of an entry's time that the machine takes at least, given for each round in seconds."""
    bests = map(min, entry.rounds)
    return median(seconds / best for best, seconds in zip(bests, least, strict=True))


def machine_time() -> float:
    """Return the seconds of CPU time that this machine has spent, on anything; NaN where it does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return math.nan
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def cpu_name() -> str:
    """Return what the CPU calls itself, as far as the system tells."""
    with_names = Path("/proc/cpuinfo")
    if with_names.exists():
        for line in with_names.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
