"""The compiled side: `attention`, and what fastattn.api calls with every argument in place."""

from typing import Any, Literal, Unpack, overload

from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastattn.api import Options

Array = NDArray[Any]

@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    return_weights: Literal[False] = False,
    **options: Unpack[Options],
) -> Array: ...
@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    return_lse: Literal[True],
    return_weights: Literal[False] = False,
    **options: Unpack[Options],
) -> tuple[Array, Array]: ...
@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    return_weights: Literal[True],
    **options: Unpack[Options],
) -> tuple[Array, Array]: ...
@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    return_lse: Literal[True],
    return_weights: Literal[True],
    **options: Unpack[Options],
) -> tuple[Array, Array, Array]: ...
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
    out: Array | None,
    return_lse: bool,
    num_threads: int | None,
) -> Any: ...
def attention_paged(
    query: ArrayLike,
    cu_seqlens_q: ArrayLike | None,
    key_pages: Array,
    value_pages: Array,
    key_scales: Array | None,
    value_scales: Array | None,
    page_table: Array,
    lengths: Array,
    scale: float | None,
    causal: bool,
    query_offset: ArrayLike | None,
    window: tuple[int | None, int | None] | None,
    alibi_slopes: ArrayLike | None,
    softcap: float | None,
    sinks: ArrayLike | None,
    out: Array | None,
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
