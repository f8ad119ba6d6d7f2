"""Attention of Hugging Face transformers on fastattn: ``attn_implementation="fastattn"``, once it is registered.

Importing this module imports transformers and torch. Tested with transformers 5.24 and torch 2.13.

Examples
--------
>>> import fastattn.transformers
>>> fastattn.transformers.register()
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Never

try:
    import torch
    from torch import Tensor
    from torch.utils._pytree import tree_map_only
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
    from transformers.masking_utils import (
        and_masks,
        bidirectional_mask_function,
        causal_mask_function,
        prepare_padding_mask,
        sdpa_mask,
        sliding_window_bidirectional_overlay,
        sliding_window_overlay,
    )
except ImportError as _failure:
    raise ImportError(
        "fastattn.transformers needs the packages torch and transformers: pip install 'fastattn[transformers]'"
    ) from _failure

import fastattn.torch as adapter

__all__ = ["Cache", "register"]


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


# --- masks ----------------------------------------------------------------------------------------


class _CompactMask(Tensor):  # type: ignore[misc]
    """A mask of bools, (batch, 1, q_length, kv_length), that says by arguments what hides keys, and has no elements.

    Whatever else is done with it than attention is done with a dense mask, made for that.
    """

    padding: Tensor | None
    scores: dict[str, Any]  # as arguments of fastattn.torch's operator

    @staticmethod
    def __new__(
        cls: type[_CompactMask],
        shape: tuple[int, int, int, int],
        reach: tuple[int | None, int | None],
        query_offset: int,
        padding: Tensor | None,
    ) -> _CompactMask:
        mask: _CompactMask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device="cpu")
        mask.padding = padding
        left, right = reach
        mask.scores = {"left": left, "right": right, "query_offset": query_offset}
        if padding is not None and bool((padding[:, 1:] <= padding[:, :-1]).all()):
            mask.scores["key_lengths"] = padding.sum(-1)  # so that what follows a sequence is not even read
        elif padding is not None:
            mask.scores["mask"] = padding[:, None, None]
        return mask

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func._schema.is_mutable and isinstance(args[0], cls):
            cls.refuse_changes()
        return func(*tree_map_only(cls, cls.dense, args), **tree_map_only(cls, cls.dense, kwargs or {}))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.refuse_changes()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        left, right, query_offset = (self.scores[name] for name in ("left", "right", "query_offset"))
        return type(self), (tuple(self.shape), (left, right), query_offset, self.padding)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CompactMask:
        kind, arguments = self.__reduce_ex__(4)
        copied: _CompactMask = kind(*copy.deepcopy(arguments, memo))
        return copied

    @staticmethod
    def refuse_changes() -> Never:
        raise RuntimeError("a mask of fastattn is not changed in place: change a copy, mask.clone()")

    def dense(self) -> Tensor:
        """Return the same mask with all its elements."""
        batch_size, _, q_length, kv_length = self.shape
        left, right, query_offset = (self.scores[name] for name in ("left", "right", "query_offset"))
        distance = torch.arange(kv_length) - torch.arange(q_length)[:, None] - query_offset
        seen = torch.ones(q_length, kv_length, dtype=torch.bool)
        if left is not None:
            seen &= distance >= -left
        if right is not None:
            seen &= distance <= right
        mask = seen if self.padding is None else seen & self.padding[:, None, None]
        return mask.expand(batch_size, 1, q_length, kv_length)


_AND = and_masks().__code__
_WINDOW = sliding_window_overlay(1).__code__
_TWO_SIDED_WINDOW = sliding_window_bidirectional_overlay(1).__code__


def reach_of(mask_function: Callable[..., Any]) -> tuple[int | None, int | None] | None:
    """Return how many keys a query sees before and after its own, None for all; None for a function not known."""
    if mask_function is causal_mask_function:
        return None, 0
    if mask_function is bidirectional_mask_function:
        return None, None
    code = getattr(mask_function, "__code__", None)
    if code not in (_AND, _WINDOW, _TWO_SIDED_WINDOW):
        return None
    (cell,) = mask_function.__closure__ or ()
    if code is _WINDOW:
        return cell.cell_contents - 1, None
    if code is _TWO_SIDED_WINDOW:
        return cell.cell_contents, cell.cell_contents
    reaches = [reach_of(each) for each in cell.cell_contents]
    known = [reach for reach in reaches if reach is not None]
    if len(known) < len(reaches):
        return None
    left, right = (min((x for x in side if x is not None), default=None) for side in zip(*known, strict=True))
    return left, right


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> Tensor | None:
    """Return no mask where the layer knows it, one without elements where keywords say it, and else a dense one."""
    is_recorded = torch.compiler.is_compiling() or torch._C._is_tracing()
    reach = None if is_recorded else reach_of(mask_function)
    if reach is None:
        mask: Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            **others,
        )
        return mask
    query_offset = int(q_offset) - kv_offset
    left, right = reach
    if left is not None and left >= query_offset + q_length - 1:
        left = None
    if right is not None and right >= kv_length - 1 - query_offset:
        right = None
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        last = kv_length if right is None else min(query_offset + q_length + right, kv_length)
        padding = None if bool(padding[:, :last].all()) else padding
    if padding is None and left is None:
        is_square = query_offset == 0 and q_length == kv_length
        skips = allow_is_bidirectional_skip or (allow_is_causal_skip and q_length == 1)
        if skips if right is None else (right == 0 and is_square and allow_is_causal_skip):
            return None
    return _CompactMask((batch_size, 1, q_length, kv_length), (left, right), query_offset, padding)


# --- attention ------------------------------------------------------------------------------------


def scores_of_mask(attention_mask: Tensor | None, position_bias: Tensor | None, causal: bool) -> dict[str, Any]:
    """Return what hides keys, and what is added to the scores, as arguments of fastattn.torch's operator."""
    if attention_mask is None:
        return {"causal": causal, "bias": position_bias}
    if isinstance(attention_mask, _CompactMask):
        return attention_mask.scores | {"bias": position_bias}
    if attention_mask.dtype == torch.bool:
        return {"mask": attention_mask, "bias": position_bias}
    return {"bias": attention_mask if position_bias is None else attention_mask + position_bias}


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
    causal = bool(is_causal and query.shape[2] > 1)
    if torch.is_autocast_enabled("cpu"):
        query, key, value = adapter.cast_for_autocast(query, key, value)
    if len(query) < len(key):
        query = query.expand(len(key), -1, -1, -1)
    if isinstance(scaling, Tensor):  # whose gradient would be lost
        raise TypeError("scaling must be a float, not a tensor")
    scores = adapter.Scores(
        **scores_of_mask(attention_mask, position_bias, causal),
        sinks=s_aux,
        seed=adapter.new_seed(dropout),
        dropout=dropout,
        scale=scaling,
        softcap=softcap,
    )
    out = adapter.attention_with_scores(query, key, value, *scores)
    return out.transpose(1, 2).contiguous(), None


