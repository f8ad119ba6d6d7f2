"""The shapes of ``fastattn.bench`` under pytest-benchmark: ``pytest bench/ --benchmark-only``.

A group is a shape at a dtype, its members are the baselines, and each result is checked before it is timed.
pytest-benchmark times the members one after the other, which is right for watching one of them from commit to
commit. For ratios between them use ``python -m fastattn bench``, which times them in alternation.
"""

import functools
import time

import numpy as np
import pytest

import fastattn
from fastattn import bench


@functools.cache
def baseline(name: str) -> bench.Baseline:
    kinds = {"fastattn": bench.FastAttn, **bench.PEERS}
    if not kinds[name].available():
        pytest.skip(f"needs {' and '.join(kinds[name].packages)}")
    return kinds[name](fastattn.get_num_threads())


@functools.lru_cache(maxsize=1)  # the baselines of a group share the arrays and the expected result
def problem(case: bench.Case, dtype: str) -> bench.Problem:
    try:
        return bench.problem_for(case, bench.find_dtype(dtype))
    except ImportError as missing:
        pytest.skip(str(missing))


PAIRS = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype}")
    for case in bench.find_cases(["forward", "both", "backward", "decode", "cache", "varlen", "layer", "cost"])
    for dtype in case.dtypes
]


@pytest.mark.parametrize("name", ["fastattn", *bench.PEERS])
@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_attention(benchmark, case, dtype, name):
    benchmark.group = f"{case.name} {case.shape} {dtype}"
    us_or_them = baseline(name)
    if needed := bench.absence(case):
        pytest.skip(needed)
    if reason := us_or_them.refuses(case, dtype):
        pytest.skip(reason)
    try:
        entry = bench.prepare(us_or_them, problem(case, dtype))
    except bench.WrongResult as complaint:
        # A peer without a right variant is a finding about the peer; fastattn without one is a failure.
        if name == "fastattn":
            raise
        pytest.skip(str(complaint))
    benchmark.extra_info.update(variant=entry.variant.name, error=entry.error, flops=problem(case, dtype).flops)
    with us_or_them.context():
        benchmark(entry.variant.run)


def test_read_bandwidth_is_not_less_than_what_numpy_reads():
    """Here and not in tests/: it holds on a machine that does nothing else."""
    data = np.ones(1 << 18, np.float32)  # within L2, where a loop that is itself the limit shows
    times = []
    for _ in range(200):
        start = time.perf_counter()
        data.max()
        times.append(time.perf_counter() - start)
    assert fastattn.measure_bandwidth(data.nbytes, num_threads=1) > 0.8 * data.nbytes / min(times)
