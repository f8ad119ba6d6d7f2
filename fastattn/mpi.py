"""Attention over sequences that are divided among MPI ranks.

Run by ``mpirun -n 2 python -m mpi4py program.py``; here one rank alone:

>>> import numpy as np
>>> from mpi4py import MPI
>>> import fastattn
>>> import fastattn.mpi
>>> comm = MPI.COMM_WORLD
>>> whole = np.random.default_rng(0).standard_normal((3, 8, 1000, 64), np.float32)
>>> query, key, value = (fastattn.mpi.shard(comm, x) for x in whole)  # this rank's tokens
>>> out = fastattn.mpi.ring_attention(comm, query, key, value, causal=True)
>>> bool(np.allclose(fastattn.mpi.unshard(comm, out), fastattn.attention(*whole, causal=True), atol=1e-6))
True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import Any, Never, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn._arguments import misfit
from fastattn._checks import Array, as_array, as_integer, checked_integer, gradient_dtype
from fastattn._keywords import CausalKeywords, names_of, takes
from fastattn._messages import Guard, RankError, agreed, check_communicator, exchange, or_abort, private
from fastattn._partials import rounded
from fastattn._ranks import Arrays, check_alike, checked_axis, checked_bounds, checked_layout, described, shards_of
from fastattn._ring import Ring, finished_gradients, go_round, go_round_with_gradients, own_gradient_of_sinks
from fastattn._shards import Shards
from fastattn._ulysses import Ulysses

__all__ = [
    "RankError",
    "positions",
    "ring_attention",
    "ring_attention_backward",
    "shard",
    "ulysses_attention",
    "ulysses_attention_backward",
    "unshard",
]


class RingKeywords(CausalKeywords, total=False):
    """Of attention over sequences that are divided among ranks."""

    query_offset: int | None
    mask: ArrayLike | None
    bias: ArrayLike | None


class UlyssesKeywords(CausalKeywords, total=False):
    """Of attention with all tokens of some heads on each rank."""

    query_offset: ArrayLike | None
    key_lengths: ArrayLike | None


RING, ULYSSES = names_of(RingKeywords), names_of(UlyssesKeywords)


def refuse_misfits(
    function: Callable[..., Any], others: Sized, scores: Mapping[str, object], accepted: frozenset[str]
) -> None:
    """Raise for what a function does not take; on all ranks, of which one alone may have been given it."""
    if len(others) or not scores.keys() <= accepted:
        raise misfit(function, others, scores)


def ring_scores(scores: RingKeywords) -> dict[str, Any]:
    """Return the keywords with one int as query_offset: that of the whole sequence."""
    offset = scores.get("query_offset")
    return {**scores, "query_offset": None if offset is None else as_integer("query_offset", offset)}


@takes(RingKeywords)
def ring_attention(
    comm: Any,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *others: Never,
    layout: str = "zigzag",
    cu_seqlens: ArrayLike | None = None,
    return_lse: bool = False,
    **scores: Unpack[RingKeywords],
) -> Any:
    """`fastattn.attention` of sequences that are divided among ranks: keys go round, and meet each rank's queries.

    Each rank calls it with its own tokens, and gets the results of its own queries. The next keys are on their way
    while the present ones are attended.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks. All of them call, with the same keywords.
    query, key, value : array_like, shape (..., H, S, D)
        This rank's tokens, as `shard` gives them; dtypes and strides as for `fastattn.attention`. (tokens, H, D) with
        `cu_seqlens`.
    query_offset : int, optional
        Position of the first query of the whole sequence. Default: the last query sees the last key.
    mask, bias : array_like, optional
        For this rank's queries and all keys, in the order of the whole sequence.
    **scores
        As for `fastattn.attention`. `alibi_slopes` not with striped tokens.
    layout : {"zigzag", "striped", "contiguous"}
        Which tokens of a sequence a rank holds of P: the chunks r and 2 P - 1 - r of 2 P; every P-th from r on; or a
        part of any length. With ``causal`` the first two give all ranks as much work.
    cu_seqlens : array_like of int, shape (B + 1,), optional
        Cumulative lengths of packed sequences, of queries and keys: the whole ones, each of which is divided.
    return_lse : bool
        Whether to return the log-sum-exp of each row's scores, too.

    Returns
    -------
    out : ndarray, shape (..., H, S, Dv)
        Of this rank's queries, in query's dtype; what a half type rounds is rounded once, after merging.
    lse : ndarray, shape (..., H, S)
        float64 for float64, else float32. Returned with ``return_lse``.

    Raises
    ------
    TypeError, ValueError
        As `fastattn.attention`, and for a sink of +inf; for parts that are not those of the layout, or differ where
        they must not.
    RankError
        If another rank failed: all ranks raise, and none waits.

    See Also
    --------
    ring_attention_backward : Its gradients.
    ulysses_attention : With all tokens of some heads on each rank.
    shard : The tokens of a rank.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> import fastattn.mpi
    >>> whole = np.random.default_rng(0).standard_normal((20, 4, 16), np.float32)  # two packed sequences
    >>> x = fastattn.mpi.shard(MPI.COMM_SELF, whole, axis=0, cu_seqlens=[0, 7, 20])
    >>> fastattn.mpi.ring_attention(MPI.COMM_SELF, x, x, x, cu_seqlens=[0, 7, 20], causal=True).shape
    (20, 4, 16)
    """
    comm = private(comm)
    arrays = {"query": query, "key": key, "value": value}

    def prepare() -> Arrays:
        refuse_misfits(ring_attention, others, scores, RING)
        return Arrays(arrays, layout, cu_seqlens, ring_scores(scores))

    own, descriptions = described(comm, prepare)
    ring = Ring(own, comm.rank, descriptions)
    guard = Guard(comm)
    with or_abort(comm):
        guard(ring.check)
        guard(ring.start)
        go_round(comm, ring, lambda *keys: guard(lambda: ring.attend(*keys)))
    results: list[Any] = []
    guard(lambda: results.extend(ring.finish()))
    guard.settle()
    return tuple(results) if return_lse else results[0]


@takes(RingKeywords)
def ring_attention_backward(
    comm: Any,
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *others: Never,
    layout: str = "zigzag",
    cu_seqlens: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    return_grad_sinks: bool = False,
    **scores: Unpack[RingKeywords],
) -> tuple[Array, ...]:
    """Gradients of `ring_attention`: keys go round once more, and with them the sums of their gradients.

    Parameters
    ----------
    comm, query, key, value, layout, cu_seqlens
        As they were for `ring_attention`.
    grad_out : array_like, shape (..., H, S, Dv)
        The gradient with respect to this rank's `out`, of a scalar that is a sum over all ranks; in query's dtype.
    out, lse : array_like
        What `ring_attention` returned with ``return_lse=True``; of a half type, `out` may be float32, not yet rounded.
    query_offset : int, optional
        Position of the first query of the whole sequence. Default: the last query sees the last key.
    mask, bias : array_like, optional
        For this rank's queries and all keys, in the order of the whole sequence.
    **scores
        As for `ring_attention`.
    grad_lse : array_like, shape (..., H, S), optional
        The gradient with respect to `lse`; default 0.
    return_grad_sinks : bool
        Whether to return the gradient of ``sinks``, too.

    Returns
    -------
    grad_query, grad_key, grad_value : ndarray
        Of this rank's tokens, of the shape and dtype of their arrays; summed in float32 (float64 for float64).
    grad_sinks : ndarray, shape (H,)
        Summed over all ranks. Returned with ``return_grad_sinks``.

    Raises
    ------
    TypeError, ValueError, RankError
        As `ring_attention`.

    See Also
    --------
    ring_attention : The forward pass.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> import fastattn.mpi
    >>> x = np.random.default_rng(0).standard_normal((8, 100, 64))
    >>> out, lse = fastattn.mpi.ring_attention(MPI.COMM_SELF, x, x, x, causal=True, return_lse=True)
    >>> [grad.shape for grad in fastattn.mpi.ring_attention_backward(MPI.COMM_SELF, x, x, x, x, out, lse, causal=True)]
    [(8, 100, 64), (8, 100, 64), (8, 100, 64)]
    """
    comm = private(comm)
    arrays = {"query": query, "key": key, "value": value, "grad_out": grad_out, "out": out, "lse": lse}

    def prepare() -> Arrays:
        refuse_misfits(ring_attention_backward, others, scores, RING)
        if return_grad_sinks and scores.get("sinks") is None:
            raise ValueError("return_grad_sinks is given without sinks")
        asked = {"return_grad_sinks": bool(return_grad_sinks)}
        return Arrays(arrays | {"grad_lse": grad_lse}, layout, cu_seqlens, ring_scores(scores), **asked)

    own, descriptions = described(comm, prepare)
    ring = Ring(own, comm.rank, descriptions)
    guard = Guard(comm)
    with or_abort(comm):
        guard(ring.check)
        guard(ring.start_backward)
        grads = go_round_with_gradients(comm, ring, guard)
    results: list[Array] = []
    guard(lambda: results.extend(finished_gradients(ring, grads)))
    if return_grad_sinks:
        guard(lambda: results.append(own_gradient_of_sinks(ring)))
    guard.settle()
    if return_grad_sinks:
        results[-1] = rounded(comm.allreduce(results[-1]), gradient_dtype(as_array("sinks", scores["sinks"])))
    return tuple(results)


@takes(UlyssesKeywords)
def ulysses_attention(
    comm: Any,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *others: Never,
    layout: str = "contiguous",
    cu_seqlens: ArrayLike | None = None,
    return_lse: bool = False,
    **scores: Unpack[UlyssesKeywords],
) -> Any:
    """`fastattn.attention` of sequences that are divided among ranks, each of which gets all tokens of some heads.

    Two exchanges between all ranks, and one call of `fastattn.attention` between them, where `ring_attention` has as
    many steps as ranks. Each rank has to have room for the whole sequence, of its heads.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks. All of them call, with the same keywords.
    query, key, value : array_like, shape (..., H, S, D)
        This rank's tokens, of all heads; H is a multiple of the ranks, and Hkv a multiple or a part of them. (tokens,
        H, D) with `cu_seqlens`.
    query_offset, key_lengths : int or array_like of int, optional
        As for `fastattn.attention`, of the whole sequence.
    **scores
        As for `fastattn.attention`.
    layout : {"contiguous", "striped", "zigzag"}
        As for `ring_attention`.
    cu_seqlens : array_like of int, shape (B + 1,), optional
        Cumulative lengths of packed sequences, of queries and keys: the whole ones, each of which is divided.
    return_lse : bool
        Whether to return the log-sum-exp of each row's scores, too.

    Returns
    -------
    out : ndarray, shape (..., H, S, Dv)
        Of this rank's tokens and all heads, in query's dtype.
    lse : ndarray, shape (..., H, S)
        Returned with ``return_lse``.

    Raises
    ------
    TypeError, ValueError, RankError
        As `ring_attention`, and ValueError for heads that the ranks cannot share.

    See Also
    --------
    ulysses_attention_backward : Its gradients.
    ring_attention : For any number of heads.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> import fastattn.mpi
    >>> x = np.random.default_rng(0).standard_normal((8, 100, 64))
    >>> fastattn.mpi.ulysses_attention(MPI.COMM_SELF, x, x, x, causal=True).shape
    (8, 100, 64)
    """
    comm = private(comm)
    arrays = {"query": query, "key": key, "value": value}

    def prepare() -> Arrays:
        refuse_misfits(ulysses_attention, others, scores, ULYSSES)
        return Arrays(arrays, layout, cu_seqlens, dict(scores))

    ulysses = Ulysses(comm, *described(comm, prepare))
    guard = Guard(comm)
    with or_abort(comm):
        out, lse = ulysses.attend(guard)
    guard.settle()
    return (out, lse) if return_lse else out


@takes(UlyssesKeywords)
def ulysses_attention_backward(
    comm: Any,
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *others: Never,
    layout: str = "contiguous",
    cu_seqlens: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    **scores: Unpack[UlyssesKeywords],
) -> tuple[Array, ...]:
    """Gradients of `ulysses_attention`.

    Parameters
    ----------
    comm, query, key, value, layout, cu_seqlens
        As they were for `ulysses_attention`.
    grad_out : array_like, shape (..., H, S, Dv)
        The gradient with respect to this rank's `out`, of a scalar that is a sum over all ranks; in query's dtype.
    out, lse : array_like
        What `ulysses_attention` returned with ``return_lse=True``; of a half type, `out` may be float32.
    query_offset, key_lengths : int or array_like of int, optional
        As for `fastattn.attention`, of the whole sequence.
    **scores
        As for `ulysses_attention`.
    grad_lse : array_like, shape (..., H, S), optional
        The gradient with respect to `lse`; default 0.

    Returns
    -------
    grad_query, grad_key, grad_value : ndarray
        Of this rank's tokens, of the shape and dtype of their arrays.

    Raises
    ------
    TypeError, ValueError, RankError
        As `ulysses_attention`.

    See Also
    --------
    ulysses_attention : The forward pass.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> import fastattn.mpi
    >>> x = np.random.default_rng(0).standard_normal((8, 100, 64))
    >>> out, lse = fastattn.mpi.ulysses_attention(MPI.COMM_SELF, x, x, x, return_lse=True)
    >>> [grad.shape for grad in fastattn.mpi.ulysses_attention_backward(MPI.COMM_SELF, x, x, x, x, out, lse)]
    [(8, 100, 64), (8, 100, 64), (8, 100, 64)]
    """
    comm = private(comm)
    arrays: dict[str, Any] = {"query": query, "key": key, "value": value, "grad_out": grad_out, "out": out, "lse": lse}
    arrays["grad_lse"] = grad_lse

    def prepare() -> Arrays:
        refuse_misfits(ulysses_attention_backward, others, scores, ULYSSES)
        return Arrays(arrays, layout, cu_seqlens, dict(scores))

    ulysses = Ulysses(comm, *described(comm, prepare))
    guard = Guard(comm)
    with or_abort(comm):
        grads = ulysses.differentiate(guard)
    guard.settle()
    return tuple(grads)


# --- what a rank holds ----------------------------------------------------------------------------


def positions(
    comm: Any, seqlen: int, *, layout: str = "zigzag", cu_seqlens: ArrayLike | None = None
) -> NDArray[np.int64]:
    """Return where the tokens of this rank lie among all tokens.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    seqlen : int
        Of the whole sequence, or of all packed ones together.
    layout : {"zigzag", "striped", "contiguous"}
        As for `ring_attention`; contiguous parts are of equal length, or the first have a token more.
    cu_seqlens : array_like of int, optional
        Cumulative lengths of packed sequences.

    Returns
    -------
    positions : ndarray of int64
        In the order in which `shard` has them.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it must be.

    See Also
    --------
    shard : The tokens themselves.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> import fastattn.mpi
    >>> fastattn.mpi.positions(MPI.COMM_SELF, 5).tolist()
    [0, 1, 2, 3, 4]
    """
    check_communicator(comm)
    seqlen, bounds = checked_integer("seqlen", seqlen, 0), checked_bounds(cu_seqlens)
    if bounds is not None and bounds[-1] != seqlen:
        raise ValueError(f"cu_seqlens ends with {bounds[-1]}, but there are {seqlen} tokens")
    return Shards(checked_layout(layout), comm.size, bounds or [0, seqlen]).positions(comm.rank)


def shard(
    comm: Any, x: ArrayLike, *, layout: str = "zigzag", axis: int = -2, cu_seqlens: ArrayLike | None = None
) -> Array:
    """Return this rank's tokens of an array that it has as a whole, in memory or as a memory-mapped file.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    x : array_like
        The same on all ranks. No messages are sent.
    layout : {"zigzag", "striped", "contiguous"}
        As for `ring_attention`; contiguous parts are of equal length, or the first have a token more.
    axis : int
        That of the tokens: -2 of query, key and value, 0 of packed ones.
    cu_seqlens : array_like of int, optional
        Cumulative lengths of packed sequences.

    Returns
    -------
    part : ndarray
        A copy.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it must be.

    See Also
    --------
    unshard : The whole, of the parts.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> import fastattn.mpi
    >>> fastattn.mpi.shard(MPI.COMM_SELF, np.ones((8, 100, 64))).shape
    (8, 100, 64)
    """
    array = np.asarray(x) if isinstance(x, np.memmap) else as_array("x", x)
    axis = checked_axis(axis, "x", array)
    where = positions(comm, array.shape[axis], layout=layout, cu_seqlens=cu_seqlens)
    return np.take(array, where, axis=axis)


def unshard(
    comm: Any, part: ArrayLike, *, layout: str = "zigzag", axis: int = -2, cu_seqlens: ArrayLike | None = None
) -> Array:
    """Return the whole array, on every rank, of the parts that all have.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    part : array_like
        This rank's tokens.
    layout : {"zigzag", "striped", "contiguous"}
        As for `ring_attention`.
    axis : int
        That of the tokens: -2 of out, -1 of lse, 0 of packed ones.
    cu_seqlens : array_like of int, optional
        Cumulative lengths of packed sequences.

    Returns
    -------
    x : ndarray

    Raises
    ------
    TypeError, ValueError, RankError
        If an argument is not what it must be, or parts are not those of the layout.

    See Also
    --------
    shard : A rank's tokens, of the whole.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> import fastattn.mpi
    >>> fastattn.mpi.unshard(MPI.COMM_SELF, np.ones((8, 100)), axis=-1).shape
    (8, 100)
    """
    comm = private(comm)

    def describe() -> dict[str, Any]:
        array = as_array("part", part)
        if array.dtype.hasobject:
            raise TypeError(f"part has dtype {array.dtype}, of objects, which are not sent")
        own_axis = checked_axis(axis, "part", array)
        shape = list(array.shape)
        length, shape[own_axis] = shape[own_axis], 0
        alike = {"layout": checked_layout(layout), "cu_seqlens": checked_bounds(cu_seqlens), "axis": own_axis}
        of_part = {"part's dtype": (array.dtype.name, array.dtype.isnative), "part's shape but for the tokens": shape}
        return alike | of_part | {"length": length}

    ranks = agreed(comm, describe)
    lengths = [each.pop("length") for each in ranks]
    check_alike(ranks)
    bounds = ranks[0]["cu_seqlens"]
    shards = shards_of("part", layout, bounds, lengths)
    array = np.ascontiguousarray(as_array("part", part))
    shapes = [(*array.shape[:axis], length, *array.shape[axis:][1:]) for length in lengths]
    with or_abort(comm):
        parts = exchange(comm, [array] * comm.size, shapes)
    whole = np.empty([*array.shape[:axis], sum(lengths), *array.shape[axis:][1:]], array.dtype)
    for rank, each in enumerate(parts):
        np.moveaxis(whole, axis, 0)[shards.positions(rank)] = np.moveaxis(each, axis, 0)
    return whole
