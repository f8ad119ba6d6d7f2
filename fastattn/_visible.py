"""How many scores a call leaves visible: the work that counts as floating-point operations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

# Of a mask: a chunk's temporaries stay within some megabytes.
SCORES_AT_ONCE = 1 << 20


def sum_of_clipped(start: int, count: int, highest: int) -> int:
    """Return the sum of clip(start + i, 0, highest) for i < count."""
    first_positive = min(max(-start, 0), count)
    first_clipped = min(max(highest - start, first_positive), count)
    rising = first_clipped - first_positive
    return rising * (2 * start + first_positive + first_clipped - 1) // 2 + (count - first_clipped) * highest


def count_in_intervals(seqlen_q: int, left: int | None, right: int | None, length: int, offset: int) -> int:
    """Return how many keys below `length` lie within left and right of the rows' positions, summed over rows."""
    below = 0 if left is None else sum_of_clipped(offset - left, seqlen_q, length)
    up_to = seqlen_q * length if right is None else sum_of_clipped(offset + right + 1, seqlen_q, length)
    return up_to - below


def count_in_mask(
    mask: NDArray[np.bool_], seqlen_q: int, left: int | None, right: int | None, length: int, offset: int
) -> int:
    """Return the number of pairs within the intervals that a (rows, keys) mask leaves."""
    if mask.size == 0:
        return 0
    position = np.arange(seqlen_q) + offset
    begin = np.zeros_like(position) if left is None else np.clip(position - left, 0, length)
    end = np.full_like(position, length) if right is None else np.clip(position + right + 1, 0, length)
    if mask.shape[1] == 1:  # one answer for all keys
        return int(np.sum(np.where(mask[:, 0], end - begin, 0)))
    if mask.shape[0] == 1:
        seen_before = np.append(0, np.cumsum(mask[0]))
        return int(np.sum(seen_before[end] - seen_before[begin]))
    step = max(1, SCORES_AT_ONCE // mask.shape[1])
    return sum(
        count_in_rows(mask[rows : rows + step], begin[rows : rows + step], end[rows : rows + step])
        for rows in range(0, seqlen_q, step)
    )


def count_in_rows(mask: NDArray[np.bool_], begin: Integers, end: Integers) -> int:
    """Return how many keys from begin to end, row by row, a (rows, keys) mask leaves."""
    keys = np.arange(mask.shape[1])
    return int(np.count_nonzero(mask & (keys >= begin[:, None]) & (keys < end[:, None])))


def count_visible(
    shape: tuple[int, ...],
    left: int | None,
    right: int | None,
    key_lengths: Integers | None,
    query_offset: Integers | None,
    mask: NDArray[Any] | None,
) -> int:
    """Return how many of the scores of shape (batch..., heads, rows, keys) are visible."""
    *batch, num_heads, seqlen_q, seqlen_k = shape
    lengths = np.broadcast_to(seqlen_k if key_lengths is None else key_lengths, batch)
    offsets = np.broadcast_to(lengths - seqlen_q if query_offset is None else query_offset, batch)
    if mask is None:
        intervals, repeats = np.unique(np.stack([lengths.ravel(), offsets.ravel()]), axis=1, return_counts=True)
        return num_heads * sum(
            int(times) * count_in_intervals(seqlen_q, left, right, int(length), int(offset))
            for (length, offset), times in zip(intervals.T, repeats, strict=True)
        )
    mask = mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape)
    per_batch = np.broadcast_to(mask, (*batch, *mask.shape[-3:]))
    heads_alike = num_heads if mask.shape[-3] == 1 else 1
    return heads_alike * sum(
        count_in_mask(head_mask, seqlen_q, left, right, int(lengths[index]), int(offsets[index]))
        for index in np.ndindex(*batch)
        for head_mask in per_batch[index][:num_heads]
    )
