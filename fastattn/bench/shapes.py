"""The one table of shapes that every benchmark reads, and the arrays made from a row of it."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn import reference
from fastattn._pages import PAGE_SIZE
from fastattn.bench.limits import PathWork, Work, split_effort
from fastattn.cache import KVCache

__all__ = ["CASES", "DTYPES", "FLOATS", "GROUPS", "Case", "Problem", "find_cases", "find_dtype"]

FLOATS = ("float32", "bfloat16", "float16", "float64")
# int8 is what a KVCache may store, under float32 queries.
DTYPES = (*FLOATS, "int8")

# The passes that are timed, by whether they are backward, and the products that each makes of a score.
PRODUCTS = {"forward": [(False, 2)], "backward": [(True, 5)], "both": [(False, 2), (True, 5)]}

# So few query rows a kv head that the time goes into reading keys and values,
FEW_ROWS = 16
# and so many bytes that the measured bandwidth is not mostly the time it takes to wake threads.
MANY_BYTES = 1 << 22


def last_cache_bytes() -> int:
    """Return the size of the last cache, as far as the system tells; 0 where it does not."""
    try:
        return max(0, os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    except (AttributeError, OSError, ValueError):  # the first on Windows
        return 0


# So much that no cache holds what is read again after it.
COLD_BYTES = 2 * max(1 << 28, last_cache_bytes())


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
    extra: str | None = None  # an array beside q, k and v: "mask", "bias", "padding", "alibi", "shift"; "left": padding
    key_factor: float = 1.0  # keys are standard normal times that: large ones give probabilities near 0 and 1
    layout: str = "contiguous"
    # "pages": keys and values are in a cache. "cache": a step of decoding, which appends the last key and then
    # attends to all. "layer": with the projections; "sentences": a whole model, on `batch` sentences.
    # "tensors": of PyTorch; "torch", "jax": an adapter's function; "model": a whole one of transformers, "model-cache":
    # with the adapter's cache.
    through: Literal[
        "attention", "varlen", "pages", "cache", "layer", "sentences", "tensors", "torch", "jax", "model", "model-cache"
    ] = "attention"
    passes: Literal["forward", "backward", "both"] = "forward"  # what is timed of attention and its gradients
    dropout: float = 0.0
    grad_bias: bool = False  # whether the bias has a gradient, too
    cold: bool = False  # keys and values come from memory, as in a decoder, whose layers take turns
    lengths: tuple[int, ...] = field(default=(), repr=False)  # of packed sequences; seqlen_q and seqlen_k are their sum
    dtypes: tuple[str, ...] = FLOATS  # those it is about
    num_threads: int | None = None  # None: as many as the run has
    baseline: Case | None = None  # the case whose time this one's is divided by
    per_flop: bool = False  # whether these are times per flop

    @property
    def shape(self) -> str:
        """The shape as the command line takes it, with the range of the lengths if they differ."""
        if self.through == "sentences":
            return f"{self.batch} sentences"
        sizes: list[Any] = [self.batch, self.num_heads, self.num_kv_heads, self.seqlen_q, self.seqlen_k, self.head_dim]
        if self.lengths:
            lengths = f"{min(self.lengths)}-{max(self.lengths)}"
            sizes[0], sizes[3], sizes[4] = len(self.lengths), lengths, lengths
        return ",".join(map(str, sizes)) + (",causal" if self.causal else "")

    def costs(self, name: str, **changes: Any) -> Case:
        """Return this case with something changed, to be timed against this case."""
        return replace(self, name=name, baseline=self, **changes)

    def training(self) -> tuple[Case, Case]:
        """Return the case with its gradients, and its gradients alone."""
        return replace(self, name=f"{self.name}-both", passes="both"), replace(
            self, name=f"{self.name}-backward", passes="backward"
        )

    def packs(self, name: str, lengths: tuple[int, ...]) -> Case:
        """Return packed sequences of these lengths, to be timed per flop against this batch."""
        total = sum(lengths)
        changes = {"batch": 1, "seqlen_q": total, "seqlen_k": total, "lengths": lengths}
        return self.costs(name, through="varlen", layout="swapaxes", per_flop=True, **changes)


BASE = Case("base", 2, 12, 12, 1024, 1024, 64)

# Swin's windows of 7 × 7 patches.
WINDOWS = Case("windows", 64, 6, 6, 49, 49, 32, extra="bias")

STEP = Case("contiguous-4096", 1, 32, 8, 1, 4096, 128, dtypes=("float32", "bfloat16"))
GROWTH = replace(STEP, name="growth-1024", seqlen_k=1024, through="cache")

# The long one comes last, where threads that share the work badly would wait for it.
MIXED = (*np.random.default_rng(3).integers(8, 257, 1000).tolist(), 4096)
# As many tokens in the same order in memory, so that the two differ in their lengths alone: in sequences of the
# mean length, and, as the long one has a share of the flops that makes the whole more efficient, of the length
# that gives as many flops.
MEAN = round(sum(MIXED) / len(MIXED))
WORK = round(sum(length * (length + 1) for length in MIXED) / sum(MIXED)) - 1
EQUAL_MEAN, EQUAL_WORK = (
    Case(f"equal-{length}", round(sum(MIXED) / length), 12, 12, length, length, 64, causal=True, layout="swapaxes")
    for length in (MEAN, WORK)
)

PAGED_DTYPES = ("float32", "bfloat16", "float16", "int8")
PAGES = Case("paged-gqa", 1, 32, 8, 1, 4096, 128, through="pages", dtypes=PAGED_DTYPES)


GLUE = Case("glue-numpy", 1, 4, 4, 8, 8, 16)
MODEL = Case("model-prefill", 1, 12, 4, 2048, 2048, 64, True, through="model", dtypes=("float32", "bfloat16"))
WINDOWED = replace(MODEL, name="model-window", seqlen_q=8192, seqlen_k=8192, window=(511, None))
GENERATED = replace(MODEL, name="model-decode", seqlen_q=1, seqlen_k=8000)
ENCODER = replace(MODEL, name="model-encoder-128", batch=8, num_kv_heads=12, seqlen_q=128, seqlen_k=128, causal=False)


def cold(case: Case) -> Case:
    """Return the case with keys and values from memory."""
    return replace(case, name=f"cold-{case.name}", cold=True)


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
    "decode": (
        Case("decode-mha", 1, 32, 32, 1, 4096, 128, dtypes=DTYPES),
        Case("decode-gqa", 1, 32, 8, 1, 4096, 128, dtypes=DTYPES),
        Case("decode-batch", 16, 32, 8, 1, 1024, 128, dtypes=DTYPES),
        # Peers copy the keys for each query head: 10 GB in float32, and in float64 as much again.
        Case("decode-batch-long", 16, 32, 8, 1, 4096, 128, dtypes=("float32", "bfloat16", "float16", "int8")),
        Case("speculative-8", 1, 32, 8, 8, 4096, 128, dtypes=DTYPES),
        Case("prefill-64", 1, 32, 8, 64, 4096, 128, causal=True, dtypes=DTYPES),
    ),
    "pages": (
        PAGES,
        replace(PAGES, name="paged-mha", num_kv_heads=32),
        replace(PAGES, name="paged-batch-16", batch=16, seqlen_k=1024),
        replace(PAGES, name="paged-batch-32", batch=32, seqlen_k=256),
        replace(PAGES, name="paged-speculative-8", seqlen_q=8),
        replace(PAGES, name="paged-chunk-64", seqlen_q=64, causal=True),
        replace(PAGES, name="paged-chunk-512", seqlen_q=512, causal=True),
        Case("paged-prefill-128", 8, 12, 12, 128, 128, 64, causal=True, through="pages", dtypes=PAGED_DTYPES),
        replace(PAGES, name="paged-prefill-2048", seqlen_q=2048, seqlen_k=2048, causal=True),
    ),
    "cache": (
        STEP.costs("cache-4096", through="cache"),
        GROWTH,
        *(GROWTH.costs(f"growth-{length}", seqlen_k=length, per_flop=True) for length in (2048, 4096, 8192)),
    ),
    "layer": (
        Case("layer-1024", 1, 12, 12, 1024, 1024, 64, through="layer", dtypes=("float32", "float64")),
        Case("layer-128", 8, 12, 12, 128, 128, 64, through="layer", dtypes=("float32", "float64")),
        Case("layer-197", 4, 12, 12, 197, 197, 64, through="layer", dtypes=("float32", "float64")),
        Case("layer-32", 32, 12, 12, 32, 32, 32, through="layer", dtypes=("float32", "float64")),
        Case("sentences-256", 256, 12, 12, 32, 32, 32, through="sentences", dtypes=("float32",)),
    ),
    "varlen": (EQUAL_MEAN.packs("varlen-mix", MIXED), EQUAL_WORK.packs("varlen-work", MIXED)),
    "cost": (
        Case("full-2048", 1, 12, 12, 2048, 2048, 64).costs("causal", causal=True),
        # The query's own key and the 256 before it: the sliding window of decoders.
        Case("full-8192", 1, 4, 4, 8192, 8192, 64).costs("window", window=(256, 0)),
        BASE.costs("mask", extra="mask"),
        BASE.costs("bias", extra="bias"),
        BASE.costs("padding", extra="padding"),
        BASE.costs("softcap", softcap=30.0),
        BASE.costs("alibi", extra="alibi"),
        # What could be slow by its numbers: most probabilities are tiny, or subnormal.
        BASE.costs("peaky", key_factor=30.0),
        Case("full-2048", 1, 12, 12, 2048, 2048, 64).costs("alibi-2048", extra="alibi"),
        WINDOWS.costs("shifted-window", extra="shift"),
        BASE.costs("swapaxes", layout="swapaxes"),
        BASE.costs("packed", layout="packed"),
        BASE.costs("reversed", layout="reversed"),
        BASE.costs("strided", layout="strided"),
        BASE.costs("transposed", layout="transposed"),
        replace(BASE, name="one-thread", num_threads=1).costs("threads", num_threads=None),
    ),
    "adapters": (
        GLUE,
        *(replace(GLUE, name=f"glue-{through}", through=through) for through in ("tensors", "torch", "jax")),
        Case("jax-1024", 1, 12, 12, 1024, 1024, 64, through="jax"),
        MODEL,
        WINDOWED,
        replace(WINDOWED, name="model-window-padded", batch=2, extra="left"),
        GENERATED,
        replace(GENERATED, name="model-decode-cache", through="model-cache"),
        ENCODER,
        replace(ENCODER, name="model-encoder-32", batch=32, seqlen_q=32, seqlen_k=32),
    ),
    "small": (
        Case("small-512", 1, 12, 12, 512, 512, 64),
        Case("small-causal", 1, 16, 4, 512, 512, 128, causal=True),
        Case("batch-128", 8, 12, 12, 128, 128, 64),
        Case("short-32", 32, 12, 12, 32, 32, 32),
    ),
}

TRAINED = ("encoder-1024", "decoder-2048", "long-8192", "dim-80", "dim-256", "batch-128", "vit-197")
GROUPS["both"], GROUPS["backward"] = zip(
    *(case.training() for case in GROUPS["forward"] if case.name in TRAINED), strict=True
)

BOTH, BACKWARD = BASE.training()
BIAS = replace(BACKWARD, name="backward-bias", extra="bias")
GROUPS["training-cost"] = (
    BASE.costs("dropout", dropout=0.1),
    BOTH.costs("dropout-both", dropout=0.1),
    BACKWARD.costs("dropout-backward", dropout=0.1),
    replace(BIAS, baseline=BACKWARD),
    BIAS.costs("grad-bias", grad_bias=True),
    Case("full-2048-backward", 1, 12, 12, 2048, 2048, 64, passes="backward").costs("causal-backward", causal=True),
    Case("full-8192-backward", 1, 4, 4, 8192, 8192, 64, passes="backward").costs("window-backward", window=(256, 0)),
)

GROUPS["cold"] = tuple(
    cold(case)
    for group, names in {
        "decode": ("decode-mha", "decode-gqa", "decode-batch", "speculative-8", "prefill-64"),
        "pages": ("paged-mha", "paged-gqa", "paged-batch-16", "paged-speculative-8", "paged-chunk-64"),
    }.items()
    for case in GROUPS[group]
    if case.name in names
)

CASES: dict[str, Case] = {case.name: case for cases in GROUPS.values() for case in cases}


def find_cases(words: list[str]) -> list[Case]:
    """Return the cases that the words name, in order and each once.

    Parameters
    ----------
    words : list of str
        Each a shape ``B,H,Hkv,Sq,Sk,D`` with an optional ``,causal`` and an optional ``,backward`` or ``,both``, or
        names of groups and cases, with commas between them.

    Raises
    ------
    ValueError
        If a word is none of these.
    """
    found: dict[Case, None] = {}
    for word in itertools.chain.from_iterable(map(split_names, words)):
        if word in GROUPS:
            found.update(dict.fromkeys(GROUPS[word]))
        elif word in CASES:
            found[CASES[word]] = None
        else:
            found[parse_shape(word)] = None
    return list(found)


def split_names(word: str) -> list[str]:
    is_shape = word[:1].isdigit()
    return [word] if is_shape else word.split(",")


def parse_shape(word: str) -> Case:
    *sizes, causal = word.removesuffix(",both").removesuffix(",backward").split(",")
    if causal != "causal":
        sizes, causal = [*sizes, causal], ""
    passes: Any = next((passes for passes in ("both", "backward") if word.endswith(f",{passes}")), "forward")
    numbers = [int(size) if size.isdecimal() else 0 for size in sizes]
    if len(numbers) != 6 or min(numbers) < 1 or numbers[1] % numbers[2]:
        raise ValueError(
            f"got {word!r}; a shape is B,H,Hkv,Sq,Sk,D[,causal][,backward|,both] with positive sizes and H a multiple "
            f"of Hkv, a group ({', '.join(GROUPS)}) or a name ({', '.join(CASES)})"
        )
    batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim = numbers
    return Case(
        "given" if passes == "forward" else f"given-{passes}",
        batch,
        num_heads,
        num_kv_heads,
        seqlen_q,
        seqlen_k,
        head_dim,
        causal=bool(causal),
        passes=passes,
        # A cache holds more keys than there are queries.
        dtypes=DTYPES if seqlen_q < seqlen_k and passes == "forward" else FLOATS,
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

    @property
    def query_dtype(self) -> np.dtype[Any]:
        """What the queries are in, and the peak is measured at: float32 over int8 keys."""
        return np.dtype(np.float32) if self.dtype == np.int8 else self.dtype

    @cached_property
    def arrays(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """query, key and value, in the case's layout; keys and values as they are before a cache makes them int8."""
        case = self.case
        draw = np.random.default_rng(1)
        heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
        rows = (case.seqlen_q, case.seqlen_k, case.seqlen_k)
        values = [
            draw.standard_normal((case.batch, h, s, case.head_dim), np.float32)
            for h, s in zip(heads, rows, strict=True)
        ]
        values[1] *= np.float32(case.key_factor)
        query, key, value = (laid_out(x, self.query_dtype, case.layout, packed_index=i) for i, x in enumerate(values))
        return query, key, value

    @cached_property
    def layers(self) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Keys and values, as often as it takes that the cache does not hold them until their next turn."""
        _, key, value = self.arrays
        return [(both["key"], both["value"]) for both in self.copies({"key": key, "value": value})]

    def copies(self, arrays: dict[Any, NDArray[Any]]) -> list[dict[Any, NDArray[Any]]]:
        """Return the arrays, and a copy of them for each further layer."""
        further = ({name: array.copy(order="K") for name, array in arrays.items()} for _ in range(self.turns - 1))
        return [arrays, *further]

    @property
    def turns(self) -> int:
        """Layers that take turns: one, whose keys and values stay where they are, unless they are to be cold."""
        return -(-COLD_BYTES // self.kv_bytes) if self.case.cold else 1

    @cached_property
    def caches(self) -> list[tuple[KVCache, list[int]]]:
        """A cache for each layer."""
        return [self.cache, *(self.make_cache() for _ in range(self.turns - 1))]

    @cached_property
    def cache(self) -> tuple[KVCache, list[int]]:
        """The first layer's."""
        return self.make_cache()

    def make_cache(self) -> tuple[KVCache, list[int]]:
        """Return a cache of the keys and values, and the ids of its sequences.

        It fills page by page, so that the pages of a batch alternate, as sequences that grow together leave
        them. A sequence has room for one page more.
        """
        case = self.case
        _, key, value = self.arrays
        num_pages = case.batch * (-(-case.seqlen_k // PAGE_SIZE) + 1)
        cache = KVCache(case.num_kv_heads, case.head_dim, dtype=self.dtype, num_pages=num_pages)
        ids = [cache.add() for _ in range(case.batch)]
        for first in range(0, case.seqlen_k, PAGE_SIZE):
            page = slice(first, first + PAGE_SIZE)
            cache.append(ids, key[:, :, page], value[:, :, page])
        return cache, ids

    @cached_property
    def parts(self) -> list[tuple[slice, slice]]:
        """The rows of query and of key that belong together: those of each packed sequence, or all."""
        if not self.case.lengths:
            return [(slice(0, self.case.seqlen_q), slice(0, self.case.seqlen_k))]
        bounds = itertools.pairwise(itertools.accumulate(self.case.lengths, initial=0))
        return [(slice(*rows), slice(*rows)) for rows in bounds]

    @cached_property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of `fastattn.attention` that this case is about."""
        case = self.case
        draw = np.random.default_rng(2)
        full = (case.batch, 1, case.seqlen_q, case.seqlen_k)
        asked: dict[str, Any] = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
        if case.dropout:
            asked |= {"dropout": case.dropout, "seed": 1}
        if case.extra == "mask":
            # Random, so that no block of it is all True or all False and could be skipped.
            asked["mask"] = draw.random(full, np.float32) < 0.9
        elif case.extra == "bias":
            asked["bias"] = draw.standard_normal(full, np.float32).astype(self.dtype)
        elif case.extra == "padding":
            # A few keys only, so that what is measured is the mask's cost and not the work it saves.
            lengths = case.seqlen_k - 3 * np.arange(1, case.batch + 1)
            asked["mask"] = (np.arange(case.seqlen_k) < lengths[:, None])[:, None, None]
        elif case.extra == "shift":
            # Of windows that are shifted across the edge of the image, half comes from the other side.
            across = (np.arange(case.seqlen_q) < case.seqlen_q // 2)[:, None] != (
                np.arange(case.seqlen_k) < case.seqlen_k // 2
            )
            asked["bias"] = np.full(full, np.where(across, -100.0, 0.0), self.dtype)
        elif case.extra == "alibi":
            asked["alibi_slopes"] = np.exp2(-8.0 * np.arange(1, case.num_heads + 1) / case.num_heads)
        return {word: value for word, value in asked.items() if value is not None and value is not False}

    @cached_property
    def for_peers(self) -> tuple[bool, NDArray[Any] | None]:
        """Whether to ask a peer for its causal, and the mask or bias to give it.

        Their causal begins at the top left, which is not ours where there are more keys than queries: there
        it is a mask, except that a single query sees every key.
        """
        case = self.case
        if case.causal and case.seqlen_q != case.seqlen_k:
            mask = np.tri(case.seqlen_q, case.seqlen_k, case.seqlen_k - case.seqlen_q, dtype=bool)[None, None]
            return False, None if mask.all() else mask
        return case.causal, self.keywords.get("mask", self.keywords.get("bias"))

    @cached_property
    def attention_paths(self) -> dict[str, PathWork]:
        """What attention computes, by the paths that it takes: what the masks leave."""
        query, key, value = self.arrays
        paths: dict[str, PathWork] = {}
        for rows, keys in self.parts:
            part = query[..., rows, :], key[..., keys, :], value[..., keys, :]
            for backward, products in PRODUCTS[self.case.passes]:
                plan = fastattn.plan(*part, **self.keywords, backward=backward)
                flops, scores, _ = paths.get(plan.path, PathWork(0, 0))
                effort = split_effort(query.dtype.name, key.dtype.name) if plan.path == "split" else 1.0
                visible = plan.flops // (2 * products * self.case.head_dim)
                paths[plan.path] = PathWork(flops + plan.flops, scores + visible, effort)
        return paths

    @cached_property
    def work(self) -> Work:
        """What is computed and moved."""
        rows = 2 * self.arrays[0].nbytes
        return Work(self.attention_paths, rows + self.kv_bytes, footprint=rows + self.turns * self.kv_bytes)

    @property
    def flops(self) -> int:
        """Floating-point operations of the work itself, with nothing for the softmax."""
        return self.work.flops

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, with the scales of int8: a float32 for each row."""
        case = self.case
        row = case.head_dim * self.dtype.itemsize + (4 if self.dtype == np.int8 else 0)
        return 2 * case.batch * case.num_kv_heads * case.seqlen_k * row

    @property
    def is_read_bound(self) -> bool:
        """Whether the read bandwidth, and not only the peak, says how fast it can be."""
        case = self.case
        rows = case.seqlen_q * case.num_heads // case.num_kv_heads
        return not case.lengths and rows <= FEW_ROWS and self.kv_bytes >= MANY_BYTES

    @cached_property
    def expected(self) -> list[tuple[slice, NDArray[Any]]]:
        """The right result, in float64, for the first, the middle and the last query rows.

        All rows of a long sequence would take the reference minutes, as would all of a thousand sequences,
        and the tests see to those.
        """
        query, (key, value) = self.arrays[0], self.stored
        found = []
        for rows, keys in sampled_parts(self.parts):
            for block in sampled_rows(rows):
                words = dict(self.keywords)
                for name in {"mask", "bias"} & words.keys():
                    if words[name].shape[-2] > 1:
                        words[name] = words[name][..., block, :]
                position = block.start - rows.stop + keys.stop - keys.start
                asked = query[..., block, :].astype(np.float64)  # the result is in its dtype
                out = reference.attention(asked, key[..., keys, :], value[..., keys, :], query_offset=position, **words)
                found.append((block, out))
        return found

    @property
    def stored(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """key and value as they are read: what a cache of int8 kept of them."""
        if self.dtype != np.int8:
            return self.arrays[1:]
        cache, ids = self.cache
        keys, values = zip(*map(cache.get, ids), strict=True)
        return np.stack(keys), np.stack(values)

    @property
    def tolerance(self) -> float:
        """The largest relative error, in the Frobenius norm, of a result that is right.

        A probability carries a few independent roundings to dtype (of the scaled query, the score and
        itself), the output one more; every sum over n = D or Sk terms adds about √n roundings of the
        accumulator, which for the half types is float32. Standard normal values leave nothing larger
        by cancellation than that. Scores of larger keys have larger roundings. The factor 4 stands for "a few"
        and for approximate exps.
        """
        half = self.dtype.itemsize == 2
        accumulator = 2.0**-53 if self.dtype == np.float64 else 2.0**-24
        rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[self.dtype.name] if half else accumulator
        seqlen_k = max(self.case.lengths, default=self.case.seqlen_k)
        scores = self.case.key_factor * math.sqrt(self.case.head_dim)
        return 4.0 * (rounding + accumulator * (scores + math.sqrt(self.case.head_dim + seqlen_k)))

    def error(self, out: NDArray[Any]) -> float:
        """Return the relative error of a result (batch, num_heads, seqlen_q, head_dim); NaN if it has any."""
        wrong = right = 0.0
        for block, expected in self.expected:
            wrong += float(np.sum((out[..., block, :].astype(np.float64) - expected) ** 2))
            right += float(np.sum(expected**2))
        return math.sqrt(wrong / right)


def sampled_parts(parts: list[tuple[slice, slice]], number: int = 16) -> list[tuple[slice, slice]]:
    """Return every so-many-th part, and the last."""
    return [*parts[: -1 : max(1, len(parts) // number)], parts[-1]]


def sampled_rows(rows: slice, length: int = 8) -> Iterator[slice]:
    last = max(rows.start, rows.stop - length)
    starts = {rows.start, (rows.start + last) // 2, last}
    return (slice(start, min(start + length, rows.stop)) for start in sorted(starts))


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
