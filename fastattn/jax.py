"""Attention as a JAX function, inside ``jit``, ``vmap`` and ``grad``, on CPU arrays.

>>> import jax
>>> import fastattn.jax
>>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 8, 100, 64))
>>> attend = jax.jit(lambda *qkv: fastattn.jax.attention(*qkv, causal=True))
>>> attend(query, key, value).shape
(2, 8, 100, 64)
>>> jax.grad(lambda q: attend(q, key, value).sum())(query).shape
(2, 8, 100, 64)
"""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np

try:
    import jax
    import jax.numpy as jnp
except ImportError as _failure:
    raise ImportError("fastattn.jax needs the package jax: pip install 'fastattn[jax]'") from _failure

import fastattn
from fastattn import _core

__all__ = ["attention"]

Arrays = dict[str, Any]
Constants = tuple[str, tuple[str, ...], bool]  # the keywords as JSON, the arrays' names, whether lse is returned

# What can be differentiated; the rest shapes scores, and has no gradient.
GRADIENTS = ("query", "key", "value", "bias", "sinks")


@functools.lru_cache(maxsize=1024)
def parsed(attribute: bytes) -> dict[str, Any]:
    return json.loads(attribute)  # type: ignore[no-any-return]


def compute(attribute: bytes, arguments: list[Any], results: list[Any]) -> None:
    """Compute what a call of XLA's asks for: its arrays come in the order of their names."""
    call = parsed(attribute)
    keywords = dict(call["keywords"])
    arrays = dict(zip(call["names"], arguments, strict=True))
    if "grad_out" in arrays:
        positional = [arrays.pop(name) for name in ("grad_out", "query", "key", "value", "out", "lse")]
        backward: Any = fastattn.attention_backward  # whose overloads cannot tell what a dict holds
        grads = backward(
            *positional,
            return_grad_bias="bias" in call["gradients"],
            return_grad_sinks="sinks" in call["gradients"],
            grads=tuple(results[:3]),
            **arrays,
            **keywords,
        )
        for result, grad in zip(results[3:], grads[3:], strict=True):
            result[...] = grad
        return
    query, key, value = (arrays.pop(name) for name in ("query", "key", "value"))
    # Where a mask alone is mapped over: it cannot enlarge the batch.
    query = np.broadcast_to(query, (*results[0].shape[:-1], query.shape[-1]))
    if len(results) == 1:
        fastattn.attention(query, key, value, out=results[0], **arrays, **keywords)
        return
    _, results[1][...] = fastattn.attention(query, key, value, out=results[0], return_lse=True, **arrays, **keywords)


