"""Exact multi-head attention for NumPy on the CPU."""

from fastattn import reference
from fastattn._core import measure_bandwidth, measure_peak
from fastattn.api import Plan, attention, get_num_threads, plan, set_num_threads, show_config

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "attention",
    "get_num_threads",
    "measure_bandwidth",
    "measure_peak",
    "plan",
    "reference",
    "set_num_threads",
    "show_config",
]
