"""Messages between MPI ranks: arrays on their way while a rank computes, and failures that all ranks hear of."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

try:
    from mpi4py import MPI
except ImportError as _failure:
    raise ImportError("fastattn.mpi needs the package mpi4py, and an MPI: pip install 'fastattn[mpi]'") from _failure

from fastattn._checks import Array, first_line

Value = TypeVar("Value")

# How often a thread looks after messages, in seconds, and by how many calls: most MPIs move large ones in calls alone,
# and Open MPI looks at its sockets in every eighth.
INTERVAL, CALLS = 0.0005, 8

PRIVATE = MPI.Comm.Create_keyval()


class RankError(RuntimeError):
    """Another rank failed, so that there is no result here either."""


def check_communicator(comm: object) -> None:
    if not isinstance(comm, MPI.Intracomm):
        raise TypeError(f"comm must be an mpi4py.MPI.Intracomm, such as MPI.COMM_WORLD, not {comm!r}")


def private(comm: Any) -> Any:
    """Return a communicator of the same ranks, kept with it, whose messages meet no others."""
    check_communicator(comm)
    own = comm.Get_attr(PRIVATE)
    if own is None:
        own = comm.Dup()
        comm.Set_attr(PRIVATE, own)
    return own


class Transfer:
    """Messages that are on their way within a ``with`` block, and have arrived after it."""

    def __init__(self, comm: Any):
        self.comm = comm
        self.requests: list[Any] = []
        self.sent: list[Array] = []  # kept until they have arrived
        self.done = threading.Event()
        self.progress: threading.Thread | None = None

    def send(self, array: Array, to: int, tag: int = 0) -> None:
        array = np.ascontiguousarray(array)
        self.sent.append(array)
        if array.size:
            self.requests.append(self.comm.Isend([as_bytes(array), MPI.BYTE], to, tag))

    def receive(self, shape: Sequence[int], dtype: np.dtype[Any], source: int, tag: int = 0) -> Array:
        array: Array = np.empty(shape, dtype)
        if array.size:
            self.requests.append(self.comm.Irecv([as_bytes(array), MPI.BYTE], source, tag))
        return array

    def start(self) -> None:
        """See to the messages by a thread, where MPI may be called by more than one."""
        if self.requests and MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            self.progress = threading.Thread(target=self.look_after, daemon=True)
            self.progress.start()

    def look_after(self) -> None:
        with contextlib.suppress(MPI.Exception):  # which waiting for them meets, too
            while not any(MPI.Request.Testall(self.requests) for _ in range(CALLS)) and not self.done.wait(INTERVAL):
                pass

    def wait(self) -> None:
        self.done.set()
        if self.progress is not None:
            self.progress.join()
        MPI.Request.Waitall(self.requests)


@contextlib.contextmanager
def transfer(comm: Any) -> Iterator[Transfer]:
    """Wait at the end for what was sent and received within."""
    messages = Transfer(comm)
    yield messages
    messages.wait()


def as_bytes(array: Array) -> Array:
    """Return the bytes of a contiguous array: MPI does not know half types."""
    return array.reshape(-1).view(np.uint8)


def exchange(comm: Any, parts: Sequence[Array], shapes: Sequence[Sequence[int]]) -> list[Array]:
    """Send to each rank its part, and return what came from each, of these shapes."""
    with transfer(comm) as messages:
        received = [
            parts[rank] if rank == comm.rank else messages.receive(shape, parts[rank].dtype, rank)
            for rank, shape in enumerate(shapes)
        ]
        for rank, part in enumerate(parts):
            if rank != comm.rank:
                messages.send(part, rank)
    return received


def agreed(comm: Any, mine: Callable[[], Value]) -> list[Value]:
    """Return what a function returned on each rank; if it failed on one, raise on all."""
    value, failure = attempted(mine)
    gathered = comm.allgather((value, described(failure)))
    raise_any(failure, [text for _, text in gathered])
    return [each for each, _ in gathered]


def attempted(function: Callable[[], Value]) -> tuple[Value | None, BaseException | None]:
    try:
        return function(), None
    except BaseException as failure:  # KeyboardInterrupt, too: the others wait for this rank
        return None, failure


def described(failure: BaseException | None) -> str | None:
    return None if failure is None else f"{type(failure).__name__}: {first_line(failure)}"


def raise_any(failure: BaseException | None, texts: Sequence[str | None]) -> None:
    """Raise this rank's failure, or say of which rank there is one."""
    if failure is not None:
        raise failure
    for rank, text in enumerate(texts):
        if text is not None:
            raise RankError(f"rank {rank} failed: {text}")


class Guard:
    """Computes for a rank. Once it has failed it computes no more, but its messages go on: others wait for them."""

    def __init__(self, comm: Any):
        self.comm = comm
        self.failure: BaseException | None = None

    def __call__(self, compute: Callable[[], None]) -> None:
        if self.failure is None:
            _, self.failure = attempted(compute)

    def settle(self) -> None:
        """Raise on all ranks if one has failed."""
        raise_any(self.failure, self.comm.allgather(described(self.failure)))


@contextlib.contextmanager
def or_abort(comm: Any) -> Iterator[None]:
    """End the whole job where messages cannot go on: without them other ranks would wait forever."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        comm.Abort(1)
