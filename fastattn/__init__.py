"""Exact multi-head attention for NumPy on the CPU."""

from fastattn import _threadpoolctl as _threadpoolctl
from fastattn import reference
from fastattn._core import measure_bandwidth, measure_peak
from fastattn.api import Plan, __version__, attention, get_num_threads, plan, set_num_threads, show_config

__all__ = [
    "Plan",
    "__version__",
    "attention",
    "get_num_threads",
    "measure_bandwidth",
    "measure_peak",
    "plan",
    "reference",
    "set_num_threads",
    "show_config",
]
