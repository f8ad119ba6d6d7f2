"""The weights of a layer in checkpoints: by what names they go there, and what else must be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastattn._checks import Array, as_array
from fastattn.rotary import RotaryOptions

if TYPE_CHECKING:
    from fastattn.layer import MultiHeadAttention

__all__ = ["SCHEMES", "Scheme", "from_checkpoint", "from_torch_state"]


class Scheme(NamedTuple):
    """What a family of checkpoints calls the weights of a layer, and how it stores them."""

    inputs: tuple[str, ...]  # of query, key and value
    output: str
    fused: str | None = None  # of query, key and value in one
    transposed: bool = False  # (in_features, out_features)
    rotary: RotaryOptions | None = None
    ignored: tuple[str, ...] = ()  # what is of no other use, or is not of the layer


NORM = tuple(f"output.LayerNorm.{name}" for name in ("weight", "bias", "gamma", "beta"))
SCHEMES = {
    "bert": Scheme(("self.query", "self.key", "self.value"), "output.dense", ignored=NORM),
    # bias and masked_bias are the causal mask.
    "gpt2": Scheme((), "c_proj", "c_attn", transposed=True, ignored=("bias", "masked_bias")),
    "llama": Scheme(("q_proj", "k_proj", "v_proj"), "o_proj", "qkv_proj", rotary={}, ignored=("rotary_emb.inv_freq",)),
}
NORMALISED = "accepted are layers that do not normalise queries and keys"
MORE_KEYS = "accepted are layers without add_bias_kv"
HINTS = {
    "sinks": "leave them out of the mapping, and give them to each call as sinks=",
    "q_norm.weight": NORMALISED,
    "k_norm.weight": NORMALISED,
    "bias_k": MORE_KEYS,
    "bias_v": MORE_KEYS,
}

# What the configuration of a checkpoint calls the sizes of a layer.
CONFIGURED = {
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
}


def require(mapping: Mapping[str, ArrayLike], name: str) -> Array:
    try:
        entry = mapping[name]
    except KeyError:
        raise KeyError(f"the mapping has no {name!r}") from None
    return as_array(name, entry)


def require_bias(mapping: Mapping[str, ArrayLike], name: str) -> Array | None:
    return require(mapping, name) if name in mapping else None


def check_all_read(mapping: Mapping[str, ArrayLike], prefix: str, names: Sequence[str]) -> None:
    """Raise if there is more under the prefix than these names, for the layer would give other results without it."""
    more = [name for name in mapping if name.startswith(prefix) and name.removeprefix(prefix) not in names]
    if more:
        shown = ", ".join(more[:5]) + (", ..." if len(more) > 5 else "")
        hint = HINTS.get(more[0].removeprefix(prefix), "accepted is a layer of projections and their biases alone")
        raise ValueError(f"the mapping has {shown}, for which there is no place in the layer; {hint}")


def split_qkv(name: str, array: Array | None, query_rows: int | None = None) -> list[Any]:
    """Return query's, key's and value's part of a fused weight or bias: thirds, unless query has its own number."""
    if array is None:
        return [None] * 3
    if query_rows is None:
        if array.ndim == 0 or len(array) % 3:
            raise ValueError(f"{name} has shape {array.shape}; accepted is three times the out_features, packed")
        return np.split(array, 3)
    if array.ndim == 0 or len(array) < query_rows or (len(array) - query_rows) % 2:
        raise ValueError(f"{name} has shape {array.shape}; accepted are {query_rows} rows for the query, as the output "
                         "has columns, and as many for the key as for the value")  # fmt: skip
    return np.split(array, [query_rows, (len(array) + query_rows) // 2])


def named(weights: Sequence[Array], biases: Sequence[Array | None]) -> dict[str, Any]:
    """Return the keywords of a layer for the weights and biases of query, key, value and output."""
    parts = ("query", "key", "value", "out")
    return {f"{part}_weight": weight for part, weight in zip(parts, weights, strict=True)} | {
        f"{part}_bias": bias for part, bias in zip(parts, biases, strict=True)
    }


def from_torch_state(state: Mapping[str, ArrayLike], prefix: str) -> dict[str, Any]:
    """Return the weights and biases that the state of a ``torch.nn.MultiheadAttention`` has, as keywords of a layer."""
    inputs = [f"{part}_proj_weight" for part in "qkv"]
    if f"{prefix}q_proj_weight" in state:
        weights = [require(state, prefix + name) for name in inputs]
    else:
        inputs = ["in_proj_weight"]
        weights = split_qkv(f"{prefix}in_proj_weight", require(state, f"{prefix}in_proj_weight"))
    weights.append(require(state, f"{prefix}out_proj.weight"))
    biases = split_qkv(f"{prefix}in_proj_bias", require_bias(state, f"{prefix}in_proj_bias"))
    biases.append(require_bias(state, f"{prefix}out_proj.bias"))
    check_all_read(state, prefix, [*inputs, "in_proj_bias", "out_proj.weight", "out_proj.bias"])
    return named(weights, biases)


def from_checkpoint(mapping: Mapping[str, ArrayLike], prefix: str, scheme: Scheme) -> dict[str, Any]:
    """Return the weights and biases that a checkpoint has under the prefix, as keywords of a layer."""
    is_fused = f"{prefix}{scheme.fused}.weight" in mapping or not scheme.inputs
    names = [*((scheme.fused,) if is_fused else scheme.inputs), scheme.output]
    weights: list[Any] = [require(mapping, f"{prefix}{name}.weight") for name in names]
    biases: list[Any] = [require_bias(mapping, f"{prefix}{name}.bias") for name in names]
    read = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    check_all_read(mapping, prefix, [*read, *scheme.ignored])
    if scheme.transposed:
        weights = [weight.T for weight in weights]
    if is_fused:
        # Queries may have more heads than keys, and then the output, which has one column for each of their rows.
        rows = weights[1].shape[-1] if scheme.inputs and weights[1].ndim else None
        weights = [*split_qkv(f"{prefix}{names[0]}.weight", weights[0], rows), weights[1]]
        biases = [*split_qkv(f"{prefix}{names[0]}.bias", biases[0], rows), biases[1]]
    return named(weights, biases)


def check_configured(config: Mapping[str, Any], layer: MultiHeadAttention) -> None:
    """Raise if the configuration of a checkpoint says something else of heads than the layer is."""
    if not any(name in config for name in CONFIGURED["num_heads"]):
        raise ValueError(f"config has no {' or '.join(CONFIGURED['num_heads'])}; accepted is the part of config.json "
                         "that describes these layers")  # fmt: skip
    for ours, theirs in CONFIGURED.items():
        for name in theirs:
            told, is_ = config.get(name), getattr(layer, ours)
            if told is not None and told != is_:
                raise ValueError(f"{ours} is {is_}, but the config's {name} is {told}")


def configured_rotary(config: Mapping[str, Any], rotary: RotaryOptions | None, head_dim: int) -> RotaryOptions:
    """Return the rotary positions that the configuration of a checkpoint says; those given must be the same."""
    rope: Mapping[str, Any] = config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(
            f"the config has rope_parameters {rope}; accepted are those of one kind of layers, in its place"
        )
    parameters = {**config, **rope}
    scaling = config.get("rope_scaling") or {"rope_type": parameters.get("rope_type", "default")}
    if scaling.get("rope_type", scaling.get("type")) != "default":
        raise ValueError(f"the config has rope_scaling {scaling}; accepted are rotary positions without scaling")
    told = {
        "base": parameters.get("rope_theta", 10000.0),
        "dim": int(head_dim * parameters.get("partial_rotary_factor", 1)),
    }
    if rotary is None:
        return {"base": told["base"], "dim": told["dim"]}
    used = {"base": rotary.get("base", 10000.0), "dim": rotary.get("dim") or head_dim}
    if used != told:
        raise ValueError(f"rotary has {used}, but the config says {told}")
    return rotary


def check_frequencies(name: str, frequencies: Array, layer: MultiHeadAttention) -> None:
    """Raise unless the frequencies that a checkpoint holds are those of the layer's rotary positions."""
    options = layer.rotary or {}
    dim = options.get("dim") or layer.head_dim
    if frequencies.shape != (dim // 2,):
        raise ValueError(f"{name} has shape {frequencies.shape}; with num_heads {layer.num_heads}, head_dim is "
                         f"{layer.head_dim}, and accepted are ({dim // 2},) frequencies")  # fmt: skip
    expected = options.get("base", 10000.0) ** (np.arange(0, dim, 2) / -dim)
    # They may have been rounded to a half type.
    if not np.allclose(frequencies.astype(np.float64), expected, rtol=2**-7, atol=2**-14):
        raise ValueError(f"{name} begins {frequencies[:4]}, but rotary makes {expected[:4]}: give the checkpoint's "
                         "rope_theta as rotary's base")  # fmt: skip
