"""Which part of a text a page holds where all of it is too much: queries around a word, and their strongest keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastattn._checks import Array
from fastattn._weights import Integers, dense

# More than these nobody looks through; of fewer keys a page says little, so that queries are left out before them.
MOST_QUERIES, MOST_KEYS, LEAST_KEYS = 64, 128, 48
# What weights and vectors take, whatever they are, in characters: so many, for a page of less than 500 kB, where that
# leaves as many queries as here, and otherwise so many.
SMALL_PART, LARGE_PART, LEAST_QUERIES = 420_000, 2_000_000, 8
# So many of the chosen word's keys, in any head, come before any of the others'.
CHOSEN_FIRST = 24


class Part(NamedTuple):
    """What is shown of a text: positions in it, in order."""

    queries: Integers
    keys: Integers


def size_of_part(heads: int, vectors: Sequence[Array]) -> tuple[int, int, int]:
    """Return how many queries and keys a part has, and how many characters are left for its weights.

    A row of counts of 255ths, and one for other keys, takes at most 3.125 bits for each and 64: see `save`. A vector
    takes a byte for each component, and two. A character holds six bits.
    """
    of_query, of_key = [4 / 3 * each[..., 0, 0].size * (each.shape[-1] + 2) for each in vectors] or [0.0, 0.0]
    queries, most = MOST_QUERIES, SMALL_PART
    while True:
        room = most - queries * (of_query + heads * (64 + 3.125) / 6)
        keys = max(1, min(MOST_KEYS, int(room / (of_key + heads * queries * 3.125 / 6))))
        if keys >= LEAST_KEYS or queries == 1:
            return queries, keys, int(most - queries * of_query - keys * of_key)
        queries //= 2
        if most == SMALL_PART and queries < LEAST_QUERIES:
            queries, most = MOST_QUERIES, LARGE_PART


def queries_around(query: int, count: int, num_queries: int) -> Integers:
    # A quarter of them before it, so that it is in sight when the page is opened.
    begin = max(0, min(query - count // 4, num_queries - count))
    return np.arange(begin, min(begin + count, num_queries))


def largest_of_heads(keys: Integers, weights: Array, num_keys: int, complete: bool) -> tuple[Integers, Array]:
    """Return the keys that are listed, and the largest weight that each query gives them in any head."""
    if complete:
        return np.arange(num_keys), np.asarray(weights.max(axis=(0, 1)))
    listed, at = np.unique(keys, return_inverse=True)
    largest = np.zeros((keys.shape[2], len(listed)), weights.dtype)
    queries = np.broadcast_to(np.arange(keys.shape[2])[:, None], keys.shape)
    np.maximum.at(largest, (queries.reshape(-1), at.reshape(-1)), weights.reshape(-1))
    return listed, largest


def strongest_keys(listed: Integers, largest: Array, chosen: int, count: int) -> Integers:
    """Return the strongest keys, in order.

    Those of the chosen query come first, and then the strongest of each query, the second of each, and so on.
    """
    order = np.argsort(-largest, axis=-1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(len(listed))[None], axis=-1)
    ranks[chosen] -= CHOSEN_FIRST
    most = largest.max(axis=0)
    best = np.lexsort((-most, np.where(largest > 0, ranks, len(listed)).min(axis=0)))
    found = np.sort(listed[best[most[best] > 0][:count]])
    return found if len(found) else np.zeros(1, np.intp)


def part_of(keys: Integers, weights: Array, num_keys: int, complete: bool, query: int, size: Sequence[int]) -> Part:
    """Choose the part of a view, (layers, heads, queries, listed), around a query."""
    queries = queries_around(query, size[0], keys.shape[2])
    near = slice(queries[0], queries[-1] + 1)
    listed, largest = largest_of_heads(keys[:, :, near], weights[:, :, near], num_keys, complete)
    return Part(queries, strongest_keys(listed, largest, query - int(queries[0]), size[1]))


def rows_of_part(keys: Integers, weights: Array, part: Part, complete: bool) -> Array:
    """Return the part's weights, (layers, heads, queries, keys + 1); the last column is that of all other keys."""
    near = slice(part.queries[0], part.queries[-1] + 1)
    weights = weights[:, :, near]
    keys = keys[:1, :1, :1] if complete else keys[:, :, near]  # where all are listed, they are the same in each row
    places = np.searchsorted(part.keys, keys)
    is_shown = part.keys.take(places, mode="clip") == keys
    return dense(np.where(is_shown, places, len(part.keys)), weights, len(part.keys), complete)
