"""What comes as an array: taken as one, or refused by the name of the argument."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def as_array(name: str, x: object) -> Array:
    """Return x as an ndarray, or raise if it is none or would lose its mask."""
    if type(x) is np.ndarray:
        return x
    if x is None or isinstance(x, (str, bytes)):
        raise TypeError(f"{name} must be an array, not {'None' if x is None else f'the {type(x).__name__} {x!r}'}")
    refuse_masked(name, x)
    try:
        return np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as failure:  # lists of unequal lengths; tensors that NumPy cannot read
        kind = ValueError if isinstance(failure, ValueError) else TypeError
        raise kind(f"{name} cannot be made an array: {failure}{how_to_export(x)}") from failure


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
