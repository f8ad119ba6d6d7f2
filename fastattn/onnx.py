"""The ONNX operator Attention for onnx's reference evaluator, computed by this library.

>>> import numpy as np
>>> from onnx import TensorProto, helper
>>> from onnx.reference import ReferenceEvaluator
>>> import fastattn.onnx
>>> names = ["query", "key", "value"]
>>> node = helper.make_node("Attention", names, ["out"], q_num_heads=2, kv_num_heads=2)
>>> shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 5, 8]) for name in names]
>>> out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 5, 8])
>>> model = helper.make_model(
...     helper.make_graph([node], "attention", shapes, [out]), opset_imports=[helper.make_opsetid("", 23)]
... )
>>> evaluator = ReferenceEvaluator(model, new_ops=[fastattn.onnx.Attention])
>>> x = np.ones((1, 5, 8), np.float32)
>>> evaluator.run(None, dict.fromkeys(names, x))[0].shape
(1, 5, 8)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # onnx tells no types

    class OpRun:
        onnx_node: Any

else:
    try:
        from onnx.reference.op_run import OpRun
    except ImportError as _failure:
        raise ImportError("fastattn.onnx needs the package onnx: pip install 'fastattn[onnx]'") from _failure

import fastattn

Array = NDArray[Any]

# What the fourth output of the operator holds.
QK, QK_CAPPED, QK_BIASED, QK_SOFTMAX = range(4)


def split_heads(x: Array, num_heads: int | None, name: str) -> Array:
    """View (batch, seqlen, heads * dim) as (batch, heads, seqlen, dim); four axes are that already."""
    if x.ndim == 4:
        return x
    if num_heads is None:
        raise ValueError(f"Attention: {name} has 3 axes, and its number of heads is not given")
    if x.ndim != 3 or x.shape[2] % num_heads:
        raise ValueError(
            f"Attention: {name} has shape {x.shape}, which is not (batch, seqlen, {num_heads} heads * dim)"
        )
    return x.reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2)


def pad_mask(mask: Array, num_keys: int) -> Array:
    """Hide the keys behind the last that a mask tells of."""
    missing = num_keys - mask.shape[-1]
    if missing <= 0:
        return mask
    hidden = False if mask.dtype == np.bool_ else -np.inf
    return np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)], constant_values=hidden)


def scores_before_softmax(query: Array, key: Array, mode: int, scores: dict[str, Any]) -> Array:
    """Return the scores as they are after the product, after the softcap, or with what hides keys."""
    group_size = query.shape[1] // key.shape[1]
    wide: Any = np.float64 if query.dtype == np.float64 else np.float32
    scale = scores["scale"] if scores["scale"] is not None else 1 / np.sqrt(query.shape[3])
    s: Array = query.astype(wide) @ np.repeat(key, group_size, axis=1).astype(wide).swapaxes(2, 3) * wide(scale)
    if mode >= QK_CAPPED and scores["softcap"] is not None:
        s = scores["softcap"] * np.tanh(s / scores["softcap"])
    if mode == QK_BIASED:
        if scores["bias"] is not None:
            s = s + scores["bias"].astype(wide)
        s = np.where(visible(s.shape, scores), s, -np.inf)
    return s.astype(query.dtype)


def visible(shape: tuple[int, ...], scores: dict[str, Any]) -> Array:
    """Return whether each query row sees each key."""
    batch, _, seqlen_q, seqlen_k = shape
    offsets = np.broadcast_to(scores["query_offset"], (batch,)).reshape(-1, 1, 1, 1)
    distance = np.arange(seqlen_k) - (np.arange(seqlen_q)[:, None] + offsets)
    left, right = scores["window"] or (None, None)
    seen = np.ones(distance.shape, bool)
    if scores["causal"]:
        seen &= distance <= 0
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    if scores["key_lengths"] is not None:
        seen &= np.arange(seqlen_k) < scores["key_lengths"].reshape(-1, 1, 1, 1)
    return seen if scores["mask"] is None else seen & scores["mask"]


class Attention(OpRun):
    """ONNX's Attention of opset 23 to 25, for ``ReferenceEvaluator(model, new_ops=[Attention])``.

    Grouped heads, float and bool masks, past and present keys, padded caches, softcap, and windows on both sides are
    what `fastattn.attention` takes them for; the score matrix is formed only where a node's fourth output asks for it.
    Probabilities are formed in float32 (float64 of float64), whatever ``softmax_precision`` says.

    References
    ----------
    The ONNX operators' specification, Attention (opsets 23, 24 and 25).
    """

    op_domain = ""

    def _run(
        self,
        query: Array,
        key: Array,
        value: Array,
        attn_mask: Array | None = None,
        past_key: Array | None = None,
        past_value: Array | None = None,
        nonpad_kv_seqlen: Array | None = None,
        *,
        scale: float | None = None,
        is_causal: int | None = None,
        q_num_heads: int | None = None,
        kv_num_heads: int | None = None,
        softmax_precision: int | None = None,
        softcap: float | None = None,
        qk_matmul_output_mode: int | None = None,
        left_window_size: int | None = None,
        right_window_size: int | None = None,
    ) -> tuple[Array | None, ...]:
        if (past_key is None) != (past_value is None):
            raise ValueError("Attention: past_key and past_value must be given together")
        if past_key is not None and nonpad_kv_seqlen is not None:
            raise ValueError("Attention: nonpad_kv_seqlen and past_key cannot be given together")
        packed = query.ndim == 3
        query = split_heads(query, q_num_heads, "Q")
        key, value = split_heads(key, kv_num_heads, "K"), split_heads(value, kv_num_heads, "V")
        offset: Any = 0
        if past_key is not None and past_value is not None:
            offset = past_key.shape[2]
            key, value = np.concatenate((past_key, key), axis=2), np.concatenate((past_value, value), axis=2)
        elif nonpad_kv_seqlen is not None:
            offset = np.asarray(nonpad_kv_seqlen).reshape(-1) - query.shape[2]
        mask = None if attn_mask is None else pad_mask(attn_mask, key.shape[2])
        left, right = (None if x is None or x < 0 else x for x in (left_window_size, right_window_size))
        scores: dict[str, Any] = {
            "scale": scale,
            "causal": bool(is_causal),
            "query_offset": offset,
            "window": None if left is None and right is None else (left, right),
            "mask": mask if mask is not None and mask.dtype == np.bool_ else None,
            "bias": mask if mask is not None and mask.dtype != np.bool_ else None,
            "softcap": softcap or None,
            "key_lengths": None if nonpad_kv_seqlen is None else np.asarray(nonpad_kv_seqlen).reshape(-1),
        }
        mode = qk_matmul_output_mode or QK
        outputs = len(self.onnx_node.output)
        weights = None
        if outputs > 3 and mode == QK_SOFTMAX:
            out, weights = fastattn.attention(query, key, value, return_weights=True, **scores)
        else:
            out = fastattn.attention(query, key, value, **scores)
            if outputs > 3:
                weights = scores_before_softmax(query, key, mode, scores)
        if packed:
            out = out.swapaxes(1, 2).reshape(*out.shape[::2], -1)
        return (out, key, value, weights)[:outputs]