# --- cache ----------------------------------------------------------------------------------------


def has_room(room: Tensor | None, states: Tensor, more: int) -> bool:
    """Return whether states lie in a room that has space for more behind them, and may be written to."""
    if room is None or (room.is_inference() and not torch.is_inference_mode_enabled()):
        return False
    if states.untyped_storage().data_ptr() != room.untyped_storage().data_ptr() or states.stride() != room.stride():
        return False
    fits = place_in(room, states) + states.shape[2] + more <= room.shape[2]
    return bool(fits and states.shape[:2] == room.shape[:2])


def place_in(room: Tensor, states: Tensor) -> int:
    return int(states.storage_offset() - room.storage_offset()) // int(room.stride(2))


def new_room(states: Tensor, batch_size: int, length: int) -> Tensor:
    """Return space for half as many states again, so that each is moved a few times at most while they grow."""
    return states.new_empty((batch_size, states.shape[1], length + max(length // 2, 64), states.shape[3]))


def appended(states: Tensor, room: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return states with new ones behind them, and the room in which they are if they are in one."""
    if states.shape[2] == 0:
        return new.clone(), None
    if torch.is_grad_enabled() or states.dtype != new.dtype or states.shape[:2] != new.shape[:2]:
        return torch.cat([states, new], 2), None
    before, more = states.shape[2], new.shape[2]
    if room is None or not has_room(room, states, more):
        room = new_room(states, len(states), before + more)
        room[:, :, :before] = states
        start = 0
    else:
        start = place_in(room, states)
    whole = room[:, :, start : start + before + more]
    whole[:, :, before:] = new
    return whole, room


def reordered(states: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sequences of these indices, and a room that they are in."""
    if torch.is_grad_enabled() and states.requires_grad:
        return states.index_select(0, indices), None
    room = new_room(states, len(indices), states.shape[2])
    chosen = room[:, :, : states.shape[2]]
    torch.index_select(states, 0, indices, out=chosen)
    return chosen, room


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer, in tensors with room for more."""

    key_room: Tensor | None = None
    value_room: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = (x.new_empty((*x.shape[:2], 0, x.shape[3])) for x in (key_states, value_states))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.key_room = appended(self.keys, self.key_room, key_states)
        self.values, self.value_room = appended(self.values, self.value_room, value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized and self.keys.shape[2] > 0:
            self.keys, self.key_room = reordered(self.keys, beam_idx)
            self.values, self.value_room = reordered(self.values, beam_idx)

    def reset(self) -> None:
        super().reset()
        self.key_room = self.value_room = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle has: keys and values of its own, without the room behind them."""
        own = {name: x.clone() for name, x in vars(self).items() if name in ("keys", "values") and x is not None}
        return vars(self) | own | {"key_room": None, "value_room": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> _GrowingLayer:
        copied = copy.copy(self)
        others = {name: x for name, x in vars(copied).items() if name not in ("keys", "values")}
        copied.__dict__.update(copy.deepcopy(others, memo))
        return copied


class _GrowingWindowLayer(_GrowingLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The last keys and values of a layer, as many as its window has."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        first = max(keys.shape[2] - self.sliding_window + 1, 0)
        if not getattr(self, "record_past", False):  # which older versions of transformers have not
            self.keys, self.values = keys[:, :, first:], values[:, :, first:]
        first = max(first - key_states.shape[2], 0)
        return keys[:, :, first:], values[:, :, first:]


if TYPE_CHECKING:  # what it has is known only where transformers are installed

    class _DynamicCache:
        def __init__(self, *, config: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

else:
    _DynamicCache = DynamicCache


class Cache(_DynamicCache):
    """A cache for generation that does not copy all keys and values at every step.

    They are in tensors with room for more, whose size grows by half when it is used up; a layer gets views of them,
    which stay as they are until tokens are cropped. `transformers.DynamicCache`, whose subclass this is, makes new
    tensors at every step, for which a long sequence takes as long as for attention. It serves any implementation of
    attention. A copy, by ``copy.copy`` as by ``copy.deepcopy``, has keys and values of its own, so that generation can
    branch; it can be pickled.

    Parameters
    ----------
    config : transformers.PreTrainedConfig, optional
        Of the model. Its layers with a window then keep no more than that window.

    Raises
    ------
    TypeError
        If `config` is something else.

    Examples
    --------
    >>> import torch
    >>> import transformers
    >>> import fastattn.transformers
    >>> config = transformers.LlamaConfig(
    ...     hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    ... )
    >>> fastattn.transformers.register()
    >>> model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastattn")
    >>> cache = fastattn.transformers.Cache(config)
    >>> prompt = torch.arange(3, 13)[None]
    >>> model.generate(prompt, cache=cache, max_length=15, min_length=15, pad_token_id=0).shape
    torch.Size([1, 15])
    >>> cache.get_seq_length()
    14
    """

    layers: list[Any]
    layer_class_to_replicate: Any

    def __init__(self, config: Any = None) -> None:
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be a transformers.PreTrainedConfig, as model.config is, not {type(config)}")
        super().__init__(config=config)
        self.layers = [growing(layer) for layer in self.layers]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = _GrowingLayer

    def __copy__(self) -> Cache:
        return copy.deepcopy(self)  # or a token appended to one would be in the other


def growing(layer: Any) -> Any:
    """Return a layer's place in the cache with room for more, where it holds keys and values alone."""
    if type(layer) is DynamicSlidingWindowLayer:
        return _GrowingWindowLayer(layer.sliding_window)
    return _GrowingLayer() if type(layer) is DynamicLayer else layer
