"""The attention layer of a transformer: NumPy's matmul around `fastattn.attention`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Never, Unpack, cast, overload

import numpy as np
from numpy.typing import ArrayLike

from fastattn._arguments import misfit
from fastattn._checks import (
    HALF,
    Array,
    SequenceIds,
    as_array,
    check_dtype,
    check_shape,
    checked_ids,
    checked_integer,
    checked_out,
    how_to_convert,
    in_kind_of,
)
from fastattn._core import is_tensor
from fastattn._keywords import DENSE, LAYER, AttentionKeywords, CausalKeywords, LayerScores, VarlenKeywords, takes
from fastattn.api import attention, attention_backward, attention_varlen, attention_varlen_backward
from fastattn.cache import KVCache
from fastattn.checkpoints import (
    SCHEMES,
    check_configured,
    check_frequencies,
    configured_rotary,
    from_checkpoint,
    from_torch_state,
    require,
)
from fastattn.rotary import RotaryOptions, checked_options, rotary

__all__ = ["LayerGradients", "MultiHeadAttention", "Saved"]


NAMES = {"q": "query", "k": "key", "v": "value"}


class LayerKeywords(LayerScores, total=False):
    """Keywords of `MultiHeadAttention` that do not change what it returns."""

    causal: bool | None
    cu_seqlens: ArrayLike | None
    cache: KVCache | None
    sequences: int | SequenceIds | None
    positions: ArrayLike | None
    dropout: float
    seed: int | None
    out: Array | None


# --- checks ---------------------------------------------------------------------------------------


def checked_matrix(name: str, x: ArrayLike) -> Array:
    array = as_array(name, x)
    check_dtype(name, array)
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}; accepted is (out_features, in_features)")
    return array


def checked_bias(name: str, x: ArrayLike, weight: Array) -> Array:
    array = as_array(name, x)
    check_dtype(name, array)
    check_shape(name, array, (len(weight),))
    return array


def common_dtype(arrays: Sequence[Array]) -> np.dtype[Any]:
    """Return what to compute in: the dtype of all weights and biases, half types counted as float32."""
    computed = {"float32" if array.dtype.name in HALF else array.dtype.name for array in arrays}
    if len(computed) > 1:
        raise TypeError("weights and biases must be all float64 or none, but come as float32 and float64")
    return np.dtype(computed.pop())


def per_head(name: str, features: int, of: str, count: int) -> int:
    if features == 0 or features % count:
        raise ValueError(f"{name} has {features} rows; accepted are multiples of {of}, {count}")
    return features // count


def check_together(dense: Mapping[str, object], cu_seqlens: object, cache: object, sequences: object) -> None:
    """Raise unless the keywords belong to one kind of call; `dense` are those of arrays of one length."""
    if dense["key"] is None and dense["value"] is not None:
        raise ValueError("value is given without key")
    if (cache is None) != (sequences is None):
        raise ValueError("cache and sequences must be given together")
    if cache is not None and cu_seqlens is not None:
        raise ValueError("cu_seqlens and cache cannot be given together")
    if cache is None and cu_seqlens is None:
        return
    for name, given in dense.items():
        if given is not None:
            raise ValueError(f"{name} and {'cu_seqlens' if cache is None else 'cache'} cannot be given together")


def check_axes(query: Array, cu_seqlens: object, sequences: int | SequenceIds | None) -> None:
    """Raise unless query has the axes that packed sequences, or those in a cache, have."""
    batch: tuple[int, ...] = ()
    if sequences is not None:
        ids, single = checked_ids(sequences)
        batch = () if single else (len(ids),)
    elif cu_seqlens is None:
        return
    check_shape("query", query, (*batch, "rows", query.shape[-1]))


def check_batch_axes(inputs: Mapping[str, Array]) -> None:
    """Raise if some are 2-D and some are not, which rather is a mistake than one sequence for a whole batch."""
    if len({array.ndim == 2 for array in inputs.values()}) > 1:
        shapes = ", ".join(f"{NAMES[parts[0]]} {array.shape}" for parts, array in inputs.items())
        raise ValueError(f"query, key and value must be all 2-D, (rows, features), or none, but have shapes {shapes}; "
                         "one sequence for all of a batch is given as key[None]")  # fmt: skip


def broadcast_batches(parts: Sequence[Array]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*(part.shape[:-3] for part in parts))
    except ValueError:
        shapes = ", ".join(str(part.shape[:-3]) for part in parts)
        raise ValueError(f"the batch axes of query, key and value do not broadcast: {shapes}") from None


def positions_in_sequences(cu_seqlens: ArrayLike, total: int) -> Array:
    """Return the position of each row in its own sequence; `attention_varlen` checks the lengths themselves."""
    begins = as_array("cu_seqlens", cu_seqlens)
    if begins.ndim != 1 or begins.size == 0 or begins.dtype.kind not in "iu":
        raise ValueError(f"cu_seqlens must be a 1-D array of ints, but has shape {begins.shape}, dtype {begins.dtype}")
    rows = np.arange(total)
    return rows - begins[np.searchsorted(begins, rows, side="right") - 1].astype(np.int64)


def check_result(out: Array | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if out is not None and not checked_out(out, shape, dtype).flags.c_contiguous:
        raise ValueError(f"out must be C-contiguous, but has strides {out.strides}")


def untensored(name: str, x: Any) -> Any:
    """Return a tensor as an array, and all else as it is."""
    return as_array(name, x) if is_tensor(x) else x


def check_kept(inputs: Mapping[str, Array], out: Array | None, cache: KVCache | None) -> None:
    """Raise unless what backward needs of a call can be kept: its inputs must outlast it."""
    if cache is not None:
        raise ValueError("return_saved and cache cannot be given together")
    for parts, x in inputs.items():
        if out is not None and np.shares_memory(out, x):
            raise ValueError(f"out overlaps {NAMES[parts[0]]} in memory, which return_saved keeps for backward")


# --- projections ----------------------------------------------------------------------------------


class Projection(NamedTuple):
    """``x @ weight + bias`` for one or several outputs, side by side in the columns."""

    weight: Array
    bias: Array | None

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        out = np.matmul(x, self.weight, out=out)
        if self.bias is not None:
            out += self.bias
        return out

    def backward(self, grad: Array, x: Array) -> tuple[Array, Array, Array]:
        """Return the gradients of x and of the weight, which is (outputs, inputs), and of a bias."""
        return grad @ self.weight.T, grad.T @ x, grad.sum(axis=0)

    def columns(self, first: int, last: int) -> Projection:
        """Return the projection to some of the outputs, on views of this one's arrays."""
        return Projection(self.weight[:, first:last], None if self.bias is None else self.bias[first:last])


