"""Combining results over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from fastattn import _core
from fastattn._checks import Array, as_array, check_dtype, in_kind_of, refuse_plus_infinity

MAX_AXES = 18  # of lses: heads and positions, and what the C library has of batch axes


def check_parts(outs: list[Array], lses: list[Array]) -> None:
    if not outs:
        raise ValueError("outs is empty; at least one result is needed")
    if len(outs) != len(lses):
        raise ValueError(f"outs and lses must be as many, but are {len(outs)} and {len(lses)}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_dtype(f"outs[{i}]", out, native=False)
        if out.dtype != outs[0].dtype:
            raise TypeError(f"outs must share a dtype, but outs[0] has {outs[0].dtype} and outs[{i}] {out.dtype}")
        if lse.dtype.name not in ("float32", "float64"):
            raise TypeError(f"lses[{i}] has dtype {lse.dtype}; accepted are float32 and float64")
        if out.ndim < 1 or out.shape[:-1] != lse.shape:
            raise ValueError(f"lses[{i}] has shape {lse.shape}; accepted is that of outs[{i}], {out.shape}, less its "
                             "last axis")  # fmt: skip
        if out.shape[-1] != outs[0].shape[-1]:
            raise ValueError(f"outs must share their last axis, but outs[0] has shape {outs[0].shape} and outs[{i}] "
                             f"{out.shape}")  # fmt: skip
    for i, lse in enumerate(lses):
        refuse_plus_infinity(f"lses[{i}]", lse)


def sequence_of(name: str, x: Sequence[ArrayLike]) -> list[ArrayLike]:
    try:
        return list(x)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of arrays, not {x!r}") from None


def arrays_of(name: str, x: list[ArrayLike]) -> list[Array]:
    return [as_array(f"{name}[{i}]", part) for i, part in enumerate(x)]


def merged_shape(lses: list[Array]) -> tuple[int, ...]:
    try:
        shape = np.broadcast_shapes(*(lse.shape for lse in lses))
    except ValueError:
        raise ValueError(f"lses do not broadcast: their shapes are {[lse.shape for lse in lses]}") from None
    if len(shape) > MAX_AXES:
        raise ValueError(f"lses broadcast to {len(shape)} axes; at most {MAX_AXES} are accepted")
    return shape


def in_native_order(array: Array) -> Array:
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def merge_results(
    outs: Sequence[ArrayLike], lses: Sequence[ArrayLike], out: Array | None, num_threads: int | None
) -> tuple[Array, Array]:
    outs = sequence_of("outs", outs)
    parts, logs = arrays_of("outs", outs), arrays_of("lses", sequence_of("lses", lses))
    check_parts(parts, logs)
    parts, logs = [in_native_order(part) for part in parts], [in_native_order(log) for log in logs]
    shape = merged_shape(logs)
    columns = parts[0].shape[-1]
    if out is None:
        target = np.empty((*shape, columns), parts[0].dtype)
    else:
        target = as_target("out", out)
        _core.check_merged_out(target, (*shape, columns), parts, logs)
    lse = np.empty(shape, np.result_type(*(log.dtype for log in logs)))
    _core.merge(parts, logs, target, lse, num_threads)
    return in_kind_of(outs[0], target) if out is None else out, in_kind_of(outs[0], lse)


def as_target(name: str, out: object) -> Array:
    if not isinstance(out, np.ndarray) and not _core.is_tensor(out):
        raise TypeError(f"{name} must be an ndarray or a tensor, not {type(out).__name__}")
    return as_array(name, out)
