"""Attention of PyTorch tensors on the CPU: what `torch.nn.functional` has, computed here, with gradients.

Importing this module imports torch; `import fastattn` does not. Tested with torch 2.13.

Examples
--------
>>> import torch
>>> import fastattn.torch
>>> query, key, value = torch.randn(3, 2, 8, 100, 64, requires_grad=True)
>>> out = fastattn.torch.scaled_dot_product_attention(query, key, value, is_causal=True)
>>> out.sum().backward()
>>> with fastattn.torch.enabled():  # whatever calls torch.nn.functional.scaled_dot_product_attention
...     same = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
>>> torch.equal(out, same)
True
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

try:
    import torch
    from torch import Tensor
except ImportError as _failure:
    raise ImportError("fastattn.torch needs the package torch: pip install 'fastattn[torch]'") from _failure

import fastattn

__all__ = ["disable", "enable", "enabled", "scaled_dot_product_attention", "varlen_attention"]

Window = tuple[int | None, int | None]

DTYPES = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
MOST_COLUMNS = 512
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))

torch_attention: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention

# --- operators ------------------------------------------------------------------------------------

_library: Any = torch.library.Library("fastattn", "DEF")
SCORES = (
    "Tensor? mask, Tensor? bias, Tensor? sinks, Tensor? key_lengths, Tensor? seed, float dropout, bool causal, "
    "float? scale, float? softcap, int? query_offset, int? left, int? right"
)
_library.define(f"attention(Tensor query, Tensor key, Tensor value, {SCORES}) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {SCORES}, bool of_bias, bool of_sinks) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, bool is_causal, "
    "float? scale, int? left, int? right) -> (Tensor, Tensor)"
)
_library.define(
    "varlen_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, bool is_causal, float? scale, int? left, int? right) "
    "-> (Tensor, Tensor, Tensor)"
)


def empty_result(query: Tensor, value: Tensor) -> Tensor:
    """Return the room for a result: in query's memory order where it is as wide."""
    if query.shape[-1] == value.shape[-1]:
        return torch.empty_like(query)
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def empty_lse(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:-1], dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)


def detached(*tensors: Tensor | None) -> list[Any]:
    """Return the tensors without their gradients, which are the operator's own business."""
    return [None if x is None else x.detach() for x in tensors]


class Scores(NamedTuple):
    """The attention operator's arguments after query, key and value."""

    mask: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    key_lengths: Tensor | None = None
    seed: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    softcap: float | None = None
    query_offset: int | None = None
    left: int | None = None
    right: int | None = None


TENSORS = 5  # among them, which come first


def score_keywords(*scores: Any) -> dict[str, Any]:
    """Return an operator's arguments as keywords of `fastattn.attention`."""
    of = Scores(*scores)
    mask, bias, sinks, key_lengths = detached(*of[: TENSORS - 1])
    keywords: dict[str, Any] = {
        "mask": mask, "bias": bias, "sinks": sinks, "key_lengths": key_lengths, "causal": of.causal, "scale": of.scale,
        "softcap": of.softcap, "query_offset": of.query_offset, "window": (of.left, of.right),
    }  # fmt: skip
    return keywords if of.seed is None else keywords | {"dropout": of.dropout, "seed": int(of.seed)}


def attention_on_cpu(query: Tensor, key: Tensor, value: Tensor, *scores: Any) -> Any:
    query, key, value = detached(query, key, value)
    room = empty_result(query, value)
    out, lse = fastattn.attention(query, key, value, out=room, return_lse=True, **score_keywords(*scores))
    return out, lse


def attention_backward_on_cpu(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *scores: Any,
) -> tuple[Tensor, ...]:
    grad_out, grad_lse, query, key, value, out, lse = detached(grad_out, grad_lse, query, key, value, out, lse)
    *scores, of_bias, of_sinks = scores  # type: ignore[assignment]
    grads: Any = tuple(torch.empty_like(x) for x in (query, key, value))
    results: list[Any] = list(
        fastattn.attention_backward(
            grad_out, query, key, value, out, lse, grad_lse=grad_lse, return_grad_bias=of_bias,
            return_grad_sinks=of_sinks, grads=grads, **score_keywords(*scores),
        )
    )  # fmt: skip
    if not of_bias:
        results.insert(3, query.new_empty(0))
    return tuple(results if of_sinks else [*results, query.new_empty(0)])


