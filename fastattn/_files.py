"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import IO

File = str | os.PathLike[str]


@contextlib.contextmanager
def whole_file(path: File) -> Iterator[IO[bytes]]:
    """Open a file to write, under a temporary name beside it until it is complete: there is never half of one.

    An OSError names the file that was asked for.
    """
    target = os.fspath(path)
    temporary = f"{target}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, target)
    except BaseException as failure:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(failure, OSError) and failure.filename == temporary:
            raise OSError(failure.errno, failure.strerror, target) from failure
        raise
