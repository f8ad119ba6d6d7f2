"""Dropout: which weights a seed drops, by numbers that depend on where a weight is and on nothing else.

Philox makes numbers of a counter and a key, without a state that would pass from one number to the next [1]_. The
counter is a weight's place, so that threads, tiles and instruction sets do not matter.

.. [1] Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastattn._checks import Array, checked_integer

ROUNDS = 10
WORD = 0xFFFFFFFF
WORD_BITS, HALF_BITS = np.uint64(32), np.uint64(16)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_STEPS = 0x9E3779B9, 0xBB67AE85

# A block of four words is eight numbers of 16 bits: those of eight keys that follow one another.
KEYS_PER_BLOCK = 8
NUMBERS = 2**16


def philox4x32(counter: tuple[Array, Array, Array, Array], key: tuple[int, int]) -> tuple[Array, Array, Array, Array]:
    """Return the four words of each counter, whose own four broadcast; words of 32 bits, in arrays of uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    low = np.uint64(WORD)
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (product_1 >> WORD_BITS) ^ c1 ^ np.uint64(k0), (product_0 >> WORD_BITS) ^ c3 ^ np.uint64(k1)
        c1, c3 = product_1 & low, product_0 & low
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def random_numbers(seed: int, item: int, head: int, position: Array, seqlen_k: int) -> Array:
    """Return a number from 0 to 65535 for each weight of a head: (rows, keys), the rows at those positions."""
    blocks = np.arange(-(-seqlen_k // KEYS_PER_BLOCK), dtype=np.uint64)[None]
    rows = (position.astype(np.int64) & WORD).astype(np.uint64)[:, None]
    of_head, of_item = (np.full((1, 1), index & WORD, np.uint64) for index in (head, item))
    words = philox4x32((blocks, rows, of_head, of_item), (seed & WORD, seed >> 32))
    halves = [half for word in words for half in (word & np.uint64(NUMBERS - 1), word >> HALF_BITS)]
    return np.stack(halves, axis=-1).reshape(len(position), KEYS_PER_BLOCK * blocks.size)[:, :seqlen_k]


class Dropout(NamedTuple):
    """What share of the weights is dropped, and which: those of a seed."""

    share: float
    seed: int

    def factors(self, item: int, head: int, position: Array, seqlen_k: int) -> Array:
        """Return what the weights of a head are multiplied by: 0, or what makes up for those that are dropped.

        The share is rounded to a multiple of 2**-16.
        """
        if self.share == 0.0:
            return np.ones((len(position), seqlen_k))
        dropped = random_numbers(self.seed, item, head, position, seqlen_k) < round(self.share * NUMBERS)
        return np.where(dropped, 0.0, 1.0 / (1.0 - self.share))


NO_DROPOUT = Dropout(0.0, 0)


def checked_dropout(dropout: float, seed: int | None) -> Dropout:
    number = isinstance(dropout, (int, float, np.integer, np.floating)) and not isinstance(dropout, bool)
    if not number:
        raise TypeError(f"dropout must be a real number, not {dropout!r}")
    share = float(dropout)
    if not 0.0 <= share < 1.0:  # NaN, too
        raise ValueError(f"dropout must be at least 0 and less than 1, but is {share}")
    if seed is not None:
        return Dropout(share, checked_integer("seed", seed, 0, 2**64 - 1))
    if share > 0.0:
        raise ValueError(
            f"dropout is {share}, but seed is not given: an int from 0 to 2**64 - 1, another for each call"
        )
    return NO_DROPOUT