def packed(weights: Sequence[Array], biases: Sequence[Array | None], dtype: np.dtype[Any]) -> Projection:
    """Return the projections to all of the outputs as one; weights are (out_features, in_features)."""
    sizes = [len(weight) for weight in weights]
    weight = np.empty((weights[0].shape[1], sum(sizes)), dtype)
    np.concatenate([part.T for part in weights], axis=1, out=weight)
    if all(bias is None for bias in biases):
        return Projection(weight, None)
    each = [np.zeros(size) if bias is None else bias for size, bias in zip(sizes, biases, strict=True)]
    return Projection(weight, np.concatenate([bias.astype(dtype) for bias in each]))


def input_projections(
    weights: Sequence[Array], biases: Sequence[Array | None], dtype: np.dtype[Any]
) -> dict[str, Projection]:
    """Return the projections to query ("q"), key, value, and to those together that may share an input.

    Weights of as many in_features lie in one matrix, and each of its projections is a view of it.
    """
    query, key, value = (weight.shape[1] for weight in weights)
    groups = ["qkv"] if query == key == value else ["q", "kv"] if key == value else ["q", "k", "v"]
    projections = {}
    for group in groups:
        members = slice("qkv".index(group), "qkv".index(group) + len(group))
        whole = packed(weights[members], biases[members], dtype)
        ends = np.cumsum([0, *(len(weight) for weight in weights[members])])
        for parts in ("qkv", "kv", "q", "k", "v"):
            if parts in group:
                begin = group.index(parts)
                projections[parts] = whole.columns(ends[begin], ends[begin + len(parts)])
    return projections


# --- what training needs ---------------------------------------------------------------------------


class Saved(NamedTuple):
    """What `MultiHeadAttention.backward` needs of a call: what the call was given, and what it made of that."""

    layer: MultiHeadAttention
    inputs: Mapping[str, Array]
    parts: tuple[Array, Array, Array]
    joined: Array
    lse: Array
    positions: ArrayLike | None
    cu_seqlens: ArrayLike | None
    scores: Any

    def backward(
        self, grad_heads: Array, grads: tuple[Array, Array, Array], asked: Mapping[str, Any]
    ) -> tuple[Array, ...]:
        """Store the gradients of queries, keys and values, given that of the joined heads; return those asked for."""
        query, key, value = self.parts
        lengths = self.cu_seqlens
        if lengths is None:
            grad_heads, heads = grad_heads.swapaxes(-3, -2), self.joined.swapaxes(-3, -2)
            return attention_backward(
                grad_heads, query, key, value, heads, self.lse, grads=grads, **self.scores, **asked
            )[3:]
        query, key, value = (part.swapaxes(0, 1) for part in self.parts)
        grad_query, grad_key, grad_value = (grad.swapaxes(0, 1) for grad in grads)
        grads = grad_query, grad_key, grad_value
        return attention_varlen_backward(
            grad_heads, query, key, value, self.joined, self.lse, lengths, lengths, grads=grads, **self.scores, **asked
        )[3:]


def asked_gradients(scores: Mapping[str, Any], wanted: Mapping[str, bool]) -> dict[str, bool]:
    """Return the keywords of `attention_backward` for the gradients that are wanted of what scores were made with."""
    names = [name for name, is_wanted in wanted.items() if is_wanted]
    for name in names:
        if scores.get(name) is None:
            raise ValueError(f"return_grad_{name} is given, but the call was without {name}")
    return {f"return_grad_{name}": True for name in names}


