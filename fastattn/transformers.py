"""Attention of Hugging Face transformers on fastattn: ``attn_implementation="fastattn"``, once it is registered.

Importing this module imports transformers and torch. Tested with transformers 5.24 and torch 2.13.

Examples
--------
>>> import fastattn.transformers
>>> fastattn.transformers.register()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import torch
    from torch import Tensor
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        prepare_padding_mask,
        sdpa_mask,
    )
except ImportError as _failure:
    raise ImportError(
        "fastattn.transformers needs the packages torch and transformers: pip install 'fastattn[transformers]'"
    ) from _failure

import fastattn
import fastattn.torch as adapter

__all__ = ["register"]


def register() -> None:
    """Make ``attn_implementation="fastattn"`` a choice of models that go by transformers' attention interface.

    Models with attention of their own, such as Bloom and MPT, are not changed by it.

    Examples
    --------
    >>> import fastattn.transformers
    >>> fastattn.transformers.register()
    """
    AttentionInterface.register("fastattn", attention_forward)
    AttentionMaskInterface.register("fastattn", make_mask)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> Tensor | None:
    """Return no mask where a keyword says it all, padding as one row for all queries, and else a mask of bools."""
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        padding = None if bool(padding.all()) else padding
    # The last query is at the last key, as fastattn has it; a window as wide as all keys hides none.
    ends_together = kv_offset == 0 and int(q_offset) + q_length == kv_length
    is_causal = mask_function is causal_mask_function or (local_size is not None and kv_length < local_size)
    if padding is None and allow_is_causal_skip and ends_together and is_causal:
        return None
    if mask_function is bidirectional_mask_function and local_size is None:
        if padding is None and allow_is_bidirectional_skip:
            return None
        if padding is not None:
            return padding[:, None, None, :].to(torch.bool).expand(batch_size, 1, q_length, kv_length)
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **others,
    )
    return mask


def added(attention_mask: Tensor | None, position_bias: Tensor | None) -> dict[str, Tensor]:
    """Return what hides keys, and what is added to the scores, as keywords of `fastattn.attention`."""
    keywords = {}
    if position_bias is not None:
        keywords["bias"] = position_bias.detach()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        keywords["mask"] = attention_mask
    elif attention_mask is not None:
        bias = attention_mask.detach()
        keywords["bias"] = bias + keywords["bias"] if position_bias is not None else bias
    return keywords


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers call it: (batch, heads, seqlen, head_dim) in, (batch, seqlen, heads, head_dim) out."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    learnt = [x for x in (query, key, value, s_aux, position_bias) if x is not None and x.requires_grad]
    if torch.is_grad_enabled() and learnt:
        out = differentiable(query, key, value, attention_mask, dropout, scaling, causal, softcap, s_aux, position_bias)
        return out.transpose(1, 2).contiguous(), None
    if dropout:
        raise ValueError("dropout is given where there is no gradient: call model.eval()")
    keywords = added(attention_mask, position_bias)
    out = fastattn.attention(
        *adapter.detached(query, key, value),
        scale=scaling,
        causal=causal,
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.detach(),
        **keywords,
    )
    return out.transpose(1, 2).contiguous(), None


def differentiable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    causal: bool,
    softcap: float | None,
    s_aux: Tensor | None,
    position_bias: Tensor | None,
) -> Tensor:
    if softcap is not None or s_aux is not None or position_bias is not None:
        raise NotImplementedError("attn_implementation='fastattn' has no gradients with softcap, sinks or a position "
                                  "bias: run the model under torch.no_grad(), or train it with 'eager'")  # fmt: skip
    if causal and query.shape[2] != key.shape[2]:
        rows, cols = query.shape[2], key.shape[2]
        attention_mask, causal = torch.ones(rows, cols, dtype=torch.bool).tril(cols - rows), False
    return adapter.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, causal, scale=scaling, enable_gqa=True
    )
