"""Problems of training: the gradients of attention, alone or with the forward pass before them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn import reference
from fastattn.bench.limits import Work
from fastattn.bench.shapes import Problem, sampled_rows

__all__ = ["GradientProblem"]

# Rows whose scores the reference holds at a time.
CHUNK = 512

Exact = tuple[NDArray[Any], ...]
Index = tuple[slice, ...]


class GradientProblem(Problem):
    """The gradients of query, key and value, and of a bias where the case asks for it."""

    @cached_property
    def grad_out(self) -> NDArray[Any]:
        """The gradient of the result, standard normal."""
        case = self.case
        shape = case.batch, case.num_heads, case.seqlen_q, case.head_dim
        return np.random.default_rng(3).standard_normal(shape, np.float32).astype(self.dtype)

    @cached_property
    def work(self) -> Work:
        """What is computed and moved: each array and its gradient, once."""
        nbytes = 4 * self.arrays[0].nbytes + 2 * self.kv_bytes
        return Work(self.attention_paths, nbytes, footprint=nbytes)

    @property
    def is_read_bound(self) -> bool:
        return False

    @property
    def tolerance(self) -> float:
        """Twice that of the result: the weights are rounded, and so are the gradients of their scores."""
        return 2.0 * super().tolerance

    def exact(self, rows: slice, heads: Index = (slice(None),) * 2, kv_heads: Index = (slice(None),) * 2) -> Exact:
        """Return the gradients, in float64, that some query rows contribute; of some batch items and heads."""
        case, words = self.case, dict(self.keywords)
        for name in {"mask", "bias"} & words.keys():
            items = words[name][heads[0]]
            words[name] = (items[..., rows, :] if items.shape[-2] > 1 else items).astype(
                bool if name == "mask" else np.float64
            )
        if "alibi_slopes" in words:
            words["alibi_slopes"] = words["alibi_slopes"][heads[1]]
        words["query_offset"] = rows.start + case.seqlen_k - case.seqlen_q
        query, grad_out = (x[heads][..., rows, :].astype(np.float64) for x in (self.arrays[0], self.grad_out))
        key, value = (x[kv_heads].astype(np.float64) for x in self.arrays[1:])
        out, lse = reference.attention(query, key, value, return_lse=True, **words)
        return reference.attention_backward(
            grad_out, query, key, value, out, lse, **words, return_grad_bias=case.grad_bias
        )

    @cached_property
    def of_rows(self) -> list[tuple[slice, Exact]]:
        """The right gradients of the first, the middle and the last query rows, and of their bias."""
        blocks = sampled_rows(slice(0, self.case.seqlen_q))
        return [(block, (found[0], *found[3:])) for block in blocks for found in [self.exact(block)]]

    @cached_property
    def of_keys(self) -> list[tuple[Index, Exact]]:
        """The right gradients of keys and values of the first head and, where none is dropped, of the last.

        Each key's is a sum over all query rows, which would take minutes for all heads.
        """
        return [(kv_heads, self.summed(heads, kv_heads)) for heads, kv_heads in self.sampled_heads()]

    def sampled_heads(self) -> Iterator[tuple[Index, Index]]:
        """Yield heads of queries, and their head of keys; dropout counts both from the first."""
        case = self.case
        group_size = case.num_heads // case.num_kv_heads
        yield (slice(0, 1), slice(0, group_size)), (slice(0, 1), slice(0, 1))
        if not case.dropout:
            yield (slice(-1, None), slice(-group_size, None)), (slice(-1, None), slice(-1, None))

    def summed(self, heads: Index, kv_heads: Index) -> Exact:
        """Return the gradients of keys and values over all query rows."""
        totals: list[NDArray[Any]] = []
        for begin in range(0, self.case.seqlen_q, CHUNK):
            found = self.exact(slice(begin, min(begin + CHUNK, self.case.seqlen_q)), heads, kv_heads)
            totals = [x + y for x, y in zip(totals or (0.0, 0.0), found[1:3], strict=True)]
        return tuple(totals)

    def error(self, grads: Any) -> float:
        """Return the largest of the gradients' relative errors, in the Frobenius norm."""
        grad_query, grad_key, grad_value, *grad_bias = grads
        checked: list[list[tuple[NDArray[Any], NDArray[Any]]]] = [[] for _ in range(3 + len(grad_bias))]
        for block, exact in self.of_rows:
            for pairs, grad, right in zip((checked[0], *checked[3:]), (grad_query, *grad_bias), exact, strict=True):
                pairs.append((grad[..., block, :], right))
        for kv_heads, exact in self.of_keys:
            for pairs, grad, right in zip(checked[1:3], (grad_key, grad_value), exact, strict=True):
                pairs.append((grad[kv_heads], right))
        return max(map(relative_error, checked))


def relative_error(pairs: list[tuple[NDArray[Any], NDArray[Any]]]) -> float:
    """Return that of some arrays together, each beside what is right."""
    wrong = sum(float(np.sum((x.astype(np.float64) - right) ** 2)) for x, right in pairs)
    return float(np.sqrt(wrong / sum(float(np.sum(right**2)) for _, right in pairs)))
