"""The benchmark: one table of shapes, one flop count, and baselines timed in alternation.

``python -m fastattn bench`` runs it; ``bench/test_speed.py`` in the source tree feeds the same shapes and
baselines to pytest-benchmark.
"""

from fastattn.bench.baselines import PEERS, Baseline, FastAttn
from fastattn.bench.limits import Limit, MachineSpeed, PathSpeed, PathWork, Work, limit_of
from fastattn.bench.models import absence, problem_for
from fastattn.bench.plot import FORMATS, draw, draw_image
from fastattn.bench.report import report
from fastattn.bench.run import PeerTime, Row, Run, run
from fastattn.bench.shapes import CASES, DTYPES, FLOATS, GROUPS, Case, Problem, find_cases, find_dtype
from fastattn.bench.timing import WrongResult, prepare

__all__ = [
    "CASES",
    "DTYPES",
    "FLOATS",
    "FORMATS",
    "GROUPS",
    "PEERS",
    "Baseline",
    "Case",
    "FastAttn",
    "Limit",
    "MachineSpeed",
    "PathSpeed",
    "PathWork",
    "PeerTime",
    "Problem",
    "Row",
    "Run",
    "Work",
    "WrongResult",
    "absence",
    "draw",
    "draw_image",
    "find_cases",
    "find_dtype",
    "limit_of",
    "prepare",
    "problem_for",
    "report",
    "run",
]
