"""The benchmark: one table of shapes, one flop count, and baselines timed in alternation.

``python -m fastattn bench`` runs it; ``bench/test_speed.py`` in the source tree feeds the same shapes and
baselines to pytest-benchmark.
"""

from fastattn.bench.baselines import PEERS, Baseline, FastAttn
from fastattn.bench.models import absence, problem_for
from fastattn.bench.report import report
from fastattn.bench.run import Row, Run, run
from fastattn.bench.shapes import CASES, DTYPES, FLOATS, GROUPS, Case, Problem, find_cases, find_dtype
from fastattn.bench.timing import WrongResult, prepare

__all__ = [
    "CASES",
    "DTYPES",
    "FLOATS",
    "GROUPS",
    "PEERS",
    "Baseline",
    "Case",
    "FastAttn",
    "Problem",
    "Row",
    "Run",
    "WrongResult",
    "absence",
    "find_cases",
    "find_dtype",
    "prepare",
    "problem_for",
    "report",
    "run",
]
