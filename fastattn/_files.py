"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import IO

File = str | os.PathLike[str]


@contextlib.contextmanager
def atomic_write(path: File) -> Iterator[IO[bytes]]:
    """Open a file to write, under a temporary name beside it until it is complete: there is never half of one.

    Links are followed, and what is there keeps its mode and, where the system permits, its owner. What is no regular
    file (a FIFO, a device, a descriptor of this process such as /dev/stdout) is written straight. An OSError names the
    file that was asked for.
    """
    asked = os.fsdecode(path)
    straight = own_descriptor(asked) is not None or not_regular(asked)
    try:
        with (written_straight if straight else written_beside)(asked) as file:
            yield file
    except OSError as failure:
        if failure.errno is None:
            raise
        raise OSError(failure.errno, failure.strerror, asked) from failure


def written_straight(path: str) -> IO[bytes]:
    descriptor = own_descriptor(path)
    # A descriptor has a place in its file, after which others go on.
    return open(path if descriptor is None else os.dup(descriptor), "wb")


@contextlib.contextmanager
def written_beside(path: str) -> Iterator[IO[bytes]]:
    target = os.path.realpath(path)
    # A name derived from the target's might be too long.
    temporary = os.path.join(os.path.dirname(target), f".{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            take_over(path, temporary)
            yield file
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def not_regular(path: str) -> bool:
    """Return whether there is something else than a regular file, to which links are followed."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:  # a link may lead nowhere yet
        return False


def own_descriptor(path: str) -> int | None:
    """Return the number of the descriptor of this process that a path such as /dev/stdout or /dev/fd/1 stands for."""
    for _ in range(40):  # links, as many as the system follows
        folder, name = os.path.split(path)
        # The second is macOS's; on Linux it is a link to the first.
        if name.isdecimal() and os.path.realpath(folder) in (f"/proc/{os.getpid()}/fd", "/dev/fd"):
            return int(name)
        if not os.path.islink(path):
            break
        path = os.path.join(folder, os.readlink(path))
    return None


def take_over(path: str, temporary: str) -> None:
    """Give a new file the mode and the owner of the one that it will replace, if there is one that may be written."""
    try:
        before = os.stat(path)
    except FileNotFoundError:
        return
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    with contextlib.suppress(OSError, AttributeError):
        os.chown(temporary, before.st_uid, before.st_gid)
    os.chmod(temporary, stat.S_IMODE(before.st_mode))


def is_special(path: str) -> bool:
    """Return whether a path stands for a FIFO, a device or an own descriptor: for neither a file nor a folder."""
    return own_descriptor(path) is not None or (not_regular(path) and not os.path.isdir(path))
