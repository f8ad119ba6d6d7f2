"""The compiled side: fastattn.api calls it with every argument in place."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    scale: float | None,
    causal: bool,
    query_offset: ArrayLike | None,
    window: tuple[int | None, int | None] | None,
    mask: ArrayLike | None,
    bias: ArrayLike | None,
    alibi_slopes: ArrayLike | None,
    softcap: float | None,
    sinks: ArrayLike | None,
    key_lengths: ArrayLike | None,
    out: np.ndarray[Any, Any] | None,
    return_lse: bool,
    return_weights: bool,
    num_threads: int | None,
) -> Any: ...
def top_keys(
    query: ArrayLike,
    key: ArrayLike,
    k: int,
    scale: float | None,
    causal: bool,
    query_offset: ArrayLike | None,
    window: tuple[int | None, int | None] | None,
    mask: ArrayLike | None,
    bias: ArrayLike | None,
    alibi_slopes: ArrayLike | None,
    softcap: float | None,
    sinks: ArrayLike | None,
    key_lengths: ArrayLike | None,
    return_totals: bool,
    num_threads: int | None,
) -> Any: ...
def attention_varlen(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    scale: float | None,
    causal: bool,
    query_offset: ArrayLike | None,
    window: tuple[int | None, int | None] | None,
    alibi_slopes: ArrayLike | None,
    softcap: float | None,
    sinks: ArrayLike | None,
    out: np.ndarray[Any, Any] | None,
    return_lse: bool,
    num_threads: int | None,
) -> Any: ...
def attention_paged(
    query: ArrayLike,
    cu_seqlens_q: ArrayLike | None,
    key_pages: np.ndarray[Any, Any],
    value_pages: np.ndarray[Any, Any],
    key_scales: np.ndarray[Any, Any] | None,
    value_scales: np.ndarray[Any, Any] | None,
    page_table: np.ndarray[Any, Any],
    lengths: np.ndarray[Any, Any],
    scale: float | None,
    causal: bool,
    query_offset: ArrayLike | None,
    window: tuple[int | None, int | None] | None,
    alibi_slopes: ArrayLike | None,
    softcap: float | None,
    sinks: ArrayLike | None,
    out: np.ndarray[Any, Any] | None,
    return_lse: bool,
    return_weights: bool,
    num_threads: int | None,
) -> Any: ...
def plan(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    scale: float | None,
    causal: bool,
    query_offset: ArrayLike | None,
    window: tuple[int | None, int | None] | None,
    mask: ArrayLike | None,
    bias: ArrayLike | None,
    alibi_slopes: ArrayLike | None,
    softcap: float | None,
    sinks: ArrayLike | None,
    key_lengths: ArrayLike | None,
    return_weights: bool,
    num_threads: int | None,
) -> dict[str, Any]: ...

compiler_version: str

def selected_isa() -> str: ...
def available_isas() -> list[str]: ...
def select_isa_from_environment() -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(num_threads: int) -> None: ...
def measure_peak(dtype: DTypeLike, num_threads: int | None = None) -> float: ...
def measure_bandwidth(nbytes: int, num_threads: int | None = None) -> float: ...