jax.ffi.register_ffi_target("fastattn", _core.xla_target(compute), platform="cpu", api_version=1)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    causal: bool = False,
    query_offset: int | jax.Array | None = None,
    window: tuple[int | None, int | None] | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    key_lengths: jax.Array | None = None,
    return_lse: bool = False,
) -> Any:
    """Exact multi-head attention of JAX arrays: `fastattn.attention`, with its keywords and their meanings.

    Arrays may be traced; numbers, ``causal`` and ``window`` are constants of a compilation. Gradients of query, key,
    value, bias and sinks, of `lse` too, are those of `fastattn.attention_backward`; a second derivative is refused by
    JAX. Under ``vmap`` all mapped items are computed in one call.

    Parameters
    ----------
    query : jax.Array, shape (..., H, Sq, D)
        float32, float16, bfloat16, or float64 where JAX has it enabled. 2-D arrays are one head.
    key, value : jax.Array, shape (..., Hkv, Sk, D) and (..., Hkv, Sk, Dv)
        In query's dtype, or float16 or bfloat16 under a float32 query.
    scale, causal, query_offset, window, mask, bias, alibi_slopes, softcap, sinks, key_lengths
        As for `fastattn.attention`.
    return_lse : bool
        Whether to return the log-sum-exp of each row's scores, too.

    Returns
    -------
    out : jax.Array, shape (..., H, Sq, Dv)
        In query's dtype.
    lse : jax.Array, shape (..., H, Sq)
        float32, or float64. Returned with ``return_lse``.

    Raises
    ------
    ValueError, TypeError
        Shapes that do not fit together. What only the kernel can see raises when the result is computed.

    References
    ----------
    XLA's foreign function interface, openxla.org/xla/custom_call.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import fastattn.jax
    >>> x = jnp.ones((4, 10, 16))
    >>> fastattn.jax.attention(x, x, x, window=(3, 0)).shape
    (4, 10, 16)
    """
    given = {"mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks, "key_lengths": key_lengths}
    keywords: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
    if query_offset is None or isinstance(query_offset, int):
        keywords["query_offset"] = query_offset
    else:
        given["query_offset"] = query_offset
    arrays = {"query": query, "key": key, "value": value} | {name: x for name, x in given.items() if x is not None}
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    single_head = arrays["query"].ndim == 2
    arrays = with_all_axes(arrays)
    constants = json.dumps({name: x for name, x in keywords.items() if x is not None}, default=as_number)
    results = attend((constants, tuple(arrays), return_lse), tuple(arrays.values()))
    if single_head:
        results = [x[0] for x in results]
    return tuple(results) if return_lse else results[0]


def as_number(x: Any) -> Any:
    """Make of NumPy's scalars what JSON has."""
    if isinstance(x, np.generic):
        return x.item()
    raise TypeError(f"constants must be numbers, not {type(x).__name__}; traced ones are not accepted")


def with_all_axes(arrays: Arrays) -> Arrays:
    """Give each array all the axes that it may have, so that one more in front is a batch axis of all of them."""
    ndim = max(max(arrays[name].ndim for name in ("query", "key", "value")), 3)
    axes = {"mask": ndim, "bias": ndim, "alibi_slopes": ndim - 2, "key_lengths": ndim - 3, "query_offset": ndim - 3}
    widened = {}
    for name, x in arrays.items():
        missing = axes.get(name, ndim if name in ("query", "key", "value") else x.ndim) - x.ndim
        if missing < 0:
            raise ValueError(f"{name} has shape {x.shape}, which has more axes than the scores")
        widened[name] = x.reshape((1,) * missing + x.shape)
    return widened


def result_types(query: Any, key: Any, value: Any) -> tuple[Any, Any]:
    """Say what comes of arrays of these shapes; the kernel checks the rest."""
    batch = np.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    rows = (*batch, *query.shape[-3:-1])
    lse = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    return jax.ShapeDtypeStruct((*rows, value.shape[-1]), query.dtype), jax.ShapeDtypeStruct(rows, lse)


def call_kernel(call: dict[str, Any], results: Any, arrays: tuple[Any, ...], vmap_method: str) -> Any:
    """Have XLA call `compute`. Sinks have no batch axis, so what is mapped over them is computed item by item."""
    method = "sequential" if "sinks" in call["names"] else vmap_method
    return jax.ffi.ffi_call("fastattn", results, vmap_method=method)(*arrays, call=json.dumps(call))


def forward(constants: Constants, arrays: tuple[Any, ...], with_lse: bool) -> tuple[Any, ...]:
    keywords, names, _ = constants
    call = {"keywords": json.loads(keywords), "names": names}
    types = result_types(*arrays[:3])
    # Arrays that are not mapped over get an axis of size 1, which attention broadcasts.
    return tuple(call_kernel(call, types if with_lse else types[:1], arrays, "expand_dims"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(constants: Constants, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    return forward(constants, arrays, constants[2])


def attend_forward(constants: Constants, arrays: tuple[Any, ...]) -> tuple[Any, Any]:
    out, lse = forward(constants, arrays, True)
    return (out, lse) if constants[2] else (out,), (arrays, out, lse)


def attend_backward(constants: Constants, saved: Any, grads: Any) -> tuple[tuple[Any, ...]]:
    keywords, names, _ = constants
    arrays, out, lse = saved
    of = dict(zip(names, arrays, strict=True))
    gradients = [name for name in GRADIENTS if name in of]
    inputs = dict(zip(("grad_out", "grad_lse"), grads, strict=False)) | {"out": out, "lse": lse} | of
    call = {"keywords": json.loads(keywords), "names": list(inputs), "gradients": gradients}
    types = [jax.ShapeDtypeStruct(of[name].shape, of[name].dtype) for name in gradients]
    # A gradient for each item that is mapped over, also of what they share.
    results = dict(zip(gradients, call_kernel(call, types, tuple(inputs.values()), "broadcast_all"), strict=True))
    return (tuple(results[name] if name in results else no_gradient(x) for name, x in of.items()),)


def no_gradient(x: Any) -> Any:
    return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros(x.shape, jax.dtypes.float0)


attend.defvjp(attend_forward, attend_backward)
