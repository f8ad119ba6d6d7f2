"""A paged, ragged cache of keys and values for decoding. The kernel reads pages in place."""

from __future__ import annotations

import operator
import os
import threading
import weakref
from typing import Any, Literal, NamedTuple, Never, NoReturn, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastattn import _core
from fastattn._arguments import misfit
from fastattn._cache_file import File, archive_name, check_saved, check_saved_pages, read_fields
from fastattn._checks import (
    Array,
    SequenceIds,
    as_array,
    as_integer,
    check_floats,
    check_shape,
    checked_ids,
    checked_integer,
    refuse_masked,
)
from fastattn._files import atomic_write
from fastattn._fork import after_fork_in_child
from fastattn._keywords import CacheKeywords, Window, takes
from fastattn._pages import (
    MAX_HEAD_DIM,
    PAGE_SIZE,
    bytes_of,
    checked_dtype,
    checked_page_size,
    new_store,
    page_layout,
    part_views,
    quantized,
    store_bytes,
)

__all__ = ["KVCache"]

Integers = NDArray[np.int64]


class Geometry(TypedDict):
    """Keywords of `KVCache` that say what a page is."""

    head_dim_v: int
    dtype: str
    page_size: int


class Entry(NamedTuple):
    """One sequence: how many tokens it has, and the pages they lie in, at the front of an array that may be longer.

    A change makes a new entry, so that what a sequence holds changes at once.
    """

    length: int
    pages: Integers


def with_pages(pages: Integers, first: int, more: list[int]) -> Integers:
    """Return an array that has more pages from the first-th on: the same one, if they fit."""
    end = first + len(more)
    if end > pages.size:
        # Doubled, so that token after token costs constant time each.
        grown = np.zeros(max(end, 2 * pages.size), np.int64)
        grown[:first] = pages[:first]
        pages = grown
    pages[first:end] = more
    return pages


# --- fork -----------------------------------------------------------------------------------------

# Those that there are: a fork leaves the child the locks of threads that it does not have.
caches: weakref.WeakSet[KVCache] = weakref.WeakSet()


def renew_locks() -> None:
    for cache in caches:
        cache._renew_lock()


after_fork_in_child(renew_locks)


