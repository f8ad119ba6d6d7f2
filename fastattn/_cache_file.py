"""The file of a saved cache: read with distrust."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

import numpy as np

from fastattn._checks import Array
from fastattn._files import is_special
from fastattn._pages import DTYPES

if TYPE_CHECKING:
    from zipfile import ZipFile

File = str | os.PathLike[str] | IO[bytes]

FIELDS = ("geometry", "dtype", "next_id", "ids", "lengths", "page_table")


def archive_name(file: str | os.PathLike[str]) -> str:
    name = os.fsdecode(file)
    return name if name.endswith(".npz") or is_special(name) else f"{name}.npz"


def read_fields(file: File) -> dict[str, Array]:
    """Return what `KVCache.save` wrote."""
    if isinstance(file, (str, os.PathLike)):
        name = archive_name(file)
        with open(name if os.path.exists(name) else file, "rb") as stream:
            fields = read_archive(stream)
    elif hasattr(file, "read") and hasattr(file, "seek"):
        fields = read_archive(file)
    else:
        raise TypeError(f"file must be a str, a path or a binary file, not {type(file).__name__}")
    for name, shape in (("geometry", (5,)), ("next_id", ())):
        found = fields[name]
        if found.dtype != np.int64 or found.shape != shape or found.min() < 0:
            raise ValueError(f"the file is damaged: its {name} is {found}")
    if str(fields["dtype"]) not in DTYPES:
        raise ValueError(f"the file is damaged: its dtype is {fields['dtype']}")
    return fields


@contextlib.contextmanager
def damage_as_value_error(*honest: type[Exception]) -> Iterator[None]:
    """Make a ValueError of whatever is raised by reading a file that is damaged, but for what is honest.

    zipfile, NumPy and the parser of its headers raise nearly anything. What the system says of the file is an OSError;
    only to seek to a place that there cannot be is the file's fault.
    """
    try:
        yield
    except honest:
        raise
    except Exception as failure:
        if isinstance(failure, OSError) and failure.errno not in (None, errno.EINVAL):
            raise
        raise ValueError(f"the file is not a saved KVCache, or is damaged: {failure}") from failure


def read_archive(stream: IO[bytes]) -> dict[str, Array]:
    import zipfile  # here, because it takes longer to import than the rest of this package

    with damage_as_value_error(MemoryError):
        stream.seek(0, os.SEEK_END)
        size = stream.tell()
        with zipfile.ZipFile(stream) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            missing = [name for name in FIELDS if name not in names]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
            unknown = set(names) - {*FIELDS, "pages"}
            if unknown:
                raise ValueError(f"it has {', '.join(sorted(unknown))}, which save does not write")
            return {name: read_member(archive, f"{name}.npy", size) for name in names}


def read_member(archive: ZipFile, name: str, size: int) -> Array:
    """Return an array of an archive that has so many bytes."""
    with damage_as_value_error(), archive.open(name) as member:
        # Before memory is taken for it. A header never truly lacks memory, and can be such that its parser says so.
        version = np.lib.format.read_magic(member)
        if version != (1, 0) or archive.getinfo(name).compress_type:
            raise ValueError(f"{name} is not as save writes it")
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        if math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"{name} cannot have shape {shape}, in a file of {size} bytes")
    with archive.open(name) as member:
        array: Array = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):  # at the end, and not before, the checksum is looked at
            raise ValueError(f"{name} has more bytes than its shape {shape} says")
        return array


def check_saved(fields: dict[str, Array], page_size: int, num_pages: int) -> None:
    """Raise if the tables are not of one piece or point outside the store, which the kernel would follow."""
    ids, lengths, table = (fields[name] for name in ("ids", "lengths", "page_table"))
    if any(x.dtype != np.int64 or x.ndim != 1 for x in (ids, lengths, table)) or ids.size != lengths.size:
        raise ValueError("the file is damaged: ids, lengths and page_table do not fit each other")
    if lengths.min(initial=0) < 0 or sum((-(-lengths // page_size)).tolist()) != table.size:
        raise ValueError(f"the file is damaged: {table.size} pages of {page_size} do not hold the lengths {lengths}")
    if np.unique(ids).size != ids.size or ids.min(initial=0) < 0 or ids.max(initial=-1) >= fields["next_id"]:
        raise ValueError(f"the file is damaged: its ids are {ids}, and the next {fields['next_id']}")
    if table.min(initial=0) < 0:
        raise ValueError("the file is damaged: a page has a negative number")
    if table.max(initial=-1) >= num_pages:
        raise ValueError(f"the sequences lie in pages up to {table.max()}, but the cache has only {num_pages} pages")


def check_saved_pages(pages: Array, page_bytes: int) -> None:
    """Raise unless they are such pages: before memory is taken for as many as the file says."""
    if pages.dtype != np.uint8 or pages.ndim != 2 or pages.shape[1] != page_bytes:
        raise ValueError(f"the file is damaged: its pages are {pages.dtype} of shape {pages.shape}, and a page has "
                         f"{page_bytes} bytes")  # fmt: skip
