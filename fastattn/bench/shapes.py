"""The one table of shapes that every benchmark reads, and the arrays made from a row of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn import reference

__all__ = ["CASES", "DTYPES", "GROUPS", "Case", "Problem", "find_cases", "find_dtype"]

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Case:
    """One shape with what is asked of it. Speeds are measured a case and a dtype at a time."""

    name: str
    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    extra: str | None = None  # an array beside q, k and v: "mask", "bias", "padding" or "alibi"
    layout: str = "contiguous"
    num_threads: int | None = None  # None: as many as the run has
    baseline: Case | None = None  # the case whose time this one's is divided by

    @property
    def shape(self) -> str:
        """The shape as the command line takes it."""
        sizes = (self.batch, self.num_heads, self.num_kv_heads, self.seqlen_q, self.seqlen_k, self.head_dim)
        return ",".join(map(str, sizes)) + (",causal" if self.causal else "")

    def costs(self, name: str, **changes: Any) -> Case:
        """Return this case with something changed, to be timed against this case."""
        return replace(self, name=name, baseline=self, **changes)


BASE = Case("base", 2, 12, 12, 1024, 1024, 64)

GROUPS: dict[str, tuple[Case, ...]] = {
    "forward": (
        Case("encoder-1024", 1, 12, 12, 1024, 1024, 64),
        Case("decoder-2048", 1, 32, 8, 2048, 2048, 128, causal=True),
        Case("long-8192", 1, 4, 4, 8192, 8192, 64),
        Case("dim-80", 1, 16, 16, 1024, 1024, 80),
        Case("dim-256", 1, 8, 8, 1024, 1024, 256),
        Case("batch-128", 8, 12, 12, 128, 128, 64),
        Case("vit-197", 4, 12, 12, 197, 197, 64),
        Case("short-32", 32, 12, 12, 32, 32, 32),
        Case("tiny-8", 1, 4, 4, 8, 8, 16),
    ),
    "cost": (
        Case("full-2048", 1, 12, 12, 2048, 2048, 64).costs("causal", causal=True),
        # The query's own key and the 256 before it: the sliding window of decoders.
        Case("full-8192", 1, 4, 4, 8192, 8192, 64).costs("window", window=(256, 0)),
        BASE.costs("mask", extra="mask"),
        BASE.costs("bias", extra="bias"),
        BASE.costs("padding", extra="padding"),
        BASE.costs("softcap", softcap=30.0),
        BASE.costs("alibi", extra="alibi"),
        BASE.costs("swapaxes", layout="swapaxes"),
        BASE.costs("packed", layout="packed"),
        BASE.costs("reversed", layout="reversed"),
        BASE.costs("strided", layout="strided"),
        BASE.costs("transposed", layout="transposed"),
        replace(BASE, name="one-thread", num_threads=1).costs("threads", num_threads=None),
    ),
    "small": (
        Case("small-512", 1, 12, 12, 512, 512, 64),
        Case("small-causal", 1, 16, 4, 512, 512, 128, causal=True),
        Case("batch-128", 8, 12, 12, 128, 128, 64),
        Case("short-32", 32, 12, 12, 32, 32, 32),
    ),
}

CASES: dict[str, Case] = {case.name: case for cases in GROUPS.values() for case in cases}


def find_cases(words: list[str]) -> list[Case]:
    """Return the cases that the words name, in order and each once.

    Parameters
    ----------
    words : list of str
        Each a case's name, a group's name, or a shape ``B,H,Hkv,Sq,Sk,D`` with an optional ``,causal``.

    Raises
    ------
    ValueError
        If a word is none of these.
    """
    found: dict[Case, None] = {}
    for word in words:
        if word in GROUPS:
            found.update(dict.fromkeys(GROUPS[word]))
        elif word in CASES:
            found[CASES[word]] = None
        else:
            found[parse_shape(word)] = None
    return list(found)


def parse_shape(word: str) -> Case:
    sizes, _, causal = word.partition(",causal")
    try:
        numbers = [int(size) for size in sizes.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 6 or min(numbers) < 1 or causal or numbers[1] % numbers[2]:
        raise ValueError(
            f"got {word!r}; a shape is B,H,Hkv,Sq,Sk,D[,causal] with positive sizes and H a multiple of Hkv, "
            f"a group ({', '.join(GROUPS)}) or a name ({', '.join(CASES)})"
        )
    batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim = numbers
    return Case(
        "given",
        batch,
        num_heads,
        num_kv_heads,
        seqlen_q,
        seqlen_k,
        head_dim,
        causal=word.endswith(",causal"),
    )


def find_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype of this name.

    Raises
    ------
    ImportError
        For bfloat16 without ml_dtypes, which is where NumPy's bfloat16 comes from.
    ValueError
        If the name is not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise ValueError(f"--dtypes got {name!r}; it takes {', '.join(DTYPES)}")
    if name == "bfloat16":
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return dtype
    return np.dtype(name)


@dataclass(frozen=True)
class Problem:
    """A case's arrays at one dtype: standard normal, from a fixed seed."""

    case: Case
    dtype: np.dtype[Any]

    @cached_property
    def arrays(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """query, key and value, in the case's layout."""
        case = self.case
        draw = np.random.default_rng(1)
        heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
        rows = (case.seqlen_q, case.seqlen_k, case.seqlen_k)
        values = [
            draw.standard_normal((case.batch, h, s, case.head_dim), np.float32)
            for h, s in zip(heads, rows, strict=True)
        ]
        query, key, value = (laid_out(x, self.dtype, case.layout, packed_index=i) for i, x in enumerate(values))
        return query, key, value

    @cached_property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of `fastattn.attention` that this case is about."""
        case = self.case
        draw = np.random.default_rng(2)
        full = (case.batch, 1, case.seqlen_q, case.seqlen_k)
        asked: dict[str, Any] = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
        if case.extra == "mask":
            # Random, so that no block of it is all True or all False and could be skipped.
            asked["mask"] = draw.random(full, np.float32) < 0.9
        elif case.extra == "bias":
            asked["bias"] = draw.standard_normal(full, np.float32).astype(self.dtype)
        elif case.extra == "padding":
            # A few keys only, so that what is measured is the mask's cost and not the work it saves.
            lengths = case.seqlen_k - 3 * np.arange(1, case.batch + 1)
            asked["mask"] = (np.arange(case.seqlen_k) < lengths[:, None])[:, None, None]
        elif case.extra == "alibi":
            asked["alibi_slopes"] = np.exp2(-8.0 * np.arange(1, case.num_heads + 1) / case.num_heads)
        return {word: value for word, value in asked.items() if value is not None and value is not False}

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of the work itself: what the masks leave, nothing for softmax."""
        return fastattn.plan(*self.arrays, **self.keywords).flops

    @cached_property
    def expected(self) -> list[tuple[slice, NDArray[Any]]]:
        """The right result, in float64, for the first, the middle and the last query rows.

        All rows of a long sequence would take the reference minutes, and the tests see to those.
        """
        query, key, value = (x.astype(np.float64) for x in self.arrays)
        rows = []
        for block in sampled_rows(self.case.seqlen_q):
            words = dict(self.keywords)
            for name in {"mask", "bias"} & words.keys():
                if words[name].shape[-2] > 1:
                    words[name] = words[name][..., block, :]
            position = block.start + self.case.seqlen_k - self.case.seqlen_q
            out = reference.attention(query[..., block, :], key, value, query_offset=position, **words)
            rows.append((block, out))
        return rows

    @property
    def tolerance(self) -> float:
        """The largest relative error, in the Frobenius norm, of a result that is right.

        A probability carries a few independent roundings to dtype (of the scaled query, the score and
        itself), the output one more; every sum over n = D or Sk terms adds about √n roundings of the
        accumulator, which for the half types is float32. Standard normal values leave nothing larger
        by cancellation than that. The factor 4 stands for "a few" and for approximate exps.
        """
        half = self.dtype.itemsize == 2
        accumulator = 2.0**-53 if self.dtype == np.float64 else 2.0**-24
        rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[self.dtype.name] if half else accumulator
        return 4.0 * (rounding + accumulator * math.sqrt(self.case.head_dim + self.case.seqlen_k))

    def error(self, out: NDArray[Any]) -> float:
        """Return the relative error of a result (batch, num_heads, seqlen_q, head_dim); NaN if it has any."""
        wrong = right = 0.0
        for block, expected in self.expected:
            wrong += float(np.sum((out[..., block, :].astype(np.float64) - expected) ** 2))
            right += float(np.sum(expected**2))
        return math.sqrt(wrong / right)


def sampled_rows(seqlen_q: int, length: int = 8) -> Iterator[slice]:
    starts = {0, max(0, (seqlen_q - length) // 2), max(0, seqlen_q - length)}
    return (slice(start, min(start + length, seqlen_q)) for start in sorted(starts))


def laid_out(values: NDArray[Any], dtype: np.dtype[Any], layout: str, packed_index: int) -> NDArray[Any]:
    """Return the values (batch, heads, seq, dim) in an array of this dtype and memory layout."""
    batch, heads, seq, dim = values.shape
    if layout == "contiguous":
        view = np.empty((batch, heads, seq, dim), dtype)
    elif layout == "swapaxes":
        view = np.empty((batch, seq, heads, dim), dtype).swapaxes(1, 2)
    elif layout == "packed":
        # What a fused projection to q, k and v leaves behind.
        view = np.empty((batch, seq, 3, heads, dim), dtype)[:, :, packed_index].swapaxes(1, 2)
    elif layout == "reversed":
        view = np.empty((batch, heads, seq, dim), dtype)[..., ::-1, ::-1]
    elif layout == "strided":
        view = np.empty((batch, heads, seq, 2 * dim), dtype)[..., ::2]
    elif layout == "transposed":
        view = np.empty((batch, heads, dim, seq), dtype).swapaxes(-1, -2)
    else:
        raise ValueError(f"unknown layout {layout!r}")
    view[...] = values
    return view
