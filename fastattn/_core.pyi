"""The compiled side: `attention`, and what fastattn.api calls with every argument in place."""

from collections.abc import Callable
from os import PathLike
from typing import Any

from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastattn._keywords import AttentionFunction, Grads, PackedKeywords, ScoreKeywords

attention: AttentionFunction

def is_tensor(x: object) -> bool: ...
def tensor_to_array(x: object, name: str) -> NDArray[Any]: ...
def array_to_tensor(array: NDArray[Any], like: object) -> Any: ...
def from_dlpack(x: object, name: str) -> NDArray[Any]: ...
def top_keys(query: ArrayLike, key: ArrayLike, k: int, scores: ScoreKeywords, return_totals: bool) -> Any: ...
def attention_varlen(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    scores: PackedKeywords,
    dropout: float,
    seed: int | None,
    out: NDArray[Any] | None,
    add_to: tuple[NDArray[Any], NDArray[Any]] | None,
    unrounded: bool,
    return_lse: bool,
) -> Any: ...
def attention_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    cu_seqlens_q: ArrayLike | None,
    cu_seqlens_k: ArrayLike | None,
    scores: ScoreKeywords | PackedKeywords,
    dropout: float,
    seed: int | None,
    grad_lse: ArrayLike | None,
    unrounded: bool,
    return_grad_bias: bool,
    return_grad_sinks: bool,
    grads: Grads | None,
) -> Any: ...
def attention_paged(
    query: ArrayLike,
    cu_seqlens_q: ArrayLike | None,
    key_pages: NDArray[Any],
    value_pages: NDArray[Any],
    key_scales: NDArray[Any] | None,
    value_scales: NDArray[Any] | None,
    page_table: NDArray[Any],
    lengths: NDArray[Any],
    scores: tuple[Any, ...],
    out: NDArray[Any] | None,
    unrounded: bool,
    return_lse: bool,
    return_weights: bool,
) -> Any: ...
def check_merged_out(
    array: NDArray[Any], shape: tuple[int, ...], outs: list[NDArray[Any]], lses: list[NDArray[Any]]
) -> None: ...
def merge(
    outs: list[NDArray[Any]],
    lses: list[NDArray[Any]],
    out: NDArray[Any],
    lse: NDArray[Any],
    num_threads: int | None,
) -> None: ...
def plan(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    scores: ScoreKeywords,
    dropout: float,
    seed: int | None,
    return_weights: bool,
    backward: bool,
) -> dict[str, Any]: ...

compiler_version: str

def selected_isa() -> str: ...
def known_isas() -> list[tuple[str, str, bool]]: ...
def available_isas() -> list[str]: ...
def select_isa_from_environment() -> None: ...
def set_split_mode_from_environment() -> None: ...
def splits() -> bool: ...
def xla_target(compute: Callable[[bytes, list[Any], list[Any]], None]) -> object: ...
def check_num_threads_from_environment() -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(num_threads: int) -> None: ...
def quota_cpus(root: str | PathLike[str]) -> int: ...
def assume_cpus(cpus: int) -> None: ...
def measure_peak(dtype: DTypeLike, num_threads: int | None = None) -> float: ...
def measure_limits(path: str, num_threads: int) -> tuple[float, float, bool]: ...
def measure_bandwidth(nbytes: int, num_threads: int | None = None) -> float: ...