class LayerGradients(NamedTuple):
    """Gradients of what a call of `MultiHeadAttention` was given, and of the layer's parameters.

    Attributes
    ----------
    query, key, value : ndarray or None
        Of the inputs, in their shapes and the layer's dtype; tensors, as `bias` and `sinks` are then, if the gradient
        that was given is one. None of `key` in self-attention, and of `value` where it
        was `key`: the gradient of an array that serves several times is the sum, and is the first one's.
    parameters : dict of str to ndarray
        By the names of `MultiHeadAttention.parameters`.
    bias, sinks : ndarray or None
        Of the keywords of these names, if they were asked for.
    """

    query: Array
    key: Array | None
    value: Array | None
    parameters: dict[str, Array]
    bias: Array | None
    sinks: Array | None


# --- the layer ------------------------------------------------------------------------------------


class MultiHeadAttention:
    """Multi-head attention with its projections: the attention layer of a transformer.

    ``out = concatenated heads @ out_weight.T + out_bias`` [1]_, where the heads are `attention` of what the other
    weights make of the inputs. Query, key and value of self-attention are one matrix product; the heads are
    views of its result, and are attended in place.

    Parameters
    ----------
    query_weight : array_like, shape (num_heads * head_dim, embed_dim)
        As in PyTorch, (out_features, in_features). Weights and biases are float32 or float64, all alike.
        float16 and bfloat16 are upcast to float32, once: NumPy multiplies matrices of them slowly.
    key_weight : array_like, shape (num_kv_heads * head_dim, key_features)
    value_weight : array_like, shape (num_kv_heads * head_dim_v, value_features)
    out_weight : array_like, shape (out_features, num_heads * head_dim_v)
    num_heads : int
    num_kv_heads : int, optional
        Fewer than `num_heads` for grouped queries. Default: what the shape of `key_weight` says.
    query_bias, key_bias, value_bias, out_bias : array_like, shape (rows of the weight,), optional
    rotary : dict, optional
        Keywords ``base``, ``dim`` and ``interleaved`` of `fastattn.rotary`, which queries and keys then go
        through; ``{}`` for its defaults. Default: no rotary positions.

    Attributes
    ----------
    embed_dim, out_features : int
        Features of the input, and of the result.
    num_heads, num_kv_heads, head_dim, head_dim_v : int
    dtype : dtype
        float32 or float64: of the computation and its result.
    rotary : dict or None
    parameters : dict of str to ndarray
        The weights and biases by their names above.

    Raises
    ------
    TypeError, ValueError
        A dtype, a shape or a value that is not accepted.

    See Also
    --------
    attention : Without projections.
    KVCache : Keys and values of earlier tokens.
    rotary : Positions by rotation.
    AttentionView : To look at its weights.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> weights = rng.standard_normal((4, 64, 64), np.float32) / 8
    >>> layer = fastattn.MultiHeadAttention(*weights, num_heads=4, rotary={"base": 10000.0})
    >>> layer
    MultiHeadAttention(embed_dim=64, num_heads=4, num_kv_heads=4, head_dim=16, dtype=float32, rotary={'base': 10000.0})
    >>> x = rng.standard_normal((2, 10, 64), np.float32)
    >>> whole = layer(x, causal=True)
    >>> whole.shape
    (2, 10, 64)

    Token by token, with the keys and values in a cache:

    >>> cache = fastattn.KVCache(layer.num_kv_heads, layer.head_dim, num_pages=2)
    >>> sequences = [cache.add(), cache.add()]
    >>> steps = [layer(x[:, i : i + 1], cache=cache, sequences=sequences) for i in range(10)]
    >>> bool(np.allclose(np.concatenate(steps, axis=1), whole, atol=1e-5))
    True
    """

    def __init__(
        self,
        query_weight: ArrayLike,
        key_weight: ArrayLike,
        value_weight: ArrayLike,
        out_weight: ArrayLike,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        query_bias: ArrayLike | None = None,
        key_bias: ArrayLike | None = None,
        value_bias: ArrayLike | None = None,
        out_bias: ArrayLike | None = None,
        rotary: RotaryOptions | None = None,
    ) -> None:
        names = ("query", "key", "value", "out")
        given = (query_weight, key_weight, value_weight, out_weight)
        weights = [checked_matrix(f"{name}_weight", weight) for name, weight in zip(names, given, strict=True)]
        biases = [
            None if bias is None else checked_bias(f"{name}_bias", bias, weight)
            for name, bias, weight in zip(names, (query_bias, key_bias, value_bias, out_bias), weights, strict=True)
        ]
        self._set_heads(weights, num_heads, num_kv_heads)
        self.embed_dim: int = weights[0].shape[1]
        self.out_features: int = len(weights[3])
        self.dtype: np.dtype[Any] = common_dtype([*weights, *(bias for bias in biases if bias is not None)])
        self.rotary: RotaryOptions | None = None if rotary is None else checked_options(rotary, self.head_dim)
        self._output = packed(weights[3:], biases[3:], self.dtype)
        self._inputs = input_projections(weights[:3], biases[:3], self.dtype)
        of_keys, of_values = (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.head_dim_v)
        self._shapes = {"q": (self.num_heads, self.head_dim), "k": of_keys, "v": of_values}
        self._with_bias = {name for name, bias in zip(names, biases, strict=True) if bias is not None}

    def _set_heads(self, weights: list[Array], num_heads: int, num_kv_heads: int | None) -> None:
        query, key, value, out = weights
        self.num_heads: int = checked_integer("num_heads", num_heads, 1)
        self.head_dim: int = per_head("query_weight", len(query), "num_heads", self.num_heads)
        self.num_kv_heads: int = per_head("key_weight", len(key), "head_dim", self.head_dim)
        if num_kv_heads not in (None, self.num_kv_heads):
            raise ValueError(f"num_kv_heads is {num_kv_heads!r}, but key_weight has {len(key)} rows: "
                             f"{self.num_kv_heads} heads of {self.head_dim}")  # fmt: skip
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads is {self.num_heads}; accepted are multiples of num_kv_heads, "
                             f"{self.num_kv_heads}")  # fmt: skip
        self.head_dim_v: int = per_head("value_weight", len(value), "num_kv_heads", self.num_kv_heads)
        if out.shape[1] != self.num_heads * self.head_dim_v:
            raise ValueError(f"out_weight has {out.shape[1]} columns; accepted is num_heads * head_dim_v, "
                             f"{self.num_heads * self.head_dim_v}")  # fmt: skip

    @classmethod
    def from_torch(cls, state: Mapping[str, ArrayLike], num_heads: int, *, prefix: str = "") -> MultiHeadAttention:
        """Make the layer from the state of a ``torch.nn.MultiheadAttention``.

        Parameters
        ----------
        state : mapping of str to array_like
            Its ``state_dict()``, or one that holds it; tensors or arrays.
        num_heads : int
        prefix : str
            What comes before ``in_proj_weight`` and the others in the names.

        Returns
        -------
        MultiHeadAttention
            In it True in a mask means attend, and in PyTorch's the reverse. ``add_zero_attn`` leaves no trace
            in a state: PyTorch's layer with it gives other results.

        Raises
        ------
        KeyError
            A name that is missing.
        TypeError, ValueError
            As for the class, tensors that NumPy does not take (bfloat16, or that require gradients), and
            whatever else begins with the prefix, such as ``bias_k`` and ``bias_v``, which have no place in it.

        Examples
        --------
        >>> import numpy as np
        >>> state = {"in_proj_weight": np.zeros((192, 64)), "out_proj.weight": np.eye(64)}
        >>> MultiHeadAttention.from_torch(state, 4).head_dim
        16
        """
        return cls(**from_torch_state(state, prefix), num_heads=num_heads)

    @classmethod
    def from_mapping(
        cls,
        mapping: Mapping[str, ArrayLike],
        prefix: str,
        num_heads: int,
        *,
        scheme: Literal["bert", "gpt2", "llama"],
        num_kv_heads: int | None = None,
        rotary: RotaryOptions | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> MultiHeadAttention:
        """Make the layer from the weights of a checkpoint, by their names.

        Parameters
        ----------
        mapping : mapping of str to array_like
            All weights of the model, as ``safetensors.numpy.load_file`` gives them.
        prefix : str
            What the names of the layer begin with: ``"encoder.layer.0.attention."`` (BERT),
            ``"h.0.attn."`` (GPT-2), ``"model.layers.0.self_attn."`` (Llama).
        num_heads : int
        scheme : {"bert", "gpt2", "llama"}
            How it goes on: ``self.query.weight`` and ``output.dense.weight``; ``c_attn.weight``, one
            (in_features, 3 * out_features) matrix, and ``c_proj.weight``; ``q_proj.weight``, or
            ``qkv_proj.weight`` (Phi-3), and ``o_proj.weight``. A bias is taken where there is one.
        num_kv_heads : int, optional
        rotary : dict, optional
            As for the class. Default for "llama": what `config` says or, without it, that of `fastattn.rotary`,
            whose ``base`` a checkpoint calls ``rope_theta``.
        config : mapping, optional
            The checkpoint's ``config.json``, whose numbers of heads and rotary positions must then be those of
            the layer. Shapes alone do not tell one number of heads from another: without it, ``num_heads`` that
            is not the checkpoint's gives other results, and so does a checkpoint with ``rope_scaling`` (Llama 3.1
            and later), for there is no scaling of frequencies here.

        Returns
        -------
        MultiHeadAttention

        Raises
        ------
        KeyError
            A name that is missing.
        TypeError, ValueError
            As for the class, another scheme, a `config` that contradicts, and whatever else begins with the
            prefix, for which there is no place in the layer: ``q_norm`` and ``k_norm`` (Qwen 3), ``sinks``, LoRA.

        Examples
        --------
        >>> import numpy as np
        >>> mapping = {"h.0.attn.c_attn.weight": np.zeros((64, 192)), "h.0.attn.c_proj.weight": np.eye(64)}
        >>> MultiHeadAttention.from_mapping(mapping, "h.0.attn.", 4, scheme="gpt2").num_heads
        4
        """
        if scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, but is {scheme!r}")
        chosen = SCHEMES[scheme]
        arrays = from_checkpoint(mapping, prefix, chosen)
        if chosen.rotary is not None and config is not None:
            head_dim = len(arrays["query_weight"]) // checked_integer("num_heads", num_heads, 1)
            rotary = configured_rotary(config, rotary, head_dim)
        layer = cls(
            **arrays, num_heads=num_heads, num_kv_heads=num_kv_heads, rotary=chosen.rotary if rotary is None else rotary
        )
        if config is not None:
            check_configured(config, layer)
        frequencies = f"{prefix}rotary_emb.inv_freq"
        if chosen.rotary is not None and frequencies in mapping:
            check_frequencies(frequencies, require(mapping, frequencies), layer)
        return layer

    def __repr__(self) -> str:
        head_dim_v = f", head_dim_v={self.head_dim_v}" if self.head_dim_v != self.head_dim else ""
        rotary = "" if self.rotary is None else f", rotary={self.rotary}"
        return (
            f"MultiHeadAttention(embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}{head_dim_v}, dtype={self.dtype}{rotary})"
        )

    @property
    def parameters(self) -> dict[str, Array]:
        """The weights and biases that the layer has, by their names as parameters of the class, as views.

        To write into one, as in ``layer.parameters["out_weight"][...] -= step``, changes the layer, and
        ``MultiHeadAttention(**layer.parameters, num_heads=layer.num_heads, rotary=layer.rotary)`` is a copy of it.
        """
        projections = {NAMES[part]: self._inputs[part] for part in "qkv"} | {"out": self._output}
        views = {f"{name}_weight": projection.weight.T for name, projection in projections.items()}
        for name, projection in projections.items():
            if name in self._with_bias and projection.bias is not None:
                views[f"{name}_bias"] = projection.bias
        return views

    @overload
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        *,
        return_weights: Literal[False] = False,
        return_saved: Literal[False] = False,
        **options: Unpack[LayerKeywords],
    ) -> Array: ...
    @overload
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        *,
        return_weights: Literal[True],
        return_saved: Literal[False] = False,
        **options: Unpack[LayerKeywords],
    ) -> tuple[Array, Array]: ...
    @overload
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        *,
        return_weights: bool = False,
        return_saved: Literal[False] = False,
        **options: Unpack[LayerKeywords],
    ) -> Array | tuple[Array, Array]: ...
    @overload
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        *,
        return_weights: Literal[False] = False,
        return_saved: Literal[True],
        **options: Unpack[LayerKeywords],
    ) -> tuple[Array, Saved]: ...
    @overload
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        *,
        return_weights: Literal[True],
        return_saved: Literal[True],
        **options: Unpack[LayerKeywords],
    ) -> tuple[Array, Array, Saved]: ...
    @takes(LayerScores)
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        *others: Never,
        causal: bool | None = None,
        cu_seqlens: ArrayLike | None = None,
        cache: KVCache | None = None,
        sequences: int | SequenceIds | None = None,
        positions: ArrayLike | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
        return_weights: bool = False,
        return_saved: bool = False,
        out: Array | None = None,
        **scores: Unpack[LayerScores],
    ) -> Any:
        """Apply the layer.

        Parameters
        ----------
        query : array_like, shape (..., Sq, embed_dim)
            Of the layer's dtype, or float16 or bfloat16, which are upcast to it.
        key : array_like, shape (..., Sk, key_features), optional
            2-D if `query` is. Default: self-attention, of `query` to itself. The same object as `query`, as in
            PyTorch's ``layer(x, x, x)``, is self-attention, too.
        value : array_like, shape (..., Sk, value_features), optional
            Default `key`.
        **scores
            As for `attention`, on (..., num_heads, Sq, Sk) scores. So is a mask or bias broadcast: the axis before
            the last two is that of heads.
        num_threads : int, optional
            As for `attention`. Threads of the matrix products are those of NumPy's BLAS.
        causal : bool, optional
            Whether a query sees no key after its own position. Default: with `cache`, as for
            `KVCache.attention`, and not without. In self-attention row ``i`` is at position ``i``, whatever
            `key_lengths`; to other keys positions are those of `attention`.
        cu_seqlens : array_like of int, shape (B + 1,), optional
            `query` is (total, embed_dim): packed sequences, without padding, and
            ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]`` the rows of one. Self-attention only.
        cache : KVCache, optional
            Keys and values are appended to it, and attention is to all that it then holds of the sequences;
            the rows of `query` are their last tokens. Self-attention only.
        sequences : int, or list or 1-D array of ints, optional
            With `cache`, one id for `query` (Sq, embed_dim), or as many as (batch, Sq, embed_dim) has items.
        positions : int or array_like of int, broadcastable to (..., Sq), optional
            What rotary positions count from; an int is that of the first row. Default 0, in each sequence
            of `cu_seqlens`, or the lengths in the cache.
        dropout, seed
            As for `attention`; not with `cache`.
        return_weights : bool
            Whether to return the attention weights, too. Not with `cu_seqlens`.
        return_saved : bool
            Whether to return what `backward` needs, too; otherwise it is not kept. Not with `cache`.
        out : ndarray, shape (..., Sq, out_features), optional
            Where to store the result: C-contiguous, in the layer's dtype. It may be an input.

        Returns
        -------
        out : ndarray, shape (..., Sq, out_features)
            In the layer's dtype. A row that sees no key is the output projection of 0 (PyTorch's layer gives NaN).
        weights : ndarray, shape (..., num_heads, Sq, Sk)
            Returned with ``return_weights``. With `cache`, Sk is the length of the longest of the sequences.
        saved : Saved
            Returned with ``return_saved``. It holds the inputs themselves, not copies, unless they had to be upcast.

        Raises
        ------
        KeyError
            No sequence of that id.
        TypeError, ValueError, MemoryError
            As for `attention` and `KVCache.append`, and for keywords that do not go together. Neither
            `out` nor what the cache holds has then been changed.
        """
        if others or not scores.keys() <= LAYER:
            raise misfit(MultiHeadAttention.__call__, others, scores)
        # Tensors go to attention beside arrays that are the layer's own.
        scores = cast(LayerScores, {name: untensored(name, x) for name, x in scores.items()})
        cu_seqlens, positions = untensored("cu_seqlens", cu_seqlens), untensored("positions", positions)
        key, value = self._sources(query, key, value)
        dense = {"key": key, "value": value} | {name: x for name, x in scores.items() if name in DENSE}
        check_together(dense, cu_seqlens, cache, sequences)
        if cache is not None and (dropout != 0.0 or seed is not None):
            raise ValueError("dropout and cache cannot be given together")
        if return_weights and cu_seqlens is not None:
            raise ValueError("return_weights and cu_seqlens cannot be given together")
        causal = cache is not None if causal is None else causal
        # Those of dense attention alone are None, if they are there.
        common = {name: x for name, x in scores.items() if name not in DENSE}
        packed = cast(CausalKeywords, {**common, "causal": causal})
        rows = self._checked_input("q", query)
        check_axes(rows, cu_seqlens, sequences)
        if positions is None and self.rotary is not None:
            positions = default_positions(rows.shape, cu_seqlens, cache, sequences)
        inputs, parts = self._projected(rows, key, value, positions)
        # Heads are written side by side, as the output projection reads them.
        joined = np.empty((*broadcast_batches(parts), rows.shape[-2], self.num_heads, self.head_dim_v), self.dtype)
        target = untensored("out", out)
        check_result(target, (*joined.shape[:-2], self.out_features), self.dtype)
        if return_saved:
            check_kept(inputs, target, cache)
        heads = joined.swapaxes(-3, -2)
        lse: Any = None
        weights: Any = None
        kept: AttentionKeywords = {}
        if cache is not None and sequences is not None:
            weights = attend_cache(cache, sequences, parts, heads, packed, return_weights)
        elif cu_seqlens is not None:
            queries, keys, values = (part.swapaxes(0, 1) for part in parts)
            kept = cast(AttentionKeywords, {**packed, "dropout": dropout, "seed": seed})
            of_packed = cast(VarlenKeywords, {**kept, "out": joined})
            both = attention_varlen(queries, keys, values, cu_seqlens, cu_seqlens, **of_packed, return_lse=return_saved)
            lse = both[1] if return_saved else None
        else:
            # In self-attention rows and keys are the same tokens, whatever key_lengths leaves of them.
            own = {"causal": causal, "query_offset": 0 if key is None else None, "dropout": dropout, "seed": seed}
            kept = cast(AttentionKeywords, {**scores, **own})
            of_dense = cast(AttentionKeywords, {**kept, "out": heads})
            results = attention(*parts, **of_dense, return_lse=return_saved, return_weights=return_weights)
            lse, weights = (results[1] if return_saved else None), (results[-1] if return_weights else None)
        result = self.output(heads, out=target)
        result = in_kind_of(query, result) if out is None else out
        extras: list[Any] = [in_kind_of(query, weights)] if return_weights else []
        if return_saved:
            extras.append(Saved(self, inputs, parts, joined, lse, positions, cu_seqlens, kept))
        return (result, *extras) if extras else result

    def backward(
        self,
        grad_out: ArrayLike,
        saved: Saved,
        *,
        return_grad_bias: bool = False,
        return_grad_sinks: bool = False,
    ) -> LayerGradients:
        """Return the gradients of the inputs and of the parameters, given that of the result of a call.

        Parameters
        ----------
        grad_out : array_like, shape (..., Sq, out_features)
            The gradient of a loss in respect to the result; of the layer's dtype, or float16 or bfloat16.
        saved : Saved
            What the call with ``return_saved=True`` returned. It is not changed, so that there may be many, of several
            threads, too; neither the inputs of the call nor the parameters may have changed meanwhile.
        return_grad_bias, return_grad_sinks : bool
            Whether to return the gradients of the `bias` and of the `sinks` of the call.

        Returns
        -------
        LayerGradients
            ``query``, ``key`` and ``value``: of the inputs; ``parameters``: a dict by the names of
            `MultiHeadAttention.parameters`; ``bias`` and ``sinks``. None for what was not given or not asked for.

        Raises
        ------
        TypeError, ValueError
            A dtype or a shape that is not accepted, what another layer saved, or a gradient of what was not given.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> rng = np.random.default_rng(0)
        >>> layer = fastattn.MultiHeadAttention(*rng.standard_normal((4, 64, 64)) / 8, num_heads=4, rotary={})
        >>> x, target = rng.standard_normal((2, 2, 10, 64))

        Gradient descent on the squared difference from a target:

        >>> losses = []
        >>> for step in range(20):
        ...     out, saved = layer(x, causal=True, return_saved=True)
        ...     losses.append(0.5 * np.square(out - target).sum())
        ...     grads = layer.backward(out - target, saved)
        ...     for name, parameter in layer.parameters.items():
        ...         parameter -= 0.005 * grads.parameters[name]
        >>> bool(losses[-1] < 0.1 * losses[0])
        True
        >>> grads.query.shape
        (2, 10, 64)
        """
        if not isinstance(saved, Saved):
            raise TypeError(f"saved must be what a call with return_saved=True returned, not {type(saved).__name__}")
        if saved.layer is not self:
            raise ValueError("saved is of a call of another layer")
        grad = self._checked_dtype("grad_out", as_array("grad_out", grad_out))
        check_shape("grad_out", grad, (*saved.joined.shape[:-2], self.out_features))

        asked = asked_gradients(saved.scores, {"bias": return_grad_bias, "sinks": return_grad_sinks})

        rows = math.prod(grad.shape[:-1])
        parameters: dict[str, Array] = {}
        joined = saved.joined.reshape(rows, self.num_heads * self.head_dim_v)
        grad_heads, parameters["out_weight"], parameters["out_bias"] = self._output.backward(
            grad.reshape(rows, self.out_features), joined
        )
        # Those of what is made of one input lie side by side, as the queries, keys and values themselves do.
        columns = {
            parts: np.empty((math.prod(x.shape[:-1]), self._inputs[parts].weight.shape[1]), self.dtype)
            for parts, x in saved.inputs.items()
        }
        of_parts = self._views(saved.inputs, columns)
        grads = of_parts["q"], of_parts["k"], of_parts["v"]
        extras = list(saved.backward(grad_heads.reshape(saved.joined.shape), grads, asked))
        if self.rotary is not None:
            for part in "qk":
                rotary(of_parts[part], saved.positions, **self.rotary, inverse=True, out=of_parts[part])
        inputs = self._inputs_backward(saved.inputs, columns, parameters)

        def given(array: Array | None) -> Any:
            return None if array is None else in_kind_of(grad_out, array)

        return LayerGradients(
            given(inputs["query"]),
            given(inputs.get("key")),
            given(inputs.get("value")),
            {name: parameters[name] for name in self.parameters},
            given(extras.pop(0) if return_grad_bias else None),
            given(extras.pop(0) if return_grad_sinks else None),
        )

    def project(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        *,
        positions: ArrayLike | None = None,
    ) -> tuple[Array, Array, Array]:
        """Return queries, keys and values as `attention` takes them, with rotary positions applied.

        A call of the layer is `project`, attention, and `output`; in between is the place to look at heads, or to
        change them.

        Parameters
        ----------
        query, key, value, positions
            As for a call of the layer.

        Returns
        -------
        query : ndarray, shape (..., num_heads, Sq, head_dim)
        key : ndarray, shape (..., num_kv_heads, Sk, head_dim)
        value : ndarray, shape (..., num_kv_heads, Sk, head_dim_v)
            In the layer's dtype; views of one buffer for what shares an input.

        Raises
        ------
        TypeError, ValueError
            As a call of the layer.
        """
        return self._projected(query, key, value, positions)[1]

    def _projected(
        self, query: ArrayLike, key: ArrayLike | None, value: ArrayLike | None, positions: ArrayLike | None
    ) -> tuple[dict[str, Array], tuple[Array, Array, Array]]:
        """Return the inputs, by the parts that are made of them, and queries, keys and values."""
        key, value = self._sources(query, key, value)
        if key is None and value is not None:
            raise ValueError("value is given without key")
        if key is None:
            sources = {"qkv": query}
        elif value is None or value is key:
            sources = {"q": query, "kv": key}
        else:
            sources = {"q": query, "k": key, "v": value}
        if self.rotary is not None and key is not None:
            raise ValueError("key is given, but the layer has rotary positions; accepted is self-attention")
        if self.rotary is None and positions is not None:
            raise ValueError("positions is given, but the layer has no rotary positions")
        inputs = {parts: self._checked_input(parts, x) for parts, x in sources.items()}
        check_batch_axes(inputs)
        columns = {
            parts: self._inputs[parts](x.reshape(math.prod(x.shape[:-1]), x.shape[-1])) for parts, x in inputs.items()
        }
        heads = self._views(inputs, columns)
        if self.rotary is not None:
            for part in "qk":
                rotary(heads[part], positions, **self.rotary, out=heads[part])
        return inputs, (heads["q"], heads["k"], heads["v"])

    def output(self, heads: ArrayLike, *, out: Array | None = None) -> Array:
        """Return the output projection of what attention made of the heads.

        Parameters
        ----------
        heads : array_like, shape (..., num_heads, Sq, head_dim_v)
            In the layer's dtype. Copied, unless the heads of a row are contiguous in memory.
        out : ndarray, shape (..., Sq, out_features), optional
            Where to store the result: C-contiguous, in the layer's dtype.

        Returns
        -------
        ndarray, shape (..., Sq, out_features)

        Raises
        ------
        TypeError, ValueError
            A dtype or a shape that is not accepted.
        """
        array = as_array("heads", heads)
        if array.dtype != self.dtype:
            raise TypeError(f"heads has dtype {array.dtype}; accepted is the layer's, {self.dtype}")
        if array.ndim < 3 or (array.shape[-3], array.shape[-1]) != (self.num_heads, self.head_dim_v):
            raise ValueError(f"heads has shape {array.shape}; accepted is (..., {self.num_heads}, rows, "
                             f"{self.head_dim_v})")  # fmt: skip
        joined = array.swapaxes(-3, -2)
        shape = (*joined.shape[:-2], self.out_features)
        check_result(out, shape, self.dtype)
        flat = joined.reshape(math.prod(shape[:-1]), self.num_heads * self.head_dim_v)
        out = np.empty(shape, self.dtype) if out is None else out
        self._output(flat, out.reshape(len(flat), self.out_features))
        return out

    def _sources(
        self, query: ArrayLike, key: ArrayLike | None, value: ArrayLike | None
    ) -> tuple[ArrayLike | None, ArrayLike | None]:
        """Return key and value, or None for both where they are query itself: self-attention."""
        own = key is query and (value is None or value is query) and "qkv" in self._inputs
        return (None, None) if own else (key, value)

    def _inputs_backward(
        self, inputs: Mapping[str, Array], columns: Mapping[str, Array], parameters: dict[str, Array]
    ) -> dict[str, Array]:
        """Return the gradients of the inputs by their names, and store those of the weights and biases made of them."""
        of_inputs = {}
        for parts, x in inputs.items():
            rows = math.prod(x.shape[:-1])
            grad, weight, bias = self._inputs[parts].backward(columns[parts], x.reshape(rows, x.shape[-1]))
            of_inputs[NAMES[parts[0]]] = grad.reshape(x.shape)
            end = 0
            for part in parts:
                begin, end = end, end + math.prod(self._shapes[part])
                parameters[f"{NAMES[part]}_weight"] = weight[begin:end]
                parameters[f"{NAMES[part]}_bias"] = bias[begin:end]
        return of_inputs

    def _checked_dtype(self, name: str, array: Array) -> Array:
        """Return the array in the layer's dtype, if it is of that or of a half type."""
        if array.dtype != self.dtype and array.dtype.name not in HALF:
            way = how_to_convert(name, array.dtype, self.dtype.name)
            raise TypeError(
                f"{name} has dtype {array.dtype}; accepted are the layer's, {self.dtype}, and half types{way}"
            )
        return array.astype(self.dtype, copy=False)

    def _checked_input(self, parts: str, x: ArrayLike) -> Array:
        """Return what the projections to these parts are applied to, in the layer's dtype."""
        name = NAMES[parts[0]]
        if parts not in self._inputs:
            lacking = "key" if parts == "qkv" else "value"
            raise ValueError(f"{lacking} must be given: it has other features than {name}")
        array = self._checked_dtype(name, as_array(name, x))
        features = len(self._inputs[parts].weight)
        if array.ndim < 2 or array.shape[-1] != features:
            raise ValueError(f"{name} has shape {array.shape}; accepted is (..., rows, {features})")
        return array

    def _views(self, inputs: Mapping[str, Array], columns: Mapping[str, Array]) -> dict[str, Array]:
        """Return each part of the projections of the inputs, as a view (..., heads, rows, dim) of their columns."""
        views = {}
        for parts, x in inputs.items():
            end = 0
            for part in parts:
                num_heads, dim = self._shapes[part]
                begin, end = end, end + num_heads * dim
                heads = columns[parts][:, begin:end].reshape(*x.shape[:-1], num_heads, dim)
                views[part] = heads.swapaxes(-3, -2)
        return views


