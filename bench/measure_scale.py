"""What it costs to attend in parts, on this machine: a ring's ranks one after the other, dask's chunks, and messages.

    python bench/measure_scale.py ranks                      # sum of ranks over one call, slowest over mean, merging
    python bench/measure_scale.py dask                       # chunks of keys over one call, on one thread
    mpirun -n 2 python bench/measure_scale.py messages       # a ring beside its computing and its messages alone
    bench/throttled.sh 1gbit                                 # the same over a link of that rate; needs root

Times are the least of several, taken in turn with what they are compared with: one call, which returns lse as parts do.
Each result is checked first.
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("FASTATTN_NUM_THREADS", "1")

import numpy as np
from model_scale import Machine, Work, message_bytes, simulate, tokens_that_hide

import fastattn
from fastattn import _ring
from fastattn._ranks import Arrays
from fastattn._shards import LAYOUTS, Shards

HEADS, HEAD_DIM, RANKS, REPEATS = 8, 64, 4, 5
DTYPES = ["float32", "bfloat16"]


def dtype_of(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def draw(seqlen: int, name: str) -> list[np.ndarray]:
    return [x.astype(dtype_of(name)) for x in np.random.default_rng(0).standard_normal((3, HEADS, seqlen, HEAD_DIM))]


def seconds_of(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def least(*functions: Callable[[], object]) -> list[float]:
    """Return the least seconds of each, taken in turn."""
    rounds = [[seconds_of(function) for function in functions] for _ in range(REPEATS)]
    return np.min(rounds, axis=0).tolist()


def check(result: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    error = float(np.abs(result.astype(np.float64) - expected.astype(np.float64)).max())
    if error > tolerance:
        raise SystemExit(f"the result differs by {error:.1e}, more than {tolerance:.1e}")


# --- a ring's ranks, one after the other ----------------------------------------------------------


class Ranks:
    """All ranks of a ring in one process: what each computes, without messages."""

    def __init__(self, arrays: list[np.ndarray], layout: str, causal: bool):
        shards = Shards(layout, RANKS, [0, arrays[0].shape[-2]])
        self.positions = [shards.positions(rank) for rank in range(RANKS)]
        self.parts = [[np.take(x, where, axis=-2) for x in arrays] for where in self.positions]
        given = [
            Arrays(dict(zip(("query", "key", "value"), part, strict=True)), layout, None, {"causal": causal})
            for part in self.parts
        ]
        self.rings = [_ring.Ring(each, rank, [x.describe() for x in given]) for rank, each in enumerate(given)]

    def rank(self, rank: int) -> np.ndarray:
        ring = self.rings[rank]
        ring.start()
        for step in range(RANKS):
            holder = (rank - step) % RANKS
            ring.attend(holder, *self.parts[holder][1:])
        return ring.finish()[0]

    def without_merging(self, rank: int) -> None:
        """What a rank computes, where results replace those before them in place of joining them."""
        original = _ring.partial_attention

        def replacing(*, add_to: tuple[np.ndarray, np.ndarray], **arguments: object) -> None:
            original(**arguments, out=add_to[0])

        _ring.partial_attention = replacing
        try:
            self.rank(rank)
        finally:
            _ring.partial_attention = original


def measure_ranks(seqlen: int, dtypes: list[str]) -> None:
    print(f"{RANKS} ranks of {seqlen // RANKS} tokens, {HEADS} heads of {HEAD_DIM}, one thread")
    print("| dtype | layout | mask | sum of ranks / one call | slowest / mean | merging |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in dtypes:
        arrays = draw(seqlen, name)
        for layout in LAYOUTS:
            for causal in (False, True):
                ranks = Ranks(arrays, layout, causal)
                expected = fastattn.attention(*arrays, causal=causal)
                for rank, where in enumerate(ranks.positions):
                    check(ranks.rank(rank), expected[:, where], 1e-5 if name == "float32" else 0.05)
                one, unmerged, *each = least(
                    lambda arrays=arrays, causal=causal: fastattn.attention(*arrays, causal=causal, return_lse=True),
                    lambda ranks=ranks: ranks.without_merging(RANKS - 1),
                    *(lambda ranks=ranks, rank=rank: ranks.rank(rank) for rank in range(RANKS)),
                )
                print(
                    f"| {name} | {layout} | {'causal' if causal else 'full'} | {sum(each) / one:.2f} | "
                    f"{max(each) / np.mean(each):.2f} | {1 - unmerged / each[-1]:.1%} |",
                    flush=True,
                )


# --- dask's chunks --------------------------------------------------------------------------------


def measure_dask(seqlen: int, dtypes: list[str]) -> None:
    import dask.array as da

    import fastattn.dask

    warnings.simplefilter("ignore", fastattn.dask.FewKeysWarning)
    print(f"{seqlen} tokens, {HEADS} heads of {HEAD_DIM}, one thread; queries in one chunk")
    print("| dtype | keys a chunk | over one call |")
    print("| --- | --- | --- |")
    for name in dtypes:
        arrays = draw(seqlen, name)
        for keys in (1024, 2048, 4096):
            chunks = [(HEADS, seqlen, HEAD_DIM), *[(HEADS, keys, HEAD_DIM)] * 2]
            lazy = [da.from_array(x, chunks=chunk) for x, chunk in zip(arrays, chunks, strict=True)]
            out = fastattn.dask.attention(*lazy)
            check(out.compute(), fastattn.attention(*arrays), 1e-5 if name == "float32" else 0.05)
            one, parts = least(
                lambda arrays=arrays: fastattn.attention(*arrays, return_lse=True),
                lambda out=out: out.compute(scheduler="threads", num_workers=1),
            )
            print(f"| {name} | {keys} | {parts / one:.2f} |", flush=True)


# --- messages -------------------------------------------------------------------------------------


def measure_messages(lengths: list[int]) -> None:
    from mpi4py import MPI

    import fastattn.mpi
    from fastattn._messages import transfer

    comm = MPI.COMM_WORLD
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size

    def slowest(function: Callable[[], object]) -> float:
        comm.Barrier()
        return comm.allreduce(seconds_of(function), op=MPI.MAX)

    def pass_on(arrays: list[np.ndarray]) -> None:
        with transfer(comm) as messages:
            for tag, x in enumerate(arrays):
                messages.receive(x.shape, x.dtype, source, tag)
            for tag, x in enumerate(arrays):
                messages.send(x, to, tag)

    if comm.rank == 0:
        print(f"{comm.size} ranks, {HEADS} heads of {HEAD_DIM}, float32, full; times in ms, of the slowest rank")
        print("| tokens a rank | computing | messages alone | ring | model | messages hidden | GB/s | hidden from |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for seqlen in lengths:
        query, key, value = draw(seqlen, "float32")
        calls = [
            lambda q=query, k=key, v=value: [fastattn.attention(q, k, v) for _ in range(comm.size)],
            lambda k=key, v=value: [pass_on([k, v]) for _ in range(comm.size - 1)],
            lambda q=query, k=key, v=value: fastattn.mpi.ring_attention(comm, q, k, v, layout="contiguous"),
        ]
        rounds = [[slowest(call) for call in calls] for _ in range(REPEATS + 1)]
        computing, alone, ring = np.min(rounds[1:], axis=0)
        work = Work(seqlen * comm.size, 1, HEADS, HEADS, HEAD_DIM, 4, causal=False)
        machine = Machine(
            work.flops_of_score * HEADS * seqlen**2 * comm.size / computing,
            message_bytes(work, comm.size) * (comm.size - 1) / alone,
            0.0,
        )
        model, _ = simulate("contiguous", work, comm.size, machine)
        hidden = (computing + alone - ring) / min(computing, alone)
        if comm.rank == 0:
            print(
                f"| {seqlen} | {1e3 * computing:.1f} | {1e3 * alone:.1f} | {1e3 * ring:.1f} | {1e3 * model:.1f} | "
                f"{hidden:.0%} | {machine.bandwidth / 1e9:.2f} | {tokens_that_hide(work, machine):.0f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="What it costs to attend in parts.")
    parser.add_argument("what", choices=["ranks", "dask", "messages"])
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 8192; of messages: 512 to 8192 a rank")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="default: both; messages: float32")
    given = parser.parse_args()
    if given.what == "messages":
        measure_messages(given.tokens or [512, 1024, 2048, 4096])
    else:
        for seqlen in given.tokens or [8192]:
            (measure_ranks if given.what == "ranks" else measure_dask)(seqlen, given.dtypes)


if __name__ == "__main__":
    main()
