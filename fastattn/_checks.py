"""What several functions check alike: arguments are taken as what they must be, or refused by their name."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any, Never

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn import _tensors

Array = NDArray[Any]
SequenceIds = Sequence[int] | NDArray[np.integer[Any]]

# What is computed with, by the names of the dtypes, and the step from 1 to the next number.
EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}
HALF = ("float16", "bfloat16")

# --- arrays ---------------------------------------------------------------------------------------


def as_array(name: str, x: object) -> Array:
    """Return x as an ndarray, or raise if it is none or would lose its mask."""
    if type(x) is np.ndarray:
        return x
    if x is None or isinstance(x, (str, bytes)):
        raise TypeError(f"{name} must be an array, not {'None' if x is None else f'the {type(x).__name__} {x!r}'}")
    refuse_masked(name, x)
    from fastattn import _core

    if _core.is_tensor(x):
        return _core.tensor_to_array(x, name)
    if hasattr(x, "__dlpack__") and not (hasattr(x, "__array__") or hasattr(x, "__array_interface__")):
        return _core.from_dlpack(x, name)
    try:
        return np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as failure:  # lists of unequal lengths; tensors that NumPy cannot read
        kind = ValueError if isinstance(failure, ValueError) else TypeError
        raise kind(f"{name} cannot be made an array: {failure}{how_to_export(x)}") from failure


def first_line(failure: BaseException) -> str:
    """Say what went wrong, without the trace that libraries in C++ put below."""
    return str(failure).partition("\n")[0]


def kind_of(kind: type) -> str:
    """Say what an argument of that type is, in a message."""
    return "an ndarray" if issubclass(kind, np.ndarray) else f"a {kind.__module__}.{kind.__qualname__}"


def in_kind_of(x: object, array: Array) -> Any:
    """Return a result as a tensor, if the argument x is one."""
    from fastattn import _core

    return _core.array_to_tensor(array, x) if _core.is_tensor(x) else array


def how_to_export(x: object) -> str:
    """Say what to do with a tensor that NumPy cannot read, as a clause for the end of a message."""
    if isinstance(x, (list, tuple)):
        return ""
    if str(getattr(x, "dtype", "")) != "torch.bfloat16" and getattr(x, "requires_grad", False):
        return "; give the tensor's tensor.detach()"
    return (
        "; give a tensor as tensor.detach().float(), or one of bfloat16 without a copy as "
        "tensor.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)"
    )


def how_to_convert(name: str, dtype: np.dtype[Any], to: str = "float32") -> str:
    """Say how an array of that dtype becomes one of floats, as a clause for the end of a message."""
    if dtype.names is not None:
        return f": give one of its fields, {name}[{dtype.names[0]!r}]"
    if dtype.kind == "c":
        return f": if the imaginary parts are 0, give np.real({name})"
    if dtype.kind in "biufV":  # V: the small floats of ml_dtypes
        return f": convert with np.asarray({name}, np.{to})"
    return ""


def refuse_masked(name: str, x: object) -> None:
    """Raise if x is a masked array or holds one: what its mask says would be lost."""
    ma: Any = sys.modules.get("numpy.ma")  # NumPy imports it when it is first used; until then there are none
    if ma is not None and holds(x, ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array (np.ma), whose mask would be ignored: give np.ma.filled({name}, ...), and hide "
            "keys with mask=, in which True means attend, the reverse of np.ma, or with key_lengths="
        )


def holds(x: object, kind: type) -> bool:
    """Return whether x is of that type, or a list that holds something of it, however deep."""
    if not isinstance(x, (list, tuple)):
        return isinstance(x, kind)
    kinds = set(map(type, x))  # a list of numbers is passed over at once
    if any(issubclass(each, kind) for each in kinds):
        return True
    return any(issubclass(each, (list, tuple)) for each in kinds) and any(holds(each, kind) for each in x)


# --- dtypes ---------------------------------------------------------------------------------------


def check_dtype(name: str, array: Array, *, native: bool = True) -> None:
    """Raise unless the array is of a dtype that is computed with, and in native byte order if it must be."""
    if array.dtype.name not in EPSILON or (native and not array.dtype.isnative):
        accepted = ", ".join(EPSILON) + (", in native byte order" if native else "")
        raise TypeError(f"{name} has dtype {array.dtype}; accepted are {accepted}{how_to_convert(name, array.dtype)}")


def check_floats(name: str, array: Array) -> None:
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} has dtype {array.dtype}; accepted are real floats{how_to_convert(name, array.dtype)}")


def refuse_as_result(add_to: object) -> Never:
    kind = f"a tuple of {len(add_to)}" if isinstance(add_to, tuple) else type(add_to).__name__
    raise TypeError(f"add_to must be (out, lse), as a call with return_lse=True returns them, not {kind}")


def refuse_beside_add_to(out: object, return_weights: bool) -> None:
    if out is not None:
        raise ValueError("out cannot be given with add_to, which says where results are stored")
    if return_weights:
        raise ValueError("return_weights cannot be given with add_to: a row has weights on other keys, too")


def refuse_plus_infinity(name: str, lse: Array) -> None:
    if (lse == np.inf).any():
        raise ValueError(f"{name} holds +inf, by which FlashAttention marks a query without keys; here that is -inf: "
                         "give np.where(lse == np.inf, -np.inf, lse)")  # fmt: skip


# --- integers, shapes, results --------------------------------------------------------------------


def as_integer(name: str, value: object) -> int:
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, not {value!r}")
    return operator.index(value)


def checked_integer(name: str, value: object, lowest: int, highest: int | None = None) -> int:
    number = as_integer(name, value)
    if number < lowest or (highest is not None and number > highest):
        accepted = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ValueError(f"{name} must be {accepted}, but is {number}")
    return number


def check_shape(name: str, array: Array, accepted: tuple[int | str, ...]) -> None:
    """Raise unless the shape is the accepted one; a word stands for any number."""
    if array.shape == accepted:
        return
    fits = array.ndim == len(accepted)
    if fits:
        for size, want in zip(array.shape, accepted, strict=True):
            fits &= size == want or isinstance(want, str)
    if not fits:
        raise ValueError(f"{name} has shape {array.shape}; accepted is ({', '.join(map(str, accepted))})")


def checked_ids(sequences: int | SequenceIds) -> tuple[list[int], bool]:
    """Return the ids, and whether it was a single one."""
    if type(sequences) is list:  # of ints, as in every step
        ids = sequences.copy()
        if all(type(sequence) is int for sequence in ids):
            return ids, False
    refuse_masked("sequences", sequences)
    try:
        array = np.asarray(sequences)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    if array.ndim > 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"sequences must be an int, or a list or 1-D array of ints, not {sequences!r}")
    return array.reshape(-1).tolist(), array.ndim == 0


def checked_out(out: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be an ndarray, not {type(out).__name__}")
    refuse_masked("out", out)
    if out.dtype != dtype:
        raise TypeError(f"out has dtype {out.dtype}; accepted is {dtype}")
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}; accepted is {shape}")
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    return out


# --- gradients ------------------------------------------------------------------------------------


def as_grads(grads: object) -> list[Array | None]:
    """Return the three arrays, or Nones, that gradients are to be stored in."""
    if not isinstance(grads, (tuple, list)) or len(grads) != 3:
        raise TypeError(
            "grads must be a tuple of three arrays or None, for the gradients of query, key and value, not "
            + (f"of {len(grads)}" if isinstance(grads, (tuple, list)) else kind_of(type(grads)))
        )
    return list(grads)


def sum_to(array: Array, shape: tuple[int, ...], dtype: np.dtype[Any], out: Array | None) -> Array:
    """Sum an array over the leading axes, and those of size 1, along which one of `shape` was broadcast to it."""
    if array.shape != shape:
        extra = array.ndim - len(shape)
        axes = (*range(extra), *(extra + axis for axis, size in enumerate(shape) if size != array.shape[extra + axis]))
        with np.errstate(invalid="ignore", over="ignore"):
            array = _tensors.converted(array.sum(axis=axes, keepdims=True).reshape(shape), dtype)
    if out is None or out is array:
        return array
    out[...] = array
    return out


def gradient_dtype(sinks: Array) -> np.dtype[Any]:
    """Return the dtype of the gradient of sinks, which may be integers."""
    return sinks.dtype if sinks.dtype.kind in "fV" else np.dtype(np.float64)


def sink_gradients(sinks: ArrayLike, lse: Array, delta: Array) -> Array:
    """Return the gradient of each head's sink, a score that has a probability and no value; axis -2 is heads."""
    logits = np.asarray(sinks)
    dtype = gradient_dtype(logits)
    logits = _tensors.converted(logits, np.dtype(np.float64))
    lse = lse.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        gradients = -np.exp(np.minimum(logits[:, None] - lse, 0)) * delta  # beyond lse: of a sink that lse cannot hold
        gradients = np.where(np.isneginf(lse), 0, gradients)
        return _tensors.converted(gradients.sum(axis=(*range(lse.ndim - 2), -1)), dtype)
