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
from fastattn.bench.contenders import PEERS, Contender, FastAttn
from fastattn.bench.shapes import Case, Problem, find_dtype
from fastattn.bench.timing import WrongResult, alternate, prepare, ratio

__all__ = ["PeerTime", "Row", "Run", "run"]


@dataclass(frozen=True)
class PeerTime:
    """A peer's times on one case, or why it has none."""

    absent: str | None = None
    rejected: list[str] = field(default_factory=list)  # ways that failed or were wrong, while another was right
    way: str | None = None
    error: float | None = None
    best_ms: float | None = None
    median_ms: float | None = None
    ratio: float | None = None  # its time over fastattn's


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
    peak_gflops: float
    share: float  # of the peak: the median over the rounds
    peers: dict[str, PeerTime]
    baseline: str | None = None
    baseline_ratio: float | None = None  # fastattn's time over its time on the baseline case


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
        Time for each contender on each case.

    Returns
    -------
    Run
        Progress goes to stderr meanwhile.
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
    work = [(case, dtype) for case in cases for dtype in known.values()]
    rows = []
    for index, (case, dtype) in enumerate(work, 1):
        print(f"[{index}/{len(work)}] {case.name} {case.shape} {dtype.name}", end="", file=sys.stderr, flush=True)
        row = measure(case, dtype, us, them, seconds)
        best_peers = [f"{peer.ratio:.2f}x {name}" for name, peer in row.peers.items() if peer.ratio is not None]
        print(f": {', '.join([f'{row.share:.0%} of peak', *best_peers])}", file=sys.stderr, flush=True)
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
        versions={contender.name: contender.version for contender in (us, *them)},
        notes=notes,
        rows=rows,
    )


def measure(case: Case, dtype: np.dtype[Any], us: FastAttn, them: list[Contender], seconds: float) -> Row:
    problem = Problem(case, dtype)
    num_threads = case.num_threads or us.num_threads
    entry = prepare(us, problem)
    entries = [entry]
    baseline = None
    if case.baseline is not None:
        baseline = prepare(us, Problem(case.baseline, dtype))
        entries.append(baseline)
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

    peaks = alternate(
        [*entries, *running.values()],
        lambda: fastattn.measure_peak(dtype, num_threads=num_threads),
        seconds,
    )
    for name, their in running.items():
        peers[name] = PeerTime(
            rejected=their.rejected,
            way=their.way.name,
            error=their.error,
            best_ms=1e3 * their.best,
            median_ms=1e3 * their.median,
            ratio=ratio(their, entry),
        )
    bests = map(min, entry.rounds)
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
        peak_gflops=median(peaks) / 1e9,
        share=median(problem.flops / best / peak for best, peak in zip(bests, peaks, strict=True)),
        peers=peers,
        baseline=case.baseline.name if case.baseline else None,
        baseline_ratio=ratio(entry, baseline) if baseline else None,
    )


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
