"""Attention weights to look at: a table for the terminal, figures of each head, one self-contained page, a plot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastattn._checks import Array, as_array, checked_integer
from fastattn._files import File, atomic_write
from fastattn._weights import (
    Integers,
    check_distributions,
    check_keys,
    checked_floats,
    checked_vectors,
    dense,
    layer_of_transformers,
)
from fastattn._words import SPECIAL_TOKENS, checked_tokens, is_word, joined_words, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastattn._part import Part

__all__ = ["AttentionView"]

# Less would read 0.000.
VISIBLE = 0.0005


class Certain(NamedTuple):
    """What one head is most certain of: the weight that a query gives a key."""

    layer: int
    head: int
    query: int
    key: int
    weight: float


class HeadSummary(NamedTuple):
    """How one head attends, as means over the queries that see a key."""

    layer: int
    head: int
    entropy: float
    distance: float
    diagonal: float
    special: float


class HeadSummaries(list[HeadSummary]):
    """Summaries of heads, whose text is a table of one line a head: in notebooks, too."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def __str__(self) -> str:
        titles = ("layer", "head", "entropy (bits)", "distance", "diagonal", "special")
        rows = [[str(s.layer), str(s.head), *(f"{figure:.2f}" for figure in s[2:])] for s in self]
        lines = ["  ".join(cell.rjust(len(title)) for cell, title in zip(row, titles, strict=True)) for row in rows]
        return "\n".join(["  ".join(titles), *lines])


# --- text -----------------------------------------------------------------------------------------


# Of so much weight or more: so many stars. Less gets none.
STARS = ((0.5, 5), (0.1, 3), (0.02, 1))
LEGEND = ", ".join(f"{'*' * count} from {least:g}" for least, count in STARS)


def stars(weight: float) -> str:
    return next(("*" * count for least, count in STARS if weight >= least), "")


# --- the view -------------------------------------------------------------------------------------