def varlen_keywords(is_causal: bool, scale: float | None, left: int | None, right: int | None) -> dict[str, Any]:
    return {"causal": is_causal, "scale": scale, "window": (left, right)}


def varlen_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *options: Any
) -> Any:
    query, key, value = detached(query, key, value)
    room: Any = empty_result(query, value)
    lengths = cu_seqlens_q, cu_seqlens_k
    results: Any = fastattn.attention_varlen(
        query, key, value, *lengths, out=room, return_lse=True, **varlen_keywords(*options)
    )
    return results


def varlen_backward_on_cpu(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *options: Any,
) -> Any:
    grad_out, grad_lse, query, key, value, out, lse = detached(grad_out, grad_lse, query, key, value, out, lse)
    grads: Any = tuple(torch.empty_like(x) for x in (query, key, value))
    lengths = cu_seqlens_q, cu_seqlens_k
    results: Any = fastattn.attention_varlen_backward(
        grad_out, query, key, value, out, lse, *lengths, grad_lse=grad_lse, grads=grads, **varlen_keywords(*options)
    )
    return results


_library.impl("attention", attention_on_cpu, "CPU")
_library.impl("attention_backward", attention_backward_on_cpu, "CPU")
_library.impl("varlen", varlen_on_cpu, "CPU")
_library.impl("varlen_backward", varlen_backward_on_cpu, "CPU")


# --- what they give, for those who trace ------------------------------------------------------------