def default_positions(
    shape: tuple[int, ...],
    cu_seqlens: ArrayLike | None,
    cache: KVCache | None,
    sequences: int | SequenceIds | None,
) -> ArrayLike | None:
    if cu_seqlens is not None:
        return positions_in_sequences(cu_seqlens, shape[-2])
    if cache is None or sequences is None:
        return None
    lengths = np.array(lengths_in(cache, sequences), np.int64)
    return lengths if lengths.ndim == 0 else lengths[:, None] + np.arange(shape[-2])


def lengths_in(cache: KVCache, sequences: int | SequenceIds) -> list[int] | int:
    """Return the length of each sequence, or of the one."""
    ids, single = checked_ids(sequences)
    lengths = cache.lengths
    missing = [sequence for sequence in ids if sequence not in lengths]
    if missing:
        raise KeyError(f"there is no sequence {missing[0]} in the cache")
    return lengths[ids[0]] if single else [lengths[sequence] for sequence in ids]


def attend_cache(
    cache: KVCache,
    sequences: int | SequenceIds,
    parts: tuple[Array, Array, Array],
    out: Array,
    scores: CausalKeywords,
    return_weights: bool,
) -> Array | None:
    """Append keys and values, and attend to all that the cache then holds; or change nothing."""
    query, key, value = parts
    before = cache.lengths
    try:
        cache.append(sequences, key, value)
        if return_weights:
            return cache.attention(query, sequences, **scores, out=out, return_weights=True)[1]
        cache.attention(query, sequences, **scores, out=out)
        return None
    except BaseException:
        for sequence in checked_ids(sequences)[0]:
            if cache.lengths.get(sequence, 0) > before.get(sequence, 0):
                cache.truncate(sequence, before[sequence])
        raise