class AttentionView:
    """Attention weights beside the words that they belong to, to be looked at.

    ``print(view)`` shows what the most certain head attends to, `heads` how each head attends, `save` writes a page
    for the browser, and notebooks show that page by themselves.

    Parameters
    ----------
    weights : array_like, shape (Sq, Sk), (heads, Sq, Sk) or (layers, heads, Sq, Sk)
        As `fastattn.attention` returns them, in float32, float64, float16 or bfloat16, or cast from one of these to
        a wider one. They are copied. Each row is 0 or more and sums to 1, or is all 0 where a query sees no key. A
        head with a sink sums to less: give it the sink's share as one more key. The first of four axes is layers:
        of a batch, (B, heads, Sq, Sk), give one item, as its items would be taken for layers. The attentions that
        a model of Hugging Face returns are taken by `from_transformers`.
    tokens : sequence of str, of length Sq
        The words of the queries, as the tokenizer splits them.
    key_tokens : sequence of str, of length Sk, optional
        The words of the keys, where they are other ones (cross attention). Default `tokens`.
    special_tokens : sequence of str
        Tokens that are no words, such as "[CLS]", "</s>" or ``<|endoftext|>``. No head is called certain of them.
    merge_subwords : bool
        Whether tokens that are parts of words are joined: those that begin with ``##``, or, where some tokens begin
        with ``Ġ`` or ``▁``, those that do not. Weights are then summed over the keys of a word, and averaged over its
        queries. Bytes of GPT's tokenizers become the text that they stand for.
    queries, keys : array_like, shape (Sq, D) and (Sk, D), with as many axes before them as weights has, optional
        What the weights were computed from, as `attention` takes them, with its default scale: the page then shows
        how a weight comes about. Keys may have fewer heads, as with grouped queries.

    Raises
    ------
    TypeError
        Tokens that are not str, or weights of another dtype.
    ValueError
        Shapes that do not match, or a row that is not a distribution.

    See Also
    --------
    attention : Weights, with ``return_weights=True``.
    top_keys : The largest weights of long sequences.
    explain.view_sentence : A sentence in a trained model.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> weights = np.array([[0.5, 0.5, 0.0], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]])
    >>> view = fastattn.AttentionView(weights, ["[CLS]", "it", "tiger"])
    >>> print(view)
    Head 0: "it" attends to
      tiger  0.800  *****
      [CLS]  0.100  ***
      it     0.100  ***
    >>> view.most_certain("it").weight
    0.8
    """

    _caption: str | None = None  # what the weights are, where they are those of no head
    _vectors: tuple[Array, Array] | None = None  # queries and keys

    def __init__(
        self,
        weights: ArrayLike,
        tokens: Sequence[str],
        *,
        key_tokens: Sequence[str] | None = None,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        merge_subwords: bool = False,
        queries: ArrayLike | None = None,
        keys: ArrayLike | None = None,
    ) -> None:
        array = checked_floats(weights)
        self._name(tokens, key_tokens, special_tokens)
        if array.shape[-1] != self._num_keys:
            named = "tokens" if key_tokens is None else "key_tokens"
            raise ValueError(f"weights has shape {array.shape}, so Sk is {array.shape[-1]}, but {named} are "
                             f"{self._num_keys}")  # fmt: skip
        check_distributions(array, self._num_keys, complete=True)
        self._check_queries(array)
        if merge_subwords and (queries is not None or keys is not None):
            raise ValueError("queries and keys are those of tokens: not with merge_subwords=True")
        self._vectors = self._pair(queries, keys, array.shape)
        if merge_subwords:
            array = self._merge_subwords(array)
        self._hold(np.broadcast_to(np.arange(self._num_keys, dtype=np.int32), array.shape), array)
        self._complete = True

    @classmethod
    def from_top_keys(
        cls,
        indices: ArrayLike,
        weights: ArrayLike,
        tokens: Sequence[str],
        *,
        key_tokens: Sequence[str] | None = None,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        queries: ArrayLike | None = None,
        keys: ArrayLike | None = None,
    ) -> AttentionView:
        """Make a view of only the keys that are attended most, for sequences whose weights would not fit in memory.

        What a row lacks to 1 is the share of its other keys. With a sink, give its share, ``exp(sink - lse)``, as one
        more key, named in `key_tokens`: else it would count as that of other keys. It is refused in a row that has
        no other keys.

        Parameters
        ----------
        indices : array_like of int, shape (Sq, k), (heads, Sq, k) or (layers, heads, Sq, k)
            The keys, as `fastattn.top_keys` returns them; -1 where there are fewer than ``k``.
        weights : array_like, of the same shape
            Their weights.
        tokens, key_tokens, special_tokens, queries, keys
            As for the class. Without `key_tokens`, Sk is the number of `tokens`.

        Returns
        -------
        AttentionView

        Raises
        ------
        TypeError, ValueError
            As the class, and for indices that are not keys or are listed twice.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> query, key = np.random.default_rng(0).standard_normal((2, 1, 10_000, 64), np.float32)
        >>> indices, weights = fastattn.top_keys(query, key, 4)
        >>> view = fastattn.AttentionView.from_top_keys(indices, weights, [f"word{i}" for i in range(10_000)])
        >>> view.table(5, count=1)  # doctest: +ELLIPSIS
        'Head 0: "word5" attends to\\n  word...'
        """
        array, listed = checked_floats(weights), as_array("indices", indices)
        view = cls.__new__(cls)
        view._name(tokens, key_tokens, special_tokens)
        check_keys(listed, array, view._num_keys)
        # A row that has room for more keys lists all that it sees.
        complete = (listed == -1).any(axis=-1) | (listed.shape[-1] == view._num_keys)
        check_distributions(array, view._num_keys, complete=complete)
        view._check_queries(array)
        view._vectors = view._pair(queries, keys, array.shape)
        view._hold(listed.astype(np.int32), array)
        view._complete = False
        return view

    @classmethod
    def from_transformers(
        cls,
        attentions: Sequence[Any],
        tokens: Sequence[str],
        *,
        item: int = 0,
        key_tokens: Sequence[str] | None = None,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        merge_subwords: bool = False,
    ) -> AttentionView:
        """Make a view of what a model of Hugging Face's transformers returns with ``output_attentions=True``.

        Parameters
        ----------
        attentions : sequence of array_like, shape (B, heads, Sq, Sk)
            One for each layer, as ``outputs.attentions``, ``outputs.decoder_attentions`` or
            ``outputs.cross_attentions``: tensors of PyTorch or arrays. The model must have been loaded with
            ``attn_implementation="eager"``, for others return no weights.
        tokens : sequence of str, of length Sq
            As ``tokenizer.convert_ids_to_tokens(inputs.input_ids[item])`` gives them.
        item : int
            Of the batch.
        key_tokens, special_tokens, merge_subwords
            As for the class.

        Returns
        -------
        AttentionView

        Raises
        ------
        TypeError, ValueError
            As the class, and for layers without weights, or of different shapes.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> layer = np.full((1, 2, 3, 3), 1 / 3)  # one sentence, two heads, three tokens
        >>> tokens = ["The", "Ġti", "ger"]
        >>> view = fastattn.AttentionView.from_transformers([layer, layer], tokens, merge_subwords=True)
        >>> print(view.table("tiger", layer=1, head=0))
        Layer 1, head 0: "tiger" attends to
          tiger  0.667  *****
          The    0.333  ***
        """
        layers = [layer_of_transformers(i, layer, item) for i, layer in enumerate(attentions)]
        if not layers:
            raise ValueError('attentions is empty: the model gave no weights, as only attn_implementation="eager" does')
        for i, layer in enumerate(layers):
            if layer.shape != layers[0].shape:
                raise ValueError(f"attentions[{i}] has shape {layer.shape} without its batch axis, but attentions[0] "
                                 f"{layers[0].shape}: give layers of one shape")  # fmt: skip
        return cls(
            np.stack(layers),
            tokens,
            key_tokens=key_tokens,
            special_tokens=special_tokens,
            merge_subwords=merge_subwords,
        )

    def _name(self, tokens: Sequence[str], key_tokens: Sequence[str] | None, special_tokens: Sequence[str]) -> None:
        self._tokens = checked_tokens("tokens", tokens)
        self._crossed = key_tokens is not None
        self._key_tokens = self._tokens if key_tokens is None else checked_tokens("key_tokens", key_tokens)
        self._num_keys = len(self._key_tokens)
        self._special = frozenset(checked_tokens("special_tokens", special_tokens))

    def _check_queries(self, weights: Array) -> None:
        if weights.shape[-2] != len(self._tokens):
            raise ValueError(f"weights has shape {weights.shape}, so Sq is {weights.shape[-2]}, but tokens are "
                             f"{len(self._tokens)}")  # fmt: skip

    def _pair(
        self, queries: ArrayLike | None, keys: ArrayLike | None, shape: tuple[int, ...]
    ) -> tuple[Array, Array] | None:
        if queries is None or keys is None:
            if queries is not keys:
                missing = "queries" if queries is None else "keys"
                raise ValueError(f"{missing} must be given, too: a weight comes about by queries and keys")
            return None
        shape = (*shape[:-1], self._num_keys)
        pair = checked_vectors("queries", queries, shape), checked_vectors("keys", keys, shape)
        if pair[0].shape[-1] != pair[1].shape[-1]:
            raise ValueError(
                f"queries has shape {pair[0].shape} and keys {pair[1].shape}: their last axes must be alike"
            )
        return pair

    def _merge_subwords(self, weights: Array) -> Array:
        """Join tokens to words, and their weights, (..., queries, keys): summed over keys, averaged over queries."""
        query_starts, self._tokens = joined_words(self._tokens, self._special)
        key_starts = query_starts
        if self._crossed:
            key_starts, self._key_tokens = joined_words(self._key_tokens, self._special)
        else:
            self._key_tokens = self._tokens
        counts = np.diff([*query_starts, weights.shape[-2]])[:, None]
        self._num_keys = len(self._key_tokens)
        wide = weights.astype(np.float64 if weights.dtype == np.float64 else np.float32)
        sums: Array = np.add.reduceat(np.add.reduceat(wide, key_starts, axis=-1), query_starts, axis=-2)
        return sums / counts

    def _hold(self, keys: Integers, weights: Array) -> None:
        """Keep the weights, and the key that each belongs to: (layers, heads, Sq, keys listed)."""
        missing = (None,) * (4 - weights.ndim)
        self._keys = keys[missing]
        self._weights = np.array(weights, np.float64 if weights.dtype == np.float64 else np.float32)[missing]

    def __repr__(self) -> str:
        layers, heads, queries, _ = self._weights.shape
        return f"<AttentionView: layers={layers}, heads={heads}, queries={queries}, keys={self._num_keys}>"

    def __str__(self) -> str:
        return self.table()

    @property
    def tokens(self) -> list[str]:
        """The words of the queries."""
        return list(self._tokens)

    @property
    def key_tokens(self) -> list[str]:
        """The words of the keys."""
        return list(self._key_tokens)

    # --- choosing ---------------------------------------------------------------------------------

    def _query(self, word: str | int) -> int:
        if not isinstance(word, str):
            return checked_integer("word", word, 0, len(self._tokens) - 1)
        if word in self._tokens:
            return self._tokens.index(word)
        folded = [token.casefold() for token in self._tokens]  # as tokenizers of uncased models do
        if word.casefold() not in folded:
            first = ", ".join(map(shown, self._tokens[:40]))
            pieces = " (## begins a piece that continues a word)" if "##" in first else ""
            raise ValueError(f"word is {word!r}, which is none of the tokens; they are {first}{pieces}")
        return folded.index(word.casefold())

    def _layer(self, layer: int | None) -> int | None:
        return None if layer is None else checked_integer("layer", layer, 0, self._weights.shape[0] - 1)

    def choice(
        self, word: str | int | None = None, layer: int | None = None, head: int | str = "certain"
    ) -> tuple[int, int | None, int | None]:
        """Return what `table` shows: the index of the query, layer and head.

        Parameters
        ----------
        word, layer, head
            As for `table`.

        Returns
        -------
        query : int
        layer : int or None
            None for the mean over all layers.
        head : int or None
            None for the mean over heads.

        Raises
        ------
        TypeError, ValueError
            A word, layer or head that is not accepted.
        """
        layers, heads = self._weights.shape[:2]
        if isinstance(head, str) and head not in ("mean", "certain"):
            raise ValueError(f'head must be an int, "mean" or "certain", not {head!r}')
        if not isinstance(head, str):
            head = checked_integer("head", head, 0, heads - 1)
            if layer is None and layers > 1:
                raise ValueError(f"layer must be given with head {head}: there are {layers} layers")
            layer = layer or 0
        layer = self._layer(layer)
        if head == "certain" or word is None:
            certain = self.most_certain(word, layer=layer)
            word = certain.query if word is None else word
            if head == "certain":
                layer, head = certain.layer, certain.head
        return self._query(word), layer, None if isinstance(head, str) else head

    def most_certain(self, word: str | int | None = None, *, layer: int | None = None) -> Certain:
        """Find the head that gives another word the largest weight: the first of `certain_heads`.

        Parameters
        ----------
        word, layer
            As for `certain_heads`.

        Returns
        -------
        Certain

        Raises
        ------
        TypeError, ValueError
            A word or a layer that there is not.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> weights = np.array([[[0.5, 0.5], [0.1, 0.9]], [[0.2, 0.8], [1.0, 0.0]]])  # two heads
        >>> fastattn.AttentionView(weights, ["red", "tree"]).most_certain("red")
        Certain(layer=0, head=1, query=0, key=1, weight=0.8)
        """
        return self.certain_heads(word, layer=layer)[0]

    def certain_heads(self, word: str | int | None = None, *, layer: int | None = None) -> list[Certain]:
        """List the heads, the one that gives another word the largest weight first.

        Another word is a key that is no special token, not punctuation and not the query itself. Heads that look by
        position come last: where other words, too, give the key at that distance more than half of their weight on
        average, the head says nothing about this one. So do, behind those, heads that give most to no word at all.

        Parameters
        ----------
        word : str or int, optional
            As for `table`. Default: for each head, the word of which it is most certain.
        layer : int, optional
            Default: all.

        Returns
        -------
        list of Certain
            One for each head: tuples of layer, head, query (the word's index), key (that of the other word, or -1 if
            none is listed) and weight.

        Raises
        ------
        TypeError, ValueError
            A word or a layer that there is not.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> weights = np.array([[[0.5, 0.5], [0.1, 0.9]], [[0.2, 0.8], [1.0, 0.0]]])  # two heads
        >>> for head in fastattn.AttentionView(weights, ["red", "tree"]).certain_heads("red"):
        ...     print(head.head, head.weight)
        1 0.8
        0 0.5
        """
        return [certain for _, certain in self._ranking(word, layer)]

    def count_telling(self, word: str | int | None = None, *, layer: int | None = None) -> int:
        """Return how many of `certain_heads`, the first ones, look at another word, and not by position.

        Parameters
        ----------
        word, layer
            As for `certain_heads`.

        Returns
        -------
        int

        Raises
        ------
        TypeError, ValueError
            A word or a layer that there is not.
        """
        return sum(kind == 0 for kind, _ in self._ranking(word, layer))

    def row(self, word: str | int, layer: int | None = None, head: int | None = None) -> Array:
        """Return the weights that a word gives the keys, without the share of keys that are not listed.

        Parameters
        ----------
        word : str or int
            As for `table`.
        layer, head : int, optional
            Default: the mean over all.

        Returns
        -------
        ndarray, shape (Sk,)
            float64.

        Raises
        ------
        TypeError, ValueError
            A word, layer or head that there is not.
        """
        query, layer = self._query(word), self._layer(layer)
        head = None if head is None else checked_integer("head", head, 0, self._weights.shape[1] - 1)
        rows = self._rows(layer, head, slice(query, query + 1))
        return np.asarray(rows[..., :-1].mean(axis=(0, 1, 2), dtype=np.float64))

    def _ranking(self, word: str | int | None, layer: int | None) -> list[tuple[int, Certain]]:
        """Return, best first, what each head is most certain of, and the kind of that key.

        Kinds: 0, another word; 1, another word, by position or next to nothing; 2, any key; 3, none that is listed.
        """
        ordinary_queries = [i for i, token in enumerate(self._tokens) if self._is_ordinary(token)]
        queries = np.array(ordinary_queries or range(len(self._tokens)) if word is None else [self._query(word)])
        # Key -1, which is no key, is the last of these.
        ordinary = np.array([self._is_ordinary(token) for token in self._key_tokens] + [False])
        number, heads = self._weights.shape[:2]
        layers = range(number) if layer is None else [checked_integer("layer", layer, 0, number - 1)]
        ranking = []
        for in_layer, head in itertools.product(layers, range(heads)):
            keys, weights = self._keys[in_layer, head, queries], self._weights[in_layer, head, queries]
            words = ordinary[keys] & (self._crossed | (keys != queries[:, None]))
            telling = words & (weights >= VISIBLE) & (self._habit(in_layer, head, queries) <= 0.5)
            kinds = np.select([telling, words, keys >= 0], range(3), 3)
            # Any key of a better kind comes before all of the next.
            query, listed = np.unravel_index(np.argmax(weights - 2.0 * kinds), kinds.shape)
            key, weight = int(keys[query, listed]), float(weights[query, listed])
            ranking.append((int(kinds[query, listed]), Certain(in_layer, head, int(queries[query]), key, weight)))
        return sorted(ranking, key=lambda ranked: (ranked[0], -ranked[1].weight))

    def _is_ordinary(self, token: str) -> bool:
        return token not in self._special and is_word(token)

    def _habit(self, layer: int, head: int, queries: Integers) -> Array:
        """Return the mean weight that the other queries give the key at the same distance, (queries, listed)."""
        keys, weights = self._keys[layer, head], self._weights[layer, head]
        if self._crossed:
            return np.zeros((len(queries), keys.shape[-1]))
        count = len(keys)
        distances = keys - np.arange(count)[:, None] + count
        sums = np.bincount(distances.reshape(-1), weights.reshape(-1), minlength=2 * count)
        others = np.maximum(count - np.abs(np.arange(2 * count) - count) - 1, 1)
        chosen = distances[queries]
        return np.asarray((sums[chosen] - weights[queries]) / others[chosen])

    def _rows(self, layer: int | None, head: int | None, queries: slice) -> Array:
        """Return weights (layers, heads, queries, Sk + 1), dense; the last column is that of all other keys."""
        layers, heads = (slice(None) if i is None else slice(i, i + 1) for i in (layer, head))
        keys, weights = self._keys[layers, heads, queries], self._weights[layers, heads, queries]
        return dense(keys, weights, self._num_keys, self._complete)

    def _title(self, layer: int | None, head: int | None) -> str:
        layers = self._weights.shape[0]
        if self._caption is not None:
            return self._caption
        if layer is None and layers > 1:
            return "Mean over all layers and heads"
        parts = [f"layer {layer}"] * (layers > 1) + ["mean over heads" if head is None else f"head {head}"]
        return ", ".join(parts).capitalize()

    # --- text -------------------------------------------------------------------------------------

    def table(
        self,
        word: str | int | None = None,
        *,
        layer: int | None = None,
        head: int | str = "certain",
        count: int = 8,
    ) -> str:
        """Return a table of the words that a word attends to, with their weights and five, three, one or no stars.

        Five are from a weight of a half on, three from 0.1, one from 0.02. Keys whose weight would read 0.000 are left
        out.

        Parameters
        ----------
        word : str or int, optional
            A token, of which the first occurrence counts, or its index. Where none is spelled so, case is not minded.
            Default: that of which a head is most certain.
        layer : int, optional
            From 0. Default: the most certain, or for the mean over heads all; needed for a head by number if there are
            several.
        head : int or {"certain", "mean"}
            From 0, or the head that is most certain (see `most_certain`), or the mean over heads.
        count : int
            How many words to list. The others are added up in the last line.

        Returns
        -------
        str

        Raises
        ------
        TypeError, ValueError
            A word, layer, head or count that is not accepted.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> weights = np.array([[[0.50, 0.50], [0.10, 0.90]], [[0.25, 0.75], [1.00, 0.00]]])
        >>> view = fastattn.AttentionView(weights, ["red", "tree"])
        >>> print(view.table("tree", head="mean"))
        Mean over heads: "tree" attends to
          red   0.550  ***
          tree  0.450  ***
        """
        checked_integer("count", count, 1)
        query, layer, head_index = self.choice(word, layer, head)
        row = self._rows(layer, head_index, slice(query, query + 1)).mean(axis=(0, 1, 2), dtype=np.float64)
        listed = [int(key) for key in np.argsort(-row[:-1], kind="stable")[:count] if row[key] >= VISIBLE]
        others = float(row.sum() - row[listed].sum())
        names = [shown(self._key_tokens[key]) for key in listed]
        rest = "other keys" if others >= VISIBLE else ""
        width = max(len(name) for name in [*names, rest])
        pairs = zip(names, row[listed], strict=True)
        lines = [f"  {name:<{width}}  {weight:.3f}  {stars(weight)}".rstrip() for name, weight in pairs]
        if rest:
            lines.append(f"  {rest:<{width}}  {others:.3f}")
        title = f'{self._title(layer, head_index)}: "{shown(self._tokens[query])}" attends to'
        return "\n".join([title, *(lines or ["  nothing"])])

    def over_heads(self, word: str | int | None = None) -> list[Certain]:
        """List the words that any head gives a word: for each key the head that gives it the largest weight.

        One head is one way of looking: what all heads find is more, and less certain. Special tokens and punctuation
        are left out, and so are heads that look by position (see `certain_heads`), and keys whose weight would read
        0.000.

        Parameters
        ----------
        word : str or int, optional
            As for `table`.

        Returns
        -------
        list of Certain
            One for each key, the largest weight first.

        Raises
        ------
        TypeError, ValueError
            A word that there is not.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> weights = np.array([[[0.5, 0.5], [0.1, 0.9]], [[0.2, 0.8], [1.0, 0.0]]])  # two heads
        >>> fastattn.AttentionView(weights, ["red", "tree"]).over_heads("tree")
        [Certain(layer=0, head=1, query=1, key=0, weight=1.0)]
        """
        query = self._query(word) if word is not None else self.most_certain().query
        layers, heads = self._weights.shape[:2]
        best: dict[int, Certain] = {}
        for layer, head in itertools.product(range(layers), range(heads)):
            keys, weights = self._keys[layer, head, query], self._weights[layer, head, query]
            telling = (weights >= VISIBLE) & (self._habit(layer, head, np.array([query]))[0] <= 0.5)
            for key, weight in zip(keys[telling].tolist(), weights[telling].tolist(), strict=True):
                other = key != query or self._crossed
                if (
                    other
                    and self._is_ordinary(self._key_tokens[key])
                    and (key not in best or weight > best[key].weight)
                ):
                    best[key] = Certain(layer, head, query, key, weight)
        return sorted(best.values(), key=lambda certain: -certain.weight)

    def rollout(self) -> AttentionView:
        """Follow attention through all layers: attention rollout [1]_.

        A layer hands on half of what was there before, by its residual connection, and half of what its heads, on
        average, attend to. The product of these matrices says how much of each input word has come to each place. It
        knows neither values nor the other parts of a layer: another picture, not a truth about the model [2]_.

        Returns
        -------
        AttentionView
            Of one head.

        Raises
        ------
        ValueError
            Of cross attention, or a view `from_top_keys`.

        References
        ----------
        .. [1] Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020.
        .. [2] Jain and Wallace, "Attention is not Explanation", 2019; Wiegreffe and Pinter, "Attention is not not
           Explanation", 2019.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> layer = np.array([[[1.0, 0.0], [0.5, 0.5]]])  # one head
        >>> view = fastattn.AttentionView([layer, layer], ["red", "tree"])
        >>> print(view.rollout().table("tree"))
        Rollout over 2 layers: "tree" attends to
          tree  0.562  *****
          red   0.438  ***
        """
        if self._crossed or not self._complete:
            kind = "of cross attention" if self._crossed else "from_top_keys"
            raise ValueError(f"rollout needs all weights of self-attention; this is a view {kind}")
        count = len(self._tokens)
        flow = np.eye(count)
        for layer in self._weights:
            mixed = (layer.mean(axis=0, dtype=np.float64) + np.eye(count)) / 2
            flow = mixed / mixed.sum(axis=-1, keepdims=True) @ flow
        view = AttentionView(flow, self._tokens, special_tokens=sorted(self._special))
        view._caption = f"Rollout over {len(self._weights)} layers"
        return view

    def heads(self) -> HeadSummaries:
        """Summarise how each head attends.

        Each figure is a mean over the queries that see a key:

        - entropy, in bits: 0 for one key alone, ``log2(n)`` for n keys alike;
        - distance: between query and key, in tokens, weighted;
        - diagonal: the weight on the query itself and its two neighbours;
        - special: the weight on special tokens.

        For cross attention distance and diagonal are NaN. Of a view `from_top_keys`, the other keys count as one key in
        the entropy and nowhere else, so that no figure is more than the true one.

        Returns
        -------
        list of HeadSummary
            Tuples of layer, head and the figures, in order. Its ``str`` is a table of one line a head.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> weights = np.array([[[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [1.0, 0.0]]])
        >>> print(fastattn.AttentionView(weights, ["[CLS]", "tree"]).heads())
        layer  head  entropy (bits)  distance  diagonal  special
            0     0            1.00      0.50      1.00     0.50
            0     1            0.00      0.50      1.00     1.00
        """
        layers, heads = self._weights.shape[:2]
        return HeadSummaries(self._summary(layer, head) for layer in range(layers) for head in range(heads))

    def _summary(self, layer: int, head: int) -> HeadSummary:
        keys, weights = self._keys[layer, head], self._weights[layer, head].astype(np.float64)
        sums = weights.sum(axis=-1, keepdims=True)
        seeing = max(np.count_nonzero(sums), 1)
        rest = np.where((sums > 0) & (sums < 1) & (not self._complete), 1 - sums, 0)
        parts = np.concatenate([weights, rest], axis=-1)
        entropy = -(parts * np.log2(np.where(parts > 0, parts, 1))).sum() / seeing
        special = np.array([token in self._special for token in self._key_tokens] + [False])
        distance = np.full(keys.shape, np.nan) if self._crossed else np.abs(keys - np.arange(len(keys))[:, None])
        near = np.where(np.isnan(distance), np.nan, distance <= 1)
        means = ((weights * part).sum() / seeing for part in (distance, near, special[keys]))
        # Adding 0 makes -0.0, the entropy of one key alone, 0.0.
        return HeadSummary(layer, head, float(entropy) + 0.0, *(float(mean) for mean in means))

    # --- pictures ---------------------------------------------------------------------------------

    def _check_drawable(self) -> None:
        from fastattn._page import MAX_PAGE_TOKENS

        longest = max(len(self._tokens), self._num_keys)
        if longest > MAX_PAGE_TOKENS:
            raise ValueError(f"tokens are {longest}; at most {MAX_PAGE_TOKENS} can be drawn: use table() and heads(), "
                             "or save(), whose page then shows a part")  # fmt: skip

    def _held_on_page(self, query: int) -> dict[str, Any]:
        """Return what the page holds of the text: all of it or, where that is too much, the part around a query."""
        from fastattn import _page, _part

        heads = self._weights[..., 0, 0].size
        vectors = self._vectors or ()
        part = _part.Part(np.arange(len(self._tokens)), np.arange(self._num_keys))
        if _page.may_hold(heads, part, vectors):
            held = self._coded(part, _page.SMALL_PAGE_WEIGHTS)
            if len(held["code"]) <= _page.MAX_PAGE_WEIGHTS:
                return {**held, "query": query, "part": None}
        *size, room = _part.size_of_part(heads, vectors)
        part = _part.part_of(self._keys, self._weights, self._num_keys, self._complete, query, size)
        told = {
            "queries": part.queries.tolist(),
            "keys": part.keys.tolist(),
            "of": {"queries": len(self._tokens), "keys": self._num_keys},
        }
        return {**self._coded(part, room), "query": query - int(part.queries[0]), "part": told}

    def _coded(self, part: Part, room: int) -> dict[str, Any]:
        """Return what the page holds of a part: tokens, weights in at most so many characters, and vectors."""
        from fastattn import _page, _part

        rows = _part.rows_of_part(self._keys, self._weights, part, self._complete)
        complete = self._complete and len(part.keys) == self._num_keys
        vectors = None
        if self._vectors is not None:
            queries, keys = self._vectors
            vectors = {
                "queries": _page.coded_vectors(queries[..., part.queries, :]),
                "keys": _page.coded_vectors(keys[..., part.keys, :]),
            }
        return {
            "tokens": [shown(self._tokens[at]) for at in part.queries],
            "keys": [shown(self._key_tokens[at]) for at in part.keys],
            "complete": complete,
            "vectors": vectors,
            **_page.coded(rows[..., :-1] if complete else rows, room),
        }

    def _page(self, title: str | None, word: str | int | None, layer: int | None, head: int | str) -> bytes:
        # What a page is made with takes a while to import, and is not needed otherwise.
        from fastattn import _page

        if title is not None and not isinstance(title, str):
            raise TypeError(f"title must be a str, not {title!r}")
        query, chosen_layer, chosen_head = self.choice(word, layer, head)
        if chosen_layer is None:
            chosen_layer = self.most_certain(query).layer
        layers, heads = self._weights.shape[:2]
        data = {
            "crossed": self._crossed,
            "stars": STARS,
            "layers": layers,
            "heads": heads,
            "layer": chosen_layer,
            "head": "mean" if chosen_head is None else chosen_head,
            **self._held_on_page(query),
        }
        return _page.page_of(title or "Attention", data)

    def save(
        self,
        path: File,
        *,
        title: str | None = None,
        word: str | int | None = None,
        layer: int | None = None,
        head: int | str = "certain",
    ) -> None:
        """Write a page for the browser: one file that needs no network, with every layer and head.

        Of texts of more than 1024 tokens, and of weights or vectors that would take more than 4,000,000 characters, it
        holds a part, and says so: the queries around a word, at most 64, and the keys that get most from them in any
        head, at most 128. What other keys get is then told as that of other words.

        Parameters
        ----------
        path : str or path
            A file that exists is replaced once the page is complete, and its mode is kept; links are followed. To
            a FIFO or a device the page is written straight.
        title : str, optional
            Default "Attention".
        word, layer, head
            What the page shows first, as for `table`. The mean over heads is that of one layer. A part is that around
            this word.

        Raises
        ------
        TypeError, ValueError
            A title, word, layer or head that is not accepted. Nothing has then been written.
        OSError
            As from `open`.

        Notes
        -----
        Weights are rounded to 4095ths, 1023rds or 255ths, the finest whose code has at most 400,000 characters
        (255ths if none has), so they are off by at most 1/510. The code is that of Golomb and Rice [1]_, in base64.
        As counts of 255ths in a row sum to about 255, ``Sk`` of them take at most ``3 Sk + (255 + Sk / 2) / 4``
        bits: 12 layers of 12 heads and 64 tokens are at most 406,000 characters, whatever the weights.

        Queries and keys take a byte for each component, 4 characters for 3 bytes, and are rounded to 127ths of the
        largest in each vector: those of 64 dimensions add 1.6 million characters to these 12 layers. With fewer bits,
        the scores that the page tells would be wrong in the first decimal; where it must be smaller, give a view of
        fewer layers.

        A part has so many queries and keys that its page has less than 500,000 characters besides its words, or, if
        that leaves fewer than 8 queries and 48 keys, about 2 million.

        References
        ----------
        .. [1] Rice and Plaunt, "Adaptive variable-length coding for efficient compression of spacecraft television
           data", 1971.

        Examples
        --------
        >>> import os
        >>> import tempfile
        >>> import numpy as np
        >>> import fastattn
        >>> view = fastattn.AttentionView(np.eye(3), ["a", "red", "tree"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     view.save(f"{folder}/page.html", title="A tree")
        ...     os.listdir(folder)
        ['page.html']
        """
        content = self._page(title, word, layer, head)
        with atomic_write(path) as file:
            file.write(content)

    def _repr_html_(self) -> str:
        """Return the page in a frame."""
        from fastattn._page import frame_of

        return frame_of(self._page(None, None, None, "certain").decode())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """Return the page, text and, where matplotlib is installed, a picture for what shows no frames."""
        bundle: dict[str, Any] = {"text/plain": str(self), "text/html": self._repr_html_()}
        picture = self._picture()
        return bundle if picture is None else {**bundle, "image/png": picture}

    def _picture(self) -> str | None:
        """Return the plot in base64, apart from the figures of pyplot; None without matplotlib, or if too long."""
        import base64
        import io

        try:
            from matplotlib.figure import Figure

            figure = Figure(figsize=(6, 5.4), layout="constrained")
            self.plot(figure.subplots())
        except (ImportError, ValueError):
            return None
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
        return base64.b64encode(file.getvalue()).decode()

    def plot(self, ax: Axes | None = None, *, layer: int | None = None, head: int | str = "certain") -> Axes:
        """Draw a head as a heat map with matplotlib: queries down, keys across.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Default: those of a new figure.
        layer, head
            As for `table`.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ImportError
            Without matplotlib.
        TypeError, ValueError
            A layer or head that is not accepted, or more than 1024 tokens.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> view = fastattn.AttentionView(np.eye(3), ["a", "red", "tree"])
        >>> axes = view.plot()  # doctest: +SKIP
        """
        _, layer, head_index = self.choice(None, layer, head)
        self._check_drawable()
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as failure:
                raise ImportError("plot needs matplotlib: pip install matplotlib") from failure
            _, ax = pyplot.subplots(layout="constrained")
        weights = self._rows(layer, head_index, slice(None))[..., :-1].mean(axis=(0, 1))
        ax.imshow(weights, cmap="Blues", vmin=0)
        ax.set_xticks(range(self._num_keys), [shown(token) for token in self._key_tokens], rotation=90)
        ax.set_yticks(range(len(self._tokens)), [shown(token) for token in self._tokens])
        ax.set(title=self._title(layer, head_index), xlabel="key", ylabel="query")
        return ax
