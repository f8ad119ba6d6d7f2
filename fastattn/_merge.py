"""Combining results over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from fastattn._checks import Array, as_array, check_dtype, in_kind_of


def refuse_plus_infinity(lses: Sequence[Array]) -> None:
    for i, lse in enumerate(lses):
        if (lse == np.inf).any():
            raise ValueError(f"lses[{i}] holds +inf, by which FlashAttention marks a query without keys; here that is "
                             "-inf: give np.where(lse == np.inf, -np.inf, lse)")  # fmt: skip


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
    refuse_plus_infinity(lses)


def sequence_of(name: str, x: Sequence[ArrayLike]) -> list[ArrayLike]:
    try:
        return list(x)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of arrays, not {x!r}") from None


def arrays_of(name: str, x: list[ArrayLike]) -> list[Array]:
    return [as_array(f"{name}[{i}]", part) for i, part in enumerate(x)]


def merge_results(outs: Sequence[ArrayLike], lses: Sequence[ArrayLike]) -> tuple[Array, Array]:
    outs = sequence_of("outs", outs)
    parts, logs = arrays_of("outs", outs), arrays_of("lses", sequence_of("lses", lses))
    check_parts(parts, logs)
    dtype = parts[0].dtype
    accumulator = np.result_type(np.float32, *(log.dtype for log in logs), *[dtype] * (dtype == np.float64))
    try:
        shape = np.broadcast_shapes(*(log.shape for log in logs))
    except ValueError:
        raise ValueError(f"lses do not broadcast: their shapes are {[log.shape for log in logs]}") from None

    highest = np.full(shape, -np.inf, accumulator)
    for log in logs:
        np.maximum(highest, log, out=highest)
    shift = np.where(highest == -np.inf, 0, highest)
    total = np.zeros(shape, accumulator)
    out = np.zeros((*shape, parts[0].shape[-1]), accumulator)
    with np.errstate(all="ignore"):
        for part, log in zip(parts, logs, strict=True):
            weight = np.exp(log - shift)
            total += weight
            # A set without keys adds nothing, whatever its result holds.
            out += np.where((log == -np.inf)[..., None], 0, weight[..., None] * part.astype(accumulator))
        lse = shift + np.log(total)
        out /= np.where(total == 0, 1, total)[..., None]
    merged = out.astype(dtype), lse.astype(np.result_type(*(log.dtype for log in logs)))
    return in_kind_of(outs[0], merged[0]), in_kind_of(outs[0], merged[1])
