"""Exact multi-head attention for NumPy on the CPU."""

try:
    from fastattn import _core as _core
except ImportError as _failure:
    from fastattn._absent import why_absent

    raise ImportError(why_absent(_failure), name=_failure.name, path=_failure.path) from _failure

from fastattn import _threadpoolctl as _threadpoolctl
from fastattn import _visible as _visible  # for programs that freeze others: only the compiled module uses it
from fastattn import reference
from fastattn._core import measure_bandwidth, measure_peak
from fastattn.api import (
    Plan,
    __version__,
    attention,
    attention_backward,
    attention_varlen,
    attention_varlen_backward,
    get_num_threads,
    merge,
    plan,
    set_num_threads,
    show_config,
    top_keys,
)
from fastattn.cache import KVCache
from fastattn.layer import MultiHeadAttention
from fastattn.rotary import rotary
from fastattn.view import AttentionView

__all__ = [
    "AttentionView",
    "KVCache",
    "MultiHeadAttention",
    "Plan",
    "__version__",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "get_num_threads",
    "measure_bandwidth",
    "measure_peak",
    "merge",
    "plan",
    "reference",
    "rotary",
    "set_num_threads",
    "show_config",
    "top_keys",
]