def fake_results(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_result(query, value), empty_lse(query)


def fake_gradients(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    _, _, _, bias, sinks, *_, of_bias, of_sinks = others
    of_scores = (x.new_empty(x.shape) if of else query.new_empty(0) for x, of in ((bias, of_bias), (sinks, of_sinks)))
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), *of_scores


def fake_varlen_gradients(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


torch.library.register_fake("fastattn::attention", fake_results, lib=_library)
torch.library.register_fake("fastattn::varlen", fake_results, lib=_library)
torch.library.register_fake("fastattn::attention_backward", fake_gradients, lib=_library)
torch.library.register_fake("fastattn::varlen_backward", fake_varlen_gradients, lib=_library)


# --- gradients ------------------------------------------------------------------------------------


def save_attention(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *scores = inputs
    ctx.options = scores[TENSORS:]
    ctx.save_for_backward(query, key, value, *output, *scores[:TENSORS])
    ctx.set_materialize_grads(False)


def differentiate_attention(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, *of_scores = ctx.saved_tensors
    of_bias, of_sinks = ctx.needs_input_grad[4:6]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    backward = _AttentionBackward.apply if is_transformed() else torch.ops.fastattn.attention_backward
    *grads, grad_bias, grad_sinks = backward(
        grad_out, grad_lse, query, key, value, out, lse, *of_scores, *ctx.options, of_bias, of_sinks
    )
    grad_bias, grad_sinks = grad_bias if of_bias else None, grad_sinks if of_sinks else None
    return (*grads, None, grad_bias, grad_sinks, None, None, *[None] * len(ctx.options))


def save_varlen(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_causal, ctx.scale, ctx.left, ctx.right = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def differentiate_varlen(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, *lengths, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = torch.ops.fastattn.varlen_backward(
        grad_out, grad_lse, query, key, value, out, lse, *lengths, ctx.is_causal, ctx.scale, ctx.left, ctx.right
    )
    return (*grads, *[None] * 6)


def refuse_second_derivatives(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "fastattn has no second derivatives of attention: for these call "
        "torch.nn.functional.scaled_dot_product_attention outside fastattn.torch.enabled(), under "
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
    )


torch.library.register_autograd(
    "fastattn::attention", differentiate_attention, setup_context=save_attention, lib=_library
)
torch.library.register_autograd("fastattn::varlen", differentiate_varlen, setup_context=save_varlen, lib=_library)
torch.library.register_autograd("fastattn::attention_backward", refuse_second_derivatives, lib=_library)
torch.library.register_autograd("fastattn::varlen_backward", refuse_second_derivatives, lib=_library)


# --- vmap -----------------------------------------------------------------------------------------


def batched(x: Tensor | None, axis: int | None, batch_size: int, ndim: int | None = None) -> Tensor | None:
    """Return a tensor with the mapped axis first, and with as many others as `ndim`."""
    if x is None:
        return None
    x = x.unsqueeze(0).expand(batch_size, *x.shape) if axis is None else x.movedim(axis, 0)
    while ndim is not None and x.dim() <= ndim:
        x = x.unsqueeze(1)
    return x


def refuse_mapped(seed: int | None) -> None:
    if seed is not None:
        raise RuntimeError("dropout of fastattn under vmap needs randomness='same'")


def mapped_lengths(key_lengths: Tensor | None, axis: int | None, info: Any, ndim: int) -> Tensor | None:
    """Return the lengths for a batch that begins with the mapped axis; those for all broadcast as they are."""
    return key_lengths if axis is None else batched(key_lengths, axis, info.batch_size, ndim - 3)


def mapped_sinks(sinks: Tensor, axis: int | None, info: Any, query: Tensor) -> Tensor:
    """Return the sinks in as many axes as lse has: mapped, of a batch, heads and queries."""
    each: Any = batched(sinks, axis, info.batch_size)
    heads = query.shape[-3]
    if each.shape[1:] != (heads,):
        raise ValueError(f"sinks has shape {tuple(each.shape[1:])}; accepted is one logit a head, ({heads},)")
    return each.reshape(len(each), *[1] * (query.dim() - 4), heads, 1)


def joined_by_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Let sinks of each sample join the softmax over its keys: they take their share of the weights."""
    # As for one call, those beyond lse's dtype are its largest number, and an infinite one leaves no weights to tell.
    sinks = torch.where(sinks == torch.inf, torch.nan, sinks.double())
    sinks = sinks.clamp(max=torch.finfo(lse.dtype).max).to(lse.dtype)
    share = torch.where(lse == -torch.inf, 0.0, torch.sigmoid(lse - sinks))
    return (out * share.unsqueeze(-1)).to(out.dtype), torch.logaddexp(lse, sinks)


def gradient_of_sinks(sinks: Tensor, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
    """Return the gradient of each sample's sinks: of scores that have a probability and no value."""
    delta = torch.where(out == 0, 0.0, grad_out.double() * out.double()).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    probability = torch.where(lse == -torch.inf, 0.0, torch.exp((sinks.double() - lse).clamp(max=0.0)))
    return -(probability * delta).sum((*range(1, lse.dim() - 2), -1)).to(sinks.dtype)


def map_attention(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
    sinks, key_lengths = args[5:7]
    refuse_mapped(in_dims[7])
    ndim = args[0].dim() - (in_dims[0] is not None)
    full = max(ndim, 3)  # one more axis before the heads: two axes get heads first
    each = [batched(x, axis, info.batch_size, full) for x, axis in zip(args[:5], in_dims[:5], strict=True)]
    key_lengths = mapped_lengths(key_lengths, in_dims[6], info, full)
    apply = _Attention.apply if is_transformed() else torch.ops.fastattn.attention
    out, lse = apply(*each, sinks if in_dims[5] is None else None, key_lengths, *args[7:])
    if in_dims[5] is not None:
        out, lse = joined_by_sinks(out, lse, mapped_sinks(sinks, in_dims[5], info, each[0]))
    return (out, lse) if ndim > 2 else (out.squeeze(1), lse.squeeze(1)), (0, 0)


def map_backward(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
    bias, sinks, key_lengths = args[8:11]
    of_bias, of_sinks = args[-2:]
    refuse_mapped(in_dims[11])
    ndim = args[2].dim() - (in_dims[2] is not None)
    full = max(ndim, 3)
    if of_bias and bias.dim() - (in_dims[8] is not None) < ndim:
        raise RuntimeError("the gradient of an attn_mask of fewer axes than query is not computed under vmap")
    short = {1, 6}  # without columns
    each = [
        batched(x, axis, info.batch_size, full - (i in short))
        for i, (x, axis) in enumerate(zip(args[:9], in_dims[:9], strict=True))
    ]
    key_lengths = mapped_lengths(key_lengths, in_dims[10], info, full)
    apply = _AttentionBackward.apply if is_transformed() else torch.ops.fastattn.attention_backward
    # Without sinks: what they changed, out and lse, is given.
    *grads, grad_bias, grad_sinks = apply(*each, None, key_lengths, *args[11:-1], False)
    if of_sinks:
        given: Any = (each[0], each[1], each[5], each[6])
        grad_sinks = gradient_of_sinks(mapped_sinks(sinks, in_dims[9], info, each[2]), *given)
    if ndim <= 2:
        grads = [x.squeeze(1) for x in grads]
        grad_bias = grad_bias.squeeze(1) if of_bias else grad_bias
    return (*grads, grad_bias, grad_sinks), (0, 0, 0, 0 if of_bias else None, 0 if of_sinks else None)


def refuse_vmap(*_: Any) -> Any:
    raise RuntimeError("packed sequences of fastattn cannot be mapped over by vmap: pack them into one call")


torch.library.register_vmap("fastattn::attention", map_attention, lib=_library)
torch.library.register_vmap("fastattn::attention_backward", map_backward, lib=_library)
torch.library.register_vmap("fastattn::varlen", refuse_vmap, lib=_library)
torch.library.register_vmap("fastattn::varlen_backward", refuse_vmap, lib=_library)


# --- under the transformations of torch.func ---------------------------------------------------------
# They differentiate functions of this form alone, and not what is registered for an operator.


def is_transformed() -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.fastattn.attention(*args)

    setup_context = staticmethod(save_attention)
    backward = staticmethod(differentiate_attention)
    vmap = staticmethod(map_attention)


class _AttentionBackward(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.fastattn.attention_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: there is no second derivative."""

    backward = staticmethod(refuse_second_derivatives)
    vmap = staticmethod(map_backward)


# --- the functions --------------------------------------------------------------------------------


def are_computed_here(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Return whether tensors are what fastattn computes with, and what PyTorch takes as it does."""
    dtype, shape = query.dtype, query.shape
    if dtype not in DTYPES or key.dtype != dtype or value.dtype != dtype:
        return False
    for x in (query, key, value):
        if not x.is_cpu or x.layout is not torch.strided or x.is_nested:
            return False
    of_key, of_value = key.shape, value.shape
    ndim = len(shape)
    if ndim < 2 or len(of_key) != ndim or len(of_value) != ndim:
        return False
    if of_key[-1] != shape[-1] or of_key[-2] != of_value[-2]:
        return False
    if not (0 < shape[-1] <= MOST_COLUMNS and of_value[-1] <= MOST_COLUMNS):
        return False
    if of_key[:-1] != of_value[:-1] or of_key[:-3] != shape[:-3]:
        return False
    if ndim == 2 or of_key[-3] == shape[-3]:
        return True
    return enable_gqa and of_key[-3] > 0 and shape[-3] % of_key[-3] == 0


def is_mask_here(attn_mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Return whether a mask is one that PyTorch takes, and so does fastattn."""
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return False
    if not attn_mask.is_cpu or attn_mask.layout is not torch.strided or attn_mask.is_nested:
        return False
    scores = (*query.shape[:-1], key.shape[-2])
    if not 2 <= attn_mask.dim() <= len(scores):
        return False
    sizes = zip(attn_mask.shape, scores[len(scores) - attn_mask.dim() :], strict=True)
    return all(size in (1, full) for size, full in sizes)


def is_for_pytorch_alone(*tensors: Tensor | None) -> bool:
    """Return whether tangents go forward, TorchScript is recorded, or numbers are negated as they are read."""
    if torch.compiler.is_compiling():
        return False
    if torch.autograd.forward_ad._current_level >= 0 or torch._C._is_tracing():
        return True
    return any(x is not None and x.is_neg() for x in tensors)


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise where tangents go forward, which an operator without a formula for them drops without a word."""
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level < 0:
        return
    given = (x for x in tensors if x is not None and x.is_floating_point())
    if any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in given):
        raise NotImplementedError(
            "fastattn has no forward-mode derivatives of this attention: take backward ones, or PyTorch's attention"
        )


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether a call is nothing but computation: nobody differentiates, maps, traces or counts it."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or is_transformed():
        return False
    given = [x for x in tensors if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return False
    return all(type(x) in PLAIN for x in given)


def cast_for_autocast(*tensors: Tensor | None) -> list[Any]:
    """Return tensors as autocast has them for attention: in its dtype, but for float64 and masks of bools."""
    dtype = torch.get_autocast_dtype("cpu")
    return [
        x if x is None or not x.is_cpu or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype)
        for x in tensors
    ]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, computed by fastattn.

    What fastattn does not compute is handed on to PyTorch: tensors that are not in the CPU's memory, sparse or nested
    ones, batch axes that broadcast, head dimensions of more than 512, a dropout of 1, and what PyTorch refuses.

    Parameters
    ----------
    query : Tensor, shape (..., H, L, E)
        float32, float64, float16 or bfloat16.
    key : Tensor, shape (..., Hkv, S, E)
    value : Tensor, shape (..., Hkv, S, Ev)
    attn_mask : Tensor, broadcastable to (..., H, L, S), optional
        Of bools, True where a query sees a key, or of floats that are added to the scores.
    dropout_p : float
        The share of the weights that is dropped. Which these are comes from PyTorch's generator of random numbers; they
        are others than PyTorch's own.
    is_causal : bool
        Whether query ``i`` sees no key after key ``i``. Not with `attn_mask`.
    scale : float, optional
        Default ``1 / sqrt(E)``.
    enable_gqa : bool
        Whether Hkv may be a divisor of H.

    Returns
    -------
    Tensor, shape (..., H, L, Ev)
        0 for a query that sees no key. It has gradients, of `attn_mask` too; these have none of their own.

    Examples
    --------
    >>> import torch
    >>> import fastattn.torch
    >>> query, key, value = torch.randn(3, 2, 8, 100, 64)
    >>> fastattn.torch.scaled_dot_product_attention(query, key, value, is_causal=True).shape
    torch.Size([2, 8, 100, 64])
    """
    # The common call, in which what fastattn takes is what PyTorch takes: asked little, for each question costs 0.1 µs.
    if (
        attn_mask is None
        and not dropout_p
        and (scale is None or type(scale) is float)
        and type(query) is type(key) is type(value) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()  # which records what is asked of shapes
        and query.shape == key.shape == value.shape
        and query.dtype is key.dtype
        and not query.requires_grad
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    ):
        try:
            return fastattn.attention(query, key, value, scale=scale, causal=is_causal)
        except (TypeError, ValueError, RuntimeError):  # not one of these: it is looked at more closely
            pass
    return attention_in_general(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def attention_in_general(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        query, key, value, attn_mask = cast_for_autocast(query, key, value, attn_mask)
    if (
        isinstance(scale, Tensor)  # which may have a gradient
        or not are_computed_here(query, key, value, enable_gqa)
        or (attn_mask is not None and (is_causal or not is_mask_here(attn_mask, query, key)))
        or not 0.0 <= dropout_p < 1.0
        or is_for_pytorch_alone(query, key, value, attn_mask)
    ):
        return torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    is_mask = attn_mask is not None and attn_mask.dtype == torch.bool
    mask, bias = (attn_mask, None) if is_mask else (None, attn_mask)
    # Causal is aligned to the first key here.
    seed, offset = new_seed(dropout_p), 0 if is_causal else None
    scores = Scores(mask, bias, None, None, seed, dropout_p, is_causal, scale, query_offset=offset)
    return attention_with_scores(query, key, value, *scores)


def new_seed(dropout: float) -> Tensor | None:
    return torch.randint(2**62, (), device="cpu") if dropout else None


def attention_with_scores(query: Tensor, key: Tensor, value: Tensor, *scores: Any) -> Tensor:
    """Attention by the operator, or without it where a call is nothing but computation."""
    refuse_tangents(query, key, value, *scores[:TENSORS])
    if is_plain(query, key, value, *scores[:TENSORS]):
        out: Any = fastattn.attention(*detached(query, key, value), **score_keywords(*scores))
        return out
    apply = _Attention.apply if is_transformed() else torch.ops.fastattn.attention
    out = apply(query, key, value, *scores)[0]
    return out


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
) -> Tensor:
    """`fastattn.attention_varlen` of tensors, with gradients: sequences of different lengths, packed without padding.

    Parameters
    ----------
    query : Tensor, shape (total_q, H, E)
    key : Tensor, shape (total_k, Hkv, E)
    value : Tensor, shape (total_k, Hkv, Ev)
    cu_seqlens_q, cu_seqlens_k : Tensor of int, shape (B + 1,)
        Cumulative lengths: 0 first, ``total_q`` and ``total_k`` last.
    is_causal : bool
        Whether a query sees no key after its own position. The last query of a sequence is at its last key.
    scale : float, optional
        Default ``1 / sqrt(E)``.
    window : (left, right), optional
        The query at ``p`` sees key ``j`` only if ``p - left <= j <= p + right``; None is unbounded.

    Returns
    -------
    Tensor, shape (total_q, H, Ev)

    Examples
    --------
    >>> import torch
    >>> import fastattn.torch
    >>> query, key, value = torch.randn(3, 10, 8, 64)
    >>> lengths = torch.tensor([0, 3, 10])
    >>> fastattn.torch.varlen_attention(query, key, value, lengths, lengths, is_causal=True).shape
    torch.Size([10, 8, 64])
    """
    if torch.is_autocast_enabled("cpu"):
        query, key, value = cast_for_autocast(query, key, value)
    refuse_tangents(query, key, value)
    left, right = (None, None) if window is None else window
    arguments = query, key, value, cu_seqlens_q, cu_seqlens_k, is_causal, scale, left, right
    out: Tensor = torch.ops.fastattn.varlen(*arguments)[0]
    return out


# --- in PyTorch's place -----------------------------------------------------------------------------

before: list[bool] = []  # while enabled: whether layers of torch.nn took their own fast path


def enable() -> None:
    """Have `torch.nn.functional.scaled_dot_product_attention` computed by fastattn, where it can be.

    So do `torch.nn.MultiheadAttention` and what is made of it, whose fast path for inference, which has attention of
    its own, is switched off meanwhile. Functions that were imported by their names before are not reached.

    Examples
    --------
    >>> import torch
    >>> import fastattn.torch
    >>> fastattn.torch.enable()
    >>> torch.nn.functional.scaled_dot_product_attention is fastattn.torch.scaled_dot_product_attention
    True
    >>> fastattn.torch.disable()
    """
    if not before:
        before.append(torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        torch.nn.functional.scaled_dot_product_attention = scaled_dot_product_attention


def disable() -> None:
    """Undo `enable`.

    Examples
    --------
    >>> import fastattn.torch
    >>> fastattn.torch.disable()
    """
    if before:
        torch.nn.functional.scaled_dot_product_attention = torch_attention
        torch.backends.mha.set_fastpath_enabled(before.pop())


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`enable` for the length of a ``with`` block.

    Examples
    --------
    >>> import fastattn.torch
    >>> with fastattn.torch.enabled():
    ...     pass  # run a model
    """
    already = bool(before)
    enable()
    try:
        yield
    finally:
        if not already:
            disable()
