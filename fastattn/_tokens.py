"""What an encoder is given, checked: sentences, and lists of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn._checks import refuse_masked


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
