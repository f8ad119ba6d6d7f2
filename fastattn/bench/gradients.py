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
EVERY = (slice(None), slice(None))  # item and head


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

    def words(self, heads: Index, rows: slice, keys: slice) -> dict[str, Any]:
        """Return the keywords for some heads, rows and keys, whose positions stay what they are."""
        words = dict(self.keywords)
        for name in {"mask", "bias"} & words.keys():
            cut = words[name][heads[0]][..., keys]
            cut = cut[..., rows, :] if cut.shape[-2] > 1 else cut
            words[name] = cut if name == "mask" else cut.astype(np.float64)
        if "alibi_slopes" in words:
            words["alibi_slopes"] = words["alibi_slopes"][heads[1]]
        words["query_offset"] = rows.start + self.case.seqlen_k - self.case.seqlen_q - keys.start
        return words

    def forward(self, heads: Index, kv_heads: Index, rows: slice) -> Exact:
        """Return the right result of some heads and rows, and its lse, in float64."""
        query, key, value = self.arrays
        words = self.words(heads, rows, slice(0, self.case.seqlen_k))
        cut = query[heads][..., rows, :].astype(np.float64)
        results: Exact = reference.attention(cut, key[kv_heads], value[kv_heads], return_lse=True, **words)
        return results

    def backward(self, heads: Index, kv_heads: Index, rows: slice, keys: slice, results: Exact) -> Exact:
        """Return the right gradients for some heads, rows and keys, of results that are of all keys."""
        grad_out, query = (x[heads][..., rows, :].astype(np.float64) for x in (self.grad_out, self.arrays[0]))
        key, value = (x[kv_heads][..., keys, :].astype(np.float64) for x in self.arrays[1:])
        asked = self.words(heads, rows, keys) | {"return_grad_bias": self.case.grad_bias}
        out, lse = results
        found: Exact = reference.attention_backward(grad_out, query, key, value, out, lse, **asked)
        return found

    @cached_property
    def of_rows(self) -> list[tuple[slice, Exact]]:
        """The right gradients of the first, the middle and the last query rows, and of their bias."""
        found, keys = [], slice(0, self.case.seqlen_k)
        for rows in sampled_rows(slice(0, self.case.seqlen_q)):
            results = self.forward(EVERY, EVERY, rows)
            grad_query, _, _, *grad_bias = self.backward(EVERY, EVERY, rows, keys, results)
            found.append((rows, (grad_query, *grad_bias)))
        return found

    @cached_property
    def of_keys(self) -> list[tuple[Index, Exact]]:
        """The right gradients of the first, the middle and the last keys and values, of the first head and the last.

        Each is a sum over all query rows, which would take minutes for all heads. Dropout counts heads and keys from
        the first, which are then all.
        """
        case = self.case
        group_size = case.num_heads // case.num_kv_heads
        sampled = [((slice(0, 1), slice(0, group_size)), (slice(0, 1), slice(0, 1)))]
        blocks = list(sampled_rows(slice(0, case.seqlen_k)))
        if case.dropout:
            blocks = blocks[:1]
        else:
            sampled.append(((slice(-1, None), slice(-group_size, None)), (slice(-1, None), slice(-1, None))))
        return [found for heads, kv_heads in sampled for found in self.of_head(heads, kv_heads, blocks)]

    def of_head(self, heads: Index, kv_heads: Index, blocks: list[slice]) -> Iterator[tuple[Index, Exact]]:
        """Yield blocks of keys of a head, and their gradients."""
        rows = slice(0, self.case.seqlen_q)
        chunks = (slice(begin, min(begin + CHUNK, rows.stop)) for begin in range(0, rows.stop, CHUNK))
        outs, lses = zip(*(self.forward(heads, kv_heads, chunk) for chunk in chunks), strict=True)
        results = np.concatenate(outs, axis=-2), np.concatenate(lses, axis=-1)
        for keys in blocks:
            _, grad_key, grad_value, *_ = self.backward(heads, kv_heads, rows, keys, results)
            yield (*kv_heads, keys), (grad_key, grad_value)

    def error(self, grads: Any) -> float:
        """Return the largest of the gradients' relative errors, in the Frobenius norm."""
        grad_query, grad_key, grad_value, *grad_bias = grads
        checked: list[list[tuple[NDArray[Any], NDArray[Any]]]] = [[] for _ in range(3 + len(grad_bias))]
        for block, exact in self.of_rows:
            for pairs, grad, right in zip((checked[0], *checked[3:]), (grad_query, *grad_bias), exact, strict=True):
                pairs.append((grad[..., block, :], right))
        for index, exact in self.of_keys:
            for pairs, grad, right in zip(checked[1:3], (grad_key, grad_value), exact, strict=True):
                pairs.append((grad[index], right))
        return max(map(relative_error, checked))


def relative_error(pairs: list[tuple[NDArray[Any], NDArray[Any]]]) -> float:
    """Return that of some arrays together, each beside what is right."""
    wrong = sum(float(np.sum((x.astype(np.float64) - right) ** 2)) for x, right in pairs)
    return float(np.sqrt(wrong / sum(float(np.sum(right**2)) for _, right in pairs)))