# --- the cache ------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of many sequences of different lengths, in pages, for token-by-token decoding.

    A sequence takes a page when it needs one, so memory follows the tokens that are there, and nothing
    is ever moved. Sequences may share the pages of a common prefix (`fork`). `attention` reads the pages
    in place.

    Parameters
    ----------
    num_kv_heads : int
        At least 1.
    head_dim : int
        From 1 to 512.
    head_dim_v : int, optional
        Likewise; default `head_dim`.
    dtype : dtype_like
        What is stored: float32, float16, bfloat16 (of ml_dtypes) or int8. int8 has a float32 scale for
        each token and head, ``max(abs(x)) / 127``.
    page_size : int
        Tokens in a page: a multiple of 64. Default 256, which the kernel takes at a time for a few queries; pages
        of 64 waste less on short sequences, but from the last-level cache a step of decoding took a tenth
        (bfloat16) to a quarter (float32) longer with them.
    num_pages : int, optional
        How many pages to allocate. Exactly one of `num_pages` and `store` must be given.
    store : ndarray, optional
        Memory to use instead: writable and C-contiguous, of any dtype and shape. As many pages as fit
        are cut from its bytes. A page that is not in use is not touched, so a ``np.memmap`` may be
        larger than memory.

    Attributes
    ----------
    num_kv_heads, head_dim, head_dim_v, dtype, page_size, num_pages
        As above.
    key_pages : ndarray, shape (num_pages, num_kv_heads, page_size, head_dim)
        The keys of all pages, in `dtype`; a view of the store.
    value_pages : ndarray, shape (num_pages, num_kv_heads, page_size, head_dim_v)
    key_scales, value_scales : ndarray, shape (num_pages, num_kv_heads, page_size), or None
        float32; None unless `dtype` is int8.

    Raises
    ------
    TypeError, ValueError
        A dtype, a size or a store that is not accepted.
    MemoryError
        No memory for `num_pages`.

    See Also
    --------
    attention : Of arrays.
    MultiHeadAttention : The layer, which appends to a cache and attends to it.

    Notes
    -----
    A page holds keys, values and, for int8, the scales of keys and values, packed in this order, each in
    the order (heads, tokens, head_dim) and a multiple of 64 bytes long.

    Threads: readers (`attention`, `get`, `fork`, `lengths`, ...) may run at the same time. `append`,
    `truncate` and `free` must have the sequences they touch to themselves; other sequences, even those
    that share pages with them, may be read and changed meanwhile by other threads. `save` reads all.

    Whatever is raised on the way, KeyboardInterrupt too, a change is made as a whole or not at all. So it is
    in the child of a fork, for a change that another thread was about to make; a store that both share, as
    a ``np.memmap`` is, must then be left to one of them.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn.cache import KVCache
    >>> rng = np.random.default_rng(0)
    >>> cache = KVCache(num_kv_heads=2, head_dim=64, num_pages=10)
    >>> prompt = cache.add(*rng.standard_normal((2, 2, 100, 64), dtype=np.float32))
    >>> answers = [prompt, cache.fork(prompt)]
    >>> cache.append(answers, *rng.standard_normal((2, 2, 2, 1, 64), dtype=np.float32))
    >>> query = rng.standard_normal((2, 8, 1, 64), dtype=np.float32)
    >>> cache.attention(query, answers).shape
    (2, 8, 1, 64)
    >>> cache.lengths
    {0: 101, 1: 101}
    >>> cache
    KVCache(num_kv_heads=2, head_dim=64, dtype=float32, page_size=256): 2 sequences, 202 tokens, 8 of 10 pages free
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: DTypeLike = np.float32,
        page_size: int = PAGE_SIZE,
        num_pages: int | None = None,
        store: Array | None = None,
    ) -> None:
        if (num_pages is None) == (store is None):
            raise ValueError("exactly one of num_pages and store must be given")
        self._page_bytes = self.bytes_per_page(
            num_kv_heads, head_dim, head_dim_v=head_dim_v, dtype=dtype, page_size=page_size
        )
        self.num_kv_heads: int = operator.index(num_kv_heads)
        self.head_dim: int = operator.index(head_dim)
        self.head_dim_v: int = self.head_dim if head_dim_v is None else operator.index(head_dim_v)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.page_size: int = operator.index(page_size)
        self._set_pages(num_pages, store)

        self._lock = threading.RLock()
        self._sequences: dict[int, Entry] = {}
        self._next_id = 0
        self._references = np.zeros(self.num_pages, np.int64)
        # Pages that were given back; those from _first_unused on were never in use. No list of all pages: a
        # store may have many millions.
        self._returned: list[int] = []
        self._first_unused = 0
        caches.add(self)

    def _set_pages(self, num_pages: int | None, store: Array | None) -> None:
        parts = page_layout(self.num_kv_heads, self.head_dim, self.head_dim_v, self.dtype, self.page_size)
        if store is None:
            memory = new_store(checked_integer("num_pages", num_pages, 1) * self._page_bytes)
        else:
            memory = store_bytes(store, max(dtype.itemsize for dtype, _ in parts))
            if memory.size < self._page_bytes:
                raise ValueError(f"store has {memory.size} bytes; one page has {self._page_bytes}")
        self.num_pages: int = memory.size // self._page_bytes
        self._pages = memory[: self.num_pages * self._page_bytes].reshape(self.num_pages, self._page_bytes)
        self._parts = part_views(self._pages, parts)
        self.key_pages: Array
        self.value_pages: Array
        self.key_pages, self.value_pages = self._parts[:2]
        self.key_scales: Array | None
        self.value_scales: Array | None
        self.key_scales, self.value_scales = self._parts[2:] or (None, None)

    @staticmethod
    def bytes_per_page(
        num_kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: DTypeLike = np.float32,
        page_size: int = PAGE_SIZE,
    ) -> int:
        """Return the bytes of a page, before there is a cache: for the size of a store.

        Parameters
        ----------
        num_kv_heads, head_dim, head_dim_v, dtype, page_size
            As for `KVCache`.

        Returns
        -------
        int
            A multiple of 64.

        Raises
        ------
        TypeError, ValueError
            As `KVCache` would.

        Examples
        --------
        >>> KVCache.bytes_per_page(8, 128, dtype="float16") == 2 * 8 * 256 * 128 * 2
        True
        """
        heads = checked_integer("num_kv_heads", num_kv_heads, 1)
        dim = checked_integer("head_dim", head_dim, 1, MAX_HEAD_DIM)
        dim_v = dim if head_dim_v is None else checked_integer("head_dim_v", head_dim_v, 1, MAX_HEAD_DIM)
        parts = page_layout(heads, dim, dim_v, checked_dtype(dtype), checked_page_size(page_size))
        return sum(bytes_of(*part) for part in parts)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a KVCache can be neither copied nor pickled: use save and load")

    # What it is.

    @property
    def page_bytes(self) -> int:
        """Bytes of a page; a multiple of 64."""
        return self._page_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, in use or not."""
        return self.num_pages * self._page_bytes

    @property
    def pages_free(self) -> int:
        """How many pages no sequence uses."""
        with self._lock:
            return self.num_pages - self._first_unused + len(self._returned)

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens of each sequence, by id; a copy."""
        # Copied at once: no need to wait for a thread that writes tokens.
        return {sequence: entry.length for sequence, entry in self._sequences.copy().items()}

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self._sequences)

    def __contains__(self, sequence: object) -> bool:
        """Return whether there is a sequence of this id."""
        return sequence in self._sequences

    def __repr__(self) -> str:
        head_dim_v = f", head_dim_v={self.head_dim_v}" if self.head_dim_v != self.head_dim else ""
        lengths = self.lengths
        return (
            f"KVCache(num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}{head_dim_v}, dtype={self.dtype.name}, "
            f"page_size={self.page_size}): {len(lengths)} sequences, {sum(lengths.values())} tokens, "
            f"{self.pages_free} of {self.num_pages} pages free"
        )

    # Sequences.

    def add(self, key: ArrayLike | None = None, value: ArrayLike | None = None) -> int:
        """Begin a sequence.

        Parameters
        ----------
        key : array_like, shape (num_kv_heads, tokens, head_dim), optional
        value : array_like, shape (num_kv_heads, tokens, head_dim_v), optional
            Its first tokens, as for `append`; default none.

        Returns
        -------
        int
            The id of the sequence. No other sequence of this cache ever has it.

        Raises
        ------
        TypeError, ValueError, MemoryError
            As for `append`; there is then no new sequence.
        """
        if (key is None) != (value is None):
            missing = "value" if value is None else "key"
            raise ValueError(f"key and value must be given together, but {missing} is None")
        stored = None if key is None or value is None else self._stored(key, value, ())
        empty = Entry(0, np.zeros(1, np.int64))
        with self._lock:
            sequence = self._next_id
            if stored is None:
                self._commit({sequence: empty})
            else:
                self._grow({sequence: empty}, stored)
        return sequence

    def append(self, sequences: int | SequenceIds, key: ArrayLike, value: ArrayLike) -> None:
        """Add tokens at the end of one sequence, or as many at the end of each of several.

        Either all of the sequences get their tokens, or nothing changes.

        Parameters
        ----------
        sequences : int, or list or 1-D array of ints
            One id, or several that are all different.
        key : array_like, shape (num_kv_heads, tokens, head_dim)
            For several sequences (len(sequences), num_kv_heads, tokens, head_dim). Of any real float dtype
            and strides. It is converted to the cache's dtype, by NumPy's rules. int8 is ``rint(x / scale)``
            with ``scale = max(abs(x)) / 127`` for each token and head.
        value : array_like, shape (num_kv_heads, tokens, head_dim_v)
            As `key`.

        Raises
        ------
        KeyError
            No sequence of that id.
        TypeError
            A dtype or kind that is not accepted.
        ValueError
            A shape that is not accepted, an id twice, or NaN or infinity where the cache is int8.
        MemoryError
            Too few pages are free, or no memory for the conversion.
        """
        ids, single = checked_ids(sequences)
        entries = self._find(ids)
        if len(set(ids)) < len(ids):
            repeated = sorted({sequence for sequence in ids if ids.count(sequence) > 1})
            raise ValueError(f"sequences must all be different, but {repeated} are there more than once")
        stored = self._stored(key, value, () if single else (len(ids),))
        self._grow(dict(zip(ids, entries, strict=True)), stored)

    def fork(self, sequence: int, length: int | None = None) -> int:
        """Begin a sequence with the first tokens of another, in the same pages.

        A page that sequences share is copied when one of them appends to it.

        Parameters
        ----------
        sequence : int
            The id of the other.
        length : int, optional
            How many tokens; default all.

        Returns
        -------
        int
            The id of the new sequence.

        Raises
        ------
        KeyError
            No sequence of that id.
        TypeError, ValueError
            Not a length, or more than there is.
        """
        entry = self._find_one(sequence)
        kept = entry.length if length is None else checked_integer("length", length, 0, entry.length)
        pages = entry.pages[: self._pages_for(kept)].copy()
        with self._lock:
            new = self._next_id
            self._commit({new: Entry(kept, pages)}, gained=pages)
        return new

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens of a sequence from the length-th on.

        Parameters
        ----------
        sequence : int
            Its id.
        length : int
            From 0 to its length.

        Raises
        ------
        KeyError
            No sequence of that id.
        TypeError, ValueError
            Not a length, or more than there is.
        """
        entry = self._find_one(sequence)
        kept = checked_integer("length", length, 0, entry.length)
        dropped = entry.pages[self._pages_for(kept) : self._pages_for(entry.length)]
        with self._lock:
            self._commit({operator.index(sequence): Entry(kept, entry.pages)}, dropped=dropped)

    def free(self, sequence: int) -> None:
        """End a sequence. Pages that it does not share become free.

        Parameters
        ----------
        sequence : int
            Its id.

        Raises
        ------
        KeyError
            No sequence of that id.
        """
        with self._lock:
            entry = self._find_one(sequence)
            dropped = entry.pages[: self._pages_for(entry.length)]
            self._commit({}, dropped=dropped, ended=operator.index(sequence))

    def get(self, sequence: int) -> tuple[Array, Array]:
        """Return copies of a sequence's keys and values.

        Parameters
        ----------
        sequence : int
            Its id.

        Returns
        -------
        key : ndarray, shape (num_kv_heads, length, head_dim)
        value : ndarray, shape (num_kv_heads, length, head_dim_v)
            In the cache's dtype. Of an int8 cache ``q * scale`` in float32.

        Raises
        ------
        KeyError
            No sequence of that id.
        """
        entry = self._find_one(sequence)
        key, value, *scales = (self._gathered(part, entry) for part in self._parts)
        if scales:
            key, value = key * scales[0][..., None], value * scales[1][..., None]
        return key, value

    @overload
    def attention(
        self,
        query: ArrayLike,
        sequences: int | SequenceIds,
        *,
        return_lse: Literal[False] = False,
        return_weights: Literal[False] = False,
        **scores: Unpack[CacheKeywords],
    ) -> Array: ...
    @overload
    def attention(
        self,
        query: ArrayLike,
        sequences: int | SequenceIds,
        *,
        return_lse: Literal[True],
        return_weights: Literal[False] = False,
        **scores: Unpack[CacheKeywords],
    ) -> tuple[Array, Array]: ...
    @overload
    def attention(
        self,
        query: ArrayLike,
        sequences: int | SequenceIds,
        *,
        return_lse: Literal[False] = False,
        return_weights: Literal[True],
        **scores: Unpack[CacheKeywords],
    ) -> tuple[Array, Array]: ...
    @overload
    def attention(
        self,
        query: ArrayLike,
        sequences: int | SequenceIds,
        *,
        return_lse: Literal[True],
        return_weights: Literal[True],
        **scores: Unpack[CacheKeywords],
    ) -> tuple[Array, Array, Array]: ...
    @overload
    def attention(
        self,
        query: ArrayLike,
        sequences: int | SequenceIds,
        *,
        return_lse: bool = False,
        return_weights: bool = False,
        **scores: Unpack[CacheKeywords],
    ) -> Array | tuple[Array, Array] | tuple[Array, Array, Array]: ...
    @takes()
    def attention(
        self,
        query: ArrayLike,
        sequences: int | SequenceIds,
        *others: Never,
        cu_seqlens_q: ArrayLike | None = None,
        scale: float | None = None,
        causal: bool = True,
        query_offset: ArrayLike | None = None,
        window: Window | None = None,
        alibi_slopes: ArrayLike | None = None,
        softcap: float | None = None,
        sinks: ArrayLike | None = None,
        out: Array | None = None,
        unrounded: bool = False,
        return_lse: bool = False,
        return_weights: bool = False,
        num_threads: int | None = None,
        **unknown: Never,
    ) -> Any:
        """Attention of queries to the keys and values of their sequences, as `fastattn.attention` would give.

        Parameters
        ----------
        query : array_like
            Of shape (H, Sq, head_dim) for one sequence, (len(sequences), H, Sq, head_dim) for several, or
            (total, H, head_dim) with `cu_seqlens_q`. float32, or the dtype of the cache; for int8 float32,
            float16 or bfloat16. ``H`` must be a multiple of `num_kv_heads`.
        sequences : int, or list or 1-D array of ints
            One id, or one for each batch item; an id may be there more than once.
        cu_seqlens_q : array_like of int, shape (len(sequences) + 1,), optional
            The queries of sequence ``b`` are rows ``cu_seqlens_q[b]`` up to ``cu_seqlens_q[b + 1]``.
        scale : float, optional
            Default ``1 / sqrt(head_dim)``.
        causal : bool
            Whether a query sees no key after its own position.
        query_offset : int or array_like of int, optional
            Position of query row 0, or one for each sequence. Default ``length - Sq``: the queries are the
            last tokens of their sequence.
        **scores
            As for `fastattn.attention`.
        out : ndarray, optional
            Where to store the result: in query's shape, but for `head_dim_v` columns, and in its dtype, or float32
            where that is half.
        unrounded : bool
            Whether the result for a float16 or bfloat16 query stays in float32.
        return_lse : bool
            Whether to return the log-sum-exp of each row's scores, too.
        return_weights : bool
            Whether to return the attention weights, too. Not with `cu_seqlens_q`.

        Returns
        -------
        out : ndarray
            In query's shape, but for `head_dim_v` columns, and in its dtype.
        lse : ndarray
            In query's shape, but for its last axis, in float32. Returned with ``return_lse``.
        weights : ndarray
            In query's shape, but for as many columns as the longest of the sequences has tokens, and in its
            dtype; 0 beyond a sequence's own. Returned with ``return_weights``.

        Raises
        ------
        KeyError
            No sequence of that id.
        TypeError, ValueError, MemoryError
            As for `fastattn.attention`.
        """
        if others or unknown:
            raise misfit(KVCache.attention, others, unknown)
        ids, single = checked_ids(sequences)
        page_table, lengths = self._table(self._find(ids))
        batch_query, batch_out = (query, out) if not single else self._with_batch_axis(query, cu_seqlens_q, out)
        scores = (scale, causal, query_offset, window, alibi_slopes, softcap, sinks, num_threads)
        results = _core.attention_paged(
            batch_query, cu_seqlens_q, self.key_pages, self.value_pages, self.key_scales, self.value_scales,
            page_table, lengths, scores, batch_out, unrounded, return_lse, return_weights,
        )  # fmt: skip
        if not single:
            return results
        result, *extras = results if isinstance(results, tuple) else (results,)
        result = result[0] if out is None else out
        return (result, *(extra[0] for extra in extras)) if extras else result

    def save(self, file: File, *, pages: bool = True) -> None:
        """Write the cache to a file, from which `load` makes it anew.

        Parameters
        ----------
        file : str, path or binary file
            A name that does not end with .npz has it added, unless it is that of a FIFO or a device. A file that
            exists is replaced once the new one is complete, and its mode is kept; links are followed.
        pages : bool
            Whether to write the pages in use, each once. They are gathered in memory first. Without them
            `load` must be given the store itself; flush it, if it is a ``np.memmap``.

        Raises
        ------
        OSError
            The file cannot be written.
        MemoryError
            No memory to gather the pages.
        """
        with self._lock:
            fields = self._fields()
            if pages:
                used, fields["page_table"] = np.unique(fields["page_table"], return_inverse=True)
                fields["pages"] = self._pages[used]
        if isinstance(file, (str, os.PathLike)):
            with atomic_write(archive_name(file)) as stream:
                np.savez(stream, **fields)
        else:
            np.savez(file, **fields)

    @classmethod
    def load(cls, file: File, *, store: Array | None = None, num_pages: int | None = None) -> KVCache:
        """Return the cache that `save` wrote: the same ids, lengths, contents and shared pages.

        Parameters
        ----------
        file : str, path or binary file
            As for `save`. A file must be one that can seek.
        store : ndarray, optional
            As for `KVCache`. With pages in the file they are written to it; else it must hold them already,
            where they were.
        num_pages : int, optional
            How many pages to allocate, if the file has pages and there is no store; default as many as the
            saved cache had.

        Returns
        -------
        KVCache

        Raises
        ------
        OSError
            The file cannot be read.
        ValueError
            Not a file of `save`, a damaged one, or not one that goes with the store or with `num_pages`.
        TypeError
            As for the class; and of bfloat16, if ml_dtypes has not been imported.
        MemoryError
            No memory for the pages: with `num_pages` there are as many as are needed.
        """
        fields = read_fields(file)
        if "pages" not in fields and store is None:
            raise ValueError("the file was saved with pages=False: store must be given, and hold the pages")
        heads, head_dim, head_dim_v, page_size, pages_then = fields["geometry"].tolist()
        geometry: Geometry = {"head_dim_v": head_dim_v, "dtype": str(fields["dtype"]), "page_size": page_size}
        if "pages" in fields:
            check_saved_pages(fields["pages"], cls.bytes_per_page(heads, head_dim, **geometry))
        if store is None and num_pages is None:
            num_pages = pages_then
        cache = cls(heads, head_dim, **geometry, num_pages=num_pages, store=store)
        cache._restore(fields)
        return cache

    # Behind them.

    def _find(self, ids: list[int]) -> list[Entry]:
        try:
            return [self._sequences[sequence] for sequence in ids]
        except KeyError as missing:
            existing = sorted(self.lengths)
            listed = ", ".join(map(str, existing[:20])) + (", ..." if len(existing) > 20 else "")
            raise KeyError(f"there is no sequence {missing.args[0]}; there are [{listed}]") from None

    def _find_one(self, sequence: int) -> Entry:
        return self._find([as_integer("sequence", sequence)])[0]

    def _stored(self, key: ArrayLike, value: ArrayLike, batch: tuple[int, ...]) -> list[Array]:
        """Return key and value as they will be stored: (sequences, heads, tokens, ...) for each part of a page."""
        keys, values = as_array("key", key), as_array("value", value)
        as_they_are = self.key_scales is None and keys.dtype == values.dtype == self.dtype
        if not as_they_are:
            check_floats("key", keys)
            check_floats("value", values)
        check_shape("key", keys, (*batch, self.num_kv_heads, "tokens", self.head_dim))
        check_shape("value", values, (*keys.shape[:-1], self.head_dim_v))
        if not batch:
            keys, values = keys[None], values[None]
        if as_they_are:
            return [keys, values]
        if self.key_scales is None:
            return [keys.astype(self.dtype, copy=False), values.astype(self.dtype, copy=False)]
        (keys, key_scales), (values, value_scales) = quantized("key", keys), quantized("value", values)
        return [keys, values, key_scales, value_scales]

    # Changes. What the sequences say is the truth, and changes last, by one call. Until then pages are only counted,
    # and tokens written where nobody looks yet; if anything is raised, Ctrl-C too, pages are counted anew.

    def _grow(self, entries: dict[int, Entry], stored: list[Array]) -> None:
        """Add stored tokens to the sequences: to all or, if anything is raised, to none."""
        count = stored[0].shape[2]
        with self._lock:
            copied = self._to_copy(entries) if count else set()
            self._check_free(list(entries.values()), count, len(copied))
            try:
                grown: dict[int, Entry] = {}
                # No comprehension: Python 3.13.0 lets what interrupts one pass by this handler.
                for sequence, entry in entries.items():
                    grown[sequence] = self._lengthened(entry, count, sequence in copied)
                self._write(list(grown.values()), stored)
                self._commit(grown)
            except BaseException:
                self._count_pages()
                raise

    def _commit(
        self,
        entries: dict[int, Entry],
        *,
        gained: Integers | None = None,
        dropped: Integers | None = None,
        ended: int | None = None,
    ) -> None:
        """Make these the entries of their sequences, and end one; the caller has the lock.

        One reference more is counted to each page that is gained, and one less to each that is dropped.
        """
        try:
            if gained is not None:
                self._references[gained] += 1
            if dropped is not None and len(dropped):
                self._references[dropped] -= 1
                self._returned.extend(dropped[self._references[dropped] == 0].tolist())
            # Before there is a sequence of that id, so that no other can ever get it.
            self._next_id = max(self._next_id, max(entries, default=-1) + 1)
            if ended is None:
                self._sequences.update(entries)
            else:
                del self._sequences[ended]
        except BaseException:
            self._count_pages()
            raise

    def _count_pages(self) -> None:
        """Make references and returned pages what the sequences say."""
        entries = self._sequences.values()
        used = [entry.pages[: self._pages_for(entry.length)] for entry in entries]
        self._references = np.bincount(np.concatenate([np.zeros(0, np.int64), *used]), minlength=self.num_pages)
        self._returned = np.flatnonzero(self._references[: self._first_unused] == 0).tolist()

    def _renew_lock(self) -> None:
        """In a child of fork: undo what a thread was about that is not there any more, and had the lock."""
        if self._lock.acquire(blocking=False):  # free, or of the thread that forked, which goes on with its change
            self._lock.release()
        else:
            self._lock = threading.RLock()
            self._count_pages()

    def _check_free(self, entries: list[Entry], count: int, num_copied: int) -> None:
        needed = num_copied
        for entry in entries:
            needed += self._pages_for(entry.length + count) - self._pages_for(entry.length)
        if needed and needed > self.pages_free:
            raise MemoryError(
                f"{needed} pages are needed for {count} tokens in each of {len(entries)} sequences, but only "
                f"{self.pages_free} of {self.num_pages} are free"
            )

    def _to_copy(self, entries: dict[int, Entry]) -> set[int]:
        """Return the sequences that must copy their last page before they append to it.

        Of several that alone share a page, the last may keep it.
        """
        copied = set()
        sharers: dict[int, int] = {}
        for sequence, entry in entries.items():
            if entry.length % self.page_size:
                page = entry.pages.item(entry.length // self.page_size)
                count = sharers.setdefault(page, self._references.item(page))
                if count > 1:
                    copied.add(sequence)
                    sharers[page] -= 1
        return copied

    def _lengthened(self, entry: Entry, count: int, copies: bool) -> Entry:
        """Return the sequence with more tokens, not yet written, in pages that are its own from where it ended."""
        length = entry.length + count
        kept = entry.length // self.page_size if copies else self._pages_for(entry.length)
        lacking = self._pages_for(length) - kept
        if lacking == 0:  # as for most tokens
            return Entry(length, entry.pages)
        taken = self._take(lacking)
        if not copies:
            return Entry(length, with_pages(entry.pages, kept, taken))
        shared = entry.pages[kept]
        self._pages[taken[0]] = self._pages[shared]
        self._references[shared] -= 1
        return Entry(length, with_pages(entry.pages.copy(), kept, taken))

    def _write(self, entries: list[Entry], stored: list[Array]) -> None:
        """Write the last tokens of the sequences."""
        added = stored[0].shape[2]
        for index, entry in enumerate(entries):
            first, done = entry.length - added, 0
            while done < added:
                # Plain slices, a page at a time: what a step does beside attention finds no cache warm.
                page, slot = divmod(first + done, self.page_size)
                count = min(self.page_size - slot, added - done)
                where = (entry.pages.item(page), slice(None), slice(slot, slot + count))
                for part, tokens in zip(self._parts, stored, strict=True):
                    part[where] = tokens[index, :, done : done + count]
                done += count

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _take(self, count: int) -> list[int]:
        """Return free pages, now with one reference each; the caller has the lock and knows that there are so many."""
        again = min(count, len(self._returned))
        fresh = range(self._first_unused, self._first_unused + count - again)
        pages = [*(self._returned.pop() for _ in range(again)), *fresh]
        self._first_unused = fresh.stop
        self._references[pages] = 1
        return pages

    def _gathered(self, part: Array, entry: Entry) -> Array:
        """Return a sequence's rows of a part, (heads, length, ...)."""
        gathered = np.empty((self.num_kv_heads, entry.length, *part.shape[3:]), part.dtype)
        for index, page in enumerate(entry.pages[: self._pages_for(entry.length)]):
            rows = gathered[:, index * self.page_size : (index + 1) * self.page_size]
            rows[...] = part[page, :, : rows.shape[1]]
        return gathered

    def _table(self, entries: list[Entry]) -> tuple[Integers, Integers]:
        """Return the pages of each sequence, padded with 0, and the lengths."""
        lengths = np.array([entry.length for entry in entries], np.int64)
        counts = [self._pages_for(entry.length) for entry in entries]
        table = np.zeros((len(entries), max(counts, default=0)), np.int64)
        for row, entry, count in zip(table, entries, counts, strict=True):
            row[:count] = entry.pages[:count]
        return table, lengths

    def _with_batch_axis(
        self, query: ArrayLike, cu_seqlens_q: ArrayLike | None, out: Array | None
    ) -> tuple[Array, Array | None]:
        if cu_seqlens_q is not None:
            raise ValueError("cu_seqlens_q needs a list of sequences, not a single id")
        array = as_array("query", query)
        if array.ndim != 3 or array.shape[-1] != self.head_dim:
            raise ValueError(f"query has shape {array.shape}; accepted for one sequence is (heads, tokens, "
                             f"{self.head_dim})")  # fmt: skip
        batch_query: Any = array[None] if not _core.is_tensor(query) else query[None]  # type: ignore[call-overload, index]
        if not (isinstance(out, np.ndarray) or _core.is_tensor(out)):
            return batch_query, out
        refuse_masked("out", out)
        check_shape("out", as_array("out", out), (*array.shape[:-1], self.head_dim_v))
        batch_out: Array = out[None]  # type: ignore[index]
        return batch_query, batch_out

    def _fields(self) -> dict[str, Any]:
        """Return all but the pages, as arrays; the caller has the lock."""
        entries = self._sequences.values()
        used = [entry.pages[: self._pages_for(entry.length)] for entry in entries]
        geometry = (self.num_kv_heads, self.head_dim, self.head_dim_v, self.page_size, self.num_pages)
        return {
            "geometry": np.array(geometry, np.int64),
            "dtype": np.array(self.dtype.name),
            "next_id": np.array(self._next_id, np.int64),
            "ids": np.array(list(self._sequences), np.int64),
            "lengths": np.array([entry.length for entry in entries], np.int64),
            "page_table": np.concatenate([np.zeros(0, np.int64), *used]),
        }

    def _restore(self, fields: dict[str, Array]) -> None:
        """Take over what was saved; this cache is new."""
        check_saved(fields, self.page_size, self.num_pages)
        table, lengths = fields["page_table"], fields["lengths"].tolist()
        self._first_unused = int(table.max(initial=-1)) + 1
        if "pages" in fields:
            pages = fields["pages"]
            if len(pages) != self._first_unused:
                raise ValueError(f"the file is damaged: it holds {len(pages)} pages, but its tables name "
                                 f"{self._first_unused}")  # fmt: skip
            self._pages[: len(pages)] = pages
        ends = np.cumsum([self._pages_for(length) for length in lengths]).tolist()
        for sequence, length, end in zip(fields["ids"].tolist(), lengths, ends, strict=True):
            self._sequences[sequence] = Entry(length, table[end - self._pages_for(length) : end].copy())
        self._next_id = int(fields["next_id"])
        self._count_pages()
